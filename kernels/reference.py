"""The specification: every op in plain PyTorch, with the names, signatures and roundings of the Triton kernels.

It is also the path that CPU tensors take, so it leans on `scaled_dot_product_attention` where its semantics fit. Everything is
differentiable by autograd except the decode calls. What is `steady` multiplies as its tensors' dtypes say, also under autocast;
the gradients that autograd makes of it are torch's, which wants no autocast there. Shapes: B batch, S query length, T key length,
Hq query heads, Hk key/value heads, D head size, N hidden size.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from .dispatch import steady
from .frequencies import rope_tables
from .quantized import QuantizedWeight

__all__ = [
    "add_rms_norm", "apply_rope", "decode_attention", "decode_linear", "flash_attention", "flash_attention_varlen", "rms_norm",
    "rope_append_", "rope_tables", "swiglu",
]  # fmt: skip


def wide(dtype):
    """The dtype in which an op computes: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x, dtype):
    """x.to(dtype), which costs microseconds also where it has nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


# --- rms_norm: Zhang & Sennrich 2019, arXiv:1910.07467 ---------------------------------------------------------------

PIECE = 512  # elements


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> torch.Tensor:
    dtype, row = x.dtype, x.shape[-1:]
    scale = weight if weight is None or (weight.dtype == dtype and not offset) else factor(x, weight, offset, casting)
    if dtype == torch.float32 or dtype == torch.float64:
        return torch.rms_norm(x, row, scale, eps)
    if casting != "llama":
        return torch.rms_norm(x.float(), row, None if scale is None else scale.float(), eps).to(dtype)
    y = torch.rms_norm(x.float(), row, None, eps).to(dtype)
    return y if scale is None else (y * scale).to(dtype)


def _rstd(x, eps):
    """1 / sqrt(mean(x^2) + eps) of rows [..., N]. A norm reads them once, where their squares are written and read again; but it
    adds up in few lanes, of strided rows in one, so it is taken of pieces of dense rows, and then of the norms of these."""
    n = x.shape[-1]
    if n == 0 or n % PIECE or x.stride(-1) != 1:
        square = x.square().mean(-1, keepdim=True)
    else:
        pieces = torch.linalg.vector_norm(x.unflatten(-1, (-1, PIECE)), 2, -1)
        square = torch.linalg.vector_norm(pieces, 2, -1, True).square().div_(n)
    return square.add_(eps).rsqrt_()


def factor(x, weight, offset, casting):
    """offset + weight in the dtype that is computed in; casting "none" rounds the sum where x and weight share a dtype."""
    total = cast(weight, wide(x.dtype))
    if not offset:
        return total
    total = offset + total
    return total.to(x.dtype).to(total.dtype) if casting == "none" and weight.dtype == x.dtype else total


def rms_norm_backward(dy, x, weight, dtotal, eps, offset, casting, need_dweight):
    """(dx + dtotal, dweight) of rms_norm at x; dweight is empty unless it is needed."""
    x32, g, dweight = cast(x, wide(x.dtype)), cast(dy, wide(x.dtype)), x.new_empty(0)
    rstd = _rstd(x32, eps)
    normal = x32 * rstd
    product = g * normal
    if need_dweight:
        rounded = casting == "llama" and x.dtype != g.dtype
        dweight = (g * normal.to(x.dtype) if rounded else product).sum_to_size(weight.shape).to(weight.dtype)
    if weight is not None:
        scale = factor(x, weight, offset, casting)
        product, g = product * scale, g * scale  # not in place: of a single row it is dweight
    mean = product.sum(-1, keepdim=True).div_(max(1, x.shape[-1]))
    dx = torch.addcmul(g, normal, mean, value=-1, out=product).mul_(rstd)
    return (dx if dtotal is None else dx.add_(dtotal)).to(x.dtype).contiguous(), dweight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, offset: float = 0.0,
    casting: str = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    total = x + residual
    return rms_norm(total, weight, eps, offset=offset, casting=casting), total


# --- rotary embedding: Su et al. 2021, arXiv:2104.09864 --------------------------------------------------------------


def reach(integers):
    return "{} to {}".format(*(n.item() for n in integers.aminmax()))


def raises(x):
    """Whether what lies outside a table or a cache is an error: on a CPU. On a GPU it would be the end of the process, so it is
    left out there, or NaN, as by the kernels, which cannot raise either."""
    return x.is_cpu


def rows_of(op, cos, sin, positions, x):
    """The rows `positions` ([S], [B, S] or None) of the tables [P, R/2], for x [B, H, S, D]."""
    if positions is None:
        return [cast(table[: x.shape[2]], wide(x.dtype)) for table in (cos, sin)]
    if not raises(positions):
        known = ((positions >= 0) & (positions < len(cos))).unsqueeze(-1)
        rows = (F.embedding(positions.clamp(0, len(cos) - 1), table) for table in (cos, sin))
        return [row.masked_fill(~known, math.nan).to(wide(x.dtype)).unsqueeze(-3) for row in rows]
    try:
        return [cast(F.embedding(positions, table), wide(x.dtype)).unsqueeze(-3) for table in (cos, sin)]
    except IndexError:
        raise IndexError(f"{op}: positions are {reach(positions)}, expected 0 to {len(cos) - 1}, the rows of cos") from None


def turning(op, cos, sin, positions, x, interleaved, inverse=False):
    """[(B, 1,) S, R] twice: what the first R elements of x [B, H, S, D] are multiplied by to be turned by the angles of its
    positions, or back, and what the partners in their pairs are."""
    cos, sin = rows_of(op, cos, sin, positions, x)
    signed = (sin, -sin) if inverse else (-sin, sin)
    if interleaved:
        return cos.repeat_interleave(2, -1), torch.stack(signed, -1).flatten(-2)
    return torch.cat((cos, cos), -1), torch.cat(signed, -1)


def rotate(x, cos, sin, interleaved):
    """x [B, H, S, D] times what `turning` gives; the last D - R elements pass through. The axes of the result lie in memory as
    those of x."""
    size = cos.shape[-1]
    part = cast(x if x.shape[-1] == size else x[..., :size], cos.dtype)
    if interleaved:
        partners = torch.stack((part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        partners = part.roll(size // 2, -1)
    turned = cast((part * cos).addcmul_(partners, sin), x.dtype)
    return turned if x.shape[-1] == size else torch.cat((turned, x[..., size:]), -1)


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return turn(q, k, cos, sin, positions, interleaved, False)


def turn(q, k, cos, sin, positions, interleaved, inverse):
    """apply_rope, or with `inverse` the rotation by the opposite angles."""
    cos, sin = turning("apply_rope", cos, sin, positions, q, interleaved, inverse)
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


def rope_append_(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor,
    v_cache: torch.Tensor, positions: torch.Tensor, *, block_table: torch.Tensor | None = None, interleaved: bool = False,
) -> torch.Tensor:  # fmt: skip
    cos, sin = turning("rope_append_", cos, sin, positions, q, interleaved)
    q, k = rotate(torch.cat((q, k), 1), cos, sin, interleaved).split((q.shape[1], k.shape[1]), 1)  # half the calls
    append_("rope_append_", k, v, k_cache, v_cache, positions, block_table)
    return q


def append_(op, k, v, k_cache, v_cache, positions, block_table=None):
    """Writes k and v [B, Hk, S, D] into the caches at `positions`."""
    if not raises(k):
        return _append_inside(k, v, k_cache, v_cache, positions, block_table)
    slot = positions.long().expand(k.shape[0], k.shape[2])
    try:
        if block_table is None and k.shape[0] == 1:
            k_cache.index_copy_(2, slot[0], k)
            v_cache.index_copy_(2, slot[0], v)
            return
        page = torch.arange(k.shape[0], device=k.device)[:, None]
        if block_table is not None:
            page, slot = block_table.long().gather(1, slot // k_cache.shape[2]), slot % k_cache.shape[2]
            if page.numel() and page.min().item() < 0:
                raise IndexError
        k_cache[page, :, slot] = k.transpose(1, 2)
        v_cache[page, :, slot] = v.transpose(1, 2)
    except (IndexError, RuntimeError):
        pages, _, T, _ = k_cache.shape
        capacity = T if block_table is None else T * block_table.shape[1]
        if positions.min() < 0 or positions.max() >= capacity:
            found = f"positions are {reach(positions)}, expected 0 to {capacity - 1}, those of the cache"
            raise IndexError(f"{op}: {found}") from None
        if block_table is not None and (page.min() < 0 or page.max() >= pages):
            raise IndexError(no_page(op, page, pages)) from None
        raise


def _append_inside(k, v, k_cache, v_cache, positions, block_table):
    """Without a wait: a token that has no place is written as another one that has, once more; without any, an old one as it is."""
    (B, _, S, _), (pages, _, T, _) = k.shape, k_cache.shape
    slot, page = positions.long().expand(B, S), torch.arange(B, device=k.device)[:, None].expand(B, S)
    inside = (slot >= 0) & (slot < (T if block_table is None else T * block_table.shape[1]))
    if block_table is not None:
        page, slot = block_table.long().gather(1, torch.where(inside, slot, 0) // T), slot % T
        inside &= (page >= 0) & (page < pages)
    inside = inside.flatten()
    if 0 in (*k.shape, *k_cache.shape, len(inside)):
        return
    token = torch.where(inside, torch.arange(B * S, device=k.device), inside.int().argmax())
    page, slot = page.flatten()[token].clamp(0, pages - 1), slot.flatten()[token].clamp(0, T - 1)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[page, :, slot] = torch.where(inside.any(), new.transpose(1, 2).flatten(0, 1)[token], cache[page, :, slot])


# --- SwiGLU: Shazeer 2020, arXiv:2002.05202 --------------------------------------------------------------------------


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return cast(F.silu(cast(gate, wide(gate.dtype))).mul_(up), gate.dtype)


def swiglu_backward(dy, gate, up, silu=None):
    """(dgate, dup); silu: that of gate, where it has been kept."""
    dy32, gate32, up32 = (cast(t, wide(t.dtype)) for t in (dy, gate, up))
    dup = F.silu(gate32).mul_(dy32) if silu is None else silu * dy32
    dgate = torch.ops.aten.silu_backward(dy32 * up32, gate32)
    return cast(dgate, gate.dtype).contiguous(), cast(dup, up.dtype).contiguous()


# --- attention: Dao 2023, arXiv:2307.08691 ---------------------------------------------------------------------------


def span(causal, window):
    """(left, right): a query at position p sees the keys p - left .. p + right; None is no limit."""
    return None if window is None else window - 1, 0 if causal else None


def visible(positions, keys, left, right):
    """Boolean [..., S, keys]: which keys a query at `positions` [..., S] sees."""
    distance = torch.arange(keys, device=positions.device) - positions.unsqueeze(-1)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if right is not None:
        seen = seen & (distance <= right)
    if left is not None:
        seen = seen & (distance >= -left)
    return seen


def attend(q, k, v, mask, scale, softcap):
    """Attention under a boolean mask [(B,) S, T], every intermediate in float32: (out, lse), 0 and -inf where nothing is seen."""
    B, Hq, S, D = q.shape
    Hk, T = k.shape[1:3]
    q32, k32, v32 = (t.to(wide(q.dtype)) for t in (q, k, v))
    scores = torch.matmul(q32.reshape(B, Hk, Hq // Hk, S, D) * scale, k32.unsqueeze(2).transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~(mask if mask.dim() == 2 else mask[:, None, None]), -math.inf)
    lse = torch.logsumexp(scores, -1) if T else scores.new_full(scores.shape[:-1], -math.inf)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1))
    out = torch.matmul(weights, v32.unsqueeze(2))
    return out.reshape(B, Hq, S, v.shape[-1]).to(q.dtype), lse.reshape(B, Hq, S)


def _has_tangents():
    """Whether forward-mode derivatives may be asked for, of which torch's fused attention has none."""
    return forward_ad._current_level >= 0


