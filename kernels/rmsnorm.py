"""RMSNorm, alone and fused with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps) * (offset + weight)          Zhang & Sennrich 2019, arXiv:1910.07467

Backward, with r = 1 / sqrt(mean(x^2) + eps), n = x r and g = dy (offset + weight):

    dx = r (g - n mean(g n))        dweight = sum over rows of dy n

r is recomputed from x, which the backward reads anyway: nothing is saved but the inputs.
"""

import math
from typing import Optional

import torch

from . import reference, tuning
from .dispatch import (
    architecture,
    call,
    call_back,
    cdiv,
    check,
    check_same,
    finite,
    fresh,
    jit,
    launch,
    number,
    promoted,
    register,
    remembered,
    row_offset,
    row_strides,
    tl,
    uses_triton,
)

CASTINGS = ("llama", "gemma", "none")


# --- kernels ---------------------------------------------------------------------------------------------------------
# One program holds BLOCK_ROWS rows in registers, so that each byte passes through HBM once. The `wide` kernels walk a row that
# does not fit there twice in steps of BLOCK_N; the second time it comes from L2.


@jit
def _load(ptr, mask):
    return tl.load(ptr, mask, other=0.0).to(tl.float32)


@jit
def _factor(weight_ptr, col, inside, offset, stride, dtype: tl.constexpr, CASTING: tl.constexpr):
    """offset + weight; "none" rounds the sum to the input's dtype where the weight has no other."""
    factor = tl.cast(offset, tl.float32) + _load(weight_ptr + col * stride, inside)
    if CASTING == "none":  # noqa: SIM102 - each is settled at compile time, which Triton wants one by one
        if weight_ptr.dtype.element_ty == dtype:
            factor = factor.to(dtype).to(tl.float32)
    return factor


@jit
def _scale(normal, weight_ptr, col, inside, offset, stride, dtype: tl.constexpr, CASTING: tl.constexpr):
    """normal * (offset + weight); "llama" rounds to the input's dtype before the weight, as Hugging Face's model does."""
    if CASTING == "llama":
        normal = normal.to(dtype).to(tl.float32)
    if weight_ptr is not None:
        normal *= _factor(weight_ptr, col, inside, offset, stride, dtype, CASTING)
    return normal.to(dtype)


