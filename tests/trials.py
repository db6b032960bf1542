"""The cases of bench/proofs.py as parameters of tests."""

import pytest
import torch
from trillama.bench import proofs
from trillama.kernels.dispatch import INTERPRETED

FEW = not (INTERPRETED or torch.cuda.is_available())  # compiled and emulated: seconds for each new shape


def trials(op, where=""):
    """The names of an op's cases that contain `where`; where each costs a compilation those of all dtypes run without `-m slow`."""
    names = [n for n in proofs.TRIALS[op] if where in n]
    return [pytest.param(proofs.bare(n), marks=[pytest.mark.slow] * (FEW and n[0] != "*")) for n in names]
