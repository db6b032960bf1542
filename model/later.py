"""Modules that take seconds to import, imported when something of them is first used: a command line answers before that."""

import importlib


class later:
    """Stands for a module in the globals of another: `torch = later("torch")`. Its attributes can be read, not set."""

    __slots__ = ("_name", "_package")

    def __init__(self, name, package=None):
        self._name, self._package = name, package

    def __getattr__(self, name):
        return getattr(importlib.import_module(self._name, self._package), name)
