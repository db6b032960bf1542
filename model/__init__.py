"""A thin model on the kernels: checkpoints of several families and formats in, text out."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generation import generate, warmup
    from .llama import KVCache, Llama
    from .tokenizer import Tokenizer

TYPE_CHECKING = False  # what type checkers take for True; typing would have to be imported for it
if TYPE_CHECKING:
    from .generation import generate, warmup
    from .llama import KVCache, Llama
    from .tokenizer import Tokenizer

_HOMES = {"KVCache": ".llama", "Llama": ".llama", "Tokenizer": ".tokenizer", "generate": ".generation", "warmup": ".generation"}
__all__ = ["KVCache", "Llama", "Tokenizer", "generate", "warmup"]


def __getattr__(name: str) -> object:
    """The public names are imported when they are first used, so that the command line answers before torch is loaded."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
