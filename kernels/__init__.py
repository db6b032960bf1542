"""The kernels of a Llama-style language model in Triton, each with a PyTorch reference beside it."""

from . import reference
from .dispatch import use_backend
from .frequencies import rope_tables

__all__ = ["reference", "rope_tables", "use_backend"]
