"""The kernels of a Llama-style language model in Triton, each with a PyTorch reference beside it."""

import re
from importlib import metadata
from pathlib import Path

from . import reference
from .attention import flash_attention, flash_attention_varlen
from .decode import decode_attention
from .dispatch import use_backend
from .frequencies import rope_tables
from .glu import swiglu
from .linear import decode_linear
from .modules import RMSNorm, SwiGLU
from .quantized import QuantizedWeight, quantize
from .rmsnorm import add_rms_norm, rms_norm
from .rope import apply_rope, rope_append_
from .sampling import choose_, embed_next_

__all__ = [
    "QuantizedWeight", "RMSNorm", "SwiGLU", "add_rms_norm", "apply_rope", "choose_", "decode_attention", "decode_linear",
    "embed_next_", "flash_attention", "flash_attention_varlen", "quantize", "reference", "rms_norm", "rope_append_", "rope_tables",
    "swiglu", "use_backend",
]  # fmt: skip
__version__: str


def __getattr__(name: str) -> str:
    """`__version__`: of a checkout what its setup.py says, else what was installed. Looked up when it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    setup = Path(__file__).resolve().parents[1] / "setup.py"
    stated = re.search(r'^    version="(.+)",$', setup.read_text(encoding="utf-8"), re.M) if setup.is_file() else None
    return stated[1] if stated else metadata.version("trillama")
