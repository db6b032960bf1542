"""The flash-attn package's calls on trillama's kernels: same names, arguments, layouts, defaults and window convention.

    from trillama.kernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Tensors are [batch, tokens, heads, head size]; causal is aligned bottom-right (flash-attn 2.1 and later); window_size = (left,
right) does not count the token itself, -1 is no limit. Dropout and ALiBi are refused. The packed forms take q, k and v as views of
one tensor, whose gradient is packed as well. `flash_attn_with_kvcache` is one torch op and compiles with fullgraph=True; it is not
differentiable, as there.
"""

from typing import Any, Optional

import torch

from .. import attention as kernels
from .. import reference
from ..decode import _check_integers, decode_attention
from ..dispatch import call, check, check_same, finite, host_sees, register, remembered, taped, whole
from ..reference import wide
from ..rope import append_, apply_rope, rope_append_

__all__ = [
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache",
]  # fmt: skip

# A tensor; where more is asked for, a tuple that begins with it. Any: so that a caller need not take the two apart.
Result = torch.Tensor | Any


def _unsupported(op, dropout_p=0.0, alibi_slopes=None, **others):
    check(not dropout_p, lambda: f"{op}: dropout_p is {dropout_p}, expected 0: these kernels have no dropout")
    check(alibi_slopes is None, lambda: f"{op}: alibi_slopes is given, expected None: these kernels have no ALiBi")
    for name, value in others.items():
        check(value is None, lambda: f"{op}: {name} is given, expected None: not offered here")  # noqa: B023


def _span(op, causal, window_size):
    """(left, right) as the kernels take them: None is no limit."""
    pair = hasattr(window_size, "__len__") and len(window_size) == 2
    check(pair, lambda: f"{op}: window_size is {window_size!r}, expected (left, right)")
    left, right = (whole(op, "window_size", w) for w in window_size)
    return None if left < 0 else left, 0 if causal else None if right < 0 else right


def _scale(op, softmax_scale, D):
    return D**-0.5 if softmax_scale is None else finite(op, "softmax_scale", softmax_scale)


def _cap(op, softcap):
    softcap = finite(op, "softcap", softcap)
    return softcap if softcap > 0 else None


def _unpacked(op, name, x, parts, axes):
    """The `parts` tensors that x packs along its third last axis, as views."""
    fits = isinstance(x, torch.Tensor) and x.dim() == len(axes) + 3 and x.shape[-3] == parts
    found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    check(fits, lambda: f"{op}: {name} is {found}, expected a tensor [{', '.join((*axes, str(parts), 'H', 'D'))}]")
    return taped(torch.unbind, x, -3)


# --- dense and packed sequences ----------------------------------------------------------------------------------------


def _dense(op, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs):
    _unsupported(op, dropout_p, alibi_slopes)
    softcap = _cap(op, softcap)
    kernels._check(op, q, k, v, softcap, None, ("B", "S", "H", "D"))
    check(q.shape[0] == k.shape[0], lambda: f"{op}: k has shape {tuple(k.shape)}, expected batch size {q.shape[0]} as q")
    scale, span = _scale(op, softmax_scale, q.shape[-1]), _span(op, causal, window_size)
    q, k, v = (taped(torch.Tensor.transpose, t, 1, 2) for t in (q, k, v))
    out, lse = kernels._run(op, q, k, v, None, None, *span, scale, softcap, return_attn_probs)
    out = taped(torch.Tensor.transpose, out, 1, 2)
    return (out, lse, None) if return_attn_probs else out


def _varlen(
    op, q, k, v, starts_q, starts_k, longest_q, longest_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    return_attn_probs, block_table=None,
):  # fmt: skip
    _unsupported(op, dropout_p, alibi_slopes, block_table=block_table)
    softcap = _cap(op, softcap)
    kernels._check(op, q, k, v, softcap, None, ("tokens", "H", "D"))
    kernels._check_starts(op, q, k, starts_q, starts_k, longest_q, longest_k)
    scale, span = _scale(op, softmax_scale, q.shape[-1]), _span(op, causal, window_size)
    q, k, v = (taped(kernels._batch_of_one, t) for t in (q, k, v))
    out, lse = kernels._run(op, q, k, v, starts_q, starts_k, *span, scale, softcap, return_attn_probs)
    out = taped(kernels._only, out)
    return (out, lse.squeeze(0), None) if return_attn_probs else out


