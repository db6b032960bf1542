"""A decode step on a CPU, compiled by Numba: all layers in one call, `decode_layers`, and the head's product, `decode_linear`.

PyTorch's products of one row reach 25 to 90 % of the memory's bandwidth, depending on vendor and dtype, and every call of it costs
as much as reading a small weight. Here every core streams rows of the weight, each read from memory once for all rows of x and
widened to float32 in registers; norm, SwiGLU and residual ride along, and only results are rounded, as in the Triton kernels. All
sums are in float32, in an order that depends on the weight or a sequence's own length alone: a row has the same bits whatever its
neighbours.

Weights are passed by address: turning a tensor into an array costs more than many of them take to multiply. What these kernels do
not take (other dtypes, more rows) is left to `reference`. Imported when a step first needs it; the machine code is kept on disk.
"""

import logging
import os
import threading
from types import SimpleNamespace

import numba
import numpy as np
import torch
from numba import prange, types
from numba.extending import intrinsic, overload

from . import reference
from .linear import ROWS
from .quantized import QuantizedWeight

WORTH = 2**24  # bytes: smaller weights are read in a millisecond, which never pays for seconds of compiling
CHUNK = 8  # rows of a weight that a core takes at a time
SPLIT = 128  # keys that a core takes at a time
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}  # sums in vectors; NaN and infinity stay what they are

_ELEMENTS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8, torch.uint8: np.uint8}
_KIND = {dtype: np.empty(0, element) for dtype, element in _ELEMENTS.items()}  # tells a kernel the type of what an address holds
_FLOAT, _HALF, _INT = np.empty(0, np.float32), np.empty(0, np.uint16), np.empty(0, np.int32)


_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": FASTMATH}
_jit = numba.njit(**_OPTIONS)
# What else Numba would look for, arrays to compute in parallel, takes it longer than all the rest.
_SEARCHES = ("reduction", "setitem", "numpy", "fusion", "stencil")
_parallel = numba.njit(parallel=dict.fromkeys(_SEARCHES, False) | {"prange": True}, **_OPTIONS)