@steady
def attention(q, k, v, scale, left, right, softcap, need_lse):
    """(out, lse or None) for a span as `span` gives it, aligned bottom-right: the last query meets the last key."""
    S, T = q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale < 0:  # torch's fused attention masks with -inf before it scales
        q, scale = -q, -scale
    limited = _limited(S, left, right)
    if _fused_fits(q, k, scale, limited, softcap):
        if q.is_cpu and not (need_lse and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))):
            dtype = wide(q.dtype) if need_lse else q.dtype  # in 16 bits torch's exponential is of few, and so is lse
            inputs = [_rows_dense(t.to(dtype)) for t in (q, _each(k, q), _each(v, q))]
            causal, mask = _fused_mask(inputs[0], k, left, right)
            out, lse = _fused(*inputs, 0.0, causal, attn_mask=mask, scale=scale)
            return out.to(q.dtype), lse
        if not need_lse:  # torch has no derivative of lse, and no lse on a GPU
            causal, mask = _fused_mask(q, k, left, right)
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped), None
    positions = torch.arange(T - S, T, device=q.device)
    rows = max(1, 2**24 // max(1, q.shape[0] * q.shape[1] * T))  # at most 64 MiB of float32 scores at a time
    parts = [
        attend(part, k, v, visible(where, T, left, right) if limited else None, scale, softcap)
        for part, where in zip(q.split(rows, 2), positions.split(rows))
    ]
    return torch.cat([o for o, _ in parts], 2), torch.cat([l for _, l in parts], 2)


# SDPA's kernel on a CPU, called by its own name: only so does it give lse, and no switch of SDPA's chooses another.
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Older ones read as many key heads as there are query heads, whether they are there or not; seen to take fewer: 2.11, 2.14.
_GROUPED = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)


