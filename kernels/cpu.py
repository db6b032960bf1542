"""A decode step on a CPU, compiled by Numba: all layers in one call, `decode_layers`, and the head's product, `decode_linear`.

PyTorch's products of one row reach 25 to 90 % of the memory's bandwidth, depending on vendor and dtype, and every call of it costs
as much as reading a small weight. Here every core streams rows of the weight, each read from memory once for all rows of x and
widened to float32 in registers; norm, SwiGLU and residual ride along, and only results are rounded, as in the Triton kernels. All
sums are in float32, in an order that depends on the weight or a sequence's own length alone: a row has the same bits whatever its
neighbours. Weights in float32 that a copy in fewer bytes stands for exactly are read as that copy (`narrowed`).

Weights are passed by address: turning a tensor into an array costs more than many of them take to multiply. What these kernels do
not take (other dtypes, more rows) is left to `reference`, and so is a step whose code is not in this process: see `cpu_code`.
"""

import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch.utils.weak import WeakTensorKeyDictionary

from . import cpu_code, reference
from .cpu_code import EIGHT, FOUR, GROUP, UPPER
from .linear import ROWS
from .quantized import QuantizedWeight

CHUNK = 8  # rows of a weight that a core takes at a time
SPLIT = 128  # keys that a core takes at a time
WHOLE = 2**31 - 1  # the columns that share a scale where a row has one
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}  # sums in vectors; NaN and infinity stay what they are

_ELEMENTS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8, torch.uint8: np.uint8}
_KIND = {dtype: np.empty(0, element) for dtype, element in _ELEMENTS.items()}  # tells a kernel the type of what an address holds
_FLOAT, _HALF, _INT, _BYTE = (np.empty(0, element) for element in (np.float32, np.uint16, np.int32, np.uint8))


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
    return types.float32(types.uint32), lambda context, builder, signature, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def _to_bits(context, value):
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


def _load(builder, array, at, vector):
    return builder.load(builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer()), align=1)


def _by_groups(begin, add, end):
    """An intrinsic of x [K] and a row of weights that share scales in groups, as a `QuantizedWeight` has them: 4 bits with data
    [K / 2], scale and minimum [groups], or 8 bits with data [K] and scale [groups]. Each weight is made as `dequantize` makes it,
    but for one rounding. begin: two totals of 16 numbers; add: to one of them 16 columns; end: the result, of both.

    In vectors of 16 bytes by hand: the compiler makes none of loops as short as a group. Groups have a power of two of bytes.
    """

    @intrinsic
    def function(context, x, data, scale, minimum):
        packed, half = data.dtype == types.uint8, scale.dtype == types.uint16

        def build(context, builder, signature, values):
            x, data, scale, minimum = (context.make_array(t)(context, builder, a) for t, a in zip(signature.args, values))
            size, groups = (builder.extract_value(a.shape, 0) for a in (data, scale))
            span = builder.sdiv(size, groups)
            shift = builder.cttz(span, ir.IntType(1)(1))
            totals = [cgutils.alloca_once_value(builder, begin) for _ in range(2)]

            def spread(array, at):
                value = builder.load(builder.gep(array.data, [at]))
                if half:
                    value = builder.bitcast(builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16)), ir.FloatType())
                one = builder.insert_element(ir.Constant(_REALS, ir.Undefined), value, ir.IntType(32)(0))
                return builder.shuffle_vector(one, one, ir.Constant(_LANES, [0] * 16))

            def take(total, w, at):
                builder.store(add(builder, builder.load(total), w, _load(builder, x, at, _REALS)), total)

            with cgutils.for_range_slice(builder, _INDEX(0), size, _INDEX(16), _INDEX) as (i, _):
                group, q = builder.lshr(i, shift), _load(builder, data, i, _BYTES)
                scales = spread(scale, group)
                if packed:
                    first, minima = builder.add(i, builder.shl(group, shift)), spread(minimum, group)  # a byte holds two columns
                    low, high = builder.and_(q, ir.Constant(_BYTES, [15] * 16)), builder.lshr(q, ir.Constant(_BYTES, [4] * 16))
                    for total, q, column in zip(totals, (low, high), (first, builder.add(first, span))):
                        w = builder.fmul(builder.uitofp(builder.zext(q, _LANES), _REALS), scales, flags=_CONTRACT)
                        take(total, builder.fadd(w, minima, flags=_CONTRACT), column)
                else:
                    take(totals[0], builder.fmul(builder.sitofp(builder.sext(q, _LANES), _REALS), scales), i)
            return end(builder, *(builder.load(total) for total in totals))

        return types.float32(x, data, scale, minimum), build

    return function


