"""A thin model on the kernels: checkpoints of several families and formats in, text out."""

import importlib
import sys
import types

__all__ = ["KVCache", "Llama", "Tokenizer", "generate"]

_HOMES = {"KVCache": ".llama", "Llama": ".llama", "Tokenizer": ".tokenizer"}


def __getattr__(name):
    """The public names are imported when they are first used, so that the command line answers before torch is loaded."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__


class _Package(types.ModuleType):
    @property
    def generate(self):
        return importlib.import_module(".generate", __name__).generate

    @generate.setter
    def generate(self, module):
        """The import system leaves the module of this name here; the name stands for the function in it."""


sys.modules[__name__].__class__ = _Package
