"""Forward-mode AD: the reference's own operations have it, no kernel has, and nobody drops a tangent without a word."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from trillama import kernels as k
from trillama.kernels import dispatch, reference

pytestmark = [
    pytest.mark.host,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning"),  # torch's own rules are made so
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning"),
]

STARTS = torch.tensor([0, 4, 11], dtype=torch.int32)
LENGTHS = torch.tensor([9, 5], dtype=torch.int32)
TABLES = {"cos": (40, 6), "sin": (40, 6)}
CACHES = {"k_cache": (2, 2, 9, 16), "v_cache": (2, 2, 9, 16)}


def quantised(ops, x, scale, **options):
    whole = k.quantize(torch.ones(16, 32))
    return ops.decode_linear(x, k.QuantizedWeight(whole.data, scale), **options)


# name: (function(ops, **tensors), shapes of the tensors by name)
CALLS = {
    "rms_norm": (lambda ops, **t: ops.rms_norm(**t, offset=1.0), {"x": (3, 16), "weight": (16,)}),
    "add_rms_norm": (lambda ops, **t: ops.add_rms_norm(**t)[0], {"x": (3, 16), "residual": (3, 16), "weight": (16,)}),
    "swiglu": (lambda ops, **t: ops.swiglu(**t), {"gate": (3, 16), "up": (3, 16)}),
    "apply_rope": (
        lambda ops, **t: torch.cat(ops.apply_rope(**t), 1), {"q": (2, 4, 5, 16), "k": (2, 2, 5, 16), **TABLES}
    ),
    "rope_append_": (
        lambda ops, **t: ops.rope_append_(**t, positions=torch.arange(3, 8)),
        {"q": (2, 4, 5, 16), "k": (2, 2, 5, 16), "v": (2, 2, 5, 16), **TABLES, **CACHES},
    ),
    "flash_attention": (
        lambda ops, **t: ops.flash_attention(**t), {"q": (2, 4, 5, 16), "k": (2, 2, 9, 16), "v": (2, 2, 9, 16)}
    ),
    "flash_attention softcap": (
        lambda ops, **t: ops.flash_attention(**t, softcap=3.0), {"q": (2, 4, 5, 16), "k": (2, 2, 9, 16), "v": (2, 2, 9, 16)}
    ),
    "flash_attention_varlen": (
        lambda ops, **t: ops.flash_attention_varlen(**t, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, max_seqlen_q=7, max_seqlen_k=7),
        {"q": (11, 4, 16), "k": (11, 2, 16), "v": (11, 2, 16)},
    ),
    "decode_attention": (
        lambda ops, **t: ops.decode_attention(**t, lengths=LENGTHS), {"q": (2, 4, 2, 16), **CACHES}
    ),
    "decode_attention of one token": (
        lambda ops, **t: ops.decode_attention(**t, lengths=LENGTHS[:1].expand(2)), {"q": (2, 4, 1, 16), **CACHES}
    ),
    "decode_linear": (
        lambda ops, **t: ops.decode_linear(**t, activation="swiglu"),
        {"x": (2, 32), "weight": (16, 32), "norm": (32,), "bias": (16,), "residual": (2, 8)},
    ),
    "decode_linear rows": (lambda ops, **t: ops.decode_linear(**t), {"x": (9, 32), "weight": (16, 32)}),
    "decode_linear int8": (quantised, {"x": (2, 32), "scale": (16, 1), "bias": (16,)}),
    "embed_next_": (
        lambda ops, **t: k.embed_next_(torch.tensor([1, 5, 3]), **t, lengths=torch.zeros(3, dtype=torch.int32))[0],
        {"table": (9, 8)},
    ),
}  # fmt: skip
PLACES = [(name, argument) for name, (_, shapes) in CALLS.items() for argument in shapes]
REFUSAL = "has no forward-mode derivatives here: call trillama.kernels.reference or use a backward"


def tensors(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in CALLS[name][1].items()}


def call(name, given, ops=k):
    return CALLS[name][0](ops, **given)


@pytest.mark.few(44)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize(("name", "argument"), PLACES)
def test_kernels_refuse(name, argument, grad):
    if grad and ("embed" in name or "cache" in argument or argument in TABLES or name.startswith(("decode", "rope"))):
        pytest.skip("has no gradient")
    given = tensors(name)
    with k.use_backend("triton"):
        call(name, {n: t.clone() for n, t in given.items()})  # which may be remembered
        with forward_ad.dual_level():
            given[argument] = forward_ad.make_dual(given[argument].requires_grad_(grad), torch.ones_like(given[argument]))
            with pytest.raises(NotImplementedError, match=f"{name.split(' ')[0].removesuffix('_varlen')} {REFUSAL}"):
                call(name, given)


@pytest.mark.parametrize("direct", [False, True], ids=["op", "reference"])
@pytest.mark.parametrize(("name", "argument"), PLACES)
def test_the_reference_has_them(name, argument, direct):
    if "embed" in name and direct:
        pytest.skip("has no reference of its own")
    given = tensors(name, torch.float64)
    step = 0.5 if "int8" in name else 1e-6  # which is linear in all, and has float32 inside

    def moved(by):
        shifted = {n: t.clone() for n, t in given.items()}
        shifted[argument] += by
        return call(name, shifted, reference)

    with k.use_backend("reference"), forward_ad.dual_level():
        dual = {n: t.clone() for n, t in given.items()}
        dual[argument] = forward_ad.make_dual(dual[argument], torch.ones_like(dual[argument]))
        out = call(name, dual, reference if direct else k)
        tangent = forward_ad.unpack_dual(out).tangent
    above, below = moved(step), moved(-step)
    expected = (above - below) / (2 * step)
    allowed = 1e-7 * (1 + expected.abs())
    if "int8" in name:
        allowed = 8 * torch.finfo(torch.float32).eps * torch.cat((above, below)).abs().max()
    if tangent is None:
        assert name == "rope_append_"
        assert argument in ("v", *CACHES)
        assert not expected.any()
    else:
        assert ((tangent - expected).abs() <= allowed).all()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "apply_rope", "flash_attention", "flash_attention_varlen"])
def test_backwards_refuse(name, backend, create_graph):
    """What comes back along the graph may carry a tangent as well."""
    given = {n: t.requires_grad_(n not in TABLES) for n, t in tensors(name).items()}
    with k.use_backend(backend):
        out = call(name, given)
        with forward_ad.dual_level():
            gradient = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            with pytest.raises(NotImplementedError, match=r"no forward-mode derivatives here|You must implement the jvp"):
                torch.autograd.grad(out, [t for t in given.values() if t.requires_grad], gradient, create_graph=create_graph)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_ops_called_by_their_name_refuse(backend):
    x = torch.randn(3, 16)
    with k.use_backend(backend), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.clone())
        for op, arguments in (
            (torch.ops.trillama.rms_norm, (dual, None, 1e-6, 0.0, "llama")),
            (torch.ops.trillama.rms_norm, (x, dual[0], 1e-6, 0.0, "llama")),
            (torch.ops.trillama.swiglu, (x, dual)),
            (torch.ops.trillama.swiglu_backward, (x, x, dual)),
        ):
            with pytest.raises(NotImplementedError, match="no forward-mode derivatives here"):
                op(*arguments)


@pytest.mark.parametrize("mode", [torch.no_grad, contextlib.nullcontext])
def test_grad_mode_makes_no_difference(mode):
    """inference_mode does: within it torch itself follows no tangent."""
    x = torch.randn(3, 16)
    with k.use_backend("triton"), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.clone())
        with mode(), pytest.raises(NotImplementedError, match=f"swiglu {REFUSAL}"):
            k.swiglu(x, dual)


def test_jvp_is_refused_as_ever():
    x = torch.randn(3, 16)
    for backend in ("reference", "triton"):
        with k.use_backend(backend), pytest.raises(NotImplementedError, match=r"swiglu does not run under torch.func's"):
            torch.func.jvp(lambda x: k.swiglu(x, x), (x,), (x,))


@pytest.mark.parametrize("name", ["eps", "offset"])
def test_a_number_may_not_carry_a_tangent(name):
    x = torch.randn(3, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(ValueError, match=f"swiglu: {name} requires a gradient"):
            dispatch.number("swiglu", name, dual)
        with pytest.raises(ValueError, match=f"rms_norm: {name} requires a gradient"):
            k.rms_norm(x, None, **{name: dual})