def _sum_of_lanes(builder, x, y):
    result, lanes = builder.fadd(x, y), [ir.IntType(32)(i) for i in range(16)]
    while len(lanes) > 1:  # in halves
        lanes = lanes[: len(lanes) // 2]
        upper = builder.shuffle_vector(result, result, ir.Constant(_LANES, [(i + len(lanes)) % 16 for i in range(16)]))
        result = builder.fadd(result, upper)
    return builder.extract_element(result, lanes[0])


_INDEX, _LANES = ir.IntType(64), ir.VectorType(ir.IntType(32), 16)
_BYTES, _REALS, _CONTRACT = ir.VectorType(ir.IntType(8), 16), ir.VectorType(ir.FloatType(), 16), ["contract"]
_ZEROS = ir.Constant(_REALS, [0.0] * 16)

_dot_groups = _by_groups(
    _ZEROS,
    lambda builder, total, w, x: builder.fadd(builder.fmul(w, x, flags=_CONTRACT), total, flags=_CONTRACT),
    _sum_of_lanes,
)
# How many of the weights are not those of x; x that is not a number is none of them.
_differences = _by_groups(
    _ZEROS,
    lambda builder, total, w, x: builder.fadd(total, builder.uitofp(builder.fcmp_unordered("!=", w, x), _REALS)),
    _sum_of_lanes,
)


@intrinsic
def _dot_sixteens(context, x, w):
    """x times w, as far as there are sixteen of them at a time."""

    def build(context, builder, signature, values):
        x, w = (context.make_array(t)(context, builder, a) for t, a in zip(signature.args, values))
        total = cgutils.alloca_once_value(builder, _ZEROS)

        end = builder.and_(builder.extract_value(x.shape, 0), _INDEX(-16))
        with cgutils.for_range_slice(builder, _INDEX(0), end, _INDEX(16), _INDEX) as (i, _):
            if signature.args[1].dtype == types.uint16:
                bits = builder.zext(_load(builder, w, i, ir.VectorType(ir.IntType(16), 16)), _LANES)
                wide = builder.bitcast(builder.shl(bits, ir.Constant(_LANES, [16] * 16)), _REALS)
            else:
                wide = _load(builder, w, i, _REALS)
            product = builder.fmul(_load(builder, x, i, _REALS), wide, flags=_CONTRACT)
            builder.store(builder.fadd(product, builder.load(total), flags=_CONTRACT), total)
        return _sum_of_lanes(builder, builder.load(total), _ZEROS)

    return types.float32(x, w), build


@_jit
def _dot_short(x, w):
    """The same as `_dot`, whose loops are made for hundreds of columns, of a few dozen."""
    total = _dot_sixteens(x, w)
    for i in range(x.shape[0] // 16 * 16, x.shape[0]):
        total += x[i] * _wide(w[i])
    return total


def _times(x, weight, scale, minimum):
    """x [K] times a row of the weight, with its scales and minima."""


@overload(_times, jit_options={"fastmath": FASTMATH})
def _(x, weight, scale, minimum):
    if weight.dtype == types.uint8:
        return lambda x, weight, scale, minimum: _dot_groups(x, weight, scale, minimum)
    if weight.dtype == types.int8 and scale.dtype == types.float32:
        return lambda x, weight, scale, minimum: _dot_groups(x, weight, scale, minimum)
    if weight.dtype == types.int8:
        return lambda x, weight, scale, minimum: _dot(x, weight) * _wide(scale[0])
    return lambda x, weight, scale, minimum: _dot(x, weight)


@_jit
def _columns(h, weight, scale, minimum, bias, residual, begin, end, out):
    """The columns begin .. end - 1 of out [M, N], of normalised x in float32; of a weight with 2 N rows the first half gates."""
    M, columns = out.shape
    for n in range(begin, end):
        for m in range(M):
            value = _times(h[m], weight[n], scale[n], minimum[n])
            if bias.shape[0] > 0:
                value += _wide(bias[n])
            if weight.shape[0] > columns:
                up = _times(h[m], weight[n + columns], scale[n + columns], minimum[n + columns])
                if bias.shape[0] > 0:
                    up += _wide(bias[n + columns])
                value = value / (np.float32(1) + np.exp(-value)) * up
            if residual.shape[0] > 0:
                value += _wide(residual[m, n])
            out[m, n] = _narrow(value, out)


@_parallel
def _product(x, norm, eps, weight, scale, minimum, bias, residual, out):
    """`decode_linear` of x [M, K] into out; norm, bias and residual have no rows if they are absent."""
    M, columns = out.shape
    h = np.empty(x.shape, np.float32)
    for m in range(M):
        _row(x[m], norm, eps, h[m])
    for part in prange((columns + CHUNK - 1) // CHUNK):
        _columns(h, weight, scale, minimum, bias, residual, part * CHUNK, min(columns, (part + 1) * CHUNK), out)


@_jit
def _linear(kinds, addresses, N, K, group):
    """The arrays weight, scale, minimum and bias of four addresses. group: the columns that share a scale and a minimum; a row's
    where it has one for all."""
    kind, weight_kind, scale_kind = kinds
    groups = K // min(group, K)
    return (
        _array(addresses[0], weight_kind, (N, K // 2 if addresses[2] != 0 else K)),
        _array(addresses[1], scale_kind, (N, groups if addresses[1] != 0 else 0)),
        _array(addresses[2], scale_kind, (N, groups if addresses[2] != 0 else 0)),
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
            score[j - first] = _dot_short(query, k[j])
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


# --- weights in fewer bytes, of the same values -------------------------------------------------------------------------
# A checkpoint in bfloat16, or a GGUF in 4 or 8 bits, that is loaded in float32 has two to five times the bytes that its values
# need, and a step costs what reading them costs. So a step reads a copy in fewer bytes where there is one that stands for exactly
# these values, found by looking at them, and looked at again at the beginning of every sequence: weights may have changed.

_exact = numba.njit(nogil=True, error_model="numpy")


@_exact
def _fp16_step(step):
    """Rounded to the 11 bits that a float16 has: nearer than that a quotient of two weights is."""
    bits = _to_bits(step)
    return _from_bits((bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000))


@_exact
def _range(w):
    """The least and the largest of GROUP weights, through integers in the order of floats: such loops are made in vectors."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for i in range(GROUP):
        bits = np.int32(_to_bits(w[i]))
        key = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
        low, high = np.int32(min(low, key)), np.int32(max(high, key))
    low, high = low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF)), high ^ ((high >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return _from_bits(np.uint32(low)), _from_bits(np.uint32(high))


@_exact
def _codes(w, scale, minimum, last, q):
    """Integers 0 .. last to q [GROUP]; whether scale q + minimum are the weights."""
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    wrong = np.int32(0)
    for i in range(GROUP):
        place = (w[i] - minimum) * inverse + np.float32(0.5)
        place = place if place > 0 else np.float32(0)  # NaN too
        q[i] = np.int32(place if place < last else last)
        wrong |= np.int32(scale * np.float32(q[i]) + minimum != w[i])
    return wrong == 0


@_exact
def _copy_row(form, w, data, upper, scale, minimum, q):
    """A row of weights [K] into its copy; False if there is none."""
    wrong = np.uint32(0)
    if form == UPPER:
        for i in range(w.shape[0]):
            bits = _to_bits(w[i])
            wrong |= bits & np.uint32(0xFFFF)
            upper[i] = np.uint16(bits >> np.uint32(16))
        return wrong == 0
    for g in range(scale.shape[0]):
        these = w[g * GROUP : (g + 1) * GROUP]
        low, high = _range(these)
        top = high if high > -low else low
        if form == EIGHT:
            # As 0 .. 254 from the lowest of them on: the products are exact, and so is their sum, which is the weight.
            scale[g] = _fp16_step(abs(top) / np.float32(127))
            if not _codes(these, scale[g], np.float32(-127) * scale[g], np.float32(254), q):
                return False
            for i in range(GROUP):
                data[g * GROUP + i] = np.uint8(q[i] - np.int32(127))
            continue
        scale[g], minimum[g] = _fp16_step((high - low) / np.float32(15)), low
        if not _codes(these, scale[g], minimum[g], np.float32(15), q):
            scale[g], minimum[g] = top / np.float32(-8), top
            if not _codes(these, scale[g], minimum[g], np.float32(15), q):
                return False
        for i in range(GROUP // 2):
            data[g * (GROUP // 2) + i] = np.uint8(q[i] | (q[i + GROUP // 2] << np.int32(4)))
    return True


@_exact
def _is_row(form, w, data, upper, scale, minimum):
    """Whether a copy stands for the weights [K]."""
    wrong = np.int32(0)
    if form == UPPER:
        for i in range(w.shape[0]):
            wrong |= np.int32(_to_bits(w[i]) != np.uint32(upper[i]) << np.uint32(16))
        return wrong == 0
    if form == EIGHT:
        return _differences(w, data.view(np.int8), scale, minimum) == 0
    return _differences(w, data, scale, minimum) == 0


@_entry
def _copied(form, new, weight, data, scale, minimum, N, K, begin, end):
    """Whether rows begin .. end - 1 of the copy have the values of the weight's [N, K], in float32; if new, after making them."""
    groups, bytes = K // GROUP, K // 2 if form == FOUR else K if form == EIGHT else 0
    weight, q = _array(weight, _FLOAT, (N, K)), np.empty(GROUP, np.int32)
    data, upper = _array(data, _BYTE, (N, bytes)), _array(data, _HALF, (N, K - bytes))
    scale = _array(scale, _FLOAT, (N, groups if scale != 0 else 0))
    minimum = _array(minimum, _FLOAT, (N, groups if minimum != 0 else 0))
    for n in range(begin, end):
        if new and not _copy_row(form, weight[n], data[n], upper[n], scale[n], minimum[n], q):
            return False
        if not _is_row(form, weight[n], data[n], upper[n], scale[n], minimum[n]):  # with the product's own instructions
            return False
    return True


def _stand(form, pairs, new):
    """Whether each (weight, copy) has the same values in the rows that the copy has; if it is new, after making it."""

    def part(whole, begin, rows):
        return _copied(*whole, begin, begin + rows)

    parts = []
    for weight, copy in pairs:
        N, K = copy.shape
        data, scale, minimum = (copy, None, None) if form == UPPER else (copy.data, copy.scale, copy.minimum)
        scales = (_address(t, torch.float32) for t in (scale, minimum))
        whole, step = (form, new, weight.data_ptr(), data.data_ptr(), *scales, N, K), max(1, 2**18 // K)
        parts += [(whole, begin, min(step, N - begin)) for begin in range(0, N, step)]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return all(threads.map(part, *zip(*parts)))


def _empty(form, N, K):
    def empty(columns, dtype):
        return torch.empty((N, columns), dtype=dtype, device="cpu")

    if form == UPPER:
        return empty(K, torch.bfloat16)
    scale = empty(K // GROUP, torch.float32)
    if form == EIGHT:
        return QuantizedWeight(empty(K, torch.int8), scale)
    return QuantizedWeight(empty(K // 2, torch.uint8), scale, torch.empty_like(scale))


def _memory():
    """Bytes that can be allocated without swapping, where the system says so."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


_copies = WeakTensorKeyDictionary()  # weight: (form, its copy)


def narrowed(weights):
    """What a step reads instead of the weights: copies in fewer bytes that stand for exactly their values, all of one form, or the
    weights themselves."""
    form = cpu_code.form_of(weights)
    if form is None or not cpu_code.has(("_copied",)):
        return weights
    kept = [_copies.pop(w, (None, None)) for w in weights]
    copies = [copy for known, copy in kept if known == form]
    if len(copies) < len(weights) or not _stand(form, zip(weights, copies), False):
        if _memory() < sum(w.nbytes for w in weights):  # twice what the largest copies take
            return weights
        copies = [_empty(form, *w.shape) for w in weights]
        if not _stand(form, zip(weights, copies), True):
            return weights
    for w, copy in zip(weights, copies):
        _copies[w] = form, copy
    return copies


def narrowed_head(weight, cache):
    """The same of one weight, looked at once for the sequence in the cache."""
    if isinstance(weight, QuantizedWeight):
        return weight
    known = cache.streams.get("head")
    if known is None or known[0] is not weight or known[1] != weight.data_ptr():
        (copy,) = narrowed([weight])
        if weight.nbytes >= cpu_code.WORTH:
            cpu_code.has(_need("_product_at", weight.dtype, _addresses(copy, None, weight.dtype)[0]))
        known = cache.streams["head"] = weight, weight.data_ptr(), copy
    return known[2]


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
    kind, _, _ = kinds
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


def _addresses(weight, bias, dtype):
    """(the dtypes of its numbers and of its scales, the columns that share one), its four columns in the table."""
    bias = _address(bias, dtype)
    if not isinstance(weight, QuantizedWeight):
        if weight.dtype != torch.bfloat16 or dtype != torch.float32:  # the one copy that is no `QuantizedWeight`
            _address(weight, dtype)
        return (weight.dtype, torch.bfloat16, WHOLE), (_address(weight, weight.dtype), 0, 0, bias)
    scale, group = weight.scale.dtype, WHOLE if weight.scale.shape[1] == 1 else weight.group
    if group != WHOLE and (group < 32 or group & (group - 1)):
        raise _Misfit
    scales = (_address(t, scale) for t in (weight.scale, weight.minimum))
    return (weight.data.dtype, scale, group), (_address(weight.data, weight.data.dtype), *scales, bias)


class _Plan:
    """The table of a sequence's layers, what it was made of, and whether that is still where it was."""

    def __init__(self, dtype, blocks, cache):
        linears = [linear for block in blocks for linear in block.linears]
        weights = narrowed([linear.weight for linear in linears])
        self.table, formats = np.zeros((len(blocks), COLUMNS), np.int64), set()
        for n, (linear, weight) in enumerate(zip(linears, weights)):
            column = (QKV, OUT, GATE_UP, DOWN)[n % 4]
            form, self.table[n // 4, column : column + 4] = _addresses(weight, linear.bias, dtype)
            formats.add(form)
        if len(formats) != 1:
            raise _Misfit
        form = formats.pop()
        (weight, scale, self.group) = form
        self.kinds, self.ready = (_KIND[dtype], _KIND[weight], _KIND[scale]), cpu_code.has(_need("_layers", dtype, form))
        norms = []
        for at, block, keys, values in zip(self.table, blocks, cache.k, cache.v):
            attention = block.self_attn
            mine = block.input_layernorm, block.post_attention_layernorm, attention.q_norm, attention.k_norm
            at[[NORM, POST_NORM, Q_NORM, K_NORM]] = [_address(m and m.weight, dtype) for m in mine]
            at[[KEYS, VALUES]] = _address(keys, dtype), _address(values, dtype)
            at[WINDOW] = attention.window or cache.max_length + 1
            norms += [m.weight for m in mine if m]
        plain = [linear.weight for linear in linears if isinstance(linear.weight, torch.Tensor)]
        self.rotary, self.rope = np.array([block.self_attn.rotary for block in blocks]), None
        self.caches = (*cache.k, *cache.v)
        self.used = (*plain, *norms, *self.caches)
        self.memory = weights, [t.detach() for t in self.used]  # what the addresses are those of must not go
        self.where = self.addresses()

    def addresses(self):
        return [t.data_ptr() for t in self.used]

    def holds(self, cache):
        """Whether the weights are where they were, and the cache has the same tensors."""
        return self.where == self.addresses() and all(a is b for a, b in zip(self.caches, (*cache.k, *cache.v)))

    def turn(self, rope):
        """Takes the sequence's rotary tables, which grow now and then."""
        if rope is not self.rope:
            for rotary, tables in rope.items():
                for column, t in zip((COS, SIN), tables):
                    self.table[self.rotary == rotary, column] = _address(t, torch.float32)
            self.rope = rope


def _plan(dtype, blocks, cache):
    plan = cache.streams.get(dtype)
    if plan is None or not plan.holds(cache):
        plan = cache.streams[dtype] = _Plan(dtype, blocks, cache)
    return plan


def decode_layers(x, blocks, rope, positions, cache):
    """The hidden states x [B, S, N] of a few tokens through the model's blocks, their keys and values appended to the cache; a new
    tensor, or None if these blocks are to be computed one by one. rope and positions as `Block` takes them."""
    B, S, N = x.shape
    dtype, first = x.dtype, blocks[0]
    attention, mlp = first.self_attn, first.mlp
    if dtype not in (torch.float32, torch.bfloat16) or B * S > ROWS or _Pool.lost:
        return None
    if not cpu_code.worth(blocks):
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for block in blocks for m in (block, block.self_attn)):
        return None
    try:
        plan = _plan(dtype, blocks, cache)
        if not plan.ready:
            return None
        plan.turn(rope)
        positions, lengths = positions.contiguous(), _address(cache.lengths, torch.int32)
        positions_at = _address(positions, torch.int32)
    except _Misfit:
        return None
    heads, kv_heads, _ = attention.heads
    x, (cos, _) = x.clone(memory_format=torch.contiguous_format), rope[attention.rotary]
    widths = attention.qkv_proj.out_features, attention.o_proj.in_features, attention.o_proj.in_features, mlp.down_proj.in_features
    buffers = [torch.empty(B * S * width, dtype=dtype, device=x.device) for width in widths]
    inside = _run(
        _layers, plan.kinds, x.data_ptr(), tuple(b.data_ptr() for b in buffers), plan.table, positions_at, lengths,
        (B, S, N, heads, kv_heads, attention.head_dim, mlp.down_proj.in_features, cache.max_length), tuple(cos.shape), plan.group,
        first.input_layernorm.eps, attention.interleaved,
    )  # fmt: skip
    if not inside:
        last = min(cos.shape[0], cache.max_length) - 1
        raise IndexError(f"positions reaches from {positions.min()} to {positions.max()}, expected 0 to {last}")
    return x


# --- one product -----------------------------------------------------------------------------------------------------


@_entry
def _product_at(kinds, x, norm, eps, addresses, residual, out, M, N, K, group, swiglu):
    kind, _, _ = kinds
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
        if x.dtype not in (torch.float32, torch.bfloat16) or not 0 < M <= ROWS or _Pool.lost or weight.nbytes < cpu_code.WORTH:
            raise _Misfit
        form, addresses = _addresses(weight, bias, x.dtype)
        if _need("_product_at", x.dtype, form) not in cpu_code.loaded:
            raise _Misfit
        kind, scale, group = form
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        norm_at, residual_at = _address(norm, x.dtype), _address(residual, x.dtype)
    except _Misfit:
        return reference.decode_linear(x, weight, norm=norm, eps=eps, residual=residual, activation=activation, bias=bias)
    out = torch.empty((*x.shape[:-1], N if activation is None else N // 2), dtype=x.dtype, device=x.device)
    _run(
        _product_at, (_KIND[x.dtype], _KIND[kind], _KIND[scale]), x.data_ptr(), norm_at, eps, addresses, residual_at,
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
        allowed = torch.get_num_threads()
        threads = min(allowed, numba.config.NUMBA_NUM_THREADS)
        if threads != numba.get_num_threads():
            numba.set_num_threads(threads)
        result = kernel(*arguments)
        if torch.get_num_threads() != allowed:  # as Numba starts its threads it sets OpenMP's number, which is PyTorch's too
            torch.set_num_threads(allowed)
        return result


# --- the code ----------------------------------------------------------------------------------------------------------


@functools.cache
def _need(name, dtype, form):
    """The need, as `cpu_code` has it, of activations in this dtype and of weights as `_addresses` says that they are."""
    return name, *(str(t).removeprefix("torch.") for t in (dtype, *form[:2]))


def _code(need):
    """The function, and the types of its arguments, that a need stands for."""
    name, *dtypes = need
    kinds = numba.typeof(tuple(_KIND[getattr(torch, dtype)] for dtype in dtypes))
    number, real, flag = types.int64, types.float64, types.boolean

    def numbers(n):
        return types.UniTuple(number, n)

    arguments = {
        "_copied": (number, flag, *[number] * 8),
        "_layers": (
            kinds, number, numbers(4), types.Array(number, 2, "C"), number, number, numbers(8), numbers(2), number, real, flag,
        ),
        "_product_at": (kinds, number, number, real, numbers(4), *[number] * 6, flag),
    }  # fmt: skip
    return globals()[name], arguments[name]


def load(need):
    """Whether its code is on disk, from where it is taken."""
    function, arguments = _code(need)
    if function._cache.load_overload(arguments, function.targetctx) is None:
        return False
    function.compile(arguments)
    return True


def compile(need):
    """Compiles it, unless it is on disk, and keeps it there."""
    function, arguments = _code(need)
    function.compile(arguments)


def kept():
    """Whether there is a folder in which Numba keeps code."""
    return _layers.stats.cache_path is not None
