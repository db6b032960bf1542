"""The kernels of a Llama-style language model in Triton, each with a PyTorch reference beside it."""

from . import reference
from .dispatch import use_backend
from .frequencies import rope_tables
from .rmsnorm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "reference", "rms_norm", "rope_tables", "use_backend"]
