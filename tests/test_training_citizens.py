"""What training and serving code does with tensors and graphs beside a plain backward, and batches of nothing."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from trillama import kernels as k

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]

COS, SIN = torch.randn(40, 6), torch.randn(40, 6)
STARTS = torch.tensor([0, 4, 11], dtype=torch.int32)

# name: (function, shapes of its tensors); every one of them is differentiable
CALLS = {
    "rms_norm": (k.rms_norm, ((3, 16), (16,))),
    "add_rms_norm": (k.add_rms_norm, ((3, 16), (3, 16), (16,))),
    "swiglu": (k.swiglu, ((3, 16), (3, 16))),
    "apply_rope": (lambda q, key: k.apply_rope(q, key, COS, SIN), ((2, 4, 5, 16), (2, 2, 5, 16))),
    "flash_attention": (k.flash_attention, ((2, 4, 5, 16), (2, 2, 9, 16), (2, 2, 9, 16))),
    "flash_attention_varlen": (
        lambda *t: k.flash_attention_varlen(*t, STARTS, STARTS, 7, 7), ((11, 4, 16), (11, 2, 16), (11, 2, 16))
    ),
}  # fmt: skip
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def made(name, grad=True):
    return [torch.randn(shape).requires_grad_(grad) for shape in CALLS[name][1]]


def total(outputs):
    return sum(o.square().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.few(4)
@BACKENDS
@pytest.mark.parametrize("name", CALLS)
def test_backwards_of_one_graph(name, backend):
    """Twice with the graph kept, a third time without, a fourth is torch's error; of every argument alone, the others frozen."""
    with k.use_backend(backend):
        leaves = made(name)
        loss = total(CALLS[name][0](*leaves))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        for keep in (True, False):
            again = torch.autograd.grad(loss, leaves, retain_graph=keep)
            assert all(torch.equal(a, b) for a, b in zip(first, again))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaves)
        for place, leaf in enumerate(leaves):
            given = [t if t is leaf else t.detach() for t in leaves]
            alone = total(CALLS[name][0](*given))
            for keep in (True, False):
                (gradient,) = torch.autograd.grad(alone, leaf, retain_graph=keep)
                assert torch.equal(gradient, first[place])
            assert all(t.grad is None for t in given)


@BACKENDS
@pytest.mark.parametrize("name", CALLS)
def test_no_second_derivative_is_made_up(name, backend):
    with k.use_backend(backend):
        leaves = made(name)
        gradients = torch.autograd.grad(total(CALLS[name][0](*leaves)), leaves, create_graph=True)
        if name == "apply_rope":  # linear, so that its own gradient is an apply_rope
            assert all(g is not None for g in torch.autograd.grad(total(gradients), leaves))
            return
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            total(gradients).backward()


