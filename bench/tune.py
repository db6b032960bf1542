"""Measures the tuning tables' neighbours on this GPU: `python -m trillama.bench.tune [OP ...] --output tuning.json`.

The tables were chosen from compiled code alone (bench/LOG.md). Here every entry that an op asks for is varied: each field is halved
and doubled (the stages: one less and one more), what fails to compile, spills or gives another result is left out, and the fastest
by the device's time is kept if it gains more than 2 %. `export TRILLAMA_TUNING=tuning.json` then puts the measured entries in the
place of the tables' own. Nothing is ever measured while a model runs.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import torch

from ..kernels import tuning
from ..kernels.dispatch import forget, observe
from .cases import DTYPES, MODELS, OPS, available, case
from .plots import table

VARIED = {  # what may change without changing what is computed, nor the order of a row's sums between calls
    "Rows": ("block_rows", "warps"),
    "Rope": ("block_s", "warps"),
    "Decode": ("block_n", "warps", "stages"),
    "Attention": ("block_m", "block_n", "warps", "stages"),
    "Linear": ("block_n", "block_k", "stages"),
}
GAIN = 0.98


class Asked(dict):
    """Entries in the tables' place, which also notes what is asked for."""

    def __init__(self, entries=()):
        super().__init__(entries)
        self.keys_asked = []

    def get(self, key, default=None):
        self.keys_asked.append(key)
        return super().get(key, default)


@contextlib.contextmanager
def entries(measured):
    """Within the block the tables answer with the fields in `measured`, a dict by (function, arguments), where it has some."""
    asked, before = Asked(measured), tuning.measured
    tuning.measured = lambda: asked
    _forget()
    try:
        yield asked
    finally:
        tuning.measured = before
        _forget()


def _forget():
    for function in vars(tuning).values():
        if hasattr(function, "cache_clear") and hasattr(function, "__wrapped__"):
            function.cache_clear()
    forget()


def neighbours(entry):
    """The fields of the entry and of those around it."""
    choices = []
    for name in VARIED[type(entry).__name__]:
        value = getattr(entry, name)
        near = (value - 1, value, value + 1) if name == "stages" else (value // 2, value, value * 2)
        choices.append([(name, v) for v in near if v > 0])
    return [dict(fields) for fields in itertools.product(*choices)]


def candidates(key):
    """The values that may stand under a key: of one entry, or of one of a pair at a time."""
    function, arguments = key
    chosen = getattr(tuning, function).__wrapped__(*arguments)
    if isinstance(chosen, tuple):
        own = [dataclasses.asdict(c) for c in chosen]
        return [[*own[:i], {**own[i], **fields}, *own[i + 1 :]] for i, c in enumerate(chosen) for fields in neighbours(c)]
    return neighbours(chosen)


def spills(c):
    """Whether a kernel of the case spills, from Triton's own record of the compiled kernels."""
    found = []

    def look(kernel, grid, arguments, options):
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        compiled._init_handles()
        found.append(compiled.n_spills)

    with observe(look):
        c.prepare(c.inputs("cuda"))()
    return any(found)


def tune(c, measure, fits=lambda c: True, device="cuda"):
    """{key: (fields, seconds, seconds of the table's own)} of the entries that the case asks for and that a neighbour beats.

    measure(case) gives seconds; fits(case) is False for what must not be used, such as kernels that spill.
    """
    inputs = c.inputs(device)

    def result():
        value = c.prepare(inputs)()
        return value if isinstance(value, tuple) else (value,)

    with entries({}) as asked:
        expected = [t.clone() for t in result()]
        own = measure(c)
    best = {}
    for key in dict.fromkeys(asked.keys_asked):
        for fields in candidates(key):
            try:
                with entries({key: fields}):
                    same = all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(result(), expected))
                    seconds = measure(c) if same and fits(c) else None
            except Exception:  # too much shared memory, a tile that the kernel cannot take, ...
                continue
            if seconds is not None and seconds < GAIN * best.get(key, (None, own, own))[1]:
                best[key] = (fields, seconds, own)
    return best


def document(found, gpu):
    rows = [{"function": f, "arguments": list(a), "entry": fields} for (f, a), (fields, _, _) in found.items()]
    return {"gpu": gpu, "torch": torch.__version__, "entries": rows}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m trillama.bench.tune", description="Measures tile sizes. Needs a GPU.")
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="default: all that there are")
    add("--model", nargs="+", metavar="MODEL", default=["Llama-3.1-8B"], help=f"of {', '.join(MODELS)}")
    add("--dtype", default="bf16", choices=DTYPES)
    add("--output", default="tuning.json", metavar="FILE")
    options = parser.parse_args(argv)
    for what, given, known in (("OP", options.ops, available()), ("--model", options.model, MODELS)):
        for name in given:
            if name not in known:
                raise ValueError(f"{what} is {name!r}, expected one of {', '.join(known)}")
    if not torch.cuda.is_available():
        raise ValueError("tune measures on a GPU, and torch finds none")
    from .timing import device_seconds

    def measure(c):
        events, graph = device_seconds(c)
        return graph or events

    found = {}
    for op in options.ops or available():
        for model, backward in itertools.product(options.model, (False, True) if OPS[op].differentiable else (False,)):
            c = case(op, model, dtype=options.dtype, backward=backward)
            found.update(tune(c, measure, lambda c: not spills(c)))
            print(f"{c.name}, {c.label}: {len(found)} entries better than the tables' so far", file=sys.stderr)
    Path(options.output).write_text(json.dumps(document(found, torch.cuda.get_device_name()), indent=1) + "\n")
    rows = [(f"{f}{a}", f"{own * 1e6:.1f}", f"{s * 1e6:.1f}", fields) for (f, a), (fields, s, own) in found.items()]
    print("\n".join(table(("entry", "us", "us now", "fields"), rows)))
    print(f"export TRILLAMA_TUNING={Path(options.output).resolve()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"trillama: error: {error}", file=sys.stderr)
        sys.exit(2)
