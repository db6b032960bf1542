"""flash_attention against the formula in float64: shapes, spans, layouts, rows that see nothing, determinism, errors."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.bench.proofs import attention as verify
from trillama.bench.proofs import formula, heads
from trillama.kernels import attention, flash_attention, reference, tuning, use_backend
from trillama.kernels.dispatch import INTERPRETED, observe


@pytest.mark.few(30)
@pytest.mark.parametrize("name", [n for n in trials("flash_attention") if "backward" not in n.values[0]])
def test_shapes(triton, poisoned, device, dtype, name):
    proofs.run("flash_attention", name, dtype, device)
    assert triton.names == ["_forward_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(("S", "T", "D"), [(257, 511, 128), (257, 1000, 64), (1000, 511, 64), (1000, 1000, 128)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 300}, {"softcap": 5.0, "window": 129}], ids=str)
def test_long_sequences(triton, poisoned, device, dtype, S, T, D, options):
    q, k, v = heads("packed", 1, 2, S, D, dtype), heads("packed", 1, 1, T, D, dtype), heads("packed", 1, 1, T, D, dtype)
    verify(device, dtype, q, k, v, **options)


@pytest.mark.parametrize("layout", ["transposed", "packed", "odd", "columns", "expanded"])
def test_views_are_read_in_place(triton, device, layout):
    q, k, v = (heads(layout, 2, 2, 9, 16, torch.float16).to(device) for _ in range(3))
    read = []

    def note(kernel, grid, arguments, options):
        read.extend(t.data_ptr() for t in arguments[:3])
        return True

    with observe(note):
        flash_attention(q, k, v)
    assert read == [t.data_ptr() for t in (q, k, v)]


def test_the_output_is_laid_out_for_the_next_projection(triton, device):
    q, k, v = (heads("contiguous", 2, 3, 10, 16, torch.float16).to(device) for _ in range(3))
    out = flash_attention(q, k, v)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    out, lse = flash_attention(q, k, v, return_lse=True)
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 3, 10)


@pytest.mark.parametrize(
    ("B", "Hq", "Hk", "S", "T", "launched"),
    [(0, 4, 2, 20, 20, 0), (2, 4, 2, 0, 20, 0), (2, 4, 2, 20, 0, 1), (1, 2, 1, 0, 0, 0), (2, 0, 2, 5, 5, 0)],
)
def test_empty(triton, poisoned, device, B, Hq, Hk, S, T, launched):
    q, k, v = (heads("contiguous", B, h, n, 32, torch.float16).to(device) for h, n in ((Hq, S), (Hk, T), (Hk, T)))
    out, lse = flash_attention(q, k, v, return_lse=True)
    assert out.shape == (B, Hq, S, 32)
    assert not out.any()
    assert (lse == -math.inf).all()
    assert len(triton.names) == launched


def test_rows_that_see_nothing(triton, poisoned, device, dtype):
    q, k, v = (heads("transposed", 1, 2, n, 64, dtype) for n in (150, 40, 40))
    out, lse = verify(device, dtype, q, k, v)
    assert not out[:, :, :110].any()
    assert (lse[:, :, :110] == -math.inf).all()
    assert lse[:, :, 110:].isfinite().all()


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_scores_far_from_zero(triton, device, shift):
    """A finite mask value would win over scores of -30,000, and exp(30,000) overflows."""
    q, k, v = (heads("transposed", 1, 1, 70, 16, torch.float32) for _ in range(3))
    q[..., 0], k[..., 0] = abs(shift) ** 0.5, math.copysign(abs(shift) ** 0.5, shift)
    out, lse = flash_attention(*(t.to(device) for t in (q, k, v)), scale=1.0, return_lse=True)
    exact, exact_lse = formula(*(t.double() for t in (q, k, v)), scale=1.0)
    oracle.check(out, exact, fp32=16**0.5 * oracle.conditioning(lambda *t: formula(*t, scale=1.0)[0], q, k, v))
    oracle.check(lse, exact_lse)


@pytest.mark.few(3)
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("growth", [0.0, 1.0, 10.0, 100.0, -100.0])
def test_scores_that_outgrow_their_maximum(triton, poisoned, device, dtype, growth, monkeypatch):
    """Scores that rise along the keys, a little or past what exp can hold, from one tile to the next and within one."""
    choose = tuning.attention
    monkeypatch.setattr(tuning, "attention", lambda *a: dataclasses.replace(choose(*a), block_n=16))
    q, k, v = (heads("transposed", 1, 1, 200, 64, torch.float32) for _ in range(3))
    q[..., 0], k[..., 0] = 4.0, growth * torch.linspace(-2, 2, 200)

    def hold(**options):
        # An exponent has the rounding of its score: 64 sums in an order that each processor chooses, whose errors add up at random.
        fp32 = max(1e-6, 64**0.5 * oracle.conditioning(lambda *t: formula(*t, **options)[0], q, k, v))
        verify(device, dtype, *(t.to(dtype) for t in (q, k, v)), fp32=fp32, **options)

    hold(causal=False)
    hold(causal=False, softcap=20.0)
    hold(window=50)
    k[..., 0] = k[..., 0].flip(-1)
    hold()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_what_a_query_does_not_see_may_be_anything(triton, device, dtype):
    q, k, v = (heads("transposed", 1, 1, 300, 64, dtype) for _ in range(3))
    ours = flash_attention(*(t.to(device) for t in (q, k, v))).cpu()
    k[:, :, 256:], v[:, :, 256:] = math.nan, math.nan
    changed = flash_attention(*(t.to(device) for t in (q, k, v))).cpu()
    assert torch.equal(ours[:, :, :128], changed[:, :, :128])


def test_same_bits_alone_and_in_company(triton, device, dtype):
    q, k, v = (heads("transposed", 2, h, 70, 32, dtype).to(device) for h in (4, 2, 2))
    out = flash_attention(q, k, v)
    assert torch.equal(out, flash_attention(q, k, v))
    assert torch.equal(out[1:2], flash_attention(q[1:2], k[1:2], v[1:2]))
    assert torch.equal(out[:, 2:], flash_attention(q[:, 2:], k[:, 1:], v[:, 1:]))


def test_lengths_do_not_recompile(triton, device):
    if INTERPRETED:
        pytest.skip("nothing is compiled in the interpreter")
    kernel = attention._forward_kernel

    def compiled():
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    def ask(B, S, T):
        flash_attention(*(torch.randn(B, n, 2, 64, dtype=torch.float16, device=device).transpose(1, 2) for n in (S, T, T)))

    with observe(lambda kernel, grid, arguments, options: False):
        ask(1, 16, 16)
        before = compiled()
        for B, S, T in [(1, 1, 1), (1, 1, 17), (1, 17, 17), (1, 3, 64), (2, 16, 33), (3, 1, 1)]:
            ask(B, S, T)
    assert compiled() == before


def test_an_allocator_of_the_users_stays_in_force(triton, device):
    from trillama.kernels.dispatch import scratch
    from triton.runtime._allocation import NullAllocator, _allocator

    x = torch.zeros(1, device=device)
    assert isinstance(_allocator.get(), NullAllocator)
    with scratch(x):
        assert _allocator.get()(128, 16, None).nbytes == 128
    assert isinstance(_allocator.get(), NullAllocator)
    theirs = lambda size, alignment, stream: None  # noqa: E731
    token = _allocator.set(theirs)
    with scratch(x):
        assert _allocator.get() is theirs
    _allocator.reset(token)


@pytest.mark.slow
def test_offsets_beyond_31_bits(triton, device):
    """Keys whose rows lie 64 MiB apart: the last begins behind the first 2^31 elements. Only their pages are ever touched."""
    T, D, stride = 70, 16, 2**25
    memory = torch.empty(T * stride, dtype=torch.float16, device=device)
    k = memory.as_strided((1, 1, T, D), (0, 0, stride, 1)).copy_(torch.randn(1, 1, T, D))
    q, v = torch.randn(1, 1, 5, D, dtype=torch.float16), torch.randn(1, 1, T, D, dtype=torch.float16)
    out = flash_attention(q.to(device), k, v.to(device))
    close = k.cpu().clone()
    oracle.check(out, formula(*(t.double() for t in (q, close, v)))[0], reference.flash_attention(q, close, v))


@pytest.mark.host
def test_compiles_without_a_break_and_for_any_length():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for S in (5, 8, 13):
        q, k, v = (torch.randn(1, S, h, 16).transpose(1, 2) for h in (4, 2, 2))
        assert torch.equal(compiled(q, k, v, window=4), flash_attention(q, k, v, window=4))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"flash_attention: q has shape \(2, 3, 4\), expected \[B, H, S, D\]"),
        ({"q": torch.zeros(1, 3, 5, 8)}, "flash_attention: q has 3 heads, expected a multiple of k's 2"),
        ({"k": torch.zeros(1, 2, 5, 16)}, "flash_attention: k has head size 16, expected 8 as q"),
        ({"v": torch.zeros(1, 2, 6, 8)}, r"flash_attention: v has shape \(1, 2, 6, 8\), expected \(1, 2, 5, 8\) as k"),
        ({"q": torch.zeros(2, 4, 5, 8)}, "flash_attention: k has shape .*, expected batch size 2 as q"),
        ({"k": torch.zeros(1, 2, 5, 8).half()}, "flash_attention: k is torch.float16, expected torch.float32 as q"),
        ({"k": torch.zeros(1, 2, 5, 8, device="meta")}, "flash_attention: k is on meta, expected cpu as q"),
        ({"q": torch.zeros(1, 4, 5, 8).int()}, "flash_attention: q is torch.int32, expected a floating-point dtype"),
        ({"q": None}, "flash_attention: q is NoneType, expected a tensor"),
        ({"window": 0}, "flash_attention: window is 0, expected a positive integer or None"),
        ({"softcap": -1.0}, "flash_attention: softcap is -1.0, expected a positive number or None"),
        ({k: torch.zeros(1, 2, 5, 257) for k in "qkv"}, "flash_attention: q has head size 257, expected 1 to 256"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"q": torch.zeros(1, 4, 5, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8), **change}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        flash_attention(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("S", "T"), [(3, 1), (5, 2), (9, 8)])
def test_queries_in_front_of_the_first_key(device, dtype, S, T, backend):
    """The last query meets the last key, so the first S - T see none: 0, and a gradient of 0."""
    q, k, v = (torch.randn(1, 1, n, 16, dtype=dtype, device=device, requires_grad=True) for n in (S, T, T))
    with use_backend(backend):
        out, lse = flash_attention(q, k, torch.ones_like(v), return_lse=True)
        assert torch.equal(flash_attention(q.detach(), k.detach(), torch.ones_like(v)), out)
    expected = (torch.arange(S) >= S - T).to(dtype)
    assert torch.allclose(out[0, 0].cpu(), expected[:, None].expand(S, 16), atol=1e-3)
    assert torch.equal(lse[0, 0].cpu() > -math.inf, expected.bool())
    (dq,) = torch.autograd.grad(out.sum() + lse[..., S - T :].sum(), q)
    assert not dq[:, :, : S - T].any()
    assert dq.isfinite().all()


@pytest.mark.few(12)
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"causal": False}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize(("S", "T"), [(12, 12), (5, 12), (1, 12), (12, 5)])
def test_scales_of_any_sign(device, dtype, S, T, options, backend):
    q, k, v = (torch.randn(2, h, n, 32, device=device).to(dtype) for h, n in ((4, S), (2, T), (2, T)))
    with use_backend(backend):
        assert torch.equal(flash_attention(q, k, v, scale=-0.3, **options), flash_attention(-q, k, v, scale=0.3, **options))
        mean = flash_attention(q, k, v, scale=0, **options)
    exact = formula(*(t.double().cpu() for t in (torch.zeros_like(q), k, v)), **options)[0]
    oracle.check(mean, exact, exact.to(dtype))


@pytest.mark.host
def test_a_number_is_a_number():
    """Of Python, of numpy or a tensor of one element; with and without gradients the same."""
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    want = flash_attention(q, k, v, window=3, scale=0.5, softcap=2.0)
    for make in (np.float32, np.float64, torch.tensor):
        for grad in (False, True):
            q.requires_grad_(grad)
            window = torch.tensor(3) if make is torch.tensor else np.int64(3)
            assert torch.equal(flash_attention(q, k, v, window=window, scale=make(0.5), softcap=make(2.0)), want)


@pytest.mark.host
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", torch.tensor(0.5, requires_grad=True), "scale requires a gradient, which this op does not give"),
        ("softcap", torch.tensor(0.5, requires_grad=True), "softcap requires a gradient, which this op does not give"),
        ("scale", torch.ones(2), r"scale is a torch.float32 tensor of shape \(2,\), expected a number"),
        ("scale", "1", "scale is '1', expected a number"),
        ("scale", math.nan, "scale is nan, expected a finite number"),
        ("scale", -math.inf, "scale is -inf, expected a finite number"),
        ("softcap", math.nan, "softcap is nan, expected a finite number"),
        ("window", torch.tensor(1.5), r"window is a torch.float32 tensor of shape \(\), expected a positive integer or None"),
        ("window", 2.0, "window is 2.0, expected a positive integer or None"),
    ],
)
def test_numbers_that_are_none(name, value, message):
    q = torch.randn(1, 2, 9, 16)
    with pytest.raises((ValueError, TypeError), match=f"flash_attention: {message}"):
        flash_attention(q, q, q, **{name: value})


@pytest.mark.host
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9's switches")
def test_the_new_switches_of_tf32():
    """In a process of its own: torch does not forget which of its two ways was used."""
    script = """
import torch
from trillama.kernels import attention
assert not attention._allow_tf32()
torch.backends.cuda.matmul.allow_tf32 = True
assert attention._allow_tf32()
torch.backends.cuda.matmul.allow_tf32 = False
assert not attention._allow_tf32()
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert attention._allow_tf32()
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert not attention._allow_tf32()
torch.backends.cuda.matmul.fp32_precision = "none"
torch.backends.fp32_precision = "tf32"
assert attention._allow_tf32()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
