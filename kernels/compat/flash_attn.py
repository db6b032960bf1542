"""The flash-attn package's calls on trillama's kernels: same names, arguments, layouts, defaults and window convention.

    from trillama.kernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Tensors are [batch, tokens, heads, head size]; causal is aligned bottom-right (flash-attn 2.1 and later); window_size = (left,
right) does not count the token itself, -1 is no limit. Dropout and ALiBi are refused. `flash_attn_with_kvcache` is one torch op
and compiles with fullgraph=True; it is not differentiable, as there.
"""

from typing import Optional

import torch

from .. import attention as kernels
from ..decode import decode_attention
from ..dispatch import call, check, check_same, register, remembered, taped
from ..reference import wide
from ..rope import apply_rope, rope_append_

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def _unsupported(op, dropout_p=0.0, alibi_slopes=None, **others):
    check(not dropout_p, lambda: f"{op}: dropout_p is {dropout_p}, expected 0: these kernels have no dropout")
    check(alibi_slopes is None, lambda: f"{op}: alibi_slopes is given, expected None: these kernels have no ALiBi")
    for name, value in others.items():
        check(value is None, lambda: f"{op}: {name} is given, expected None: not offered here")  # noqa: B023


def _span(causal, window_size):
    """(left, right) as the kernels take them: None is no limit."""
    left, right = (None if w < 0 else w for w in window_size)
    return left, 0 if causal else right


def _cap(softcap):
    return softcap if softcap > 0 else None


@remembered
def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """softmax(q k^T softmax_scale) v: q [B, S, Hq, D]; k, v [B, T, Hk, D]; returns out [B, S, Hq, D].

    softmax_scale: default 1 / sqrt(D). deterministic: these kernels always are. return_attn_probs: returns (out, softmax_lse
    [B, Hq, S], None); the third, flash-attn's dropout pattern, has no meaning without dropout. Differentiable.
    """
    op = "flash_attn_func"
    _unsupported(op, dropout_p, alibi_slopes)
    softcap, _ = kernels._check(op, q, k, v, _cap(softcap), None, ("B", "S", "H", "D"))
    check(q.shape[0] == k.shape[0], lambda: f"{op}: k has shape {tuple(k.shape)}, expected batch size {q.shape[0]} as q")
    q, k, v = (taped(torch.Tensor.transpose, t, 1, 2) for t in (q, k, v))
    out, lse = kernels._run(op, q, k, v, None, None, *_span(causal, window_size), softmax_scale, softcap, return_attn_probs)
    out = taped(torch.Tensor.transpose, out, 1, 2)
    return (out, lse, None) if return_attn_probs else out


