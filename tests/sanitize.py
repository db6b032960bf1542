"""Runs in an environment with Triton 3.6 and triton-viz, which tests/test_memory_safety.py makes: kernels under the sanitizer.

The sanitizer runs a kernel on symbols instead of numbers and asks an SMT solver whether any program of the grid can reach an
address outside of the tensors. It knows contiguous tensors only, and takes every branch that depends on a symbol.

Reads one case a line; prints `op, kernel, argument, outcome` a line. An argument other than "-" has been made one element shorter
before, so that a proof that would prove anything is seen: the outcome must be "caught" then, and "safe" else.
"""

import contextlib
import io
import json
import sys

import torch
import triton_viz
from trillama.bench.cases import Case
from trillama.bench.xray import launches
from triton_viz.clients import Sanitizer


def outcome(kernel, grid, arguments, options):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            triton_viz.trace(client=Sanitizer(abort_on_error=True))(kernel)[grid](*arguments, **options)
        except SystemExit:  # how the sanitizer stops at what it has found
            return "caught"
    return "safe"


for line in sys.stdin:
    case, ready = Case(**json.loads(line)), []
    inputs = {name: t.contiguous() for name, t in case.inputs().items()}
    launches(lambda: ready.append(case.prepare(inputs)))  # noqa: B023
    for kernel, grid, arguments, options in launches(ready[0]):
        for name, t in (("-", None), *zip(kernel.arg_names, arguments)):
            if t is None and name == "-":
                print(case.name, kernel.fn.__name__, name, outcome(kernel, grid, arguments, options), sep="\t", flush=True)
            elif isinstance(t, torch.Tensor):
                changed = [t.flatten()[:-1].clone() if a is t else a for a in arguments]
                print(case.name, kernel.fn.__name__, name, outcome(kernel, grid, changed, options), sep="\t", flush=True)