@remembered
def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """softmax(q k^T softmax_scale) v: q [B, S, Hq, D]; k, v [B, T, Hk, D]; returns out [B, S, Hq, D].

    softmax_scale: default 1 / sqrt(D). deterministic: these kernels always are. return_attn_probs: returns (out, softmax_lse
    [B, Hq, S], None); the third, flash-attn's dropout pattern, has no meaning without dropout. Differentiable.
    """
    return _dense(
        "flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )


@remembered
def flash_attn_qkvpacked_func(
    qkv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_func` of qkv [B, S, 3, H, D]."""
    op = "flash_attn_qkvpacked_func"
    q, k, v = _unpacked(op, "qkv", qkv, 3, ("B", "S"))
    return _dense(op, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)


@remembered
def flash_attn_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_func` of q [B, S, Hq, D] and kv [B, T, 2, Hk, D]."""
    op = "flash_attn_kvpacked_func"
    k, v = _unpacked(op, "kv", kv, 2, ("B", "T"))
    return _dense(op, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)


@remembered
def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Result:  # fmt: skip
    """`flash_attn_func` of sequences packed one behind the other: q [tokens, Hq, D]; k, v [tokens, Hk, D]; cu_seqlens int32
    [batch + 1]. softmax_lse is [Hq, tokens]. A paged k (block_table) is not offered."""
    return _varlen(
        "flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, return_attn_probs, block_table,
    )  # fmt: skip


@remembered
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_varlen_func` of qkv [tokens, 3, H, D]."""
    op = "flash_attn_varlen_qkvpacked_func"
    q, k, v = _unpacked(op, "qkv", qkv, 3, ("tokens",))
    return _varlen(
        op, q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, return_attn_probs,
    )  # fmt: skip


@remembered
def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_varlen_func` of q [tokens, Hq, D] and kv [tokens, 2, Hk, D]."""
    op = "flash_attn_varlen_kvpacked_func"
    k, v = _unpacked(op, "kv", kv, 2, ("tokens",))
    return _varlen(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, return_attn_probs,
    )  # fmt: skip


# --- the cache -------------------------------------------------------------------------------------------------------


def _append(q, k, v, k_cache, v_cache, cos, sin, before, table, interleaved, same_position):
    """Writes k and v behind the `before` [B] tokens of the caches; returns q, rotated where there are tables."""
    new = before[:, None] + torch.arange(k.shape[2], dtype=before.dtype, device=q.device)
    if cos is None:
        append_("flash_attn_with_kvcache", k, v, k_cache, v_cache, new, table)
        return q
    at = before[:, None].expand(-1, q.shape[2]) if same_position else new[:, :1] + torch.arange(q.shape[2], device=q.device)
    if q.shape[2] == k.shape[2] and not same_position:
        return rope_append_(q, k, v, cos, sin, k_cache, v_cache, new, block_table=table, interleaved=interleaved)
    rope_append_(k, k, v, cos, sin, k_cache, v_cache, new, block_table=table, interleaved=interleaved)
    return apply_rope(q, q, cos, sin, positions=at.contiguous(), interleaved=interleaved)[0]


def _everywhere(length, q):
    return torch.full((len(q),), length, dtype=torch.int32, device=q.device)


def _outside(table, pages):
    low, high = table.aminmax()
    return low.item() < 0 or high.item() >= pages


def _check_values(k_cache, new, before, table, leftpad, cos, turned):
    """What the host can see of the values is within the cache, and the rotary tables reach to the last of the `turned` tokens."""
    op, (pages, _, page, _) = "flash_attn_with_kvcache", k_cache.shape
    capacity = page if table is None else page * table.shape[1]
    low, high = (n.item() for n in before.aminmax())
    fits = low >= 0 and high + new <= capacity
    check(fits, lambda: f"{op}: cache_seqlens is {low} to {high}, expected 0 to {capacity - new}: {new} new tokens in {capacity}")
    if table is not None and table.numel() and _outside(table, pages):  # most tables are sound to their ends
        needed = table[torch.arange(table.shape[1], device=table.device) * page < (before + new)[:, None]]
        if needed.numel() and _outside(needed, pages):
            found = f"the rows or pages of the cache that are needed are {reference.reach(needed)}, expected 0 to {pages - 1}"
            raise IndexError(f"{op}: {found}")
    if cos is not None and high + turned > len(cos):
        raise IndexError(f"{op}: positions are {low} to {high + turned - 1}, expected 0 to {len(cos) - 1}, the rows of rotary_cos")
    if leftpad is not None:
        fits = bool(((leftpad >= 0) & (leftpad <= before + new)).all())
        check(fits, lambda: f"{op}: cache_leftpad is {reference.reach(leftpad)}, expected from 0 to the length of the row")


def _with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor],
    cos: Optional[torch.Tensor], sin: Optional[torch.Tensor], before: torch.Tensor, table: Optional[torch.Tensor],
    leftpad: Optional[torch.Tensor], scale: float, left: Optional[int], right: Optional[int], softcap: Optional[float],
    interleaved: bool, splits: Optional[int], need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out [B, S, Hq, D], lse [B, Hq, S]); the arguments have the axes [B, H, tokens, D]; lse is empty unless it is needed."""
    at_once = left is None and right is None  # all of q is turned by the angle of the first new token
    if len(before) and host_sees(before, table, leftpad):
        new = 0 if k is None else k.shape[2]
        _check_values(k_cache, new, before, table, leftpad, cos, max(new, min(1, q.shape[2]) if at_once else q.shape[2]))
    lengths = before
    if k is not None:
        q = _append(q, k, v, k_cache, v_cache, cos, sin, before, table, interleaved, at_once)
        lengths = before + k.shape[2]
    B, Hq, S, D = q.shape
    one_range = right == 0 or (S == 1 and right is None)  # the last query sees the last key, each before it one key less
    if one_range and not need_lse and leftpad is None:
        window = None if left is None else left + 1
        out = decode_attention(
            q, k_cache, v_cache, lengths, scale=scale, window=window, softcap=softcap, block_table=table, splits=splits
        )
        out = out.view(B, 1, Hq, D) if S == 1 else out.transpose(1, 2).contiguous()
        return out, q.new_empty(0, dtype=wide(q.dtype))
    if table is not None:
        k_cache, v_cache = (reference.joined_inside(c, table) for c in (k_cache, v_cache))
    # The rows' keys as packed sequences; what is before the padding's end and behind a length are sequences without queries.
    T, row = k_cache.shape[2], torch.arange(B, device=q.device)[:, None]
    lengths = lengths.clamp(0, T)[:, None]
    keys, queries = [row * T + lengths, (row + 1) * T], [(row + 1) * S] * 2
    if leftpad is not None:
        keys, queries = [row * T + leftpad[:, None].clamp(min=0).minimum(lengths), *keys], [row * S, *queries]
    cuts = (torch.cat(t, 1).flatten() for t in (queries, keys))
    starts_q, starts_k = (torch.nn.functional.pad(t, (1, 0)).to(torch.int32) for t in cuts)
    q, k, v = (t.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0) for t in (q, k_cache, v_cache))
    out, lse = kernels._attention(q, k, v, starts_q, starts_k, scale, softcap, left, right, need_lse)
    out = out.squeeze(0).transpose(0, 1).reshape(B, S, Hq, D)
    return out, lse.reshape(Hq, B, S).transpose(0, 1).clone(memory_format=torch.contiguous_format) if need_lse else lse


_with_kvcache_op = register(
    "flash_attn_with_kvcache", _with_kvcache,
    lambda q, *rest: (
        q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])),
        q.new_empty(q.shape[:3] if rest[-1] else (0,), dtype=wide(q.dtype)),
    ),
    mutates=("k_cache", "v_cache"),
)  # fmt: skip


@remembered
def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None, rotary_sin: torch.Tensor | None = None, cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None, cache_leftpad: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: torch.Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Result:  # fmt: skip
    """Attention over a cache, after k and v have been appended to it in place.

    q: [B, S, Hq, D]. k_cache, v_cache: [B, T, Hk, D], or pages [pages, page, Hk, D] with block_table int32 [B, n]. k, v: new tokens
    [B, S', Hk, D], written at cache_seqlens (int32 [B], on the device, or an integer; the tokens there were before; default: the
    cache is full). rotary_cos, rotary_sin: [positions, R / 2] (float32 is best), rotate k at cache_seqlens and following, and q
    likewise if causal or windowed, else all of q at cache_seqlens. cache_batch_idx: int [B], which row of the cache each row of q
    uses. cache_leftpad: int [B], the keys before it are not seen; as in flash-attn positions count from the beginning of the row,
    rotary ones too, and pages have none. num_splits: 0 leaves it to the kernel. Returns out [B, S, Hq, D], with return_softmax_lse
    also lse float32 [B, Hq, S].

    Causal with any S, and S = 1, run on `decode_attention`; the rest (several queries without causality, windows to the right,
    softmax_lse, cache_leftpad) on the kernel for packed sequences, for which pages are gathered first.

    On CPU tensors an append beyond the capacity, or a length outside 0 and the capacity, is a ValueError; a row or page that is
    needed and not in the cache, or a position that is needed and not in the tables, an IndexError; and nothing is written. On a GPU
    the host cannot know without a wait: there, on any backend, nothing is written outside the cache, a length counts as the nearest
    possible one, and what needs a page that is not there is NaN.
    """
    op = "flash_attn_with_kvcache"
    _unsupported(op, alibi_slopes=alibi_slopes)
    check_same(op, optional=("k", "v"), q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        check(
            x is None or (x.dim() == 4 and x.shape[3] == q.shape[-1]),
            lambda: f"{op}: {name} has shape {tuple(x.shape)}, expected [batch, tokens, heads, {q.shape[-1]}]",  # noqa: B023
        )
    check((k is None) == (v is None), lambda: f"{op}: {'k' if k is None else 'v'} is None, expected both of k and v, or neither")
    check((rotary_cos is None) == (rotary_sin is None), lambda: f"{op}: expected both of rotary_cos and rotary_sin, or neither")
    check(rotary_cos is None or k is not None, lambda: f"{op}: rotary_cos is given without k, expected new tokens to rotate")
    check(cache_batch_idx is None or block_table is None, lambda: f"{op}: expected one of cache_batch_idx and block_table")
    check(cache_leftpad is None or block_table is None, lambda: f"{op}: expected one of cache_leftpad and block_table")
    B, _, Hq, D = q.shape
    rows, _, Hk, _ = k_cache.shape
    same = v_cache.shape == k_cache.shape
    check(same, lambda: f"{op}: v_cache has shape {tuple(v_cache.shape)}, expected {tuple(k_cache.shape)} as k_cache")
    check(1 <= D <= 256, lambda: f"{op}: q has head size {D}, expected 1 to 256")
    check(Hk > 0 and Hq % Hk == 0, lambda: f"{op}: q has {Hq} heads, expected a multiple of the {Hk} of k_cache")
    if k is not None:
        check(k.shape[0] == B, lambda: f"{op}: k has shape {tuple(k.shape)}, expected batch size {B} as q")
        check(k.shape[2] == Hk, lambda: f"{op}: k has {k.shape[2]} heads, expected {Hk} as k_cache")
        check(v.shape == k.shape, lambda: f"{op}: v has shape {tuple(v.shape)}, expected {tuple(k.shape)} as k")
    for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad), ("block_table", block_table)):
        if x is not None:
            _check_integers(op, name, x, q, "[B, n]" if x is block_table else "[B]")
    if cache_batch_idx is not None:  # the rows of the cache are pages as long as the cache
        block_table = taped(torch.unsqueeze, cache_batch_idx, 1)
    check(block_table is not None or rows == B, lambda: f"{op}: k_cache has {rows} rows, expected {B} as q, or cache_batch_idx")
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        check(k is None, lambda: f"{op}: cache_seqlens is None, expected where to write k")
        cache_seqlens = capacity
    if not isinstance(cache_seqlens, torch.Tensor):
        cache_seqlens, new = whole(op, "cache_seqlens", cache_seqlens), 0 if k is None else k.shape[1]
        check(
            0 <= cache_seqlens <= capacity - new,
            lambda: f"{op}: cache_seqlens is {cache_seqlens}, expected at most {capacity - new}: {new} new tokens in {capacity}",
        )
        cache_seqlens = taped(_everywhere, cache_seqlens, q)
    elif not cache_seqlens.dim():
        cache_seqlens = taped(torch.Tensor.expand, cache_seqlens, B)
    _check_integers(op, "cache_seqlens", cache_seqlens, q, "[B]")
    scale, (left, right), softcap = _scale(op, softmax_scale, D), _span(op, causal, window_size), _cap(op, softcap)
    num_splits = whole(op, "num_splits", num_splits)
    check(num_splits >= 0, lambda: f"{op}: num_splits is {num_splits}, expected at least 0")
    if rotary_cos is not None:
        rotary_cos, rotary_sin = taped(torch.Tensor.float, rotary_cos), taped(torch.Tensor.float, rotary_sin)
    tensors = q, k_cache, v_cache, k, v
    q, k_cache, v_cache, k, v = (None if t is None else taped(torch.Tensor.transpose, t, 1, 2) for t in tensors)
    out, lse = call(
        _with_kvcache_op, _with_kvcache, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, block_table,
        cache_leftpad, scale, left, right, softcap, bool(rotary_interleaved), num_splits or None, bool(return_softmax_lse),
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out
