"""flash-attention's calls: its published semantics (layouts, bottom-right causality, window pairs, softcap, lse, packed sequences,
cache append with rotary) against the formulas in float64."""

import numpy as np
import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import use_backend
from trillama.kernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

WINDOWS = [(-1, -1), (3, -1), (-1, 2), (2, 4), (0, 0)]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def exact(q, k, v, causal, window, lengths=None, **options):
    """(out [B, S, H, D], lse) in float64; the arguments in flash-attn's layout."""
    left, right = (None if w < 0 else w for w in window)
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    out, lse = oracle.attention(q, k, v, left=left, right=0 if causal else right, lengths=lengths, **options)
    return out.transpose(1, 2), lse


def plain(q, k, v, causal, window, **options):
    """What plain PyTorch gives in the inputs' dtype: scores and weights are rounded to it."""
    S, T, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q * q.shape[-1] ** -0.5, k).float()
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    distance = torch.arange(T) - torch.arange(T - S, T)[:, None]
    left, right = (T + S if w < 0 else w for w in window)
    seen = (distance >= -left) & (distance <= (0 if causal else right))
    weights = torch.where(seen, scores, -torch.inf).softmax(-1).nan_to_num(0.0).to(q.dtype)
    return torch.einsum("bhst,bthd->bshd", weights, v)


@pytest.mark.few(20)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("S", "T"), [(7, 7), (3, 9), (9, 4)])
def test_func(triton, device, dtype, causal, window, S, T):
    q, k, v = randn(2, S, 4, 32, dtype=dtype), randn(2, T, 2, 32, dtype=dtype), randn(2, T, 2, 32, dtype=dtype)
    out, lse, third = flash_attn_func(*(t.to(device) for t in (q, k, v)), causal=causal, window_size=window, return_attn_probs=True)
    want, lse64 = exact(q, k, v, causal, window)
    oracle.check(out, want, plain(q, k, v, causal, window), fp32=1e-5)
    assert oracle.error(lse, lse64) < 1e-3
    assert third is None
    assert out.is_contiguous()
    assert triton.names == ["_forward_kernel"]


def test_defaults_are_flash_attentions(triton, device):
    """Not causal, no window, scale 1 / sqrt(D)."""
    q, k, v = (randn(1, 5, 2, 16) for _ in range(3))
    out = flash_attn_func(*(t.to(device) for t in (q, k, v)))
    oracle.check(out.cpu(), exact(q, k, v, False, (-1, -1))[0], fp32=1e-5)
    scaled = flash_attn_func(*(t.to(device) for t in (q, k, v)), softmax_scale=0.5, softcap=1.5, deterministic=True)
    oracle.check(scaled.cpu(), exact(q, k, v, False, (-1, -1), scale=0.5, softcap=1.5)[0], fp32=1e-5)


