"""Attention for prefill and training: softmax(scale q k^T) v tile by tile, the scores never leave the chip.

    s = scale q k^T,   optionally s = softcap tanh(s / softcap)          p = exp(s - lse),   out = p v

Forward: online softmax in base 2 (Dao 2023, arXiv:2307.08691), the statistics in float32. Backward, with the weights recomputed
from lse and delta = rowsum(out dout) - dlse:

    ds = p (dout v^T - delta),   times 1 - tanh^2 under a softcap      dq = scale ds k,   dk = scale ds^T q,   dv = p^T dout

in one kernel for dq and one for dk and dv: each output tile belongs to one program, so there are no atomics and the same input
gives the same bits.

A query at position p sees the keys p - left .. p + right; the last query meets the last key, so query i of S stands at
position i + T - S. Seen from a key it is the same with left and right, S and T exchanged. Packed sequences are the same kernels
with one more offset: a batch of one, cut by `cu_seqlens`, where each program finds its own sequence.
"""

from typing import Literal, Optional, overload

import torch

from . import reference, tuning
from .dispatch import (
    WIDEN,
    architecture,
    asked,
    call,
    call_back,
    cdiv,
    check,
    check_same,
    finite,
    fresh,
    host_sees,
    jit,
    launch,
    nvidia,
    register,
    register_limit,
    remembered,
    taped,
    tl,
    uniform,
    uses_triton,
    whole,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LIMIT = tl.constexpr(2.0**40)  # of a sum of weights, relative to a maximum that later scores may outgrow
LIMIT16 = tl.constexpr(2.0**15)  # for weights that float16 has to hold


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def _tanh(x):
    """Cephes' tanhf: a polynomial near zero, where 1 - 2 / (exp(2x) + 1) would cancel."""
    z = x * x
    near = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1) * z
    return tl.where(tl.abs(x) < 0.625, near * x + x, 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0))


@jit
def _program(tiles, heads, section, LAST_FIRST: tl.constexpr):
    """(number of the tile, flat batch and head) of this program.

    Heads go in sections whose operands fit in the L2 cache together. Within a section the tiles that see most under a causal mask
    start first, so that none of them is left over at the end, and the heads of one group run side by side.
    """
    program = tl.program_id(0)
    first = program // (section * tiles) * section
    width = tl.minimum(section, heads - first)
    inside = program - first * tiles
    tile = inside // width
    return tiles - 1 - tile if LAST_FIRST else tile, first + inside % width


@jit
def _tiles(rows, starts_ptr, sequences, BLOCK: tl.constexpr):
    """How many tiles of BLOCK rows there are; of packed sequences, how many numbers `_place` gives to them."""
    return tl.cdiv(rows, BLOCK) if starts_ptr is None else rows // BLOCK + sequences + 2


@jit
def _cut(starts_ptr, i, sequences, rows):
    """Where packed sequence i begins: 0 are the tokens in front of the first, sequences + 1 those behind the last. Whatever a user
    has written there, it is within the tensor."""
    start = tl.load(starts_ptr + i - 1, (i > 0) & (i < sequences + 2), other=0)
    return tl.where(i < sequences + 2, tl.minimum(tl.maximum(start, 0), rows), rows).to(tl.int32)