@remembered
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """`flash_attn_func` of sequences packed one behind the other: q [tokens, Hq, D]; k, v [tokens, Hk, D]; cu_seqlens int32
    [batch + 1]. softmax_lse is [Hq, tokens]. A paged k (block_table) is not offered."""
    op = "flash_attn_varlen_func"
    _unsupported(op, dropout_p, alibi_slopes, block_table=block_table)
    softcap, _ = kernels._check(op, q, k, v, _cap(softcap), None, ("tokens", "H", "D"))
    kernels._check_starts(op, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q, k, v = (taped(kernels._batch_of_one, t) for t in (q, k, v))
    cuts = cu_seqlens_q, cu_seqlens_k
    out, lse = kernels._run(op, q, k, v, *cuts, *_span(causal, window_size), softmax_scale, softcap, return_attn_probs)
    out = taped(kernels._only, out)
    return (out, lse.squeeze(0), None) if return_attn_probs else out


# --- the cache -------------------------------------------------------------------------------------------------------


def _append(q, k, v, k_cache, v_cache, cos, sin, before, table, interleaved, same_position):
    """Writes k and v behind the `before` [B] tokens of the caches; returns q, rotated where there are tables."""
    new = before[:, None] + torch.arange(k.shape[2], dtype=before.dtype, device=q.device)
    if cos is None:
        page = torch.arange(len(before), device=q.device)[:, None]
        slot = new.long()
        if table is not None:
            page, slot = table.long().gather(1, slot // k_cache.shape[2]), slot % k_cache.shape[2]
        k_cache[page, :, slot], v_cache[page, :, slot] = k.transpose(1, 2), v.transpose(1, 2)
        return q
    at = before[:, None].expand(-1, q.shape[2]) if same_position else new[:, :1] + torch.arange(q.shape[2], device=q.device)
    if q.shape[2] == k.shape[2] and not same_position:
        return rope_append_(q, k, v, cos, sin, k_cache, v_cache, new, block_table=table, interleaved=interleaved)
    rope_append_(k, k, v, cos, sin, k_cache, v_cache, new, block_table=table, interleaved=interleaved)
    return apply_rope(q, q, cos, sin, positions=at.contiguous(), interleaved=interleaved)[0]


def _with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor],
    cos: Optional[torch.Tensor], sin: Optional[torch.Tensor], before: torch.Tensor, table: Optional[torch.Tensor], scale: float,
    left: Optional[int], right: Optional[int], softcap: Optional[float], interleaved: bool, splits: Optional[int], need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out [B, S, Hq, D], lse [B, Hq, S]); the arguments have the axes [B, H, tokens, D]; lse is empty unless it is needed."""
    lengths = before
    if k is not None:
        q = _append(q, k, v, k_cache, v_cache, cos, sin, before, table, interleaved, left is None and right is None)
        lengths = before + k.shape[2]
    B, Hq, S, D = q.shape
    one_range = right == 0 or (S == 1 and right is None)  # the last query sees the last key, each before it one key less
    if one_range and not need_lse:
        window = None if left is None else left + 1
        out = decode_attention(
            q, k_cache, v_cache, lengths, scale=scale, window=window, softcap=softcap, block_table=table, splits=splits
        )
        out = out.view(B, 1, Hq, D) if S == 1 else out.transpose(1, 2).contiguous()
        return out, q.new_empty(0, dtype=wide(q.dtype))
    if table is not None:
        k_cache, v_cache = (c[table.long()].transpose(2, 3).flatten(1, 2).transpose(1, 2) for c in (k_cache, v_cache))
    # The rows' keys as packed sequences; what is behind a length is a sequence without queries.
    T, row = k_cache.shape[2], torch.arange(B, device=q.device)[:, None]
    keys = torch.cat((row * T + lengths[:, None], (row + 1) * T), 1).flatten()
    queries = ((row + 1) * S).expand(B, 2).flatten()
    starts_q, starts_k = (torch.nn.functional.pad(t, (1, 0)).to(torch.int32) for t in (queries, keys))
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


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """Attention over a cache, after k and v have been appended to it in place.

    q: [B, S, Hq, D]. k_cache, v_cache: [B, T, Hk, D], or pages [pages, page, Hk, D] with block_table int32 [B, n]. k, v: new tokens
    [B, S', Hk, D], written at cache_seqlens (int32 [B], on the device, or an integer; the tokens there were before; default: the
    cache is full). rotary_cos, rotary_sin: [positions, R / 2] (float32 is best), rotate k at cache_seqlens and following, and q
    likewise if causal or windowed, else all of q at cache_seqlens. cache_batch_idx: int [B], which row of the cache each row of q
    uses. num_splits: 0 leaves it to the kernel. Returns out [B, S, Hq, D], with return_softmax_lse also lse float32 [B, Hq, S].

    Causal with any S, and S = 1, run on `decode_attention`; the rest (several queries without causality, windows to the right,
    softmax_lse) on the kernel for packed sequences, for which pages are gathered first. cache_leftpad is not offered.
    """
    op = "flash_attn_with_kvcache"
    _unsupported(op, alibi_slopes=alibi_slopes, cache_leftpad=cache_leftpad)
    check_same(op, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        check(
            x is None or (x.dim() == 4 and x.shape[3] == q.shape[-1]),
            lambda: f"{op}: {name} has shape {tuple(x.shape)}, expected [batch, tokens, heads, {q.shape[-1]}]",  # noqa: B023
        )
    check((k is None) == (v is None), lambda: f"{op}: {'k' if k is None else 'v'} is None, expected both of k and v, or neither")
    check((rotary_cos is None) == (rotary_sin is None), lambda: f"{op}: expected both of rotary_cos and rotary_sin, or neither")
    check(rotary_cos is None or k is not None, lambda: f"{op}: rotary_cos is given without k, expected new tokens to rotate")
    check(cache_batch_idx is None or block_table is None, lambda: f"{op}: expected one of cache_batch_idx and block_table")
    B, D = q.shape[0], q.shape[3]
    check(k is None or k.shape[0] == B, lambda: f"{op}: k has shape {tuple(k.shape)}, expected batch size {B} as q")
    if cache_batch_idx is not None:  # the rows of the cache are pages as long as the cache
        block_table = cache_batch_idx[:, None]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        check(k is None, lambda: f"{op}: cache_seqlens is None, expected where to write k")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        new = 0 if k is None else k.shape[1]
        check(
            0 <= cache_seqlens <= capacity - new,
            lambda: f"{op}: cache_seqlens is {cache_seqlens}, expected at most {capacity - new}: {new} new tokens in {capacity}",
        )
        cache_seqlens = torch.full((B,), cache_seqlens, dtype=torch.int32, device=q.device)
    found = getattr(cache_seqlens, "dtype", type(cache_seqlens).__name__)
    check(found in (torch.int32, torch.int64), lambda: f"{op}: cache_seqlens is {found}, expected an integer or an int32 tensor")
    found = tuple(cache_seqlens.shape)
    check(found == (B,), lambda: f"{op}: cache_seqlens has shape {found}, expected ({B},) as q")
    left, right = _span(causal, window_size)
    if rotary_cos is not None:
        rotary_cos, rotary_sin = rotary_cos.float(), rotary_sin.float()
    q, k_cache, v_cache, k, v = (None if t is None else t.transpose(1, 2) for t in (q, k_cache, v_cache, k, v))
    out, lse = call(
        _with_kvcache_op, _with_kvcache, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, block_table,
        D**-0.5 if softmax_scale is None else float(softmax_scale), left, right, _cap(softcap), rotary_interleaved,
        num_splits or None, return_softmax_lse,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out
