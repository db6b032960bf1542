"""Weights in 8 and 4 bits for the products of a decode step, which cost what reading their weight costs.

    8 bits, one scale a row:                        w = scale q,            q in -127 .. 127
    4 bits, a scale and a minimum a group:          w = scale q + minimum,  q in 0 .. 15

Rounded to nearest, as llama.cpp's Q8_0 and Q4_1 do; only weights are quantised, activations keep their dtype. Scales are rounded
to bfloat16 before the integers are chosen, so that no later cast moves them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.nn.functional as F

from .dispatch import steady

GROUPS = (32, 64, 128)
TILE = 2**24  # elements of a weight that are dequantised at a time where a product needs them in full


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] in 8 or 4 bits; `quantize` makes it, `decode_linear` takes it.

    data: int8 [N, K]; or uint8 [N, K / 2], where byte j of a group of G columns holds column j in its low and column j + G / 2 in
    its high half. scale: [N, 1] or [N, K / G]. minimum: like scale, None in 8 bits. Of these follow bits, shape [N, K], group.
    Views become contiguous: the kernels know no other layout.
    """

    data: torch.Tensor
    scale: torch.Tensor
    minimum: Optional[torch.Tensor] = None
    bits: int = field(init=False, repr=False, compare=False)
    shape: torch.Size = field(init=False, repr=False, compare=False)
    group: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("data", "scale", "minimum"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, getattr(self, name).contiguous())
        bits = 8 if self.minimum is None else 4
        shape = torch.Size((self.data.shape[0], self.data.shape[1] * 8 // bits))
        for name, value in (("bits", bits), ("shape", shape), ("group", shape[1] // self.scale.shape[1])):
            object.__setattr__(self, name, value)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scale, self.minimum) if t is not None)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        return self.apply(lambda t: t.to(device))

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedWeight":
        """The weight whose tensors are what the function makes of this one's."""
        return QuantizedWeight(*(None if t is None else function(t) for t in (self.data, self.scale, self.minimum)))

    def integers(self, rows: slice = slice(None)) -> torch.Tensor:
        """q [n, groups, G], int8 or uint8."""
        data = self.data[rows].unflatten(1, (self.scale.shape[1], -1))
        return data if self.bits == 8 else torch.cat((data & 15, data >> 4), -1)

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> torch.Tensor:
        """The weight, or the given rows of it, as a plain tensor; computed in float32, rounded once."""
        w = self.integers(rows).float() * self.scale[rows].float().unsqueeze(-1)
        if self.minimum is not None:
            w += self.minimum[rows].float().unsqueeze(-1)
        return w.flatten(1).to(dtype)

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(4 bits in the order that PyTorch's CPU kernel wants, its scales and zeros), or None where it has no use. Kept until one
        of the tensors is written to; inference tensors count no versions and are taken to stay."""
        if self.bits == 8 or self.device.type != "cpu" or self.shape[0] % 16:
            return None
        versions = [None if t.is_inference() else t._version for t in (self.data, self.scale, self.minimum)]
        if self.__dict__.get("_packed", (None,))[0] != versions:
            self.__dict__["_packed"] = versions, self._pack()
        return self.__dict__["_packed"][1]

    def _pack(self):
        order = torch._convert_weight_to_int4pack_for_cpu(self.integers().flatten(1).int(), 1)
        zero = self.minimum.float() + 8 * self.scale.float()  # the kernel computes scale (q - 8) + zero
        return order, torch.stack((self.scale.T, zero.to(self.scale.dtype).T), -1).contiguous()

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times the weight, transposed, plus bias, in x.dtype, by PyTorch alone.

        On a CPU a few rows of bfloat16 go through PyTorch's own kernels for 8 and 4 bits; everything else dequantises a part of
        the weight at a time, so that memory stays bounded.
        """
        return _linear(x, self, bias)


@steady
def _linear(x, weight, bias):
    N, K = weight.shape
    few = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[:-1].numel() <= 16
    if few and weight.packed is not None:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(_dense(x), weight.packed[0], weight.group, weight.packed[1])
    elif few and weight.bits == 8 and K % 32 == 0 and N % 16 == 0:  # it reads past the end of other shapes
        y = torch._weight_int8pack_mm(_dense(x), weight.data, weight.scale.flatten().to(x.dtype))
    else:
        step = max(1, TILE // max(1, K))
        y = x.new_empty((x.shape[:-1].numel(), N))
        for start in range(0, N, step):
            rows = slice(start, start + step)
            y[:, rows] = F.linear(x.reshape(-1, K), weight.dequantize(x.dtype, rows))
    y = y.view(*x.shape[:-1], N)
    return y if bias is None else y + bias


def quantize(weight: torch.Tensor, bits: int = 8, group: int = 32) -> QuantizedWeight:
    """A `QuantizedWeight` of `weight` [N, K]. bits: 8 (a scale a row) or 4 (a scale and a minimum for every `group` columns, 32,
    64 or 128, of which K is a multiple). Raises ValueError for anything else, and for weights that are not finite."""
    if bits not in (8, 4):
        raise ValueError(f"quantize: bits is {bits}, expected 8 or 4")
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"quantize: weight has shape {tuple(weight.shape)} and dtype {weight.dtype}, expected two axes of floats")
    if bits == 4 and (group not in GROUPS or weight.shape[1] % group):
        raise ValueError(f"quantize: group is {group}, expected 32, 64 or 128, and {weight.shape[1]} columns a multiple of it")
    step = max(1, TILE // max(1, weight.shape[1]))
    if len(weight) > step:  # rows have nothing to do with each other, and in float32 they take twice or four times the memory
        parts = [quantize(rows, bits, group) for rows in weight.detach().split(step)]
        tensors = zip(*((part.data, part.scale, part.minimum) for part in parts))
        return QuantizedWeight(*(None if part[0] is None else torch.cat(part) for part in tensors))
    w = weight.detach().float()
    if not w.isfinite().all():
        raise ValueError("quantize: weight has values that are not finite")
    if bits == 8:
        scale = _round_up(w.abs().amax(1, keepdim=True) / 127)
        return QuantizedWeight((w / _divisor(scale)).round().to(torch.int8), scale)
    w = w.unflatten(1, (-1, group))
    low, high = w.amin(-1), w.amax(-1)
    minimum = low.bfloat16()
    scale = _round_up((high - minimum.float()) / 15)
    q = ((w - minimum.float().unsqueeze(-1)) / _divisor(scale).unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8)
    half = group // 2
    return QuantizedWeight((q[..., :half] | q[..., half:] << 4).flatten(1), scale, minimum)


def _dense(x):
    """x as contiguous rows from a 16-byte boundary on: PyTorch's kernel for 8 bits crashes on others."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _round_up(scale):
    """float32 from 0 on to bfloat16, not below: the largest weight must stay in range."""
    return ((scale.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()


def _divisor(scale):
    return torch.where(scale == 0, 1.0, scale.float())
