"""Bytes through memory: what each kernel touches against the least possible, and what a whole step of a model moves and computes.

    python -m trillama.bench.traffic [OP ...]            the kernels, from their own accesses under Triton's interpreter
    python -m trillama.bench.traffic --step              launches, bytes and FLOP of a model's step, and bounds on its time

A kernel's HBM bytes are the 32-byte sectors that it reads plus those that it writes, each counted once a launch: what a GPU moves
whose L2 cache holds everything for the length of a launch. `requested` counts every access: what L1 and L2 have to serve.
"""

import contextlib
import inspect
import os
import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ..model import cli
from ..model.later import later
from .cases import DTYPES, MODELS, OPS, case, torch_dtype

torch = later("torch")

SECTOR = 32


# --- a kernel's accesses -------------------------------------------------------------------------------------------------


@dataclass
class Buffer:
    """Accesses of one launch to one storage: bytes asked for, and which bytes and sectors were touched at all."""

    name: str
    start: int
    stop: int
    requested: Counter = field(default_factory=Counter)
    touched: dict = field(default_factory=dict)

    def note(self, kind, addresses, itemsize):
        touched = self.touched.setdefault(kind, np.zeros(self.stop - self.start, bool))
        self.requested[kind] += addresses.size * itemsize
        for byte in range(itemsize):
            touched[addresses - self.start + byte] = True

    def bytes(self, kind):
        return int(self.touched[kind].sum()) if kind in self.touched else 0

    def sectors(self, kind):
        """Bytes of the 32-byte sectors touched, as the storage lies in memory."""
        if kind not in self.touched:
            return 0
        return len(np.unique((np.flatnonzero(self.touched[kind]) + self.start) // SECTOR)) * SECTOR


@dataclass
class Launch:
    kernel: str
    programs: int
    buffers: list

    def note(self, kind, addresses, itemsize):
        for buffer in self.buffers:
            inside = (addresses >= buffer.start) & (addresses < buffer.stop)
            if inside.any():
                buffer.note(kind, addresses[inside], itemsize)
                addresses = addresses[~inside]
        if addresses.size:
            raise RuntimeError(f"{self.kernel}: {kind} at {int(addresses[0]):#x}, which lies in none of its arguments")

    @property
    def hbm(self):
        return sum(b.sectors(kind) for b in self.buffers for kind in ("read", "written"))

    @property
    def requested(self):
        return sum(sum(b.requested.values()) for b in self.buffers)


def _tensors(arguments, names):
    for name, a in zip(names, arguments):
        if isinstance(a, torch.Tensor):
            yield name, a
        elif isinstance(a, tuple):
            yield from _tensors(a, [name] * len(a))
        elif isinstance(getattr(a, "base", None), torch.Tensor):
            yield name, a.base


def quicken():
    """At every call of a function, Triton's interpreter looks through all of triton.language for what to replace by its own: half
    of the time of small kernels. The names are always the same, and inside of a kernel they are replaced already."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names = {}

    def patch_builtin(module, *rest):
        if module not in names:
            names[module] = [name for name, member in inspect.getmembers(module) if is_builtin(member)]
        if names[module] and is_builtin(getattr(module, names[module][0])):
            for name in names[module]:
                interpreter._patch_attr(module, name, getattr(module, name), *rest)

    interpreter._patch_builtin = patch_builtin


@contextlib.contextmanager
def counting():
    """Within the block kernels run in the interpreter; gives the list of `Launch`es, which grows as they are made."""
    from ..kernels import use_backend
    from ..kernels.dispatch import INTERPRETED, observe

    if not INTERPRETED:
        raise RuntimeError("memory accesses are counted in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported")
    from triton.runtime.interpreter import interpreter_builder as builder

    launches = []

    def begin(kernel, grid, arguments, options):
        storages = {}
        for name, t in _tensors(arguments, kernel.arg_names):
            storages.setdefault(t.untyped_storage().data_ptr(), (name, t.untyped_storage().nbytes()))
        buffers = [Buffer(name, start, start + size) for start, (name, size) in storages.items()]
        launches.append(Launch(kernel.fn.__name__, int(np.prod(grid)), buffers))

    def note(kind, pointers, mask):
        addresses, active = np.broadcast_arrays(pointers.data, mask)
        addresses = addresses[active.astype(bool)]  # what `&` makes of masks are integers
        width = pointers.get_element_ty().primitive_bitwidth // 8
        launches[-1].note(kind, addresses.astype(np.int64), max(1, width))

    def load(pointers, mask, *rest, **options):
        note("read", pointers, mask.data)
        return before["create_masked_load"](pointers, mask, *rest, **options)

    def store(pointers, value, mask, *rest, **options):
        note("written", pointers, mask.data)
        return before["create_masked_store"](pointers, value, mask, *rest, **options)

    def update(operation, pointer, value, mask, *rest, **options):
        note("read", pointer, mask.data)
        note("written", pointer, mask.data)
        return before["create_atomic_rmw"](operation, pointer, value, mask, *rest, **options)

    hooks = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": update}
    before = {name: getattr(builder, name) for name in hooks}
    try:
        for name, hook in hooks.items():
            setattr(builder, name, hook)
        with use_backend("triton"), observe(begin):
            yield launches
    finally:
        for name in hooks:
            delattr(builder, name)


def count(case, inputs=None):
    """The launches of a case, run in the interpreter on its usual inputs or on these."""
    with counting():
        run = case.prepare(case.inputs() if inputs is None else inputs)
    with counting() as launches:
        run()
    return launches


# --- a whole step of a model ---------------------------------------------------------------------------------------------


@dataclass
class Line:
    """One kind of operation in a step: how often, with how many launches, what it moves at least and computes."""

    name: str
    calls: int = 0
    launches: int = 0
    moved: int = 0
    flops: int = 0


def _library(note):
    """A mode in which every PyTorch call that makes new data is noted; each is one launch at least."""

    class Library(torch.overrides.TorchFunctionMode):
        FREE = ("empty", "new_empty", "empty_like", "empty_strided", "__get__", "__set__", "_make_subclass")

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = getattr(function, "__name__", str(function))
            inputs = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            if not isinstance(result, torch.Tensor) or name in self.FREE or result.device.type != "meta":
                return result
            in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
            known = {t.untyped_storage()._cdata for t in inputs}
            if in_place or result.untyped_storage()._cdata not in known:
                moved = sum(t.numel() * t.element_size() for t in (*inputs, result))
                flops = 0
                if name == "linear":
                    flops = 2 * inputs[0].numel() * inputs[1].shape[0]
                elif name in ("matmul", "bmm", "mm", "__matmul__"):
                    flops = 2 * inputs[0].numel() * inputs[1].shape[-1]
                elif name == "embedding":
                    moved = 2 * result.numel() * result.element_size()
                note(name, 1, moved, flops)
            return result

    return Library()


def step(config, batch, tokens, context, dtype=None):
    """What one step of `Llama(config)` does: `tokens` new tokens in each of `batch` rows, the last of which sees `context` keys.

    Returns a list of `Line`s, one a kind of operation. The model's own code runs, on tensors without memory: launches of our
    kernels are noted, not made; bytes and FLOP are the least that each operation needs. dtype: None is bfloat16.
    """
    from .. import kernels
    from .. import model as package
    from ..kernels import use_backend
    from ..kernels.dispatch import INTERPRETED, observe
    from ..model import KVCache, Llama
    from .xray import compiling_for

    lines, dtype = {}, dtype or torch.bfloat16

    def note(name, launches, moved, flops):
        line = lines.setdefault(name, Line(name))
        line.calls += 1
        line.launches += launches
        line.moved += int(moved)
        line.flops += int(flops)

    made = []
    moved = {name: op.moved for name, op in OPS.items()}
    flops = {name: op.flops for name, op in OPS.items()}

    def counted(name, function):
        signature = inspect.signature(function)

        def call(*args, **kwargs):
            before = len(made)
            arguments = signature.bind(*args, **kwargs).arguments
            result = function(*args, **kwargs)
            note(name, len(made) - before, moved[name](arguments), flops[name](arguments) if name in flops else 0)
            return result

        return call

    places = kernels, sys.modules[package.__name__ + ".llama"]
    ours = [(place, name, getattr(place, name)) for place in places for name in moved if hasattr(place, name)]
    with torch.device("meta"):
        llama = Llama(config).to(dtype).eval()
        cache = KVCache(config, batch, context, dtype, "meta")
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
    if context > tokens:
        cache.advance(batch, context - tokens)
    # The choice of the next id, one launch more, reads the logits alone and is left out.
    target = contextlib.nullcontext() if INTERPRETED else compiling_for("sm_80")  # asked for its number only
    try:
        for place, name, function in ours:
            setattr(place, name, counted(name, function))
        with target, use_backend("triton"), observe(lambda *launch: made.append(launch) or True), torch.inference_mode():
            llama.rope(context, context, torch.device("meta"))  # the tables are made once, not in a step
            with _library(note):
                if tokens == 1:
                    llama.step(ids[:, 0], cache)
                else:
                    llama.head(llama.hidden_states(ids, cache)[:, -1:])
    finally:
        for place, name, function in ours:
            setattr(place, name, function)
    return list(lines.values())


def seconds(lines, gpu, itemsize=2):
    """The least time of the step on the GPU of that name: its operations one after the other, each at its own bound."""
    from .roofline import GPUS

    return sum(GPUS[gpu].bound(line.moved, line.flops, itemsize) for line in lines)


# --- the command -------------------------------------------------------------------------------------------------------


def small(case):
    """The case with few tokens, so that the interpreter is done in seconds; what is counted scales with them."""
    from dataclasses import replace

    # A norm's backward adds up dweight in a fixed number of rows: with few tokens these would weigh too much.
    enough = 512 if case.backward and "norm" in case.op else 256 if "attention" in case.op else 16
    tokens = min(case.tokens, enough)
    if "linear" in case.op or case.op in ("embed_next_", "choose_", "choose_ cut"):  # weight, table, logits are all that counts
        return replace(case, model="SmolLM2-135M")
    if enough == 512:  # the ratio does not depend on the columns
        return replace(case, model="Qwen3-0.6B", tokens=enough, context=enough)
    if case.op == "flash_attention":  # heads of keys have nothing to do with each other
        name = case.model.partition("/")[0]
        case = replace(case, model=f"{name}/{MODELS[name].kv_heads}")
    return replace(case, tokens=tokens, context=min(case.context, 1024) if case.context > case.tokens else tokens)


def summary(case):
    """What a case moves, over its launches: {"least", "hbm", "requested"} in bytes, and the shape it was counted at."""
    launches = count(case)
    return {
        "op": case.name, "case": case.label, "shape": case.shape, "dtype": case.dtype, "kernels": [l.kernel for l in launches],
        "least": case.moved, "hbm": sum(l.hbm for l in launches), "requested": sum(l.requested for l in launches),
    }  # fmt: skip


def text(summaries):
    from .plots import table

    header = ("op", "case", "shape", "least bytes", "HBM bytes", "of the least", "requested")
    rows = [
        (s["op"], s["case"], s["shape"], s["least"], s["hbm"], f"{s['hbm'] / s['least']:.3f}", f"{s['requested'] / s['least']:.2f}")
        for s in summaries
    ]
    return "\n".join(table(header, rows, left=3))


def step_text(name, lines, what, itemsize=2, tokens=1):
    """A step as tables: its operations, and bounds on its time."""
    from .plots import table
    from .roofline import GPUS

    rows = [(l.name, l.calls, l.launches, f"{l.moved / 1e9:.4f}", f"{l.flops / 1e9:.2f}") for l in lines]
    rows.append(("together", *(sum(getattr(l, f) for l in lines) for f in ("calls", "launches")),
                 f"{sum(l.moved for l in lines) / 1e9:.4f}", f"{sum(l.flops for l in lines) / 1e9:.2f}"))  # fmt: skip
    times = {gpu: seconds(lines, gpu, itemsize) for gpu in GPUS}
    bounds = [(gpu, f"{t * 1e3:.3f}", f"{tokens / t:,.0f}", GPUS[gpu].source) for gpu, t in times.items()]
    return "\n".join([
        f"{name}, {what}", *table(("operation", "calls", "launches", "GB", "GFLOP"), rows), "",
        "Bounds, not measurements: the operations one after the other at the datasheet's bandwidth and FLOP rate.",
        *table(("", "ms at least", "tokens/s at most", "source"), bounds), "",
    ])  # fmt: skip


def main(argv=None):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks at it when it is imported

    parser = cli.Parser(prog="python -m trillama.bench.traffic", description="Bytes through memory. Needs no GPU.")
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="default: all that there are")
    add("--model", nargs="+", metavar="MODEL", default=["Llama-3.1-8B"], help=f"of {', '.join(MODELS)}")
    add("--dtype", default="bf16", metavar="DTYPE", help="bf16, fp16 or fp32")
    add("--step", action="store_true", help="a prefill and a decode step of the whole model, and bounds on their time")
    add("--batch", type=int, default=1)
    add("--context", type=int, default=4096, help="tokens of the prefill, and keys that the decode step sees (default: 4096)")
    options = parser.parse_args(argv)
    for what, given, names in (("OP", options.ops, OPS), ("--model", options.model, MODELS), ("--dtype", [options.dtype], DTYPES)):
        cli.known(what, given, names)
    for name in options.model:
        if options.step and not MODELS[name].layers:
            raise ValueError(f"--model is {name}, of which only some shapes are known here, not a whole step")
    quicken()
    if options.step:
        for name in options.model:
            dtype = torch_dtype(options.dtype)
            for new, what in ((options.context, "prefill"), (1, "decode")):
                lines = step(MODELS[name].config(), options.batch, new, options.context, dtype)
                shape = f"{what}: batch {options.batch}, {new} new, {options.context} keys, {options.dtype}"
                print(step_text(name, lines, shape, dtype.itemsize, options.batch * new))
        return 0
    cases = [
        small(case(op, model, batch=options.batch, dtype=options.dtype, backward=backward))
        for op in (options.ops or OPS)
        for backward in ((False, True) if OPS[op].differentiable else (False,))
        for model in options.model
    ]
    print(text([summary(c) for c in cases]))
    return 0


if __name__ == "__main__":
    sys.exit(cli.status(main))