def _entry(function):
    """A function that Python calls: its machine code, and that of all it calls, is kept on disk where there is a place for it."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither this folder nor the user's can be written
        return _jit(function)


# --- elements: bfloat16 as the upper half of a float32's bits ------------------------------------------------------------


@intrinsic
def _from_bits(context, bits):
    from llvmlite import ir

    return types.float32(types.uint32), lambda context, builder, signature, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def _to_bits(context, value):
    from llvmlite import ir

    return types.uint32(types.float32), lambda context, builder, signature, values: builder.bitcast(values[0], ir.IntType(32))


@intrinsic
def _pointer(context, address, kind):
    """The address, a number, as a pointer to elements like those of the array `kind`."""
    pointer = types.CPointer(kind.dtype)

    def build(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(pointer))

    return pointer(types.int64, kind), build


@_jit
def _array(address, kind, shape):
    return numba.carray(_pointer(address, kind), shape)


def _wide(value):
    """An element as float32."""


@overload(_wide, jit_options={"fastmath": FASTMATH})
def _(value):
    if value == types.uint16:
        return lambda value: _from_bits(np.uint32(value) << np.uint32(16))
    return lambda value: np.float32(value)


def _narrow(value, kind):
    """A float32 as an element of `kind`, rounded to nearest even."""


@overload(_narrow, jit_options={"fastmath": FASTMATH})
def _(value, kind):
    if kind.dtype == types.float32:
        return lambda value, kind: value

    def rounded(value, kind):
        bits = _to_bits(value)
        if value != value:
            return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))  # rounding could carry a NaN into infinity
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


@_jit
def _dot(x, w):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * _wide(w[i])
    return total


@_jit
def _row(x, norm, eps, out):
    """x [K] in float32 to out [K], normalised if there is a norm [K], rounded before its weight and after it as `rms_norm` does."""
    for k in range(x.shape[0]):
        out[k] = _wide(x[k])
    if norm.shape[0] > 0:
        rstd = np.float32(1) / np.sqrt(_dot(out, out) / np.float32(x.shape[0]) + np.float32(eps))
        for k in range(x.shape[0]):
            out[k] = _wide(_narrow(_wide(_narrow(out[k] * rstd, x)) * _wide(norm[k]), x))


# --- the product -----------------------------------------------------------------------------------------------------


@intrinsic
def _dot_groups(context, x, data, scale):
    """x [K] times scale (q - 8), of 4-bit weights with data [K / 2] and scale [groups] as a `QuantizedWeight` has them.

    In vectors of 16 bytes by hand: the compiler makes none of loops as short as half a group.
    """
    from llvmlite import ir
    from numba.core import cgutils

    index, byte, lane, real = (ir.IntType(64), *(ir.VectorType(t, 16) for t in (ir.IntType(8), ir.IntType(32), ir.FloatType())))
    none, contract = ir.Constant(real, ir.Undefined), ["contract"]

    def build(context, builder, signature, values):
        x, data, scale = (context.make_array(t)(context, builder, a) for t, a in zip(signature.args, values))
        size, groups = (builder.extract_value(a.shape, 0) for a in (data, scale))
        half = builder.sdiv(size, groups)
        total = cgutils.alloca_once_value(builder, ir.Constant(real, [0.0] * 16))

        def load(array, at, vector):
            return builder.load(builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer()), align=1)

        with cgutils.for_range_slice(builder, index(0), size, index(16), index) as (i, _):
            group = builder.sdiv(i, half)
            first = builder.add(i, builder.mul(group, half))
            packed = load(data, i, byte)
            low, high = builder.and_(packed, ir.Constant(byte, [15] * 16)), builder.lshr(packed, ir.Constant(byte, [4] * 16))
            low, high = (builder.sub(q, ir.Constant(byte, [8] * 16)) for q in (low, high))
            low, high = (builder.sitofp(builder.sext(q, lane), real) for q in (low, high))
            product = builder.fmul(low, load(x, first, real), flags=contract)
            other = builder.fmul(high, load(x, builder.add(first, half), real), flags=contract)
            product = builder.fadd(product, other, flags=contract)
            bits = builder.shl(builder.zext(builder.load(builder.gep(scale.data, [group])), ir.IntType(32)), ir.IntType(32)(16))
            one = builder.insert_element(none, builder.bitcast(bits, ir.FloatType()), ir.IntType(32)(0))
            scales = builder.shuffle_vector(one, none, ir.Constant(lane, [0] * 16))
            builder.store(builder.fadd(builder.fmul(product, scales, flags=contract), builder.load(total), flags=contract), total)
        result, lanes = builder.load(total), [ir.IntType(32)(i) for i in range(16)]
        while len(lanes) > 1:  # in halves
            lanes = lanes[: len(lanes) // 2]
            upper = ir.Constant(lane, [(i + len(lanes)) % 16 for i in range(16)])
            result = builder.fadd(result, builder.shuffle_vector(result, none, upper))
        return builder.extract_element(result, lanes[0])

    return types.float32(x, data, scale), build


@_jit
def _dot_middles(sums, scale, minimum):
    """Sums [groups] of x times minimum + 8 scale: around the middle of the range, where weights lie, little cancels."""
    total = np.float32(0)
    for group in range(sums.shape[0]):
        total += sums[group] * (_wide(minimum[group]) + np.float32(8) * _wide(scale[group]))
    return total


def _times(x, sums, weight, scale, minimum):
    """x [K] times a row of the weight, with its scale and minimum; sums [groups] of the x that share them."""


@overload(_times, jit_options={"fastmath": FASTMATH})
def _(x, sums, weight, scale, minimum):
    if weight.dtype == types.uint8:
        return lambda x, sums, weight, scale, minimum: _dot_groups(x, weight, scale) + _dot_middles(sums, scale, minimum)
    if weight.dtype == types.int8:
        return lambda x, sums, weight, scale, minimum: _dot(x, weight) * _wide(scale[0])
    return lambda x, sums, weight, scale, minimum: _dot(x, weight)


@_jit
def _columns(h, sums, weight, scale, minimum, bias, residual, begin, end, out):
    """The columns begin .. end - 1 of out [M, N], of normalised x in float32; of a weight with 2 N rows the first half gates."""
    M, columns = out.shape
    for n in range(begin, end):
        for m in range(M):
            value = _times(h[m], sums[m], weight[n], scale[n], minimum[n])
            if bias.shape[0] > 0:
                value += _wide(bias[n])
            if weight.shape[0] > columns:
                up = _times(h[m], sums[m], weight[n + columns], scale[n + columns], minimum[n + columns])
                if bias.shape[0] > 0:
                    up += _wide(bias[n + columns])
                value = value / (np.float32(1) + np.exp(-value)) * up
            if residual.shape[0] > 0:
                value += _wide(residual[m, n])
            out[m, n] = _narrow(value, out)


@_jit
def _sum(x):
    """In a local variable: whether a sum in memory is made in vectors depends on where the arrays happen to lie."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@_parallel
