"""The cases of bench/proofs.py as parameters of tests."""

import pytest
import torch
from trillama.bench import proofs
from trillama.kernels.dispatch import INTERPRETED

FEW = not (INTERPRETED or torch.cuda.is_available())  # compiled and emulated: seconds for each new shape


def trials(op, where="", long=()):
    """The names of an op's cases that contain `where`; those in `long`, and where each costs a compilation all but those of all
    dtypes, run with `-m slow` only."""
    names = [n for n in proofs.TRIALS[op] if where in n]
    return [
        pytest.param(proofs.bare(n), marks=[pytest.mark.slow] * (proofs.bare(n) in long or (FEW and n[0] != "*"))) for n in names
    ]