@jit(do_not_specialize=["rows", "middle", "inner"])
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, eps, offset, rows, middle, inner, x_strides, residual_strides,
    weight_stride,
    N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CASTING: tl.constexpr,
):  # fmt: skip
    """Reads x (and residual) and writes y (and total = x + residual, rounded as the tensor is)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]  # int64: a column may be a long stride away
    mask = (row < rows) & (col < N)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x = _load(x_ptr + row_offset(row, middle, inner, x_strides) + col * x_strides[3], mask)
    if residual_ptr is not None:
        x += _load(residual_ptr + row_offset(row, middle, inner, residual_strides) + col * residual_strides[3], mask)
        total = x.to(dtype)
        tl.store(total_ptr + row * N + col, total, mask)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / N + tl.cast(eps, tl.float32))
    tl.store(y_ptr + row * N + col, _scale(x * rstd, weight_ptr, col, col < N, offset, weight_stride, dtype, CASTING), mask)


@jit(do_not_specialize=["rows", "middle", "inner"])
def _rms_norm_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, eps, offset, rows, middle, inner, x_strides, residual_strides,
    weight_stride,
    N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CASTING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x_ptr += row_offset(row, middle, inner, x_strides)
    if residual_ptr is not None:
        residual_ptr += row_offset(row, middle, inner, residual_strides)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N).to(tl.int64)
        x = _load(x_ptr + col * x_strides[3], col < N)
        if residual_ptr is not None:
            total = (x + _load(residual_ptr + col * residual_strides[3], col < N)).to(dtype)
            tl.store(total_ptr + row * N + col, total, col < N)
            x = total.to(tl.float32)
        square += x * x
    rstd = tl.rsqrt(tl.sum(square, 0) / N + tl.cast(eps, tl.float32))
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N).to(tl.int64)
        x = _load(x_ptr + col * x_strides[3], col < N)
        if residual_ptr is not None:  # added again rather than read back: another thread may have written total
            x = (x + _load(residual_ptr + col * residual_strides[3], col < N)).to(dtype).to(tl.float32)
        tl.store(y_ptr + row * N + col, _scale(x * rstd, weight_ptr, col, col < N, offset, weight_stride, dtype, CASTING), col < N)


@jit(do_not_specialize=["rows", "rows_per_program", "middle", "inner"])
def _rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, dtotal_ptr, dx_ptr, partial_ptr, eps, offset, rows, rows_per_program, middle, inner,
    dy_strides, x_strides, dtotal_strides, weight_stride,
    N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CASTING: tl.constexpr,
):  # fmt: skip
    """Reads dy, x (and dtotal) and writes dx; each program adds up its rows' share of dweight into one float32 row of
    `partial`, so that the sum has a fixed order and needs no atomics."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]  # int64: a column may be a long stride away
    scale = tl.zeros((1, BLOCK_N), tl.float32) + 1.0
    if weight_ptr is not None:
        scale = _factor(weight_ptr, col, col < N, offset, weight_stride, x_ptr.dtype.element_ty, CASTING)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
    for start in range(0, rows_per_program, BLOCK_ROWS):
        row = program * rows_per_program + start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < N)
        x = _load(x_ptr + row_offset(row, middle, inner, x_strides) + col * x_strides[3], mask)
        dy = _load(dy_ptr + row_offset(row, middle, inner, dy_strides) + col * dy_strides[3], mask)
        rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / N + tl.cast(eps, tl.float32))
        normal = x * rstd
        g = dy * scale
        dx = rstd * (g - normal * (tl.sum(g * normal, 1, keep_dims=True) / N))
        if dtotal_ptr is not None:
            dx += _load(dtotal_ptr + row_offset(row, middle, inner, dtotal_strides) + col * dtotal_strides[3], mask)
        tl.store(dx_ptr + row * N + col, dx.to(dx_ptr.dtype.element_ty), mask)
        if partial_ptr is not None:
            if CASTING == "llama":
                normal = normal.to(x_ptr.dtype.element_ty).to(tl.float32)
            dweight += dy * normal
    if partial_ptr is not None:
        tl.store(partial_ptr + program * N + col, tl.sum(dweight, 0, keep_dims=True), col < N)


@jit(do_not_specialize=["rows", "rows_per_program", "middle", "inner"])
def _rms_norm_backward_wide_kernel(
    dy_ptr, x_ptr, weight_ptr, dtotal_ptr, dx_ptr, partial_ptr, eps, offset, rows, rows_per_program, middle, inner,
    dy_strides, x_strides, dtotal_strides, weight_stride,
    N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CASTING: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for row in range(program * rows_per_program, tl.minimum(rows, (program + 1) * rows_per_program)):
        x_row = x_ptr + row_offset(row, middle, inner, x_strides)
        dy_row = dy_ptr + row_offset(row, middle, inner, dy_strides)
        square = tl.zeros((BLOCK_N,), tl.float32)
        dot = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N).to(tl.int64)
            x = _load(x_row + col * x_strides[3], col < N)
            g = _load(dy_row + col * dy_strides[3], col < N)
            if weight_ptr is not None:
                g *= _factor(weight_ptr, col, col < N, offset, weight_stride, x_ptr.dtype.element_ty, CASTING)
            square += x * x
            dot += g * x
        rstd = tl.rsqrt(tl.sum(square, 0) / N + tl.cast(eps, tl.float32))
        mean = tl.sum(dot, 0) * rstd / N
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N).to(tl.int64)
            normal = _load(x_row + col * x_strides[3], col < N) * rstd
            dy = _load(dy_row + col * dy_strides[3], col < N)
            g = dy
            if weight_ptr is not None:
                g *= _factor(weight_ptr, col, col < N, offset, weight_stride, x_ptr.dtype.element_ty, CASTING)
            dx = rstd * (g - normal * mean)
            if dtotal_ptr is not None:
                dx += _load(dtotal_ptr + row_offset(row, middle, inner, dtotal_strides) + col * dtotal_strides[3], col < N)
            tl.store(dx_ptr + row * N + col, dx.to(dx_ptr.dtype.element_ty), col < N)
            if partial_ptr is not None:
                if CASTING == "llama":
                    normal = normal.to(x_ptr.dtype.element_ty).to(tl.float32)
                share = dy * normal
                if row > program * rows_per_program:
                    share += _load(partial_ptr + program * N + col, col < N)
                tl.store(partial_ptr + program * N + col, share, col < N)