def _product(x, norm, eps, weight, scale, minimum, bias, residual, out):
    """`decode_linear` of x [M, K] into out; norm, bias and residual have no rows if they are absent."""
    (M, K), columns, groups = x.shape, out.shape[1], minimum.shape[1]
    h, sums = np.empty((M, K), np.float32), np.empty((M, groups), np.float32)
    for m in range(M):
        _row(x[m], norm, eps, h[m])
        for group in range(groups):
            sums[m, group] = _sum(h[m, group * (K // groups) : (group + 1) * (K // groups)])
    for part in prange((columns + CHUNK - 1) // CHUNK):
        _columns(h, sums, weight, scale, minimum, bias, residual, part * CHUNK, min(columns, (part + 1) * CHUNK), out)


@_jit
def _linear(kinds, addresses, N, K, group):
    """The arrays weight, scale, minimum and bias of four addresses. group: the columns that share a scale and a minimum, if any."""
    kind, weight_kind = kinds
    groups = K // group if addresses[2] != 0 else 1 if addresses[1] != 0 else 0
    return (
        _array(addresses[0], weight_kind, (N, K // 2 if addresses[2] != 0 else K)),
        _array(addresses[1], _HALF, (N, groups)),
        _array(addresses[2], _HALF, (N, groups if addresses[2] != 0 else 0)),
        _array(addresses[3], kind, (N if addresses[3] != 0 else 0,)),
    )


# --- rotary embedding and cache ----------------------------------------------------------------------------------------


@_jit
def _turn(x, cos, sin, interleaved, out):
    """One head [D] in float32, rotated, to out [D]; what lies beyond the tables' width passes through."""
    half = cos.shape[0]
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        out[first] = _narrow(x[first] * cos[i] - x[second] * sin[i], out)
        out[second] = _narrow(x[second] * cos[i] + x[first] * sin[i], out)
    for i in range(2 * half, x.shape[0]):
        out[i] = _narrow(x[i], out)


@_jit
def _append(qkv, q_norm, k_norm, eps, cos, sin, interleaved, positions, q, k_cache, v_cache):
    """qkv [B, S, heads, D]: the rotated queries to q [B, S, Hq, D], keys and values into the caches [B, Hk, T, D]."""
    B, S, _, D = qkv.shape
    Hq, Hk = q.shape[2], k_cache.shape[1]
    head = np.empty(D, np.float32)
    for b in range(B):
        for s in range(S):
            position = positions[b, s]
            for i in range(Hq):
                _row(qkv[b, s, i], q_norm, eps, head)
                _turn(head, cos[position], sin[position], interleaved, q[b, s, i])
            for i in range(Hk):
                _row(qkv[b, s, Hq + i], k_norm, eps, head)
                _turn(head, cos[position], sin[position], interleaved, k_cache[b, i, position])
                v_cache[b, i, position] = qkv[b, s, Hq + Hk + i]


# --- attention over the cache: flash-decoding, Dao et al. 2023 -----------------------------------------------------------


@_jit
def _part(q, k, v, split, length, window, maximum, total, values):
    """Attention of q [S, G, D], the last S positions before `length`, over one split of the keys k, v [T, D]: of each of the S G
    rows its maximum, the sum of its weights and its weighted values [D]; -inf, 0 and 0 if it sees none of the keys."""
    S, G, D = q.shape
    scale = np.float32(1 / np.sqrt(D))
    begin, end = max(split * SPLIT, length - S - window + 1), min(length, (split + 1) * SPLIT)
    query, score = np.empty(D, np.float32), np.empty(SPLIT, np.float32)
    for r in range(S * G):
        row, highest, sum = values[r], np.float32(-np.inf), np.float32(0)
        for d in range(D):
            query[d], row[d] = _wide(q[r // G, r % G, d]) * scale, np.float32(0)
        position = length - S + r // G
        first, last = max(begin, position - window + 1), min(end, position + 1)
        for j in range(first, last):
            score[j - first] = _dot(query, k[j])
            highest = max(score[j - first], highest)
        for j in range(first, last):
            weight, value = np.exp(score[j - first] - highest), v[j]
            sum += weight
            for d in range(D):
                row[d] += weight * _wide(value[d])
        maximum[r], total[r] = highest, sum


@_jit
def _combine(maximum, total, values, out):
    """The splits' maximum and total [splits], values [splits, D] as one result out [D]; 0 if there were no keys."""
    highest, sum = np.float32(-np.inf), np.float32(0)
    for split in range(maximum.shape[0]):
        highest = max(highest, maximum[split])
    row = np.zeros(out.shape[0], np.float32)
    for split in range(maximum.shape[0]):
        if maximum[split] != -np.inf:
            shrink = np.exp(maximum[split] - highest)
            sum += total[split] * shrink
            for d in range(row.shape[0]):
                row[d] += values[split, d] * shrink
    for d in range(row.shape[0]):
        out[d] = _narrow(row[d] / sum if sum != 0 else np.float32(0), out)


@_jit
def _longest(lengths):
    longest = 1
    for b in range(lengths.shape[0]):
        longest = max(longest, lengths[b])
    return longest


@_parallel
def _attend(q, k, v, lengths, window, out):
    """q and out [B, S, Hq, D], the caches k and v [B, Hk, T, D]."""
    B, S, Hq, D = q.shape
    Hk = k.shape[1]
    G, splits = Hq // Hk, (_longest(lengths) + SPLIT - 1) // SPLIT
    parts = B * Hk * splits
    maximum, total = np.empty((parts, S * G), np.float32), np.empty((parts, S * G), np.float32)
    values = np.empty((parts, S * G, D), np.float32)
    for part in prange(parts):
        b, head, split = part // splits // Hk, part // splits % Hk, part % splits
        _part(
            q[b, :, head * G : (head + 1) * G], k[b, head], v[b, head], split, lengths[b], window,
            maximum[part], total[part], values[part],
        )  # fmt: skip
    for b in range(B):
        for s in range(S):
            for i in range(Hq):
                first, r = (b * Hk + i // G) * splits, s * G + i % G
                mine = slice(first, first + splits)
                _combine(maximum[mine, r], total[mine, r], values[mine, r], out[b, s, i])


# --- all layers ------------------------------------------------------------------------------------------------------

# The columns of a table of addresses, a row a layer. A linear layer has four: weight, scale, minimum, bias.
NORM, QKV, Q_NORM, K_NORM, OUT, POST_NORM, GATE_UP, DOWN, KEYS, VALUES, COS, SIN, WINDOW, COLUMNS = (
    0, 1, 5, 6, 7, 11, 12, 16, 20, 21, 22, 23, 24, 25
)  # fmt: skip


@_entry
def _layers(kinds, x, buffers, table, positions, lengths, shape, rope, group, eps, interleaved):
    """The residual stream x [B S, N] through all layers, in place. All but the table are addresses; buffers: of as many numbers as
    qkv, q, q again and the MLP's columns have. shape: B, S, N, Hq, Hk, D, I, T. rope: the tables' rows and columns.

    False, with nothing done, for a position that lies outside the tables or the cache."""
    kind, _ = kinds
    B, S, N, Hq, Hk, D, I, T = shape
    M, heads = B * S, Hq + 2 * Hk
    x, positions, lengths = _array(x, kind, (M, N)), _array(positions, _INT, (B, S)), _array(lengths, _INT, (B,))
    for b in range(B):
        for s in range(S):
            if positions[b, s] < 0 or positions[b, s] >= rope[0] or positions[b, s] >= T:
                return False
    none, nothing = _array(0, kind, (0,)), _array(0, kind, (0, 0))
    qkv, split = _array(buffers[0], kind, (M, heads * D)), _array(buffers[0], kind, (B, S, heads, D))
    q, out = _array(buffers[1], kind, (B, S, Hq, D)), _array(buffers[2], kind, (B, S, Hq, D))
    attended, inner = _array(buffers[2], kind, (M, Hq * D)), _array(buffers[3], kind, (M, I))
    for layer in range(table.shape[0]):
        at = table[layer]
        k, v = _array(at[KEYS], kind, (B, Hk, T, D)), _array(at[VALUES], kind, (B, Hk, T, D))
        weight, scale, minimum, bias = _linear(kinds, at[QKV : QKV + 4], heads * D, N, group)
        _product(x, _array(at[NORM], kind, (N,)), eps, weight, scale, minimum, bias, nothing, qkv)
        q_norm = _array(at[Q_NORM], kind, (D if at[Q_NORM] != 0 else 0,))
        k_norm = _array(at[K_NORM], kind, (D if at[K_NORM] != 0 else 0,))
        cos, sin = _array(at[COS], _FLOAT, rope), _array(at[SIN], _FLOAT, rope)
        _append(split, q_norm, k_norm, eps, cos, sin, interleaved, positions, q, k, v)
        _attend(q, k, v, lengths, at[WINDOW], out)
        weight, scale, minimum, bias = _linear(kinds, at[OUT : OUT + 4], N, Hq * D, group)
        _product(attended, none, eps, weight, scale, minimum, bias, x, x)
        weight, scale, minimum, bias = _linear(kinds, at[GATE_UP : GATE_UP + 4], 2 * I, N, group)
        _product(x, _array(at[POST_NORM], kind, (N,)), eps, weight, scale, minimum, bias, nothing, inner)
        weight, scale, minimum, bias = _linear(kinds, at[DOWN : DOWN + 4], N, I, group)
        _product(inner, none, eps, weight, scale, minimum, bias, x, x)
    return True


class _Misfit(Exception):
    """Something that the kernels do not take."""


def _address(t, dtype):
    if t is None:
        return 0
    if t.dtype != dtype or not t.is_contiguous():
        raise _Misfit
    return t.data_ptr()


def _addresses(linear, dtype):
    """(the dtype of its numbers, the columns that share a scale), its four columns in the table."""
    weight, bias = linear.weight, _address(linear.bias, dtype)
    if not isinstance(weight, QuantizedWeight):
        return (dtype, 1), (_address(weight, dtype), 0, 0, bias)
    scales = (_address(t, torch.bfloat16) for t in (weight.scale, weight.minimum))
    return (weight.data.dtype, weight.group if weight.bits == 4 else 1), (_address(weight.data, weight.data.dtype), *scales, bias)


def decode_layers(x, blocks, rope, positions, cache):
    """The hidden states x [B, S, N] of a few tokens through the model's blocks, their keys and values appended to the cache; a new
    tensor, or None if these blocks are to be computed one by one. rope and positions as `Block` takes them."""
    B, S, N = x.shape
    dtype, table, formats = x.dtype, np.empty((len(blocks), COLUMNS), np.int64), set()
    weight = blocks[0].mlp.gate_up_proj.weight
    if dtype not in (torch.float32, torch.bfloat16) or B * S > ROWS or _Pool.lost or len(blocks) * weight.nbytes < WORTH:
        return None
    try:
        for at, block, keys, values in zip(table, blocks, cache.k, cache.v):
            attention, mlp = block.self_attn, block.mlp
            if any(m._forward_hooks or m._forward_pre_hooks for m in (block, attention)):
                return None
            linears = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
            for column, linear in zip((QKV, OUT, GATE_UP, DOWN), linears):
                form, at[column : column + 4] = _addresses(linear, dtype)
                formats.add(form)
            at[NORM], at[POST_NORM] = (_address(m.weight, dtype) for m in (block.input_layernorm, block.post_attention_layernorm))
            at[Q_NORM], at[K_NORM] = (_address(m and m.weight, dtype) for m in (attention.q_norm, attention.k_norm))
            at[KEYS], at[VALUES] = _address(keys, dtype), _address(values, dtype)
            cos, sin = rope[attention.rotary]
            at[COS], at[SIN] = _address(cos, torch.float32), _address(sin, torch.float32)
            at[WINDOW] = attention.window or cache.max_length + 1
        positions, lengths = positions.contiguous(), _address(cache.lengths, torch.int32)
        positions_at = _address(positions, torch.int32)
    except _Misfit:
        return None
    if len(formats) != 1:
        return None
    (weight, group), (heads, kv_heads, _) = formats.pop(), attention.heads
    x = x.clone(memory_format=torch.contiguous_format)
    widths = attention.qkv_proj.out_features, attention.o_proj.in_features, attention.o_proj.in_features, mlp.down_proj.in_features
    buffers = [torch.empty(B * S * width, dtype=dtype) for width in widths]
    inside = _run(
        _layers, (_KIND[dtype], _KIND[weight]), x.data_ptr(), tuple(b.data_ptr() for b in buffers), table, positions_at, lengths,
        (B, S, N, heads, kv_heads, attention.head_dim, mlp.down_proj.in_features, cache.max_length), tuple(cos.shape), group,
        block.input_layernorm.eps, attention.interleaved,
    )  # fmt: skip
    if not inside:
        last = min(cos.shape[0], cache.max_length) - 1
        raise IndexError(f"positions reaches from {positions.min()} to {positions.max()}, expected 0 to {last}")
    return x


# --- one product -----------------------------------------------------------------------------------------------------


@_entry
def _product_at(kinds, x, norm, eps, addresses, residual, out, M, N, K, group, swiglu):
    kind, _ = kinds
    weight, scale, minimum, bias = _linear(kinds, addresses, N, K, group)
    columns = N // 2 if swiglu else N
    _product(
        _array(x, kind, (M, K)), _array(norm, kind, (K if norm != 0 else 0,)), eps, weight, scale, minimum, bias,
        _array(residual, kind, (M if residual != 0 else 0, columns)), _array(out, kind, (M, columns)),
    )  # fmt: skip


def decode_linear(x, weight, *, norm=None, eps=1e-6, residual=None, activation=None, bias=None):
    """As `reference.decode_linear`, which also computes what the kernels do not take."""
    M, (N, K) = x.shape[:-1].numel(), weight.shape
    try:
        if x.dtype not in (torch.float32, torch.bfloat16) or not 0 < M <= ROWS or _Pool.lost or weight.nbytes < WORTH:
            raise _Misfit
        (kind, group), addresses = _addresses(SimpleNamespace(weight=weight, bias=bias), x.dtype)
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        norm_at, residual_at = _address(norm, x.dtype), _address(residual, x.dtype)
    except _Misfit:
        return reference.decode_linear(x, weight, norm=norm, eps=eps, residual=residual, activation=activation, bias=bias)
    out = torch.empty((*x.shape[:-1], N if activation is None else N // 2), dtype=x.dtype)
    _run(
        _product_at, (_KIND[x.dtype], _KIND[kind]), x.data_ptr(), norm_at, eps, addresses, residual_at,
        out.data_ptr(), M, N, K, group, activation is not None,
    )  # fmt: skip
    return out


# --- calling a kernel ------------------------------------------------------------------------------------------------


class _Pool:
    """Numba's threads: entered by one thread at a time, as some kinds of them end the process if two do; lost to a fork."""

    lock, entered, lost = threading.Lock(), False, False

    @classmethod
    def after_fork(cls):
        cls.lock, cls.lost = threading.Lock(), cls.entered


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Pool.after_fork)


def _run(kernel, *arguments):
    """kernel(*arguments) on as many threads as PyTorch may use."""
    with _Pool.lock:
        _Pool.entered = True
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if threads != numba.get_num_threads():
            numba.set_num_threads(threads)
        if _knows(kernel, arguments):
            return kernel(*arguments)
        patience = threading.Timer(2, _log.warning, ("compiling the decode step for this CPU, once: up to half a minute",))
        patience.start()
        try:
            return kernel(*arguments)
        finally:
            patience.cancel()


def _knows(kernel, arguments):
    """Whether this process has the kernel's machine code for such arguments."""
    known = _seen.setdefault(kernel, set())
    before, kinds = len(known), tuple(kind.dtype for kind in arguments[0])
    known.add(kinds)
    return len(known) == before


_seen, _log = {}, logging.getLogger(__name__)
