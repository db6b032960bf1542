"""The ops as citizens of torch: compile, export, autocast, checkpointing; and what they refuse."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from trillama import kernels as k
from trillama.kernels.compat.flash_attn import flash_attn_with_kvcache

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def rope_arguments(B=2, S=5, grad=True):
    """q and k as views of a packed projection, tables of partial width."""
    q, key = (torch.randn(B, S, h, 16, requires_grad=grad).transpose(1, 2) for h in (4, 2))
    return q, key, torch.randn(40, 6), torch.randn(40, 6)


class Row(nn.Module):
    """Every differentiable row op in one function of the hidden states [B, S, 32]."""

    def __init__(self):
        super().__init__()
        self.norm = k.RMSNorm(32)
        self.packed = nn.Linear(32, 64)
        self.mlp = k.SwiGLU(32, 48)
        angle = torch.outer(torch.arange(64.0), 0.5 ** torch.arange(4))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x):
        y, total = k.add_rms_norm(x, 2 * x, self.norm.weight)
        q, key, gate = self.packed(self.norm(y)).split((16, 16, 32), -1)
        q, key = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, key))
        q, key = k.apply_rope(q, key, self.cos, self.sin)
        mixed = torch.cat((q.transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2)), -1)
        return self.mlp(k.swiglu(gate, mixed) + total) / 16


def run(function, module, x):
    """(value, gradients of the input and of every parameter)"""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    module.zero_grad()
    y.float().square().sum().backward()
    return [y.float(), x.grad, *(p.grad for p in module.parameters())]


def same(a, b, tolerance=1e-5):
    assert all(torch.allclose(s, t, rtol=tolerance, atol=tolerance) for s, t in zip(a, b))


def test_compiled_without_a_graph_break():
    module, x = Row(), torch.randn(2, 5, 32)
    same(run(torch.compile(module, fullgraph=True, backend="aot_eager"), module, x), run(module, module, x))


def test_compiled_by_inductor():
    module, x = Row(), torch.randn(2, 5, 32)
    same(run(torch.compile(module, fullgraph=True), module, x), run(module, module, x))


def test_one_graph_for_all_lengths():
    module = Row()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for B, S in ((2, 7), (3, 12), (5, 33), (4, 64)):
        x = torch.randn(B, S, 32)
        same(run(compiled, module, x), run(module, module, x))
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4


def test_a_decode_loop_is_compiled_once():
    """Positions and cache are arguments; one graph serves every step."""
    counter = CompileCounterWithBackend("aot_eager")
    cos, sin = torch.randn(64, 8), torch.randn(64, 8)

    @torch.compile(fullgraph=True, backend=counter)
    def step(q, key, v, k_cache, v_cache, positions):
        return k.rope_append_(q, key, v, cos, sin, k_cache, v_cache, positions)

    caches = torch.zeros(2, 2, 2, 64, 16)
    expected = caches.clone()
    for position in range(20):
        q, key, v = (torch.randn(2, h, 1, 16) for h in (4, 2, 2))
        positions = torch.tensor([position])
        y = step(q, key, v, caches[0], caches[1], positions)
        assert torch.equal(y, k.rope_append_(q, key, v, cos, sin, expected[0], expected[1], positions))
    assert counter.frame_count == 1
    assert torch.equal(caches, expected)


def test_exported_with_dynamic_axes():
    module, x = Row(), torch.randn(2, 5, 32)
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(module, (x,), dynamic_shapes=(axes,))
    assert {"trillama.add_rms_norm.default", "trillama.apply_rope.default", "trillama.swiglu.default"} <= {
        str(node.target) for node in program.graph.nodes
    }
    longer = torch.randn(3, 9, 32)
    assert torch.allclose(program.module()(longer), module(longer), atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(reentrant):
    module, x = Row(), torch.randn(2, 5, 32)
    again = run(lambda x: checkpoint(module, x, use_reentrant=reentrant), module, x)
    assert all(torch.equal(a, b) for a, b in zip(again, run(module, module, x)))


def test_autocast_mixes_dtypes_as_torch_does():
    module, x = Row(), torch.randn(2, 5, 32)
    exact = run(module, module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(module, module, x)
        half = torch.randn(2, 5, 32).bfloat16()
        assert k.rms_norm(half, module.norm.weight).dtype == torch.bfloat16
        assert k.add_rms_norm(half, x, None)[1].dtype == torch.float32
        assert k.swiglu(half, x).dtype == torch.float32
    assert all((a - b).norm() <= 0.05 * b.norm() for a, b in zip(y, exact))
    with pytest.raises(TypeError, match=r"add_rms_norm: residual is torch.float32, expected torch.bfloat16"):
        k.add_rms_norm(half, x, None)


def test_inference_mode_and_meta_tensors():
    module = Row()
    with torch.inference_mode():
        assert module(torch.randn(2, 5, 32)).shape == (2, 5, 32)
        q, key, cos, sin = rope_arguments(grad=False)
        k.rope_append_(q, key, key, cos, sin, torch.zeros(2, 2, 8, 16), torch.zeros(2, 2, 8, 16), torch.arange(5))
    y = module.to("meta")(torch.empty(2, 5, 32, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 5, 32)


CALLS = {
    "rms_norm": lambda x: k.rms_norm(x, None),
    "add_rms_norm": lambda x: k.add_rms_norm(x, x, None)[0],
    "swiglu": lambda x: k.swiglu(x, x),
    "apply_rope": lambda x: k.apply_rope(x, x, torch.ones(5, 4), torch.ones(5, 4))[0],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_function_transforms_are_refused(name, transform):
    x = torch.randn(3, 2, 4, 5, 8)
    function = torch.vmap(CALLS[name]) if transform == "vmap" else torch.func.grad(lambda x: CALLS[name](x[0]).sum())
    with pytest.raises(NotImplementedError, match=rf"{name} does not run under torch.func's {transform}: pass the batch as"):
        function(x)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name):
    x = leaf(2, 4, 5, 8)
    (gradient,) = torch.autograd.grad(CALLS[name](x).square().sum(), x, create_graph=True)
    if name == "apply_rope":  # linear
        (second,) = torch.autograd.grad(gradient.sum(), x)
        assert torch.allclose(second, 4 * torch.ones_like(x))  # ones for cos and sin: twice the length
        return
    with pytest.raises(NotImplementedError, match=r"norm has no second derivative|swiglu has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_versions_count_what_changes(name):
    x = leaf(2, 4, 5, 8)
    y = CALLS[name](x)
    made = y._version  # the reference may have filled it in steps
    y.sum().backward()
    assert x._version == 0
    assert y._version == made


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_written_cache_counts_a_version(backend):
    q, key, cos, sin = rope_arguments(grad=False)
    caches = torch.zeros(2, 2, 8, 16), torch.zeros(2, 2, 8, 16)
    with k.use_backend(backend):
        k.rope_append_(q, key, key, cos, sin, *caches, torch.arange(5))
    assert all(cache._version > 0 for cache in caches)


X, QKV = torch.ones(2, 64), torch.ones(1, 2, 3, 16)
TABLE, ONE, WEIGHT = torch.ones(8, 8), torch.ones(1, dtype=torch.int32), torch.ones(64)
REQUIRED = [
    (k.rms_norm, {"x": X, "weight": WEIGHT}, ["x"]),
    (k.add_rms_norm, {"x": X, "residual": X, "weight": WEIGHT}, ["x", "residual"]),
    (k.swiglu, {"gate": X, "up": X}, ["gate", "up"]),
    (k.decode_linear, {"x": X, "weight": X}, ["x", "weight"]),
    (k.apply_rope, {"q": QKV, "k": QKV, "cos": TABLE, "sin": TABLE}, ["q", "k", "cos", "sin"]),
    (
        k.rope_append_, {"q": QKV[:, :, :1], "k": QKV[:, :, :1], "v": QKV[:, :, :1], "cos": TABLE, "sin": TABLE, "k_cache": QKV,
        "v_cache": QKV, "positions": ONE}, ["q", "k", "v", "cos", "sin", "k_cache", "v_cache", "positions"],
    ),
    (k.flash_attention, {"q": QKV, "k": QKV, "v": QKV}, ["q", "k", "v"]),
    (
        k.decode_attention, {"q": QKV[:, :, :1], "k_cache": QKV, "v_cache": QKV, "lengths": ONE},
        ["q", "k_cache", "v_cache", "lengths"],
    ),
    (flash_attn_with_kvcache, {"q": QKV, "k_cache": QKV, "v_cache": QKV}, ["q", "k_cache", "v_cache"]),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("function", "given", "name"), [(f, given, name) for f, given, names in REQUIRED for name in names],
    ids=[f"{f.__name__}-{name}" for f, _, names in REQUIRED for name in names],
)  # fmt: skip
def test_what_is_missing_is_named(function, given, name, backend):
    with k.use_backend(backend), pytest.raises((TypeError, ValueError), match=rf"{function.__name__}: {name} is None"):
        function(**{**given, name: None})
