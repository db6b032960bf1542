"""The matrix-vector product of a decode step, with what stands before and after it.

    h = rms_norm(x, norm)        y = h Wᵀ + bias        y = silu(first half) * second half        out = y + residual

At one to eight rows the product costs what reading W costs, so each weight is read once for all rows, and the normalisation,
the SwiGLU and the residual addition ride along in one launch. The warps of a program divide the columns of a tile of W among
themselves (the leading axis of a batched product), so that no warp repeats another's work; tiles stream through shared memory
with several in flight. Tile and order of summation depend on the weight alone: a row has the same bits whatever its neighbours.
"""

from typing import Optional

import torch
import torch.nn.functional as F

from . import reference, tuning
from .attention import _dot, _precision
from .dispatch import (
    WIDEN,
    architecture,
    await_inputs,
    backend,
    call,
    cdiv,
    check,
    check_same,
    dependence,
    fresh,
    jit,
    launch,
    number,
    prefetch,
    register,
    release_dependents,
    remembered,
    row_offset,
    row_strides,
    tl,
    unseen,
    uses_triton,
)
from .glu import _sigmoid, swiglu
from .quantized import QuantizedWeight
from .rmsnorm import check_eps, rms_norm

ROWS = 8  # beyond, the product is no longer limited by memory alone and belongs to the vendor's library
ACTIVATIONS = (None, "swiglu")


# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _rstd(x_row, row, rows, column_stride, eps, K: tl.constexpr, BLOCK_M: tl.constexpr):
    """1 / rms of each row, [1, BLOCK_M, 1]; the rows come from L2, where the first program has brought them."""
    square = tl.zeros((BLOCK_M, 1024), tl.float32)
    for start in tl.range(0, K, 1024, loop_unroll_factor=4):
        k = start + tl.arange(0, 1024)[None, :]
        x = tl.load(x_row + k * column_stride, (row < rows) & (k < K), other=0.0).to(tl.float32)
        square += x * x
    return tl.rsqrt(tl.sum(square, 1) / K + tl.cast(eps, tl.float32))[None, :, None]


@jit
def _activations(x_row, norm_ptr, rstd, live, k, column_stride, norm_stride, K: tl.constexpr):
    """The columns k [SLICES, 1, n] of x, normalised if there is a norm: [SLICES, n, BLOCK_M]."""
    x = tl.load(x_row + k * column_stride, live & (k < K), other=0.0)
    if norm_ptr is not None:  # rounded before the weight and after it, as rms_norm does
        scale = tl.load(norm_ptr + k * norm_stride, k < K, other=0.0).to(tl.float32)
        x = ((x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32) * scale).to(x.dtype)
    return tl.permute(x, (0, 2, 1))


@jit
def _real(w, dtype: tl.constexpr):
    """Weights in 8 bits as numbers of dtype, others as they are: the interpreter takes integers for the bits of a bfloat16."""
    return w.to(tl.float32).to(dtype) if WIDEN else w.to(dtype)


_UNPACK = """{
    .reg .b32 nibbles;
    shr.u32 nibbles, $2, SHIFT;
    and.b32 nibbles, nibbles, 0x0f0f0f0f;
    prmt.b32 $0, nibbles, EXPONENT, 0x4140;
    prmt.b32 $1, nibbles, EXPONENT, 0x4342;
}"""
_LOW128, _HIGH128, _LOW1024, _HIGH1024 = (
    tl.constexpr(_UNPACK.replace("SHIFT", shift).replace("EXPONENT", f"0x{4 * byte}")) for byte in ("43", "64") for shift in "04"
)


@jit
def _nibbles(w, dtype: tl.constexpr, OFFSET: tl.constexpr):
    """OFFSET + the low and the high half of the bytes w, through the bits of the mantissa: integer conversions run at a quarter of
    the rate. On NVIDIA's a byte permutation puts each nibble under its exponent: eight weights take seven instructions. Each half
    has an operation of its own, so that both are unpacked where the tensor cores want them: of an operation with two results
    Triton 3.8 moves only one, the other went through shared memory."""
    if OFFSET == 0:
        low, high = (w & 15).to(dtype), (w >> 4).to(dtype)
    elif WIDEN or not tl.target_info.is_cuda():
        exponent: tl.constexpr = 0x4300 if OFFSET == 128 else 0x6400
        low = ((w & 15).to(tl.int16) | exponent).to(dtype, bitcast=True)
        high = ((w >> 4).to(tl.int16) | exponent).to(dtype, bitcast=True)
    elif OFFSET == 128:
        low = tl.inline_asm_elementwise(_LOW128, "=r,=r,r", [w], tl.bfloat16, True, 4)
        high = tl.inline_asm_elementwise(_HIGH128, "=r,=r,r", [w], tl.bfloat16, True, 4)
    else:
        low = tl.inline_asm_elementwise(_LOW1024, "=r,=r,r", [w], tl.float16, True, 4)
        high = tl.inline_asm_elementwise(_HIGH1024, "=r,=r,r", [w], tl.float16, True, 4)
    return low, high