@jit
def _place(tile, starts_ptr, others_ptr, sequences, rows, others, CUTS: tl.constexpr, BLOCK: tl.constexpr):
    """(first row of the tile within its sequence, the sequence's offset and length, offset and length of what it sees or is seen
    by). A tile without rows is told by a first row that is not below the length.

    Sequence i, from c to d, has the tiles c // BLOCK + i .. d // BLOCK + i: enough for its rows, and where they begin needs no sum
    over the sequences before. It is looked for as the first that ends behind the tile; so every row belongs to some program even
    where cuts decrease, which would otherwise leave rows unwritten. All at once: a loop here costs the loops that follow registers.
    """
    if starts_ptr is None:
        return tile * BLOCK, tl.cast(0, tl.int64), rows, tl.cast(0, tl.int64), others
    else:
        i = 1 + tl.arange(0, CUTS)
        i = tl.where(_cut(starts_ptr, i, sequences, rows) // BLOCK + i > tile, i, sequences + 2)
        i = uniform(tl.min(i)) - 1
        start = uniform(_cut(starts_ptr, i, sequences, rows))
        length = uniform(_cut(starts_ptr, i + 1, sequences, rows) - start)
        real = (i > 0) & (i <= sequences)
        start_other = uniform(tl.where(real, _cut(others_ptr, i, sequences, others), 0))
        length_other = uniform(tl.where(real, tl.maximum(_cut(others_ptr, i + 1, sequences, others) - start_other, 0), 0))
        return uniform(tile - start // BLOCK - i) * BLOCK, start.to(tl.int64), length, start_other.to(tl.int64), length_other


@jit
def _matrix(
    ptr, rows, strides, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """The matrix [rows, D] at `ptr` as `_tile` reads it: a tensor descriptor, or the pointer itself."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(ptr, [rows, D], [strides[2], 1], [ROWS, BLOCK_D])
    else:
        return ptr


@jit
def _tile(
    matrix, start, rows, strides, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of a matrix [rows, D], zero beyond its edges; BOUNDED: the tile may cross the last row."""
    if DESCRIPTORS:
        return matrix.load([start, 0])
    else:
        row = tl.arange(0, ROWS)[:, None]
        col = tl.arange(0, BLOCK_D)[None, :]
        ptrs = matrix + start * tl.cast(strides[2], tl.int64) + row.to(tl.int64) * strides[2] + col.to(tl.int64) * strides[3]
        if BOUNDED and BLOCK_D > D:
            return tl.load(ptrs, (row < rows - start) & (col < D), other=0.0)
        elif BOUNDED:
            return tl.load(ptrs, row < rows - start, other=0.0)
        elif BLOCK_D > D:
            return tl.load(ptrs, col < D, other=0.0)
        else:
            return tl.load(ptrs)


@jit
def _store(ptr, tile, start, rows, strides, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = start + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + row.to(tl.int64) * strides[2] + col.to(tl.int64) * strides[3]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), (row < rows) & (col < D))


@jit
def _range(m, rows, columns, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(low, a, b, high): what the rows m .. m + BLOCK_M see. Tiles low .. a cross the left edge of some row, tiles a .. b are seen
    whole by every row, tiles b .. high cross the right edge or the last column."""
    first, last = m + columns - rows, tl.minimum(m + BLOCK_M, rows) - 1 + columns - rows
    low, high, b = 0, columns, columns // BLOCK_N * BLOCK_N
    if right is not None:
        high = tl.minimum(columns, tl.maximum(last + right + 1, 0))
        b = tl.minimum(b, tl.maximum(first + right + 1, 0) // BLOCK_N * BLOCK_N)
    a = low
    if left is not None:
        low = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        a = tl.minimum(tl.cdiv(tl.maximum(last - left, 0), BLOCK_N), tl.cdiv(high, BLOCK_N)) * BLOCK_N
        b = tl.maximum(a, b)
    return low, a, b, high


@jit
def _edge_tiles(low, a, b, high, left):
    """(start, stop) of one walk over the tiles at both edges: from a on they lie b - a further, the gap between the edges. A loop
    for each edge would cost registers for each."""
    if left is None:
        return b, high
    else:
        return low, high - (b - a)


@jit
def _edges(m, rows, columns, left, right, BLOCK_M: tl.constexpr):
    """(first, one past the last) column that each of the rows m .. m + BLOCK_M sees; first means nothing without a left limit.
    Rows that are none see what the last one does."""
    position = tl.minimum(m + tl.arange(0, BLOCK_M), rows - 1) + (columns - rows)
    starts = position if left is None else position - left
    stops = position * 0 + columns if right is None else tl.minimum(columns, position + right + 1)
    return starts, stops


@jit
def _seen(n, starts, stops, left, BLOCK_N: tl.constexpr):
    column = tl.arange(0, BLOCK_N)[None, :]
    seen = column < (stops - n)[:, None]
    if left is not None:
        seen = seen & (column >= (starts - n)[:, None])
    return seen


@jit
def _base2(scale, softcap):
    """What a product of q and k is multiplied by: with exp2 instead of exp, or before tanh."""
    scale = tl.cast(scale, tl.float32)
    return scale * LOG2E if softcap is None else scale / tl.cast(softcap, tl.float32)


@jit
def _cap(t, softcap):
    return t * (tl.cast(softcap, tl.float32) * LOG2E)


@jit
def _scores(
    q, k, n, T, scale, softcap, k_strides, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """(products with a tile of keys, what multiplies them to make scores in base 2): often that is part of a multiply-add."""
    k_tile = _tile(k, n, T, k_strides, BLOCK_N, D, BLOCK_D, DESCRIPTORS, BOUNDED)
    s = _dot(q, k_tile.T, None, PRECISION)
    if softcap is None:
        return s, scale
    else:
        return _cap(_tanh(s * scale), softcap), 1.0


@jit
def _forward_steps(
    q, acc, total, top, k, v, start, stop, T, starts, stops, left, scale, softcap, k_strides, v_strides,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr, RISING: tl.constexpr, a=None, gap=None, STAGES: tl.constexpr = None,
):  # fmt: skip
    """Walks the keys start .. stop: acc and total are the sums of the weighted values and of the weights, relative to exp2(top).
    top rises with the largest score (base 2), or, if not RISING, stays what it is."""
    for n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        if gap is not None:
            n = tl.where(n < a, n, n + gap)
        s, unit = _scores(q, k, n, T, scale, softcap, k_strides, D, BLOCK_D, BLOCK_N, PRECISION, DESCRIPTORS, MASKED)
        if MASKED:
            s = tl.where(_seen(n, starts, stops, left, BLOCK_N), s * unit, float("-inf"))
            unit = 1.0
        before = top
        if RISING:
            top = tl.maximum(top, tl.max(s, 1) * unit)
        # A row that has seen nothing so far is at -inf, and -inf - -inf is NaN.
        shift = tl.where(top == float("-inf"), 0.0, top) if MASKED else top
        p = tl.exp2(s * unit - shift[:, None])
        v_tile = _tile(v, n, T, v_strides, BLOCK_N, D, BLOCK_D, DESCRIPTORS, MASKED)
        if RISING:
            alpha = tl.exp2(before - shift)
            acc = acc * alpha[:, None]
            total = total * alpha
        acc = _dot(p.to(v_tile.dtype), v_tile, acc, PRECISION)
        total += tl.sum(p, 1)
    return acc, total, top


@jit(do_not_specialize=["sequences", "S", "T", "left", "right", "heads", "section", "lse_stride"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_q_ptr, starts_k_ptr, sequences, scale, softcap, left, right, S, T, heads, section,
    lse_stride, q_strides, k_strides, v_strides, out_strides,
    CUTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head against all keys it sees. Reads the queries once and writes the output once; keys
    and values come once a tile, mostly from L2. The accumulator and the statistics stay in registers.

    Softmax needs no maximum, only some number that keeps exp in range. The tiles at the edge of the mask, or a first look at the
    first tile, give one; the others are walked as if no score were much larger, without maxima and rescaling, a quarter of the
    loop. Where the sums tell that one was, everything is walked again with a maximum that rises.
    """
    tile, flat = _program(_tiles(S, starts_q_ptr, sequences, BLOCK_M), heads, section, True)
    batch, head = (flat // HEADS).to(tl.int64), flat % HEADS
    m, start_q, S, start_k, T = _place(tile, starts_q_ptr, starts_k_ptr, sequences, S, T, CUTS, BLOCK_M)
    if m >= S:
        return
    kv_head = (head // GROUP).to(tl.int64)
    head = head.to(tl.int64)
    q_ptr += batch * q_strides[0] + head * q_strides[1] + start_q * q_strides[2]
    k_ptr += batch * k_strides[0] + kv_head * k_strides[1] + start_k * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[1] + start_k * v_strides[2]

    low, a, b, high = _range(m, S, T, left, right, BLOCK_M, BLOCK_N)
    start, stop = _edge_tiles(low, a, b, high, left)
    starts, stops = _edges(m, S, T, left, right, BLOCK_M)
    factor = _base2(scale, softcap)
    q_ptr += m * tl.cast(q_strides[2], tl.int64)
    q = _tile(q_ptr, 0, S - m, q_strides, BLOCK_M, D, BLOCK_D, False, True)
    k = _matrix(k_ptr, T, k_strides, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
    v = _matrix(v_ptr, T, v_strides, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    limit = LIMIT16 if k_ptr.dtype.element_ty == tl.float16 else LIMIT
    # The tiles at the edge give a maximum if all rows see a key there: near enough where weights have the range of float32.
    blind = b >= T
    if right is not None:
        blind |= m + T - S + right < b
    if a < b and (blind or limit == LIMIT16):
        s, unit = _scores(q, k, a, T, factor, softcap, k_strides, D, BLOCK_D, BLOCK_N, PRECISION, DESCRIPTORS, False)
        top = tl.max(s, 1) * unit
    acc, total, top = _forward_steps(
        q, acc, total, top, k, v, start, stop, T, starts, stops, left, factor, softcap, k_strides, v_strides,
        D, BLOCK_D, BLOCK_N, PRECISION, DESCRIPTORS, True, True, a, None if left is None else b - a,
    )  # fmt: skip
    acc, total, top = _forward_steps(
        q, acc, total, top, k, v, a, b, T, starts, stops, left, factor, softcap, k_strides, v_strides,
        D, BLOCK_D, BLOCK_N, PRECISION, DESCRIPTORS, False, False,
    )  # fmt: skip
    if tl.max(total) > limit:  # rare: few registers matter more than loads under way
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc, total, top = _forward_steps(
            q, acc, total, top, k, v, low, high, T, starts, stops, left, factor, softcap, k_strides, v_strides,
            D, BLOCK_D, BLOCK_N, PRECISION, DESCRIPTORS, True, True, None, None, 1,
        )  # fmt: skip

    out_ptr += batch * out_strides[0] + head * out_strides[1] + start_q * out_strides[2]
    total = tl.where(total == 0.0, 1.0, total)  # a row that saw nothing: 0 / 1, and -inf + log2(1)
    _store(out_ptr, acc * (1.0 / total)[:, None], m, S, out_strides, BLOCK_M, D, BLOCK_D)
    if lse_ptr is not None:
        lse_ptr += flat.to(tl.int64) * lse_stride + start_q
        row = m + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + row, (top + tl.log2(total)) * LN2, row < S)


@jit(do_not_specialize=["rows", "S"])
def _delta_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr, rows, S, HEADS: tl.constexpr, out_strides, dout_strides,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the backward kernels need of each row of [B, H, S]: delta = rowsum(out dout) - dlse, and lse in base 2, infinite where
    nothing was seen, so that the weights of such a row come out as zero."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_D)[None, :]
    batch, head, m = row // S // HEADS, row // S % HEADS, row % S
    inside = (row < rows)[:, None] & (col < D)
    out_ptr += (batch * out_strides[0] + head * out_strides[1] + m * out_strides[2])[:, None]
    dout_ptr += (batch * dout_strides[0] + head * dout_strides[1] + m * dout_strides[2])[:, None]
    out = tl.load(out_ptr + col * out_strides[3], inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + col * dout_strides[3], inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, row < rows, other=0.0)
    lse = tl.load(lse_ptr + row, row < rows, other=0.0)
    tl.store(delta_ptr + row, delta, row < rows)
    tl.store(lse2_ptr + row, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), row < rows)


@jit
def _weights(s, lse, softcap):
    return tl.exp2(s - lse) if softcap is None else tl.exp2(_cap(s, softcap) - lse)


@jit
def _dq_steps(
    q, dout, lse, delta, dq, k, v, start, stop, T, starts, stops, left, scale, softcap, k_strides, v_strides,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr, a=None, gap=None,
):  # fmt: skip
    for n in range(start, stop, BLOCK_N):
        if gap is not None:
            n = tl.where(n < a, n, n + gap)
        k_tile = _tile(k, n, T, k_strides, BLOCK_N, D, BLOCK_D, DESCRIPTORS, MASKED)
        v_tile = _tile(v, n, T, v_strides, BLOCK_N, D, BLOCK_D, DESCRIPTORS, MASKED)
        s = _dot(q, k_tile.T, None, PRECISION) * scale
        if softcap is not None:
            s = _tanh(s)
        p = _weights(s, lse[:, None], softcap)
        if MASKED:
            p = tl.where(_seen(n, starts, stops, left, BLOCK_N), p, 0.0)
        if softcap is not None:
            p *= 1.0 - s * s
        ds = p * (_dot(dout, v_tile.T, None, PRECISION) - delta[:, None])
        dq = _dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION)
    return dq


@jit(do_not_specialize=["sequences", "S", "T", "left", "right", "heads", "section", "row_stride"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, starts_q_ptr, starts_k_ptr, sequences, scale, softcap, left, right,
    S, T, heads, section, row_stride, q_strides, k_strides, v_strides, dout_strides, dq_strides,
    CUTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of BLOCK_M queries of one head: walks the keys as the forward does, three products a tile."""
    tile, flat = _program(_tiles(S, starts_q_ptr, sequences, BLOCK_M), heads, section, True)
    batch, head = (flat // HEADS).to(tl.int64), (flat % HEADS).to(tl.int64)
    m, start_q, S, start_k, T = _place(tile, starts_q_ptr, starts_k_ptr, sequences, S, T, CUTS, BLOCK_M)
    if m >= S:
        return
    kv_head = head // GROUP
    q_ptr += batch * q_strides[0] + head * q_strides[1] + (start_q + m) * q_strides[2]
    dout_ptr += batch * dout_strides[0] + head * dout_strides[1] + (start_q + m) * dout_strides[2]
    k_ptr += batch * k_strides[0] + kv_head * k_strides[1] + start_k * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[1] + start_k * v_strides[2]
    low, a, b, high = _range(m, S, T, left, right, BLOCK_M, BLOCK_N)
    start, stop = _edge_tiles(low, a, b, high, left)
    starts, stops = _edges(m, S, T, left, right, BLOCK_M)
    factor = _base2(scale, softcap)

    row = tl.arange(0, BLOCK_M)
    first = flat.to(tl.int64) * row_stride + start_q + m
    lse = tl.load(lse_ptr + first + row, row < S - m, other=float("inf"))
    delta = tl.load(delta_ptr + first + row, row < S - m, other=0.0)
    q = _tile(q_ptr, 0, S - m, q_strides, BLOCK_M, D, BLOCK_D, False, True)
    dout = _tile(dout_ptr, 0, S - m, dout_strides, BLOCK_M, D, BLOCK_D, False, True)
    k = _matrix(k_ptr, T, k_strides, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
    v = _matrix(v_ptr, T, v_strides, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = _dq_steps(
        q, dout, lse, delta, dq, k, v, a, b, T, starts, stops, left, factor, softcap, k_strides, v_strides,
        D, BLOCK_D, BLOCK_N, PRECISION, DESCRIPTORS, False,
    )  # fmt: skip
    dq = _dq_steps(
        q, dout, lse, delta, dq, k, v, start, stop, T, starts, stops, left, factor, softcap, k_strides, v_strides,
        D, BLOCK_D, BLOCK_N, PRECISION, DESCRIPTORS, True, a, None if left is None else b - a,
    )  # fmt: skip
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1] + start_q * dq_strides[2]
    _store(dq_ptr, dq * tl.cast(scale, tl.float32), m, S, dq_strides, BLOCK_M, D, BLOCK_D)


@jit
def _dkv_steps(
    k, v, dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, start, stop, S, starts, stops, right, scale, softcap, q_strides,
    dout_strides, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, GATHER: tl.constexpr,
    MASKED: tl.constexpr, a=None, gap=None, STAGES: tl.constexpr = None,
):  # fmt: skip
    """Everything is transposed, keys by queries: the weights are then the left operand of the products with dout and q.

    GATHER: lse and delta reach the threads through shared memory. They would anyway; but a gather of everything in its place cannot
    be moved into the load, where every thread would copy all rows of its scores, with an address in registers for each."""
    for m in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        if gap is not None:
            m = tl.where(m < a, m, m + gap)
        row = m + tl.arange(0, BLOCK_M)
        if MASKED:
            lse = tl.load(lse_ptr + row, row < S, other=float("inf"))
            delta = tl.load(delta_ptr + row, row < S, other=0.0)
        else:
            lse = tl.load(lse_ptr + row)
            delta = tl.load(delta_ptr + row)
        if GATHER:
            lse, delta = tl.gather(lse, tl.arange(0, BLOCK_M), 0), tl.gather(delta, tl.arange(0, BLOCK_M), 0)
        q = _tile(q_ptr, m, S, q_strides, BLOCK_M, D, BLOCK_D, False, MASKED)
        dout = _tile(dout_ptr, m, S, dout_strides, BLOCK_M, D, BLOCK_D, False, MASKED)
        s = _dot(k, q.T, None, PRECISION) * scale
        if softcap is not None:
            s = _tanh(s)
        p = _weights(s, lse[None, :], softcap)
        if MASKED:
            p = tl.where(_seen(m, starts, stops, right, BLOCK_M), p, 0.0)
        dv = _dot(p.to(dout.dtype), dout, dv, PRECISION)
        if softcap is not None:
            p *= 1.0 - s * s  # here, so that s need not wait for the product
        ds = p * (_dot(v, dout.T, None, PRECISION) - delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@jit(do_not_specialize=["sequences", "S", "T", "left", "right", "heads", "section", "row_stride"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, starts_q_ptr, starts_k_ptr, sequences, scale, softcap, left,
    right, S, T, heads, section, row_stride, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    CUTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, GATHER: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of BLOCK_N keys and values of one head: walks the queries of all heads of its group in turn, so
    that the group is summed in registers, four products a tile."""
    tile, flat = _program(_tiles(T, starts_k_ptr, sequences, BLOCK_N), heads, section, False)
    batch, kv_head = (flat // HEADS).to(tl.int64), (flat % HEADS).to(tl.int64)
    n, start_k, T, start_q, S = _place(tile, starts_k_ptr, starts_q_ptr, sequences, T, S, CUTS, BLOCK_N)
    if n >= T:
        return
    q_ptr += batch * q_strides[0] + kv_head * GROUP * q_strides[1] + start_q * q_strides[2]
    dout_ptr += batch * dout_strides[0] + kv_head * GROUP * dout_strides[1] + start_q * dout_strides[2]
    k_ptr += batch * k_strides[0] + kv_head * k_strides[1] + (start_k + n) * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[1] + (start_k + n) * v_strides[2]
    first = flat.to(tl.int64) * GROUP * row_stride + start_q
    lse_ptr += first
    delta_ptr += first
    low, a, b, high = _range(n, T, S, right, left, BLOCK_N, BLOCK_M)
    start, stop = _edge_tiles(low, a, b, high, right)
    starts, stops = _edges(n, T, S, right, left, BLOCK_N)
    factor = _base2(scale, softcap)

    k = _tile(k_ptr, 0, T - n, k_strides, BLOCK_N, D, BLOCK_D, False, True)
    v = _tile(v_ptr, 0, T - n, v_strides, BLOCK_N, D, BLOCK_D, False, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for _ in range(GROUP):
        dk, dv = _dkv_steps(
            k, v, dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, start, stop, S, starts, stops, right, factor, softcap, q_strides,
            dout_strides, D, BLOCK_D, BLOCK_M, PRECISION, GATHER, True, a, None if right is None else b - a, EDGE_STAGES,
        )  # fmt: skip
        dk, dv = _dkv_steps(
            k, v, dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, a, b, S, starts, stops, right, factor, softcap, q_strides,
            dout_strides, D, BLOCK_D, BLOCK_M, PRECISION, GATHER, False,
        )  # fmt: skip
        q_ptr += q_strides[1]
        dout_ptr += dout_strides[1]
        lse_ptr += row_stride
        delta_ptr += row_stride
    dk_ptr += batch * dk_strides[0] + kv_head * dk_strides[1] + start_k * dk_strides[2]
    dv_ptr += batch * dv_strides[0] + kv_head * dv_strides[1] + start_k * dv_strides[2]
    _store(dk_ptr, dk * tl.cast(scale, tl.float32), n, T, dk_strides, BLOCK_N, D, BLOCK_D)
    _store(dv_ptr, dv, n, T, dv_strides, BLOCK_N, D, BLOCK_D)


# --- launchers -------------------------------------------------------------------------------------------------------


def _precision(x):
    """float32 means float32, unless the user has allowed TF32 in torch: three products of tensor cores (Ootomo and Yokota 2022,
    arXiv:2203.03341), as scalar multiplications keep whole rows of both operands in registers. AMD has only those."""
    if x.dtype != torch.float32:
        return "ieee"
    if asked(_allow_tf32):
        return "tf32"
    return "tf32x3" if nvidia(x) else "ieee"


def _allow_tf32():
    matmul = torch.backends.cuda.matmul
    # torch 2.9 has a switch of three states instead; who has set that one may no longer read the old one, which sets the new one.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _strides(x, starts):
    """Strides of [B, H, S, D] for a kernel. Packed sequences share one batch row. The distance of two rows is a property of the
    model, not of lengths, so it is compiled in: the addresses of a tile then need one register instead of one each."""
    batch, head, row, column = x.stride()
    return tl.constexpr(0) if starts is not None else batch, head, tl.constexpr(row) if column == 1 else row, column


def _section(x, heads, group):
    """How many of `heads` run side by side: as many as keep two operands like x in the L2 cache, `group` heads sharing each."""
    fitting = tuning.l2_bytes(architecture(x)) // max(1, 2 * x.shape[2] * x.shape[3] * x.element_size())
    return max(1, min(heads, fitting * group))


def _constants(tile, x):
    return {
        "D": x.shape[3], "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tuning.block_d(x.shape[3]),
        "PRECISION": _precision(x), "num_warps": tile.warps, "num_stages": tile.stages,
        **register_limit(tile, x),
        "enable_fp_fusion": True,  # a score times the scale minus the maximum is one instruction; Triton 3.10 no longer says so
    }  # fmt: skip


def _describable(x):
    """Whether the matrices of x [B, H, S, D] can be read through tensor descriptors: rows contiguous and 16-byte aligned."""
    return x.stride(3) == 1 and not any(n * x.element_size() % 16 for n in (*x.stride()[:3], x.data_ptr() // x.element_size()))


def _grid(rows, starts, heads, block):
    """As many programs as `_tiles` has tiles, times heads."""
    return ((cdiv(rows, block) if starts is None else rows // block + len(starts) + 1) * heads,)


def _forward(q, k, v, starts_q, starts_k, scale, softcap, left, right, need_lse):
    """(out [B, Hq, S, D], in memory [B, S, Hq, D]; lse [B, Hq, S] or empty). Packed sequences: B is 1, `starts` cut S and T."""
    out, lse = (fresh(t) for t in _outputs(q, need_lse))
    if scale < 0:  # the kernel takes the largest score before it scales
        q, scale = taped(torch.neg, q), -scale
    B, Hq, S, D = q.shape
    Hk, T = k.shape[1:3]
    tile = tuning.attention(architecture(q), D, q.element_size())
    descriptors = tile.descriptors and _describable(k) and _describable(v)
    launch(
        _forward_kernel,
        _grid(S, starts_q, B * Hq, tile.block_m),
        q, k, v, out, lse if need_lse else None, starts_q, starts_k, _sequences(starts_q), scale, softcap, left, right,
        S, T, B * Hq, _section(k, B * Hq, Hq // Hk), S,
        *(_strides(t, starts_q) for t in (q, k, v, out)),
        CUTS=_cuts(starts_q), HEADS=Hq, GROUP=Hq // Hk, DESCRIPTORS=descriptors, **_constants(tile, q),
    )  # fmt: skip
    return out, lse


def _sequences(starts):
    return None if starts is None else len(starts) - 1  # nothing to pass: a parameter more moves those behind it


def _cuts(starts):
    """How many cuts a program looks through. Few classes: each is compiled anew."""
    return None if starts is None else next(n for n in (256, 2048, 16384, 2**20) if len(starts) <= n)


def _backward(dout, dlse, q, k, v, out, lse, starts_q, starts_k, scale, softcap, left, right, need_dq, need_dkv):
    """(dq, dk, dv), those that are not needed are empty."""
    B, Hq, S, D = q.shape
    Hk, T = k.shape[1:3]
    arch, group = architecture(q), Hq // Hk
    dq, dk, dv = _gradients_like(q, k, v, need_dq, need_dkv)
    delta, lse2 = torch.empty((2, B, Hq, S), dtype=torch.float32, device=q.device)
    launch(
        _delta_kernel,
        (cdiv(B * Hq * S, 4096 // tuning.block_d(D)),),
        out, dout, lse, None if dlse is None else dlse.contiguous(), delta, lse2, B * Hq * S, S, Hq, out.stride(), dout.stride(),
        D=D, BLOCK_M=4096 // tuning.block_d(D), BLOCK_D=tuning.block_d(D), num_warps=4,
    )  # fmt: skip
    tile_dq, tile_dkv = tuning.attention_backward(arch, D, q.element_size())
    if need_dq:
        descriptors = tile_dq.descriptors and _describable(k) and _describable(v)
        launch(
            _dq_kernel,
            _grid(S, starts_q, B * Hq, tile_dq.block_m),
            q, k, v, dout, lse2, delta, dq, starts_q, starts_k, _sequences(starts_q), scale, softcap, left, right,
            S, T, B * Hq, _section(k, B * Hq, group), S,
            *(_strides(t, starts_q) for t in (q, k, v, dout, dq)),
            CUTS=_cuts(starts_q), HEADS=Hq, GROUP=group, DESCRIPTORS=descriptors, **_constants(tile_dq, q),
        )  # fmt: skip
    if need_dkv:
        launch(
            _dkv_kernel,
            _grid(T, starts_k, B * Hk, tile_dkv.block_n),
            q, k, v, dout, lse2, delta, dk, dv, starts_q, starts_k, _sequences(starts_k), scale, softcap, left, right,
            S, T, B * Hk, _section(q, B * Hq, 1) // group or 1, S,
            *(_strides(t, starts_q) for t in (q, k, v, dout, dk, dv)),
            CUTS=_cuts(starts_k), HEADS=Hk, GROUP=group, GATHER=tile_dkv.gather, EDGE_STAGES=tile_dkv.edge_stages,
            **_constants(tile_dkv, q),
        )  # fmt: skip
    return dq, dk, dv


# --- the op: custom op for the dispatcher, gradients, checks -----------------------------------------------------------


def _outputs(q, need_lse):
    """Uninitialised (out, lse). In memory out is [B, S, H, D], so that a caller's transpose and reshape to [B, S, H D] is free."""
    B, H, S, D = q.shape
    lse = q.new_empty((B, H, S) if need_lse else (0,), dtype=reference.wide(q.dtype))
    return q.new_empty((B, S, H, D)).transpose(1, 2), lse


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts_q: Optional[torch.Tensor], starts_k: Optional[torch.Tensor],
    scale: float, softcap: Optional[float], left: Optional[int], right: Optional[int], need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    sequences, triton = None, uses_triton(q)
    if starts_q is not None and (not triton or host_sees(starts_q, starts_k)):
        sequences = reference.sequences(starts_q, starts_k, q.shape[2], k.shape[2])
    if triton:
        return _forward(q, k, v, starts_q, starts_k, scale, softcap, left, right, need_lse)
    if sequences is None:
        out, lse = reference.attention(q, k, v, scale, left, right, softcap, need_lse)
        return _heads_inside(out), lse.contiguous() if need_lse else q.new_empty(0, dtype=reference.wide(q.dtype))
    out, lse = _outputs(q, need_lse)
    for rows, keys in sequences:
        o, l = reference.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], scale, left, right, softcap, need_lse)
        out[:, :, rows] = o
        if need_lse:
            lse[:, :, rows] = l
    return out, lse


def _heads_inside(x):
    """x [B, H, S, D] as `_outputs` lays it out: in memory [B, S, H, D]."""
    _, H, S, D = x.shape
    return x if x.stride() == (S * H * D, D, H * D, 1) else x.transpose(1, 2).contiguous().transpose(1, 2)


def _gradients_like(q, k, v, need_dq, need_dkv):
    """Uninitialised (dq, dk, dv), in memory [B, S, H, D] as `out`; empty where not needed."""
    need = (need_dq, need_dkv, need_dkv)
    return tuple(_outputs(t, False)[0] if n else t.new_empty(0) for t, n in zip((q, k, v), need))


def _attention_backward(
    dout: torch.Tensor, dlse: Optional[torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, starts_q: Optional[torch.Tensor], starts_k: Optional[torch.Tensor], scale: float, softcap: Optional[float],
    left: Optional[int], right: Optional[int], need_dq: bool, need_dkv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    if uses_triton(q):
        return _backward(dout, dlse, q, k, v, out, lse, starts_q, starts_k, scale, softcap, left, right, need_dq, need_dkv)
    if starts_q is None:
        parts = reference.attention_backward(dout, dlse, q, k, v, out, lse, scale, left, right, softcap)
        need = (need_dq, need_dkv, need_dkv)
        return tuple(_heads_inside(t) if n else t.new_empty(0) for t, n in zip(parts, need))
    gradients = _gradients_like(q, k, v, need_dq, need_dkv)
    for rows, keys in reference.sequences(starts_q, starts_k, q.shape[2], k.shape[2]):
        parts = reference.attention_backward(
            dout[:, :, rows], None if dlse is None else dlse[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys],
            out[:, :, rows], lse[:, :, rows], scale, left, right, softcap,
        )  # fmt: skip
        for gradient, part, where in zip(gradients, parts, (rows, keys, keys)):
            if gradient.dim() == 4:
                gradient[:, :, where] = part
    return gradients


_attention_op = register(
    "flash_attention", _attention, lambda q, *rest: _outputs(q, rest[-1]),
    backward=lambda ctx, dout, dlse: _gradients(ctx, dout, dlse),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
)  # fmt: skip
_backward_op = register(
    "flash_attention_backward", _attention_backward,
    lambda dout, dlse, q, k, v, *rest: _gradients_like(q, k, v, *rest[-2:]),
)  # fmt: skip


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.rest = inputs[5:-1]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse):
    q, k, v, starts_q, starts_k, out, lse = ctx.saved_tensors
    need_dq, need_dkv = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = dout, dlse, q, k, v, out, lse, starts_q, starts_k, *ctx.rest, need_dq, need_dkv
    dq, dk, dv = call_back(_backward_op, _attention_backward, *inputs)
    return dq if need_dq else None, *((dk, dv) if need_dkv else (None, None)), *([None] * (len(ctx.needs_input_grad) - 3))


def _check(op, q, k, v, softcap, window, axes):
    check_same(op, q=q, k=k, v=v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check(t.dim() == len(axes), lambda: f"{op}: {name} has shape {tuple(t.shape)}, expected [{', '.join(axes)}]")  # noqa: B023
    Hq, Hk, D = q.shape[axes.index("H")], k.shape[axes.index("H")], q.shape[-1]
    check(k.shape[-1] == D, lambda: f"{op}: k has head size {k.shape[-1]}, expected {D} as q")
    check(v.shape == k.shape, lambda: f"{op}: v has shape {tuple(v.shape)}, expected {tuple(k.shape)} as k")
    check(1 <= D <= 256, lambda: f"{op}: q has head size {D}, expected 1 to 256")
    check(Hk > 0 and Hq % Hk == 0, lambda: f"{op}: q has {Hq} heads, expected a multiple of k's {Hk}")
    softcap = None if softcap is None else finite(op, "softcap", softcap)
    check(softcap is None or softcap > 0, lambda: f"{op}: softcap is {softcap}, expected a positive number or None")
    window = None if window is None else whole(op, "window", window, "a positive integer or None")
    check(window is None or window > 0, lambda: f"{op}: window is {window}, expected a positive integer or None")
    return softcap, window


def _check_starts(op, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(starts, torch.Tensor) or starts.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} is {getattr(starts, 'dtype', type(starts).__name__)}, expected an int32 or int64 tensor")
        check(starts.device == q.device, lambda: f"{op}: {name} is on {starts.device}, expected {q.device} as q")  # noqa: B023
        check(
            starts.dim() == 1 and len(starts) >= 1 and starts.is_contiguous(),
            lambda: f"{op}: {name} has shape {tuple(starts.shape)}, expected [sequences + 1], contiguous",  # noqa: B023
        )
    check(
        len(cu_seqlens_q) == len(cu_seqlens_k),
        lambda: f"{op}: cu_seqlens_k has {len(cu_seqlens_k)} entries, expected {len(cu_seqlens_q)} as cu_seqlens_q",
    )
    if host_sees(cu_seqlens_q, cu_seqlens_k):
        taped(_refuse_lengths, f"{op}: cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
        taped(_refuse_lengths, f"{op}: cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k)


def _refuse_lengths(name, starts, x, longest):
    """Lengths can pass for cuts; they add up to the tokens, and the largest is the longest."""
    lengths = starts.tolist()
    check(
        lengths[0] == 0 or sum(lengths) != x.shape[0] or max(lengths) != longest,
        lambda: f"{name} holds lengths, which add up to the {x.shape[0]} tokens, expected where sequences start and end",
    )


def _run(op, q, k, v, starts_q, starts_k, left, right, scale, softcap, return_lse):
    scale = q.shape[-1] ** -0.5 if scale is None else finite(op, "scale", scale)
    need_lse = return_lse or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    return call(_attention_op, _attention, q, k, v, starts_q, starts_k, scale, softcap, left, right, need_lse)


@overload
def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, return_lse: Literal[False] = False,
) -> torch.Tensor: ...  # fmt: skip


@overload
def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@remembered
def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """softmax(scale q k^T) v, the scores never written to memory.

    q: [B, Hq, S, D]; k, v: [B, Hk, T, D], Hq a multiple of Hk (query head h reads key head h // (Hq / Hk)); float16, bfloat16 or
    float32, any strides, D at most 256. scale: default 1 / sqrt(D). causal: aligned bottom-right, the last query sees the last
    key. window=w: a query sees itself and the w - 1 keys before it. softcap=c: scores become c tanh(scores / c).

    Returns out [B, Hq, S, D], in memory [B, S, Hq, D], and with return_lse also the logarithm (natural) of each row's sum of
    exponentials, float32 [B, Hq, S]. A row that sees no key gives 0 and -inf. Differentiable in q, k and v.
    Raises ValueError or TypeError for arguments that do not fit. Source: arXiv:2307.08691.
    """
    op = "flash_attention"
    softcap, window = _check(op, q, k, v, softcap, window, ("B", "H", "S", "D"))
    check(q.shape[0] == k.shape[0], lambda: f"{op}: k has shape {tuple(k.shape)}, expected batch size {q.shape[0]} as q")
    out, lse = _run(op, q, k, v, None, None, *reference.span(causal, window), scale, softcap, return_lse)
    return (out, lse) if return_lse else out


@overload
def flash_attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, return_lse: Literal[False] = False,
) -> torch.Tensor: ...  # fmt: skip


@overload
def flash_attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@remembered
def flash_attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`flash_attention` of sequences packed one behind the other, each for itself.

    q: [tokens, Hq, D]; k, v: [tokens, Hk, D]. cu_seqlens_q, cu_seqlens_k: integers [B + 1] on the same device, sequence b is made
    of the tokens cu_seqlens[b] .. cu_seqlens[b + 1]. Tokens in front of the first and behind the last belong to none: out and their
    gradients are 0 there, lse is -inf. max_seqlen_q, max_seqlen_k: the longest lengths, which flash-attention's callers have at
    hand; nothing depends on them. Returns out [tokens, Hq, D] and with return_lse also lse [Hq, tokens].

    Cuts that decrease or lie outside the tensor are refused where they are on the CPU. On a GPU, where that would mean to wait for
    it, they count as if moved to the tensor's ends: nothing outside it is read, every row is written, and which sequence a token
    between such cuts is taken to be of is not said. Everything else as in `flash_attention`.
    """
    op = "flash_attention_varlen"
    softcap, window = _check(op, q, k, v, softcap, window, ("tokens", "H", "D"))
    _check_starts(op, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q, k, v = (taped(_batch_of_one, t) for t in (q, k, v))
    out, lse = _run(op, q, k, v, cu_seqlens_q, cu_seqlens_k, *reference.span(causal, window), scale, softcap, return_lse)
    out = taped(_only, out)
    return (out, taped(torch.Tensor.squeeze, lse, 0)) if return_lse else out


def _batch_of_one(x):
    """[tokens, H, D] as [1, H, tokens, D]"""
    return x.transpose(0, 1).unsqueeze(0)


def _only(x):
    """[1, H, tokens, D] as [tokens, H, D]"""
    return x.squeeze(0).transpose(0, 1)