@pytest.mark.few(6)
@BACKENDS
@pytest.mark.parametrize("name", CALLS)
def test_hooks(name, backend):
    """On tensors, on what accumulates their gradients and on the node of the op: each is called, and what it returns counts."""
    called = []
    with k.use_backend(backend):
        expected = made(name)
        total(CALLS[name][0](*expected)).backward()
        leaves = [t.detach().clone().requires_grad_() for t in expected]
        accumulators = [t.view_as(t).grad_fn.next_functions[0][0] for t in leaves]  # live as long as somebody holds them
        for t, accumulator in zip(leaves, accumulators):
            t.register_hook(lambda g: called.append("tensor") or 2 * g)
            t.register_post_accumulate_grad_hook(lambda t: called.append("accumulated"))
            accumulator.register_prehook(lambda g: called.append("accumulating"))
        outputs = CALLS[name][0](*leaves)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first.register_hook(lambda g: called.append("output"))
        first.grad_fn.register_hook(lambda *_: called.append("node"))
        total(outputs).backward()
    assert all(torch.equal(t.grad, 2 * e.grad) for t, e in zip(leaves, expected))
    n = len(leaves)
    assert sorted(called) == sorted([*["tensor", "accumulated", "accumulating"] * n, "output", "node"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = k.RMSNorm(16), k.SwiGLU(16, 24)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


@BACKENDS
def test_functional_call_and_module_hooks(backend):
    block, other, called = Block(), Block(), []
    nn.init.normal_(other.norm.weight)
    x = torch.randn(3, 16)
    block.norm.register_full_backward_hook(lambda module, gi, go: called.append(tuple(g.shape for g in (*gi, *go))))
    with k.use_backend(backend):
        weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
        x.requires_grad_()
        total(functional_call(block, weights, (x,))).backward()
        total(other(x.detach())).backward()
    assert called == [((3, 16), (3, 16))]
    assert all(torch.allclose(weights[name].grad, p.grad, atol=1e-6) for name, p in other.named_parameters())
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.few(4)
@BACKENDS
@pytest.mark.parametrize("name", CALLS)
def test_inference_tensors(name, backend):
    """As inputs within and outside of inference mode; who wants a gradient through one gets torch's own refusal."""
    function, _ = CALLS[name]
    with k.use_backend(backend):
        plain = made(name, grad=False)
        expected = total(function(*plain))
        with torch.inference_mode():
            given = [t.clone() for t in plain]
            assert torch.allclose(total(function(*given)), expected)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                result = function(*given)
                assert torch.allclose(total(result), expected)
        assert torch.allclose(total(function(*plain)), expected)
        mixed = [plain[0].requires_grad_(), *given[1:]]
        if name == "apply_rope":  # saves the tables alone
            total(function(*mixed)).backward()
            return
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            total(function(*mixed)).backward()


def decoded(q):
    caches = torch.zeros(2, q.shape[0], 2, 12, 16)
    key = torch.zeros(q.shape[0], 2, q.shape[2], 16)
    q = k.rope_append_(q, key, key, COS, SIN, *caches, torch.arange(q.shape[2]))
    return k.decode_attention(q, *caches, torch.full((q.shape[0],), q.shape[2], dtype=torch.int32))


QUANTISED = {bits: k.quantize(torch.randn(24, 32), bits) for bits in (8, 4)}
DENSE = torch.randn(24, 32)
NONE = torch.zeros(3, dtype=torch.int32)  # of two sequences, both without tokens

# name: (function, shapes, whether it has gradients): a batch, a sequence or heads of nothing
EMPTY = {
    "rms_norm": (k.rms_norm, ((0, 16), (16,)), True),
    "rms_norm middle": (k.rms_norm, ((4, 0, 2, 16), (16,)), True),
    "add_rms_norm": (k.add_rms_norm, ((2, 0, 16), (2, 0, 16), (16,)), True),
    "swiglu": (k.swiglu, ((0, 16), (0, 16)), True),
    "apply_rope": (lambda q, key: k.apply_rope(q, key, COS, SIN), ((0, 4, 5, 16), (0, 2, 5, 16)), True),
    "apply_rope no tokens": (lambda q, key: k.apply_rope(q, key, COS, SIN), ((2, 4, 0, 16), (2, 2, 0, 16)), True),
    "apply_rope no heads": (lambda q, key: k.apply_rope(q, key, COS, SIN), ((2, 0, 5, 16), (2, 0, 5, 16)), True),
    "flash_attention": (k.flash_attention, ((0, 4, 5, 16), (0, 2, 9, 16), (0, 2, 9, 16)), True),
    "flash_attention no queries": (k.flash_attention, ((2, 4, 0, 16), (2, 2, 9, 16), (2, 2, 9, 16)), True),
    "flash_attention no keys": (k.flash_attention, ((2, 4, 5, 16), (2, 2, 0, 16), (2, 2, 0, 16)), True),
    "flash_attention_varlen": (
        lambda *t: k.flash_attention_varlen(*t, NONE, NONE, 0, 0), ((0, 4, 16), (0, 2, 16), (0, 2, 16)), True
    ),
    "rope_append_ and decode_attention": (decoded, ((0, 4, 3, 16),), False),
    "decode_linear": (lambda x: k.decode_linear(x, DENSE), ((0, 32),), False),
    "decode_linear swiglu": (lambda x: k.decode_linear(x, DENSE, norm=DENSE[0], activation="swiglu"), ((2, 0, 32),), False),
    "decode_linear int8": (lambda x: k.decode_linear(x, QUANTISED[8]), ((0, 32),), False),
    "decode_linear int4": (lambda x: k.decode_linear(x, QUANTISED[4]), ((0, 32),), False),
    "embed_next_": (lambda table: k.embed_next_(NONE[:0].long(), table, NONE[:0].clone())[0], ((9, 8),), False),
}  # fmt: skip


@pytest.mark.few(34)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@BACKENDS
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_in_nothing_out(name, backend, compiled):
    function, shapes, differentiable = EMPTY[name]
    leaves = [torch.randn(shape).requires_grad_(differentiable) for shape in shapes]
    with k.use_backend(backend):
        run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        for _ in range(2):
            outputs = run(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            assert all(not o.any() and o.isfinite().all() for o in outputs)
            assert not differentiable or outputs[0].shape[:-1] == leaves[0].shape[:-1]
            if differentiable:
                gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
                assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients, leaves))