@jit
def _grouped(
    total, w_row, scale_row, minimum_row, low, high, ones, group, column, mask, PRECISION: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """total plus the products of one group of 4-bit weights a slice: scale (q x) + minimum (1 x). Slices and rows of W are one
    axis of the loads: of two, Triton 3.6 takes the slices for the faster one and gives no warp a slice of its own."""
    w = tl.load(w_row + column, mask, other=0).reshape(total.shape[0], total.shape[1], column.shape[1])
    scale = tl.load(scale_row + group, mask, other=0.0).to(tl.float32).reshape(total.shape[0], total.shape[1], 1)
    minimum = tl.load(minimum_row + group, mask, other=0.0).to(tl.float32).reshape(total.shape[0], total.shape[1], 1)
    w_low, w_high = _nibbles(w, low.dtype, OFFSET)
    product = _dot(w_high, high, _dot(w_low, low, None, PRECISION), PRECISION)
    return total + scale * product + (minimum - OFFSET * scale) * ones


@jit
def _beginnings(weight_ptr, weight_strides, columns, first, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Asks for the first 2 KiB of each of this program's rows of W, behind row `first`; the last rows for their own once more."""
    n = first + tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1)[:, None]
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    k = tl.minimum(tl.arange(0, 16) * LINE, COLUMNS - 1)[None, :]
    prefetch(weight_ptr + n.to(tl.int64) * weight_strides[0] + k * weight_strides[1])


@jit(do_not_specialize=["rows", "middle", "inner"])
def _linear_kernel(
    x_ptr, weight_ptr, scale_ptr, minimum_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, eps, rows, columns, middle, inner,
    x_strides, weight_strides, scale_stride, norm_stride, bias_stride, residual_strides,
    K: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of out for all rows: reads BLOCK_N rows of W (with SwiGLU as many of each half), SLICES * BLOCK_K
    columns at a time, and x from L2. 4-bit weights: BLOCK_K is their group. PDL: the beginnings of the rows of W are asked for
    while the kernel before still runs."""
    release_dependents(PDL)
    if PDL:
        COLUMNS: tl.constexpr = K if minimum_ptr is None else K // 2
        _beginnings(weight_ptr, weight_strides, columns, 0, COLUMNS, BLOCK_N)
        if SWIGLU:
            _beginnings(weight_ptr, weight_strides, columns, columns, COLUMNS, BLOCK_N)
    await_inputs(PDL)
    row = tl.arange(0, BLOCK_M)[:, None]
    x_row = x_ptr + row_offset(row.to(tl.int64), middle, inner, x_strides)
    rstd = None
    if norm_ptr is not None:
        rstd = _rstd(x_row, row, rows, x_strides[3], eps, K, BLOCK_M)
    x_row, live = x_row[None, :, :], (row < rows)[None, :, :]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    w_row = weight_ptr + n.to(tl.int64) * weight_strides[0]
    half = tl.cast(columns, tl.int64) * weight_strides[0]
    total = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    gated = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, SLICES * BLOCK_K):
        first = start + tl.arange(0, SLICES)[:, None, None] * BLOCK_K
        if minimum_ptr is not None:
            inside = tl.arange(0, BLOCK_K // 2)[None, None, :]
            low = _activations(x_row, norm_ptr, rstd, live, first + inside, x_strides[3], norm_stride, K)
            high = _activations(x_row, norm_ptr, rstd, live, first + BLOCK_K // 2 + inside, x_strides[3], norm_stride, K)
            one = (tl.zeros((SLICES, BLOCK_N, BLOCK_K // 2), tl.float32) + 1.0).to(low.dtype)
            ones = _dot(one, high, _dot(one, low, None, PRECISION), PRECISION)
            pair = tl.arange(0, SLICES * BLOCK_N)[:, None]  # of a slice and a row of W
            n_pair = tl.program_id(0) * BLOCK_N + pair % BLOCK_N
            group = start // BLOCK_K + pair // BLOCK_N
            column = group * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
            mask = (n_pair < columns) & (group < K // BLOCK_K)
            q_row = weight_ptr + n_pair.to(tl.int64) * weight_strides[0]
            s_row = scale_ptr + n_pair.to(tl.int64) * scale_stride
            m_row = minimum_ptr + n_pair.to(tl.int64) * scale_stride
            total = _grouped(total, q_row, s_row, m_row, low, high, ones, group, column, mask, PRECISION, OFFSET)
            if SWIGLU:
                skip = tl.cast(columns, tl.int64) * scale_stride
                gated = _grouped(
                    gated, q_row + half, s_row + skip, m_row + skip, low, high, ones, group, column, mask, PRECISION, OFFSET
                )
        else:
            k = first + tl.arange(0, BLOCK_K)[None, None, :]
            x = _activations(x_row, norm_ptr, rstd, live, k, x_strides[3], norm_stride, K)
            mask = (n < columns) & (k < K)
            w = tl.load(w_row + k * weight_strides[1], mask, other=0)
            total = _dot(_real(w, x.dtype), x, total, PRECISION)
            if SWIGLU:
                up = tl.load(w_row + half + k * weight_strides[1], mask, other=0)
                gated = _dot(_real(up, x.dtype), x, gated, PRECISION)

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    mask = (n < columns) & (m < rows)
    y = _finish(tl.sum(total, 0), n, n < columns, scale_ptr, minimum_ptr, bias_ptr, bias_stride)
    if SWIGLU:
        y *= _sigmoid(y) * _finish(tl.sum(gated, 0), n + columns, n < columns, scale_ptr, minimum_ptr, bias_ptr, bias_stride)
    if residual_ptr is not None:
        offset = row_offset(m.to(tl.int64), middle, inner, residual_strides) + n * residual_strides[3]
        y += tl.load(residual_ptr + offset, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * columns + n, y.to(out_ptr.dtype.element_ty), mask)


@jit
def _finish(y, n, mask, scale_ptr, minimum_ptr, bias_ptr, bias_stride):
    """The scale of 8-bit weights, one a row, and the bias."""
    if scale_ptr is not None:  # noqa: SIM102 - Triton does not take `and` for settled and open conditions alike
        if minimum_ptr is None:
            y *= tl.load(scale_ptr + n, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n * bias_stride, mask, other=0.0).to(tl.float32)
    return y


# --- launcher --------------------------------------------------------------------------------------------------------


def _strides(t, sizes):
    """Row strides as `row_strides` orders them, and the column's; None is passed on."""
    return None if t is None else (*sizes, t.stride(-1))


def _fused(x, weight, scale, minimum, norm, eps, residual, activation, bias):
    K = x.shape[-1]
    columns = weight.shape[0] // (2 if activation == "swiglu" else 1)
    out = fresh(torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device))
    rows = x.shape[:-1].numel()
    tensors, middle, inner, strides = row_strides(*(t for t in (x, residual) if t is not None))
    x, residual = tensors[0], None if residual is None else tensors[1]
    group = K // scale.shape[1] if minimum is not None else None
    tile = tuning.linear(architecture(x), K, weight.element_size(), activation == "swiglu", rows, group)
    launch(
        _linear_kernel,
        (cdiv(columns, tile.block_n) if rows else 0,),
        x, weight, scale, minimum, norm, bias, residual, out, eps, rows, columns, middle, inner,
        _strides(x, strides[0]), weight.stride(), None if scale is None else scale.stride(0),
        None if norm is None else norm.stride(0), None if bias is None else bias.stride(0), _strides(residual, strides[-1]),
        K=K, SWIGLU=activation == "swiglu", BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, SLICES=tile.slices,
        PRECISION="ieee" if minimum is not None else _precision(x), OFFSET=_OFFSETS[x.dtype],
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        **dependence(x),
    )  # fmt: skip
    return out


_OFFSETS = {torch.bfloat16: 128, torch.float16: 1024, torch.float32: 0}  # of `_nibbles`: where a mantissa's last bit counts one


# --- the op ----------------------------------------------------------------------------------------------------------


def _decode_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: Optional[torch.Tensor], minimum: Optional[torch.Tensor],
    norm: Optional[torch.Tensor], eps: float, residual: Optional[torch.Tensor], activation: Optional[str],
    bias: Optional[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """weight, scale and minimum: a plain tensor and None, or what a `QuantizedWeight` holds."""
    whole = weight if scale is None else QuantizedWeight(weight, scale, minimum)
    if not uses_triton(x):
        return reference.decode_linear(x, whole, norm=norm, eps=eps, residual=residual, activation=activation, bias=bias)
    if x.shape[:-1].numel() <= ROWS:
        return _fused(x, weight, scale, minimum, norm, eps, residual, activation, bias)
    x = x if norm is None else rms_norm(x, norm, eps)
    with torch._C._DisableAutocast():
        y = F.linear(x, weight, bias) if scale is None else whole.linear(x, bias)
    if activation == "swiglu":
        y = swiglu(*y.chunk(2, -1))
    return y if residual is None else y + residual


_op = register(
    "decode_linear", _decode_linear,
    lambda x, weight, scale, minimum, norm, eps, residual, activation, bias: x.new_empty(
        (*x.shape[:-1], weight.shape[0] // (2 if activation == "swiglu" else 1))
    ),
)  # fmt: skip


def _check(x, weight, norm, eps, residual, activation, bias):
    """eps as a float."""
    op = "decode_linear"
    if isinstance(weight, QuantizedWeight):
        check_same(op, optional=("residual", "bias"), x=x, residual=residual, bias=bias)
        check(weight.device == x.device, lambda: f"{op}: weight is on {weight.device}, expected {x.device} as x")
    else:
        check_same(op, optional=("residual", "bias"), x=x, weight=weight, residual=residual, bias=bias)
    check_same(op, same_dtype=False, optional=("norm",), x=x, norm=norm)
    check(activation in ACTIVATIONS, lambda: f"{op}: activation is {activation!r}, expected None or 'swiglu'")
    check(x.dim() > 0, lambda: f"{op}: x is a scalar, expected at least one axis")
    check(len(weight.shape) == 2, lambda: f"{op}: weight has shape {tuple(weight.shape)}, expected two axes")
    N, K = weight.shape
    check(x.shape[-1] == K, lambda: f"{op}: x has {x.shape[-1]} columns, expected {K} as weight")
    check(activation is None or N % 2 == 0, lambda: f"{op}: weight has {N} rows, expected an even number for SwiGLU")
    out = (*x.shape[:-1], N // 2 if activation else N)
    for name, t, shape in (("norm", norm, (K,)), ("bias", bias, (N,)), ("residual", residual, out)):
        check(t is None or t.shape == shape, lambda: f"{op}: {name} has shape {tuple(t.shape)}, expected {shape}")  # noqa: B023
    return check_eps(op, eps)


def decode_linear(
    x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, *, norm: torch.Tensor | None = None, eps: float = 1e-6,
    residual: torch.Tensor | None = None, activation: str | None = None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The product of a few rows with a weight, the normalisation before it and SwiGLU and residual after it, in one launch.

    x: [..., K], float16, bfloat16 or float32. weight: [N, K] of the same dtype, or a `QuantizedWeight`. norm: [K], weight of the
    RMSNorm applied to x first (with `eps`, rounded as `rms_norm(..., casting="llama")`). bias: [N]. activation: None, or "swiglu":
    the first half of the N outputs gates the second, silu(first) * second. residual: like the result, added last. Any strides.

    Returns [..., N], or [..., N / 2] with SwiGLU, contiguous. Up to 8 rows (all leading axes together) share one pass over the
    weight; more go through `rms_norm`, torch's matrix product and `swiglu`, a quantised weight in parts. Not differentiable.
    Raises ValueError or TypeError for arguments that do not fit.
    """
    eps = number("decode_linear", "eps", eps)
    if not isinstance(weight, QuantizedWeight):
        return _call(x, weight, None, None, norm, eps, residual, activation, bias)
    if weight.data.is_cpu and backend() != "triton" and unseen(x, norm, residual, bias):
        eps = _check(x, weight, norm, eps, residual, activation, bias)  # the reference takes the object, which has CPUs' form
        return reference.decode_linear(x, weight, norm=norm, eps=eps, residual=residual, activation=activation, bias=bias)
    return _call(x, weight.data, weight.scale, weight.minimum, norm, eps, residual, activation, bias)


@remembered
def _call(x, weight, scale, minimum, norm, eps, residual, activation, bias):
    eps = _check(x, weight if scale is None else QuantizedWeight(weight, scale, minimum), norm, eps, residual, activation, bias)
    return call(_op, _decode_linear, x, weight, scale, minimum, norm, eps, residual, activation, bias)
