"""SwiGLU: the gated activation between the projections of a Llama's MLP.

    y = silu(gate) up,   silu(g) = g s,   s = 1 / (1 + exp(-g))          Shazeer 2020, arXiv:2002.05202

Backward: dgate = dy up s (1 + g (1 - s)), dup = dy g s. s is recomputed: the kernels keep nothing but the inputs.
"""

from typing import Optional

import torch

from . import reference, tuning
from .dispatch import (
    INTERPRETED,
    call,
    call_back,
    cdiv,
    check,
    check_same,
    fresh,
    jit,
    launch,
    promoted,
    register,
    remembered,
    row_offset,
    row_strides,
    tl,
    uses_triton,
)

try:
    from triton.language.extra import libdevice
except ImportError:
    libdevice = None

# --- kernels ---------------------------------------------------------------------------------------------------------
# One program computes BLOCK_ROWS x BLOCK_N elements; each is read once and written once.

_PRECISE = tl.constexpr(INTERPRETED)  # the interpreter has no libdevice


@jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) to about 2 units in the last place of float32. The exact division and exponential take three times the
    instructions, for denormal intermediate values that only matter where the result is 0 or 1."""
    if _PRECISE:
        return 1.0 / (1.0 + tl.exp(-x))
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(x * -1.0))


@jit
def _tile(rows, N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row, col, inside) of this program."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    row = (program // columns).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = (program % columns * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)
    return row, col, (row < rows) & (col < N)


@jit(do_not_specialize=["rows", "middle", "inner"])
def _swiglu_kernel(
    gate_ptr, up_ptr, y_ptr, rows, middle, inner, gate_strides, up_strides,
    N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(rows, N, BLOCK_ROWS, BLOCK_N)
    gate = tl.load(gate_ptr + row_offset(row, middle, inner, gate_strides) + col * gate_strides[3], inside).to(tl.float32)
    up = tl.load(up_ptr + row_offset(row, middle, inner, up_strides) + col * up_strides[3], inside).to(tl.float32)
    tl.store(y_ptr + row * N + col, (gate * _sigmoid(gate) * up).to(y_ptr.dtype.element_ty), inside)


@jit(do_not_specialize=["rows", "middle", "inner"])
def _swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, middle, inner, dy_strides, gate_strides, up_strides,
    N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(rows, N, BLOCK_ROWS, BLOCK_N)
    dy = tl.load(dy_ptr + row_offset(row, middle, inner, dy_strides) + col * dy_strides[3], inside).to(tl.float32)
    gate = tl.load(gate_ptr + row_offset(row, middle, inner, gate_strides) + col * gate_strides[3], inside).to(tl.float32)
    up = tl.load(up_ptr + row_offset(row, middle, inner, up_strides) + col * up_strides[3], inside).to(tl.float32)
    s = _sigmoid(gate)
    dtype: tl.constexpr = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + row * N + col, (dy * up * s * (1.0 + gate * (1.0 - s))).to(dtype), inside)
    tl.store(dup_ptr + row * N + col, (dy * gate * s).to(dtype), inside)


# --- launchers -------------------------------------------------------------------------------------------------------


def _launch(kernel, inputs, outputs):
    n = inputs[0].shape[-1]
    rows = inputs[0].shape[:-1].numel()
    inputs, middle, inner, strides = row_strides(*inputs)
    tile = tuning.elementwise(n, inputs[0].element_size())
    launch(
        kernel, (cdiv(rows, tile.block_rows) * cdiv(n, tile.block_n),),
        *inputs, *outputs, rows, middle, inner, *((*s, t.stride(-1)) for s, t in zip(strides, inputs)),
        N=n, BLOCK_ROWS=tile.block_rows, BLOCK_N=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    return outputs


# --- the op ----------------------------------------------------------------------------------------------------------


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if uses_triton(gate):
        return _launch(_swiglu_kernel, (gate, up), (_like(gate),))[0]
    return reference.swiglu(gate, up).contiguous()


def _swiglu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, silu: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if uses_triton(gate):
        return _launch(_swiglu_backward_kernel, (dy, gate, up), (_like(gate), _like(gate)))
    return reference.swiglu_backward(dy, gate, up, silu)


def _like(x):
    return fresh(torch.empty(x.shape, dtype=x.dtype, device=x.device))


class _Node(torch.autograd.Function):
    """The op's node, which in float32 on the reference path, where exponentials are most of the work, also keeps silu(gate), as
    PyTorch's own nodes do."""

    @staticmethod
    def forward(ctx, gate, up):
        if uses_triton(gate) or gate.dtype != torch.float32:
            ctx.save_for_backward(gate, up)
            return _swiglu(gate, up)
        silu = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate, up, silu)
        return (silu * up).contiguous()

    @staticmethod
    def backward(ctx, dy):
        return call_back(_backward_op, _swiglu_backward, dy, *ctx.saved_tensors)


_swiglu_op = register(
    "swiglu", _swiglu, lambda gate, up: _like(gate),
    backward=_Node.backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs), node=_Node,
)  # fmt: skip
_backward_op = register("swiglu_backward", _swiglu_backward, lambda dy, gate, up, silu=None: (_like(gate), _like(gate)))


@remembered
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, computed in float32 and rounded once.

    gate, up: [..., F] of one shape and dtype (float16, bfloat16 or float32), any strides: the two halves of a packed projection go
    in as the views `x.chunk(2, -1)`. Returns a new contiguous tensor. Differentiable in both: only the inputs are kept for the
    backward (by the reference path in float32 silu(gate) too, as PyTorch keeps it), which changes nothing. Raises ValueError or
    TypeError for arguments that do not fit. Source: arXiv:2002.05202.
    """
    gate, up = promoted(gate, up)
    check_same("swiglu", gate=gate, up=up)
    check(up.shape == gate.shape, lambda: f"swiglu: up has shape {tuple(up.shape)}, expected {tuple(gate.shape)} as gate")
    check(gate.dim() > 0, lambda: "swiglu: gate is a scalar, expected at least one axis")
    return call(_swiglu_op, _swiglu, gate, up)
