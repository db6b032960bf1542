"""`nn.Module` forms of the row ops, with the parameter names and constructors of the modules they replace."""

from collections.abc import Sequence

import torch
from torch import nn

from .glu import swiglu
from .reference import wide
from .rmsnorm import rms_norm


class RMSNorm(nn.Module):
    """`torch.nn.RMSNorm` and the RMSNorm of Hugging Face's models, on `rms_norm`; their state dicts load as they are.

    normalized_shape: the trailing axes, an integer or a sequence. eps: None is torch's default, the epsilon of the dtype that is
    computed in (float32 for lower precision). elementwise_affine=False: no weight. offset, casting: as in `rms_norm`; the weight
    starts at 1 - offset.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = 1e-6, elementwise_affine: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, offset: float = 0.0, casting: str = "llama",
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.elementwise_affine, self.offset, self.casting = eps, elementwise_affine, offset, casting
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        self.weight = None if weight is None else nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = len(self.normalized_shape)
        if tuple(x.shape[-axes:]) != self.normalized_shape:
            raise ValueError(f"RMSNorm: x has shape {tuple(x.shape)}, expected (*, {', '.join(map(str, self.normalized_shape))})")
        eps = torch.finfo(wide(x.dtype)).eps if self.eps is None else self.eps
        weight = None if self.weight is None else self.weight.flatten()
        return rms_norm(x.flatten(-axes), weight, eps, offset=self.offset, casting=self.casting).view(x.shape)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class SwiGLU(nn.Module):
    """The gated MLP of Llama: down_proj(silu(gate_proj(x)) * up_proj(x)), with Hugging Face's parameter names."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
