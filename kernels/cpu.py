"""The fastest way to multiply one row with a weight on this CPU, found by measurement.

A product of one row with a weight reads the weight once and does two operations an element: it should run at the speed of memory.
Whether it does depends on the routine that a formulation lands in, and that differs by vendor and dtype: `F.linear` streams at
full speed on one CPU and at 40 % of it on another, where the same product as a batch of slices does better. All formulations give
the product; they differ in speed and in the order of summation.
"""

import time
from functools import partial

import torch
import torch.nn.functional as F

BYTES = 2**26  # of weights that a measurement reads: more than most caches hold, as a decode step does
PASSES = 3
CLEARLY = 0.8  # of F.linear's time: what another formulation must need to be taken, so that noise does not decide


def _matvec(x, weight):
    return torch.mv(weight, x.reshape(-1))


def _sliced_rows(x, weight, slices):
    """x times each slice of the weight, transposed."""
    N, K = weight.shape
    return torch.bmm(x.reshape(1, 1, K).expand(slices, 1, K), weight.view(slices, N // slices, K).transpose(1, 2))


def _sliced_columns(x, weight, slices):
    """Each slice of the weight times x as a column."""
    N, K = weight.shape
    return torch.bmm(weight.view(slices, N // slices, K), x.reshape(1, K, 1).expand(slices, K, 1))


def formulations(weight):
    """By name, functions of (x, weight): one row x with K elements in all times the weight [N, K], its N elements in any shape."""
    made = {"linear": F.linear, "matrix times vector": _matvec}
    if weight.is_contiguous() and weight.numel():
        for slices in (2, 8):
            if weight.shape[0] % slices == 0:
                made[f"row times {slices} slices"] = partial(_sliced_rows, slices=slices)
                made[f"{slices} slices times column"] = partial(_sliced_columns, slices=slices)
    return made


_chosen = {}  # {what `_key` says of a weight: (name, formulation)}, as long as the process lives


def _key(weight):
    return weight.shape, weight.dtype, weight.is_contiguous(), torch.get_num_threads()


def linear(x, weight, bias=None):
    """`F.linear`, for one row of x in the formulation that `choose` found fastest for weights like this one."""
    _, product = _chosen.get(_key(weight), ("linear", F.linear)) if x.numel() == weight.shape[1] else ("linear", F.linear)
    if product is F.linear:
        return F.linear(x, weight, bias)
    y = product(x, weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def choose(weights):
    """Measures the formulations for each shape and dtype among `weights` [N, K] on the CPU; `linear` follows from then on.

    Reads 64 MiB of weights one after the other, so that they come from memory, three times in every formulation: a tenth of a
    second for each shape, once a process. Returns {shape: name}.
    """
    alike = {}
    for weight in weights:
        alike.setdefault(_key(weight), []).append(weight)
    for key, group in alike.items():
        if key not in _chosen:
            name = _fastest(group[: max(1, BYTES // max(1, group[0].nbytes))])
            _chosen[key] = name, formulations(group[0])[name]
    return {tuple(key[0]): _chosen[key][0] for key in alike}


@torch.inference_mode()
def _fastest(weights):
    x = torch.randn(1, weights[0].shape[1], dtype=weights[0].dtype)
    best = dict.fromkeys(formulations(weights[0]), float("inf"))
    for _ in range(PASSES):  # in turns: what else the machine does meets all of them
        for name, product in formulations(weights[0]).items():
            start = time.perf_counter()
            for weight in weights:
                product(x, weight)
            best[name] = min(best[name], time.perf_counter() - start)
    name = min(best, key=best.get)
    return name if best[name] < CLEARLY * best["linear"] else "linear"
