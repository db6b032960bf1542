"""Attention of a few new queries against a key/value cache: split over the keys, combined in the same launch.

    out = softmax(cap(scale q kᵀ)) v        cap(s) = softcap tanh(s / softcap), or s

The query heads that share a key/value head, times the S new positions, are the rows of one tile, so that the cache is read once
and by tensor cores. Each program walks one split of the keys of one tile with the online softmax (Dao 2023, arXiv:2307.08691)
and leaves its maximum m, its sum l and its weighted values o in float32; the last one to arrive adds them up
(flash-decoding, Dao et al. 2023):

    M = max m        out = sum exp(m - M) o / sum exp(m - M) l

Where the splits lie is decided by the row's own length on the device, never by the batch or by the capacity of the cache: the
bits of a row do not depend on its neighbours, and nothing is compiled or sized anew from step to step.
"""

import contextlib
import threading
from typing import Optional

import torch

from . import reference, tuning
from .attention import LOG2E, _dot, _precision, _tanh
from .dispatch import (
    architecture,
    await_inputs,
    call,
    cdiv,
    check,
    check_same,
    dependence,
    finite,
    fresh,
    jit,
    launch,
    register,
    register_limit,
    release_dependents,
    remembered,
    taped,
    tl,
    uses_triton,
    whole,
)

# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _locate(key, end, table_ptr, table_strides, batch, pages, PAGE: tl.constexpr):
    """(page, slot, whether there is such a page) of the keys numbered `key` of a sequence; page and slot int64, as columns."""
    if PAGE is None:
        page, slot, known = batch, key, key < end
    else:
        page = tl.load(table_ptr + batch * table_strides[0] + key // PAGE * table_strides[1], key < end, other=0)
        slot, known = key % PAGE, (page >= 0) & (page < pages)
        page = page[:, None]
    return page.to(tl.int64), slot[:, None].to(tl.int64), known


@jit
def _combine(
    out_ptr, m_ptr, l_ptr, o_ptr, splits, rows, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """out [rows, D] from the partial results m, l [splits, BLOCK_M] and o [splits, BLOCK_M, D], in the order of the splits. m and l
    are read once a row: read once an element, Triton 3.6 gave each of them threads of its own, and an address to each element."""
    ROWS: tl.constexpr = max(1, BLOCK_E // BLOCK_D)
    col = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < D)
        e = row[:, None] * D + col
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        out = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for first in range(0, splits, 8):
            split = first + tl.arange(0, 8)[:, None]
            mask = (split < splits) & (row < rows)[None, :]
            # .cg: past the first-level cache, which does not follow what other multiprocessors write
            m = tl.load(m_ptr + split * BLOCK_M + row[None, :], mask, other=float("-inf"), cache_modifier=".cg")
            l = tl.load(l_ptr + split * BLOCK_M + row[None, :], mask, other=0.0, cache_modifier=".cg")
            here = (split < splits)[:, :, None] & inside[None, :, :]
            o = tl.load(o_ptr + split[:, :, None] * (BLOCK_M * D) + e[None, :, :], here, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(top, tl.max(m, 0))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(m - safe[None, :])
            shrink = tl.exp2(top - safe)
            total = total * shrink + tl.sum(weight * l, 0)
            out = out * shrink[:, None] + tl.sum(weight[:, :, None] * o, 0)
            top = higher
        out /= tl.where(total == 0.0, 1.0, total)[:, None]  # where it is NaN, so is the result
        tl.store(out_ptr + e, out.to(out_ptr.dtype.element_ty), inside)


@jit(do_not_specialize=["capacity", "pages", "heads", "slots"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lengths_ptr, table_ptr, partial_ptr, counter_ptr, scale, softcap, window,
    S, capacity, pages, heads, slots, q_strides, k_strides, v_strides, length_stride, table_strides,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program for each sequence, key/value head, tile of its queries and split of its keys (the last runs fastest; one axis, as
    the others of a grid end at 65,535): reads its split of k and v once. A row cut into one split is written to `out` at once;
    otherwise partial results of [BLOCK_M, D + 2] float32 a split pass through `partial`."""
    release_dependents(PDL)
    await_inputs(PDL)
    split, program = tl.program_id(0) % slots, tl.program_id(0) // slots
    tiles = tl.cdiv(GROUP * S, BLOCK_M)
    tile, head = program % tiles, program // tiles % heads
    batch = (program // tiles // heads).to(tl.int64)

    # The keys first .. length - 1 are visible to some query; they are cut into splits of equal length.
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch * length_stride), 0), capacity).to(tl.int32)
    first = 0
    if window is not None:
        first = tl.maximum(0, length - S - window + 1)
    step = SPLIT * tl.cdiv(length - first, SPLIT * MAX_SPLITS)
    splits = tl.cdiv(length - first, tl.maximum(step, 1))
    if split >= tl.maximum(splits, 1):
        return
    first += split * step
    end = tl.minimum(first + step, length)

    row = tl.arange(0, BLOCK_M)
    rows = tl.minimum(GROUP * S - tile * BLOCK_M, BLOCK_M)
    col = tl.arange(0, BLOCK_D)
    member, token = (tile * BLOCK_M + row) // S, (tile * BLOCK_M + row) % S
    q_row = batch * q_strides[0] + (head * GROUP + member).to(tl.int64) * q_strides[1] + token.to(tl.int64) * q_strides[2]
    q = tl.load(q_ptr + q_row[:, None] + col[None, :] * q_strides[3], (row < rows)[:, None] & (col < D)[None, :], other=0.0)
    position = (length - S + token)[:, None]

    k_ptr += head.to(tl.int64) * k_strides[1]
    v_ptr += head.to(tl.int64) * v_strides[1]
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lost = tl.zeros((BLOCK_N,), tl.int1)
    for start in range(first, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # Beyond `end` lies another program's split, or what was never written: nothing of it may be read, 0 * NaN is NaN.
        mask = (key < end)[:, None] & (col < D)[None, :]
        page, slot, known = _locate(key, end, table_ptr, table_strides, batch, pages, PAGE)
        if PAGE is not None:
            mask &= known[:, None]
            lost |= ~known
        k = tl.load(k_ptr + page * k_strides[0] + slot * k_strides[2] + col[None, :] * k_strides[3], mask, other=0.0)
        v = tl.load(v_ptr + page * v_strides[0] + slot * v_strides[2] + col[None, :] * v_strides[3], mask, other=0.0)
        score = _dot(q, k.T, None, PRECISION) * tl.cast(scale, tl.float32)
        if softcap is not None:
            score = tl.cast(softcap, tl.float32) * _tanh(score / tl.cast(softcap, tl.float32))
        seen = (key < end)[None, :] & (key[None, :] <= position)
        if window is not None:
            seen &= key[None, :] > position - window
        score = tl.where(seen, score * LOG2E, float("-inf"))
        higher = tl.maximum(m, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN: a row may see nothing of this tile
        weight = tl.exp2(score - safe[:, None])
        shrink = tl.exp2(m - safe)
        l = l * shrink + tl.sum(weight, 1)
        o = _dot(weight.to(v.dtype), v, o * shrink[:, None], PRECISION)
        m = higher
    if PAGE is not None:  # a page that is not there: nothing is read, and NaN says so
        l = tl.where(tl.max(lost.to(tl.int32), 0) > 0, float("nan"), l)

    o_flat = row[:, None] * D + col[None, :]
    mask = (row < rows)[:, None] & (col < D)[None, :]
    program = (tl.program_id(0) // slots).to(tl.int64)
    out_ptr += (program // tiles * (GROUP * S) + tile * BLOCK_M) * D
    if splits <= 1:
        tl.store(out_ptr + o_flat, (o / tl.where(l == 0.0, 1.0, l)[:, None]).to(out_ptr.dtype.element_ty), mask)
    if partial_ptr is not None:  # noqa: SIM102 - the outer condition is settled at compile time
        if splits > 1:
            o_ptr = partial_ptr + program * slots * (BLOCK_M * (D + 2))
            m_ptr = o_ptr + slots * (BLOCK_M * D)
            l_ptr = m_ptr + slots * BLOCK_M
            tl.store(o_ptr + split * (BLOCK_M * D) + o_flat, o, mask)
            tl.store(m_ptr + split * BLOCK_M + row, m, row < rows)
            tl.store(l_ptr + split * BLOCK_M + row, l, row < rows)
            tl.debug_barrier()  # the counter is raised by one thread, after the stores of all
            if tl.atomic_add(counter_ptr + program, 1, sem="acq_rel") == splits - 1:
                _combine(out_ptr, m_ptr, l_ptr, o_ptr, splits, rows, D, BLOCK_M, BLOCK_D, BLOCK_E)
                tl.store(counter_ptr + program, 0)  # as it was found


# --- launcher --------------------------------------------------------------------------------------------------------

_own = threading.local()


@contextlib.contextmanager
def counters(device, programs=16384):
    """Arrival counters that the decode calls within the block share: int32 zeros before and after every call.

    Without them each call that splits clears its own, one more small kernel. A decode step enters this block around its capture
    as a CUDA graph (and keeps the returned tensor as long as the graph); calls that share counters must not run at the same time.
    """
    previous = getattr(_own, "counters", None)
    _own.counters = torch.zeros(programs, dtype=torch.int32, device=device)
    try:
        yield _own.counters
    finally:
        _own.counters = previous


def _counters(programs, device):
    own = getattr(_own, "counters", None)
    if own is not None and own.device == device and own.numel() >= programs:
        return own
    return torch.zeros(programs, dtype=torch.int32, device=device)


def _forward(q, k_cache, v_cache, lengths, scale, window, softcap, block_table, splits):
    B, Hq, S, D = q.shape
    Hk, page = k_cache.shape[1:3]
    capacity = page if block_table is None else page * block_table.shape[1]
    group = Hq // max(1, Hk)
    tile = tuning.decode(architecture(q), D, q.element_size(), group * S)
    split, most = (tile.split, tile.max_splits) if splits is None else (tile.block_n, splits)
    out = fresh(torch.empty((B, Hq, S, D), dtype=q.dtype, device=q.device))
    programs = Hk * cdiv(group * S, tile.block_m)
    visible = capacity if window is None else min(capacity, window + S - 1)
    slots = max(1, min(most, cdiv(visible, split)))
    partial = counter = None
    if slots > 1:
        partial = fresh(torch.empty((B, programs, slots, tile.block_m * (D + 2)), dtype=torch.float32, device=q.device))
        counter = taped(_counters, B * programs, q.device)
    launch(
        _decode_kernel,
        (slots * programs * B,),
        q, k_cache, v_cache, out, lengths, block_table, partial, counter, scale, softcap, window,
        S, capacity, k_cache.shape[0], Hk, slots, q.stride(), k_cache.stride(), v_cache.stride(), lengths.stride(0),
        None if block_table is None else block_table.stride(),
        GROUP=group, D=D, PAGE=None if block_table is None else page, SPLIT=split, MAX_SPLITS=most,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, BLOCK_E=tile.block_e,
        PRECISION=_precision(q), num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        **dependence(q), **register_limit(tile, q),
    )  # fmt: skip
    return out


# --- the op ----------------------------------------------------------------------------------------------------------


def _decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, scale: float, window: Optional[int],
    softcap: Optional[float], block_table: Optional[torch.Tensor], splits: Optional[int],
) -> torch.Tensor:  # fmt: skip
    if uses_triton(q):
        return _forward(q, k_cache, v_cache, lengths, scale, window, softcap, block_table, splits)
    return reference.decode_attention(
        q, k_cache, v_cache, lengths, scale=scale, window=window, softcap=softcap, block_table=block_table
    ).contiguous()


_op = register("decode_attention", _decode_attention, lambda q, *_: q.new_empty(q.shape))


def _check(q, k_cache, v_cache, lengths, window, softcap, block_table, splits):
    op = "decode_attention"
    check_same(op, q=q, k_cache=k_cache, v_cache=v_cache)
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check(t.dim() == 4, lambda: f"{op}: {name} has shape {tuple(t.shape)}, expected four axes")  # noqa: B023
    B, Hq, _, D = q.shape
    pages, Hk, _, width = k_cache.shape
    check(
        v_cache.shape == k_cache.shape,
        lambda: f"{op}: v_cache has shape {tuple(v_cache.shape)}, expected {tuple(k_cache.shape)} as k_cache",
    )
    check(1 <= width == D <= 256, lambda: f"{op}: k_cache has head size {width} and q {D}, expected one head size from 1 to 256")
    check(Hk > 0 and Hq % Hk == 0, lambda: f"{op}: q has {Hq} heads, expected a multiple of the {Hk} of k_cache")
    _check_integers(op, "lengths", lengths, q, "[B]")
    if block_table is not None:
        _check_integers(op, "block_table", block_table, q, "[B, n]")
    if block_table is None:
        check(pages == B, lambda: f"{op}: k_cache holds {pages} sequences, expected {B} as q")
    check(window is None or window >= 1, lambda: f"{op}: window is {window}, expected at least 1 or None")
    check(softcap is None or softcap > 0, lambda: f"{op}: softcap is {softcap}, expected a positive number or None")
    check(splits is None or splits >= 1, lambda: f"{op}: splits is {splits}, expected at least 1 or None")


def _check_integers(op, name, t, q, shape):
    found = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
    check(found in (torch.int32, torch.int64), lambda: f"{op}: {name} is {found}, expected int32")
    check(t.device == q.device, lambda: f"{op}: {name} is on {t.device}, expected {q.device} as q")
    check(
        t.dim() == len(shape.split(",")) and t.shape[0] == q.shape[0],
        lambda: f"{op}: {name} has shape {tuple(t.shape)}, expected {shape} with B = {q.shape[0]}",
    )


@remembered
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, block_table: torch.Tensor | None = None, splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of the newest S tokens of each sequence over its key/value cache, theirs included.

    q: [B, Hq, S, D], float16, bfloat16 or float32, D up to 256. k_cache, v_cache: [B, Hk, T, D] of the same dtype, Hq a multiple
    of Hk; or paged, [pages, Hk, page, D] with block_table int32 [B, n]: key j of sequence b lies in page block_table[b, j // page]
    at j % page. lengths: int32 [B] on the device of q, valid keys a sequence; the S queries are the last S of them, causal among
    themselves. Any strides; what lies beyond a length is never read, nor are the lengths read by the host. So that nothing outside
    the cache is read either, a length below 0 counts as 0, one beyond the capacity as the capacity, and a sequence that needs a
    page outside k_cache gives NaN; on CPU tensors the reference raises ValueError and IndexError for them.

    scale: 1 / sqrt(D) if None. window: a query sees itself and the window - 1 keys before it. softcap: scores become
    softcap * tanh(score / softcap). splits: at most so many programs share the keys of one sequence; None: as many as the
    architecture's table says, which depends on the sequence's own length alone.

    Returns a contiguous [B, Hq, S, D]; a query that sees no key gives 0. Not differentiable. Raises ValueError or TypeError for
    arguments that do not fit. Source: arXiv:2307.08691 and flash-decoding (Dao et al. 2023).
    """
    op = "decode_attention"
    scale, softcap = (None if n is None else finite(op, name, n) for name, n in (("scale", scale), ("softcap", softcap)))
    window, splits = (None if n is None else whole(op, name, n) for name, n in (("window", window), ("splits", splits)))
    _check(q, k_cache, v_cache, lengths, window, softcap, block_table, splits)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(_op, _decode_attention, q, k_cache, v_cache, lengths, scale, window, softcap, block_table, splits)