# --- launchers -------------------------------------------------------------------------------------------------------


def _rows_of(*tensors):
    """(rows, middle, inner, [(tensor, its strides, the column's too)]) for tensors of one shape [..., N] as `row_strides` gives
    them; None is passed on. Rows of no elements are none."""
    present, middle, inner, strides = row_strides(*(t for t in tensors if t is not None))
    pairs = iter([(t, (*s, t.stride(-1))) for t, s in zip(present, strides)])
    *lead, n = present[0].shape
    return math.prod(lead) if n else 0, middle, inner, [(None, None) if t is None else next(pairs) for t in tensors]


def _forward(x, residual, weight, eps, offset, casting):
    """(y, total), both contiguous; total is None without a residual."""
    n = x.shape[-1]
    y = fresh(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    total = None if residual is None else fresh(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    rows, middle, inner, ((x, x_strides), (residual, residual_strides), *_) = _rows_of(x, residual, y, total)
    tile = tuning.rows(n, x.element_size())
    launch(
        _rms_norm_kernel if tile.block_n >= n else _rms_norm_wide_kernel,
        (cdiv(rows, tile.block_rows),),
        x, residual, weight, y, total, eps, offset, rows, middle, inner, x_strides, residual_strides,
        None if weight is None else weight.stride(0),
        N=n, BLOCK_ROWS=tile.block_rows, BLOCK_N=tile.block_n, CASTING=casting, num_warps=tile.warps,
    )  # fmt: skip
    return y, total


def _backward(dy, x, weight, dtotal, eps, offset, casting, need_dweight):
    n = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, middle, inner, ((dy, dy_strides), (x, x_strides), (dtotal, dtotal_strides), _) = _rows_of(dy, x, dtotal, dx)
    tile = tuning.rows(n, x.element_size(), tensors=3)
    rows_per_program = cdiv(cdiv(rows, tuning.programs(architecture(x))), tile.block_rows) * tile.block_rows
    programs = cdiv(rows, max(1, rows_per_program))
    partial = torch.empty((programs, n), dtype=torch.float32, device=x.device) if need_dweight else None
    launch(
        _rms_norm_backward_kernel if tile.block_n >= n else _rms_norm_backward_wide_kernel,
        (programs,),
        dy, x, weight, dtotal, dx, partial, eps, offset, rows, rows_per_program, middle, inner,
        dy_strides, x_strides, dtotal_strides, None if weight is None else weight.stride(0),
        N=n, BLOCK_ROWS=tile.block_rows, BLOCK_N=tile.block_n, CASTING=casting, num_warps=tile.warps,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if need_dweight else x.new_empty(0)


# --- the op: custom ops for the dispatcher, gradients, checks ------------------------------------------------------------


def _rms_norm(x: torch.Tensor, weight: Optional[torch.Tensor], eps: float, offset: float, casting: str) -> torch.Tensor:
    if uses_triton(x):
        return _forward(x, None, weight, eps, offset, casting)[0]
    return reference.rms_norm(x, weight, eps, offset=offset, casting=casting).contiguous()


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: Optional[torch.Tensor], eps: float, offset: float, casting: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if uses_triton(x):
        return _forward(x, residual, weight, eps, offset, casting)
    y, total = reference.add_rms_norm(x, residual, weight, eps, offset=offset, casting=casting)
    return y.contiguous(), total.contiguous()


def _rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: Optional[torch.Tensor], dtotal: Optional[torch.Tensor],
    eps: float, offset: float, casting: str, need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx + dtotal, dweight); dweight is empty unless it is needed."""
    backward = _backward if uses_triton(x) else reference.rms_norm_backward
    return backward(dy, x, weight, dtotal, eps, offset, casting, need_dweight)


def _like(x):
    return x.new_empty(x.shape)


_rms_norm_op = register(
    "rms_norm", _rms_norm, lambda x, weight, *_: _like(x),
    backward=lambda ctx, dy: _gradients(ctx, dy, None),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs[0], inputs[1], inputs[2:]),
)  # fmt: skip
_add_rms_norm_op = register(
    "add_rms_norm", _add_rms_norm, lambda x, residual, weight, *_: (_like(x), _like(x)),
    backward=lambda ctx, dy, dtotal: _gradients(ctx, dy, dtotal),
    setup_context=lambda ctx, inputs, output: _save(ctx, output[1], inputs[2], inputs[3:]),
)  # fmt: skip
_backward_op = register(
    "rms_norm_backward", _rms_norm_backward,
    lambda dy, x, weight, dtotal, eps, offset, casting, need_dweight: (
        _like(x), weight.new_empty(weight.shape) if need_dweight else x.new_empty(0)
    ),
)  # fmt: skip


def _save(ctx, x, weight, rest):
    ctx.save_for_backward(x, weight)
    ctx.rest = rest


def _gradients(ctx, dy, dtotal):
    x, weight = ctx.saved_tensors
    at = len(ctx.needs_input_grad) - 4  # weight, eps, offset and casting come last
    need = weight is not None and ctx.needs_input_grad[at]
    dx, dweight = call_back(_backward_op, _rms_norm_backward, dy, x, weight, dtotal, *ctx.rest, need)
    return *([dx] * at), dweight if need else None, None, None, None


def check_eps(op, eps):
    """eps as a float."""
    eps = number(op, "eps", eps)
    check(0 <= eps < math.inf, lambda: f"{op}: eps is {eps}, expected a finite number, at least 0")
    return eps


def _check(op, x, weight, eps, offset, casting, **residual):
    """(eps, offset) as floats."""
    check_same(op, x=x, **residual)
    check(x.dim() > 0, lambda: f"{op}: x is a scalar, expected at least one axis")
    check(casting in CASTINGS, lambda: f"{op}: casting is {casting!r}, expected one of {', '.join(CASTINGS)}")
    if weight is not None:
        check_same(op, same_dtype=False, x=x, weight=weight)
        check(
            weight.shape == x.shape[-1:],
            lambda: f"{op}: weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])} as the last axis of x",
        )
    for t in residual.values():
        check(t.shape == x.shape, lambda: f"{op}: residual has shape {tuple(t.shape)}, expected {tuple(x.shape)} as x")  # noqa: B023
    return check_eps(op, eps), finite(op, "offset", offset)


@remembered
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> torch.Tensor:
    """x / rms(x) * (offset + weight) over the last axis; rms(x) = sqrt(mean(x²) + eps).

    x: [..., N], float16, bfloat16 or float32, any strides. weight: [N] in any floating dtype, or None for no scaling.
    casting: "llama" rounds x / rms(x) to x.dtype before the weight (Hugging Face's Llama), "gemma" keeps float32 to the end
    (with offset=1.0, Hugging Face's Gemma), "none" is "gemma" but that offset + weight is a sum in the dtype of both where x and
    weight share it (Liger's "none", whose squares are also rounded: in float16 they would overflow from 256 on).
    Returns a new contiguous tensor like x. Differentiable in x and weight. Raises ValueError or TypeError for arguments that do
    not fit; eps is at least 0. Source: arXiv:1910.07467.
    """
    eps, offset = _check("rms_norm", x, weight, eps, offset, casting)
    return call(_rms_norm_op, _rms_norm, x, weight, eps, offset, casting)


@remembered
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, offset: float = 0.0,
    casting: str = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(rms_norm(x + residual), x + residual) in one pass over memory: what stands between two blocks of a transformer.

    x, residual: [..., N] of one dtype, any strides. The sum is rounded to their dtype before it is normalised, as two separate
    operations would. Everything else as in `rms_norm`.
    """
    x, residual = promoted(x, residual)
    eps, offset = _check("add_rms_norm", x, weight, eps, offset, casting, residual=residual)
    return call(_add_rms_norm_op, _add_rms_norm, x, residual, weight, eps, offset, casting)