def _limited(S, left, right):
    """Whether some query does not see every key."""
    return left is not None or (right is not None and right < S - 1)


def _fused_fits(q, k, scale, limited, softcap):
    """Whether torch's fused attention computes this: it has no softcap, no scale of 0, and NaN where a query sees no key."""
    blind = limited and q.shape[2] > k.shape[2]
    return softcap is None and scale > 0 and not blind and 0 not in (*q.shape, *k.shape) and not _has_tangents()


def _fused_mask(q, k, left, right):
    """(is_causal, attn_mask) of a span."""
    S, T = q.shape[2], k.shape[2]
    causal = left is None and right == 0 and S == T
    if causal or not _limited(S, left, right):
        return causal, None
    seen = visible(torch.arange(T - S, T, device=q.device), T, left, right)
    return False, torch.zeros(S, T, dtype=q.dtype, device=q.device).masked_fill_(~seen, -math.inf)


def _each(k, q):
    """k with a head for each head of q, where torch's kernel needs them."""
    return k if _GROUPED or k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _rows_dense(x):
    return x if x.stride(-1) == 1 else x.contiguous()


@steady
def attention_backward(dout, dlse, q, k, v, out, lse, scale, left, right, softcap):
    """(dq, dk, dv) of `attention`, whose lse must be given; dlse is None where lse has no gradient."""
    S, (Hk, T) = q.shape[2], k.shape[1:3]
    q32, k32, v32, dout32, out32 = (t.to(wide(q.dtype)) for t in (q, k, v, dout, out))
    if q.is_cpu and dlse is None and _fused_fits(q, k, scale, _limited(S, left, right), softcap):
        causal, mask = _fused_mask(q32, k, left, right)
        q32, k32, v32, dout32 = (_rows_dense(t) for t in (q32, _each(k32, q), _each(v32, q), dout32))
        dq, dk, dv = _fused_backward(dout32, q32, k32, v32, out32, lse, 0.0, causal, attn_mask=mask, scale=scale)
        if k32.shape[1] != Hk:
            dk, dv = (t.unflatten(1, (Hk, -1)).sum(2) for t in (dk, dv))
        return tuple(t.to(q.dtype) for t in (dq, dk, dv))
    q32, k32, v32, dout32, out32 = (t.unflatten(1, (Hk, -1)) for t in (q32, k32, v32, dout32, out32))
    delta = (dout32 * out32).sum(-1) - (0 if dlse is None else dlse.unflatten(1, (Hk, -1)))
    scores = torch.matmul(q32 * scale, k32.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(torch.arange(T - S, T, device=q.device), T, left, right)
    weights = torch.exp(scores - lse.unflatten(1, (Hk, -1)).unsqueeze(-1)).masked_fill(~seen, 0)
    dscores = weights * (torch.matmul(dout32, v32.mT) - delta.unsqueeze(-1))
    if softcap is not None:
        dscores = dscores * (1 - (scores / softcap).square())
    dq = (torch.matmul(dscores, k32) * scale).flatten(1, 2)
    dk, dv = (torch.matmul(dscores.mT, q32) * scale).sum(2), torch.matmul(weights.mT, dout32).sum(2)
    return tuple(t.to(q.dtype) for t in (dq, dk, dv))


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, lse = attention(q, k, v, scale, *span(causal, window), softcap, return_lse)
    return (out, lse) if return_lse else out


def sequences(starts_q, starts_k, tokens_q, tokens_k):
    """(queries, keys) of each packed sequence, as slices. The tokens in front of the first and behind the last are sequences too:
    queries that see no key, and keys that nobody sees."""
    a, c = _cuts("cu_seqlens_q", starts_q, tokens_q), _cuts("cu_seqlens_k", starts_k, tokens_k)
    pairs = [*zip(pairwise(a), pairwise(c)), *((outside, (0, 0)) for outside in ((0, a[0]), (a[-1], tokens_q)))]
    pairs += [((0, 0), outside) for outside in ((0, c[0]), (c[-1], tokens_k))]
    return [(slice(*rows), slice(*keys)) for rows, keys in pairs if rows[0] < rows[1] or keys[0] < keys[1]]


def _cuts(name, starts, tokens):
    cuts = starts.tolist()
    if any(a > b for a, b in pairwise((0, *cuts, tokens))):
        shown = ", ".join(map(str, cuts[:8])) + (", .." if len(cuts) > 8 else "")
        raise ValueError(f"{name} is [{shown}], expected cuts that rise from 0 to at most {tokens}, the number of tokens")
    return cuts


def flash_attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, lse = torch.zeros_like(q), q.new_full(q.shape[1::-1], -math.inf, dtype=wide(q.dtype))
    for rows, keys in sequences(cu_seqlens_q, cu_seqlens_k, len(q), len(k)):
        parts = (t[where].transpose(0, 1).unsqueeze(0) for t, where in ((q, rows), (k, keys), (v, keys)))
        o, l = attention(*parts, scale, *span(causal, window), softcap, return_lse)
        out[rows] = o.squeeze(0).transpose(0, 1)
        if return_lse:
            lse[:, rows] = l.squeeze(0)
    return (out, lse) if return_lse else out


def joined(op, cache, table):
    """The pages [pages, Hk, page, D] that the table [B, n] names, one behind the other: [B, Hk, n page, D]."""
    if not raises(table):
        return joined_inside(cache, table)
    try:
        pages = cache.index_select(0, table.long().flatten())
    except (IndexError, RuntimeError):
        if table.min() < 0 or table.max() >= len(cache):
            raise IndexError(no_page(op, table, len(cache))) from None
        raise
    return pages.unflatten(0, table.shape).transpose(1, 2).flatten(2, 3)


def joined_inside(cache, table):
    """`joined`, with NaN for a page that is not there."""
    absent = (table < 0) | (table >= len(cache))
    pages = cache[table.long().clamp(0, len(cache) - 1)].masked_fill_(absent[:, :, None, None, None], math.nan)
    return pages.transpose(1, 2).flatten(2, 3)


def no_page(op, table, pages):
    return f"{op}: block_table names the pages {reach(table)} where it is needed, expected 0 to {pages - 1}, those of k_cache"


@steady
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, block_table: torch.Tensor | None = None, splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    ends = lengths.tolist()
    if len(set(ends)) > 1:  # row by row: no product may reach what lies beyond a row's length
        rows, paged = [], block_table is not None
        for b in range(len(ends)):
            one = slice(b, b + 1)
            k, v = (c if paged else c[one] for c in (k_cache, v_cache))
            table = block_table[one] if paged else None
            options = {"scale": scale, "window": window, "softcap": softcap, "block_table": table}
            rows.append(decode_attention(q[one], k, v, lengths[one], **options))
        return torch.cat(rows)
    B, Hq, S, D = q.shape
    end = ends[0] if ends else 0
    capacity = k_cache.shape[2] if block_table is None else k_cache.shape[2] * block_table.shape[1]
    if not 0 <= end <= capacity:
        if raises(lengths):
            raise ValueError(f"decode_attention: lengths has {end}, expected 0 to {capacity}, the capacity of the cache")
        end = min(max(end, 0), capacity)
    if block_table is not None:
        table = block_table[:, : -(-end // k_cache.shape[2])]
        k_cache, v_cache = (joined("decode_attention", c, table) for c in (k_cache, v_cache))
    begin = 0 if window is None else max(0, end - S - window + 1)
    k, v = k_cache[:, :, begin:end], v_cache[:, :, begin:end]
    if S != 1 or softcap is not None or 0 in (*q.shape, *k.shape) or _has_tangents():
        return attention(q, k, v, scale, *span(True, window), softcap, False)[0]
    # The query heads of a group are the rows of one product, so the cache is read once and never expanded.
    packed = q.reshape(B, k.shape[1], -1, D)
    return F.scaled_dot_product_attention(packed, k, v, scale=scale).view(B, Hq, S, D)


# --- the matrix-vector product of the decode step --------------------------------------------------------------------


@steady
def decode_linear(
    x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, *, norm: torch.Tensor | None = None, eps: float = 1e-6,
    residual: torch.Tensor | None = None, activation: str | None = None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    x = x if norm is None else rms_norm(x, norm, eps)
    y = F.linear(x, weight, bias) if isinstance(weight, torch.Tensor) else weight.linear(x, bias)
    if activation == "swiglu":
        y = swiglu(*y.chunk(2, -1))
    return y if residual is None else y + residual