@pytest.mark.parametrize("window", [(-1, -1), (2, 3)], ids=str)
def test_gradients(triton, device, dtype, window):
    if dtype != torch.float32:
        pytest.skip("the kernels' own tests have the other dtypes")
    q, k, v = randn(2, 5, 4, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 16)
    dout = randn(2, 5, 4, 16)
    leaves = [t.to(device).requires_grad_() for t in (q, k, v)]
    got = torch.autograd.grad(flash_attn_func(*leaves, window_size=window), leaves, dout.to(device))
    leaves64 = oracle.exact(q, k, v)
    want = torch.autograd.grad(exact(*leaves64, False, window)[0], leaves64, dout.double())
    for g, w in zip(got, want):
        oracle.check(g, w, fp32=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", [(-1, -1), (2, 4), (3, -1)], ids=str)
def test_varlen_with_empty_sequences(triton, device, dtype, causal, window):
    lengths_q, lengths_k = [4, 0, 1, 6, 3], [4, 5, 9, 2, 0]
    starts_q, starts_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, k, v = (randn(n, h, 32, dtype=dtype) for n, h in ((14, 4), (20, 2), (20, 2)))
    on = [t.to(device) for t in (q, k, v, starts_q, starts_k)]
    out, lse, _ = flash_attn_varlen_func(*on, 6, 9, causal=causal, window_size=window, return_attn_probs=True)
    for i in range(5):
        a, b = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        parts = q[None, a], k[None, b], v[None, b]
        want, lse64 = exact(*parts, causal, window)
        if lengths_k[i]:
            oracle.check(out[None, a], want, plain(*parts, causal, window), fp32=1e-5)
        else:
            assert not out[a].any()
        assert oracle.error(lse[None, :, a], lse64) < 1e-3


# --- packed forms ----------------------------------------------------------------------------------------------------

STARTS = torch.tensor([0, 4, 4, 9]).int()
PACKED = {
    "qkv": (flash_attn_qkvpacked_func, flash_attn_func, [(2, 5, 3, 4, 32)], ()),
    "kv": (flash_attn_kvpacked_func, flash_attn_func, [(2, 3, 4, 32), (2, 7, 2, 2, 32)], ()),
    "varlen qkv": (flash_attn_varlen_qkvpacked_func, flash_attn_varlen_func, [(9, 3, 4, 32)], (STARTS, 5)),
    "varlen kv": (flash_attn_varlen_kvpacked_func, flash_attn_varlen_func, [(9, 6, 32), (9, 2, 2, 32)], (STARTS, STARTS, 5, 5)),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("window", [(-1, -1), (2, 1)], ids=str)
def test_packed_forms(triton, device, dtype, form, window):
    """The same numbers and gradients, bit for bit, as of q, k and v taken apart, which are views; the gradient is packed."""
    packed, plain, shapes, cuts = PACKED[form]
    tensors = [randn(*shape, dtype=dtype).to(device).requires_grad_() for shape in shapes]
    cuts = [c.to(device) if isinstance(c, torch.Tensor) else c for c in cuts]
    options = dict(softmax_scale=0.3, causal=True, window_size=window, softcap=5.0, return_attn_probs=True)
    out, lse, third = packed(*tensors, *cuts, **options)
    apart = [*tensors[:-1], *tensors[-1].unbind(-3)]
    both = [cuts[0], cuts[0], cuts[1], cuts[1]] if form == "varlen qkv" else cuts
    want, lse_want, _ = plain(*apart, *both, **options)
    assert torch.equal(out, want)
    assert torch.equal(lse, lse_want)
    assert third is None
    dout = randn(*out.shape, dtype=dtype).to(device)
    got, expected = (torch.autograd.grad(o, tensors, dout, retain_graph=True) for o in (out, want))
    for g, e, t in zip(got, expected, tensors):
        assert torch.equal(g, e)
        assert g.shape == t.shape
        assert g.is_contiguous()


@pytest.mark.parametrize("form", PACKED)
def test_packed_forms_against_float64(triton, device, dtype, form):
    packed, _, shapes, cuts = PACKED[form]
    tensors = [randn(*shape, dtype=dtype) for shape in shapes]
    with torch.no_grad():
        for _ in range(3):  # the second is remembered, and so done another way
            out = packed(*(t.to(device) for t in tensors), *(c.to(device) if isinstance(c, torch.Tensor) else c for c in cuts))
    q, k, v = [*tensors[:-1], *tensors[-1].unbind(-3)]
    sequences = [(out, q, k, v)]
    if cuts:
        sequences = [[t[None, slice(*ends)] for t in (out, q, k, v)] for ends in ((0, 4), (4, 9))]
    for part, *given in sequences:
        oracle.check(part, exact(*given, False, (-1, -1))[0], plain(*given, False, (-1, -1)), fp32=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", [torch.tensor, np.asarray, np.int64], ids=["tensor", "array", "numpy"])
def test_numbers_of_any_kind(triton, device, causal, kind):
    real = np.float32 if kind is np.int64 else kind
    q = torch.randn(1, 9, 2, 16, device=device)
    cuts = torch.tensor([0, 4, 9], device=device).int()
    same = {"softmax_scale": 0.5, "softcap": 2.0, "window_size": (3, 1)}
    other = {"softmax_scale": real(0.5), "softcap": real(2.0), "window_size": (kind(3), kind(1))}
    assert torch.equal(flash_attn_func(q, q, q, causal=causal, **other), flash_attn_func(q, q, q, causal=causal, **same))
    assert torch.equal(
        flash_attn_varlen_func(*[q[0]] * 3, cuts, cuts, 5, 5, causal=causal, **other),
        flash_attn_varlen_func(*[q[0]] * 3, cuts, cuts, 5, 5, causal=causal, **same),
    )


# --- the cache -------------------------------------------------------------------------------------------------------


def rotated(x, cos, sin, positions, interleaved):
    """x [B, S, H, D] in float64."""
    return oracle.rope(x.double().transpose(1, 2), cos.double(), sin.double(), positions, interleaved).transpose(1, 2)


@pytest.mark.few(12)
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("interleaved", [None, False, True], ids=["bare", "half", "interleaved"])
@pytest.mark.parametrize(("S", "new"), [(1, 1), (3, 3), (2, 5), (1, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_kvcache(triton, device, dtype, S, new, interleaved, paged, causal):
    if interleaved is not None and not new:
        pytest.skip("flash-attn rotates what it appends")
    B, Hq, Hk, D, T, page = 3, 4, 2, 32, 24, 8
    q, k, v = randn(B, S, Hq, D, dtype=dtype), randn(B, new, Hk, D, dtype=dtype), randn(B, new, Hk, D, dtype=dtype)
    before = torch.tensor([0 if new >= S else 4, 17, 6]).int()
    angle = torch.arange(T)[:, None] * 0.7 ** torch.arange(12.0)
    cos, sin = angle.cos(), angle.sin()
    k_cache, v_cache = randn(B, T, Hk, D, dtype=dtype), randn(B, T, Hk, D, dtype=dtype)
    table = torch.randperm(12)[: B * 3].view(B, 3).int() if paged else None

    def stored(cache):  # in the memory that the call gets
        if not paged:
            return cache.clone().to(device)
        pages = randn(12, page, Hk, D, dtype=dtype)
        pages[table.long()] = cache.view(B, 3, page, Hk, D)
        return pages.to(device)

    def seen(memory):
        return memory.cpu() if not paged else memory.cpu()[table.long()].flatten(1, 2)

    memory = stored(k_cache), stored(v_cache)
    rotary = {} if interleaved is None else {
        "rotary_cos": cos.to(device), "rotary_sin": sin.to(device), "rotary_interleaved": interleaved,
    }  # fmt: skip
    out = flash_attn_with_kvcache(
        q.to(device), *memory, k.to(device) if new else None, v.to(device) if new else None, cache_seqlens=before.to(device),
        block_table=table.to(device) if paged else None, causal=causal, **rotary,
    )  # fmt: skip

    at = before.long()[:, None] + torch.arange(new)
    k64, q64 = k.double(), q.double()
    if interleaved is not None:
        k64 = rotated(k, cos, sin, at, interleaved)
        here = before.long()[:, None] + torch.arange(S) * causal  # without causality all queries are rotated as the first
        q64 = rotated(q, cos, sin, here.expand(B, S), interleaved)
    full = k_cache.double(), v_cache.double()
    rows = torch.arange(B)[:, None]
    full[0][rows, at], full[1][rows, at] = k64, v.double()
    for memory_now, expected, original in zip(memory, full, (k_cache, v_cache)):
        now = seen(memory_now)
        assert oracle.error(now[rows, at], expected[rows, at]) <= torch.finfo(dtype).eps
        old = torch.ones(B, T, dtype=torch.bool)
        old[rows, at] = False
        assert torch.equal(now[old], original[old])
    want, _ = exact(q64, *full, causal, (-1, -1), lengths=before + new)
    assert oracle.error(out, want) < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert out.is_contiguous()


@pytest.mark.parametrize("window", [(4, 0), (3, -1), (2, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_kvcache_windows_softcap_and_lse(triton, device, window, causal):
    q, k_cache, v_cache = randn(2, 3, 4, 32), randn(2, 20, 2, 32), randn(2, 20, 2, 32)
    lengths = torch.tensor([13, 20]).int()
    options = dict(causal=causal, window_size=window, softcap=2.0, softmax_scale=0.3)
    on = [t.to(device) for t in (q, k_cache, v_cache)]
    out, lse = flash_attn_with_kvcache(*on, cache_seqlens=lengths.to(device), return_softmax_lse=True, **options)
    want, lse64 = exact(q, k_cache, v_cache, causal, window, lengths=lengths, scale=0.3, softcap=2.0)
    oracle.check(out.cpu(), want, fp32=1e-5)
    oracle.check(lse.cpu(), lse64, fp32=1e-5)
    assert torch.allclose(flash_attn_with_kvcache(*on, cache_seqlens=lengths.to(device), **options), out, atol=1e-5)


def test_kvcache_rows_by_index_and_a_length_for_all(triton, device):
    q, k, v = randn(2, 1, 4, 32), randn(2, 1, 2, 32), randn(2, 1, 2, 32)
    k_cache, v_cache = randn(5, 16, 2, 32), randn(5, 16, 2, 32)
    rows = torch.tensor([3, 1]).int()
    memory = k_cache.clone().to(device), v_cache.clone().to(device)
    out = flash_attn_with_kvcache(
        q.to(device), *memory, k.to(device), v.to(device), cache_seqlens=7, cache_batch_idx=rows.to(device), causal=True
    )
    k_cache[rows.long(), 7], v_cache[rows.long(), 7] = k[:, 0], v[:, 0]
    assert torch.equal(memory[0].cpu(), k_cache)
    assert torch.equal(memory[1].cpu(), v_cache)
    want, _ = exact(q, k_cache[rows.long()], v_cache[rows.long()], True, (-1, -1), lengths=torch.tensor([8, 8]))
    oracle.check(out.cpu(), want, fp32=1e-5)


def test_kvcache_compiles_without_a_graph_break(device):
    """One graph for all steps, whatever the lengths: what flash-attn's users have asked for since 2024."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    angle = torch.arange(32.0, device=device)[:, None] * 0.5 ** torch.arange(16.0, device=device)
    cos, sin = angle.cos(), angle.sin()

    def step(q, k_cache, v_cache, k, v, lengths):
        return flash_attn_with_kvcache(
            q * 1.5, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, causal=True
        ) + 1.0  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    caches = torch.zeros(2, 2, 32, 2, 32, device=device)
    expected = caches.clone()
    for n in range(6):
        q, k, v = (randn(2, 1, h, 32).to(device) for h in (4, 2, 2))
        lengths = torch.tensor([n, n + 9], device=device).int()
        assert torch.equal(compiled(q, *caches, k, v, lengths), step(q, *expected, k, v, lengths))
    assert torch.equal(caches, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: flash_attn_func(q, q, q, 0.1), "flash_attn_func: dropout_p is 0.1, expected 0"),
        (lambda q: flash_attn_func(q, q, q, alibi_slopes=q), "flash_attn_func: alibi_slopes is given, expected None"),
        (lambda q: flash_attn_func(q, q[:1], q[:1]), "flash_attn_func: k has shape .*, expected batch size 2 as q"),
        (lambda q: flash_attn_func(q, q, q, softmax_scale=float("inf")), "func: softmax_scale is inf, expected a finite number"),
        (lambda q: flash_attn_func(q, q, q, softcap=float("nan")), "flash_attn_func: softcap is nan, expected a finite number"),
        (lambda q: flash_attn_func(q, q, q, window_size=3), r"flash_attn_func: window_size is 3, expected \(left, right\)"),
        (lambda q: flash_attn_func(q, q, q, window_size=(2.5, 1)), "flash_attn_func: window_size is 2.5, expected an integer"),
        (lambda q: flash_attn_func(q, q, q, softmax_scale=torch.ones((), requires_grad=True)), "softmax_scale requires a gradient"),
        (
            lambda q: flash_attn_qkvpacked_func(q),
            r"flash_attn_qkvpacked_func: qkv is \(2, 3, 4, 16\), expected a tensor \[B, S, 3, H, D\]",
        ),
        (lambda q: flash_attn_kvpacked_func(q, None), r"kvpacked_func: kv is NoneType, expected a tensor \[B, T, 2, H, D\]"),
        (lambda q: flash_attn_kvpacked_func(q, q[:1, :, None].expand(1, 3, 2, 4, 16)), "kvpacked_func: k has shape .*, expected"),
        (lambda q: flash_attn_qkvpacked_func(q[:, :, None].expand(2, 3, 3, 4, 16), 0.1), "qkvpacked_func: dropout_p is 0.1"),
        (
            lambda q: flash_attn_varlen_kvpacked_func(q[0], q[:, :2], None, None, 1, 1),
            "flash_attn_varlen_kvpacked_func: cu_seqlens_q is NoneType",
        ),
        (lambda q: flash_attn_varlen_qkvpacked_func(q, None, 1), "flash_attn_varlen_qkvpacked_func: cu_seqlens_q is NoneType"),
        (lambda q: flash_attn_varlen_func(q, q, q, None, None, 1, 1), "flash_attn_varlen_func: q has shape"),
        (lambda q: flash_attn_varlen_func(*[q[0]] * 3, None, None, 1, 1, block_table=q), "block_table is given, expected None"),
        (lambda q: flash_attn_with_kvcache(q, q, q, q), "v is None, expected both of k and v, or neither"),
        (lambda q: flash_attn_with_kvcache(q, q, q, q, q), "cache_seqlens is None, expected where to write k"),
        (lambda q: flash_attn_with_kvcache(q, q, q, q, q, cache_seqlens=3), "cache_seqlens is 3, expected at most 0"),
        (lambda q: flash_attn_with_kvcache(q, q, q, cache_seqlens=q[0, 0, 0]), "cache_seqlens is torch.float32, expected int32"),
        (lambda q: flash_attn_with_kvcache(q, q, q, rotary_cos=q, rotary_sin=q), "rotary_cos is given without k"),
        (lambda q: flash_attn_with_kvcache(q, q[..., :8], q), r"k_cache has shape .*, expected \[batch, tokens, heads, 16\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with use_backend("reference"), pytest.raises((ValueError, TypeError), match=message) as caught:
        call(torch.randn(2, 3, 4, 16))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "new", "options"), [(3, 1, {"causal": True}), (3, 1, {"window_size": (2, 2)}), (2, 2, {}), (1, 3, {})]
)
def test_tables_that_are_too_short_leave_the_cache_alone(triton, tokens, new, options):
    q, kv, cache = torch.randn(1, tokens, 2, 16), torch.randn(1, new, 2, 16), torch.zeros(1, 20, 2, 16)
    for rows in (5 + max(tokens, new), 5 + max(tokens, new) - 1):
        caches, tables = (cache.clone(), cache.clone()), {"rotary_cos": torch.randn(rows, 8), "rotary_sin": torch.randn(rows, 8)}
        arguments = dict(k=kv, v=kv, cache_seqlens=torch.tensor([5], dtype=torch.int32), **tables, **options)
        if rows < 5 + max(tokens, new):
            with pytest.raises(IndexError, match=r"flash_attn_with_kvcache: positions are 5 to \d, expected 0 to \d, the rows of"):
                flash_attn_with_kvcache(q, *caches, **arguments)
            assert not caches[0].any()
            assert not caches[1].any()
        else:
            assert flash_attn_with_kvcache(q, *caches, **arguments).isfinite().all()
