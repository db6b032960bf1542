"""On a CPU an op is no slower than what it replaces: bytes that pass through memory, counted, and the way to the first of them.

Times are in `pytest --benchmark`; here only the long test has any, alternating in one run.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trillama import kernels as k
from trillama.bench.cases import case, form
from trillama.bench.peers import eager
from trillama.kernels import reference, use_backend

pytestmark = pytest.mark.host


class Moved(TorchDispatchMode):
    """Counts bytes that torch's operations read and write (views do neither), and their names."""

    def __init__(self):
        super().__init__()
        self.bytes, self.names = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        known = {t.untyped_storage()._cdata for t in given}
        if function._schema.is_mutable or not all(t.untyped_storage()._cdata in known for t in made):
            self.names.append(function._schema.name)
            if "empty" not in function._schema.name:
                self.bytes += sum(t.nbytes for t in (*given, *made))
        return out


def moved(function):
    with Moved() as seen:
        function()
    return seen


def inputs(op):
    return case(op, "SmolLM2-135M", tokens=64, dtype="fp32").inputs()


def backward(op, function):
    """(its gradients as a function of no arguments, the gradient of each output)"""
    given = inputs(op)
    leaves = {name: given[name].detach().requires_grad_() for name in form(op).differentiable}
    outputs = function(**{**given, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(o) for o in outputs]
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), gradients, retain_graph=True)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "apply_rope", "swiglu"])
def test_no_more_bytes_than_what_it_replaces(op):
    given = inputs(op)
    ours, theirs = (moved(functools.partial(getattr(where, op), **given)) for where in (reference, eager))
    assert ours.bytes <= theirs.bytes, (ours.names, theirs.names)


@pytest.mark.parametrize("op", ["rms_norm", "apply_rope", "swiglu"])
def test_backward_moves_no_more_bytes_than_what_it_replaces(op):
    a, allowed = inputs(op), moved(backward(op, getattr(eager, op))).bytes
    if op == "rms_norm":
        dy = torch.randn_like(a["x"])
        ours = moved(lambda: reference.rms_norm_backward(dy, a["x"], a["weight"], None, 1e-6, 0.0, "llama", True))
    elif op == "apply_rope":
        ours = moved(lambda: reference.turn(*a.values(), None, False, True))
    else:
        dy = torch.randn(a["gate"].shape)
        silu = torch.nn.functional.silu(a["gate"])  # which both keep
        ours = moved(lambda: reference.swiglu_backward(dy, **a, silu=silu))
    assert ours.bytes <= allowed, ours.names


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9}, {"scale": -0.3}], ids=str)
def test_attention_is_sdpas_with_its_own_backward(options):
    """In float32 with gradients and without the same kernel, so the same bits."""
    q, key, v = (t[:, :, :40].contiguous() for t in inputs("flash_attention").values())
    leaves = [t.clone().requires_grad_() for t in (q, key, v)]
    with use_backend("reference"):
        out = k.flash_attention(*leaves, **options)
        assert torch.equal(out, k.flash_attention(q, key, v, **options))
    span = reference.span(options.get("causal", True), options.get("window"))
    scale = options.get("scale", 0.125)
    seen = moved(lambda: reference.attention(q, key, v, scale, *span, None, True))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen.names
    lse = reference.attention(q, key, v, scale, *span, None, True)[1]
    seen = moved(lambda: reference.attention_backward(out, None, q, key, v, out, lse, abs(scale), *span, None))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in seen.names


def test_heads_are_copied_for_a_kernel_that_does_not_share_them(monkeypatch):
    q, key, v = (torch.randn(2, h, 20, 16) for h in (4, 2, 2))
    dout, results = torch.randn(2, 4, 20, 16), []
    for grouped in (True, False) if reference._GROUPED else (False, False):
        monkeypatch.setattr(reference, "_GROUPED", grouped)
        out, lse = reference.attention(q, key, v, 0.25, None, 0, None, True)
        results.append((out, lse, *reference.attention_backward(dout, None, q, key, v, out, lse, 0.25, None, 0, None)))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "apply_rope", "swiglu", "flash_attention"])
def test_gradients_do_not_go_through_the_dispatcher(op):
    given = inputs(op)
    leaves = {name: given[name].detach().requires_grad_() for name in form(op).differentiable}
    with use_backend("reference"):
        out = getattr(k, op)(**{**given, **leaves})
    node = (out[0] if isinstance(out, tuple) else out).grad_fn
    assert isinstance(node, torch.autograd.function.BackwardCFunction)
    assert not type(node).__name__.startswith("GeneratedBackwardFor")
