"""Measures tile sizes on this GPU: `python -m trillama.bench.tune [ENTRY ...] --output tuning.json`, `--list` shows what it tries.

The tables were chosen from compiled code alone (bench/LOG.md). ENTRIES names the entries that matter and the op whose call
decides each: a forward's by its forward, a backward's by its backward. A few candidates stand beside each of the tables' own:
some picked by hand, then neighbours. They are compiled at once, on all cores; what fails to compile, does not fit or spills more
than the table's own never reaches the GPU. The rest is measured in a process for each entry: a candidate that gives another
result, crashes, hangs or runs out of memory is named, and costs only itself. The fastest by the device's time is kept if it gains
more than 2 %. The file is written after every candidate and keeps what it had of other entries.

`export TRILLAMA_TUNING=tuning.json` puts the measured entries in the place of the tables' own. Nothing is ever measured while a
model runs.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..model import cli
from ..model.later import later
from . import files
from .apart import Died, apart, one_line
from .cases import DTYPES, MODELS, case
from .plots import table
from .xray import ARCHITECTURES

torch, kernels, check = later("torch"), later("..kernels", __package__), later(".check", __package__)
dispatch, tuning = later("..kernels.dispatch", __package__), later("..kernels.tuning", __package__)
GAIN = 0.98
MOST = 8  # candidates of one entry
VARIED = {  # what may change without changing what is computed, nor the order of a row's sums between calls
    "Rows": ("block_rows", "warps"),
    "Rope": ("block_s", "warps"),
    "Decode": ("block_n", "warps", "stages"),
    "Attention": ("block_m", "block_n", "warps", "stages"),
    "Linear": ("block_n", "block_k", "stages"),
    "Choose": ("block", "warps"),
}


# --- what is varied ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What `function` of the tables answers to the op's call, or `part` of the pair that it answers, at the shapes of `models`.
    by_hand(arguments, own): fields of candidates beside the tables' own. fixed: fields that neighbours leave as they are."""

    op: str
    function: str
    models: tuple = ("Llama-3.1-8B",)
    backward: bool = False
    part: int | None = None
    by_hand: Callable = lambda arguments, own: []
    fixed: tuple = ()


def _tiles(by_size):
    """by_hand of attention from (block_m, block_n, warps, stages[, edge_stages]) by padded head size, in half precision."""
    names = ("block_m", "block_n", "warps", "stages", "edge_stages")

    def by_hand(arguments, own):
        _, head_dim, itemsize = arguments
        return [dict(zip(names, tile)) for tile in by_size.get(tuning.block_d(head_dim), ()) if itemsize == 2]

    return by_hand


HEAD_SIZES = ("Llama-3.2-1B", "Llama-3.1-8B", "Gemma-2-9B")  # 64, 128, 256

ENTRIES = {
    "attention": Entry(
        "flash_attention", "attention", HEAD_SIZES, fixed=("block_m",),
        by_hand=_tiles({
            64: [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3), (128, 32, 4, 4)],
            128: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
            256: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 1)],
        }),
    ),
    "dq": Entry(
        "flash_attention", "attention_backward", HEAD_SIZES, backward=True, part=0, fixed=("block_m",),
        by_hand=_tiles({
            64: [(64, 64, 4, 2), (128, 64, 8, 3), (64, 128, 4, 2), (128, 128, 8, 2), (128, 32, 4, 3), (64, 64, 4, 3)],
            128: [(64, 64, 4, 2), (128, 64, 8, 1), (64, 128, 8, 2), (128, 32, 8, 3), (64, 64, 8, 3), (64, 32, 4, 3)],
            256: [(64, 64, 8, 2), (64, 16, 8, 3), (32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 4, 3), (32, 32, 8, 2)],
        }),
    ),
    "dkv": Entry(
        "flash_attention", "attention_backward", HEAD_SIZES, backward=True, part=1, fixed=("block_m",),
        by_hand=_tiles({
            64: [(32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 3), (32, 64, 4, 2), (32, 64, 8, 3), (64, 128, 8, 1)],
            128: [(32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 8, 3), (16, 64, 8, 3), (16, 128, 8, 2), (64, 64, 8, 2, 1)],
            256: [(32, 32, 8, 1), (64, 32, 8, 1), (16, 32, 4, 2), (16, 32, 8, 2), (16, 32, 8, 3), (32, 16, 8, 2)],
        }),
    ),
    "decode": Entry(
        "decode_attention", "decode", HEAD_SIZES,
        by_hand=lambda arguments, own: [{"split": own.split // 2}, {"split": own.split * 2}, {"warps": 4, "stages": 4}],
    ),
    **{
        name: Entry(
            op, "linear", fixed=("block_k",) if op.endswith("int4") else (),  # there it is the group
            by_hand=lambda arguments, own: [
                {"slices": 2 * own.slices, "warps": 8}, {"block_n": 2 * own.block_n, "slices": 2 * own.slices, "warps": 8},
                {"stages": 2}, {"stages": 6},
            ],
        )
        for name, op in (
            ("linear", "decode_linear"), ("linear-swiglu", "decode_linear swiglu"), ("linear-int8", "decode_linear int8"),
            ("linear-int4", "decode_linear int4"),
        )
    },
    "choose": Entry("choose_", "choose"),
    "rms_norm": Entry("rms_norm", "rows"),
    "rms_norm-backward": Entry("rms_norm", "rows", backward=True),
    "swiglu": Entry("swiglu", "elementwise"),
    "rope": Entry("apply_rope", "rope"),
    "embed": Entry("embed_next_", "elementwise", fixed=("block_rows",)),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """An entry at the shapes of one model."""

    name: str
    model: str
    dtype: str = "bf16"

    @property
    def entry(self):
        return ENTRIES[self.name]

    @property
    def case(self):
        return case(self.entry.op, self.model, dtype=self.dtype, backward=self.entry.backward)

    def __str__(self):
        return f"{self.name}, {self.model} ({self.case.label}, {self.case.shape}), {self.dtype}"

    def key(self, arch):
        """(function, arguments): what the call alone asks of the table on the architecture, not what was computed before it."""
        from .xray import compiling_for

        with contextlib.ExitStack() as stack:
            if not dispatch.INTERPRETED:
                stack.enter_context(compiling_for(arch))
            stack.enter_context(kernels.use_backend("triton"))
            stack.enter_context(dispatch.observe(lambda *launch: True))
            run = self.case.prepare(self.case.inputs(empty=True))
            asked = stack.enter_context(entries({}))
            run()
        return next(key for key in asked.keys_asked if key[0] == self.entry.function)

    def candidates(self, arch):
        """The fields that are tried, each as a tuning file has them."""
        function, arguments = key = self.key(arch)
        own = getattr(tuning, function).__wrapped__(*arguments)
        mine = own if self.entry.part is None else own[self.entry.part]
        near = neighbours(mine, self.entry.fixed)
        found = []
        for fields in itertools.chain(self.entry.by_hand(arguments, mine), near):
            new = dataclasses.replace(mine, **fields)
            if new != mine and new not in found:
                found.append(new)
        return key, [self._stored(mine, new) for new in found[:MOST]]

    def _stored(self, own, new):
        varied = VARIED[type(own).__name__]
        fields = {n: value for n, value in dataclasses.asdict(new).items() if n in varied or value != getattr(own, n)}
        if self.entry.part is None:
            return fields
        return [fields if part == self.entry.part else {} for part in range(2)]


def neighbours(entry, fixed=()):
    """The fields of the entries around it: one of them halved or doubled, or one stage less or more."""
    near = []
    for name in VARIED[type(entry).__name__]:
        value = getattr(entry, name)
        steps = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        near += [{name: step} for step in steps if step > 0 and name not in fixed]
    return near


def targets(names=(), models=(), dtype="bf16"):
    """All that `names` select (an entry, or those that begin with `NAME-`), at the entries' own models or at `models`."""
    chosen = [n for n in ENTRIES if not names or any(n == name or n.startswith(f"{name}-") for name in names)]
    return [Target(name, model, dtype) for name in chosen for model in models or ENTRIES[name].models]


# --- one entry in the tables' place ------------------------------------------------------------------------------------


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
    from ..kernels import tuning

    asked, before = Asked(measured), tuning.measured
    tuning.measured = lambda: asked
    _forget()
    try:
        yield asked
    finally:
        tuning.measured = before
        _forget()


def _forget():
    """Nothing that was chosen before is remembered."""
    from ..kernels import tuning

    for function in vars(tuning).values():
        if hasattr(function, "cache_clear") and hasattr(function, "__wrapped__"):
            function.cache_clear()
    dispatch.forget()


# --- what a call computes ----------------------------------------------------------------------------------------------


def difference(found, expected):
    """None where two outcomes are the same but for roundings, else which tensor is not.

    Each row (of the last axis) differs by at most four roundings of its dtype, of its own norm or of the tensor's usual one, the
    larger; in float32, whose products are made of three, by 1e-5. Integers and what is not finite are equal.
    """
    for i, (a, b) in enumerate(zip(found, expected)):
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return f"tensor {i} has other values"
            continue
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite) or not same(a[~finite], b[~finite]):
            return f"tensor {i} has other values that are not finite"
        a, b = (t.where(finite, 0).float().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (a, b))
        norm = b.norm(dim=1)
        usual = norm.square().mean().sqrt()
        error = ((a - b).norm(dim=1) / norm.maximum(usual).clamp_min(1e-30)).max().item() if len(a) else 0.0
        allowed = max(4 * torch.finfo(found[i].dtype).eps, 1e-5)
        if not error <= allowed:
            return f"tensor {i} differs by {error:.1e} of a row, allowed {allowed:.1e}"
    return None


def same(a, b):
    """Whether two tensors are equal, NaN equal to NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def spills(c, device):
    """The registers that the call's kernels spill, from Triton's own record of the compiled kernels; 0 where none are compiled."""
    found = [0]
    if dispatch.INTERPRETED:
        return 0

    def look(kernel, grid, arguments, options):
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        compiled._init_handles()
        found.append(compiled.n_spills)

    run = c.prepare(c.inputs(device))
    with dispatch.observe(look):
        run()
    return sum(found)


# --- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Fields of an entry, as a tuning file has them (None: the table's own), and the seconds that the call then takes, or the
    reason why there are none."""

    fields: dict | list | None
    seconds: float | None = None
    reason: str | None = None


def compare(c, key, candidates, measure, device="cuda"):
    """Yields the Trial of the table's own entry, then of each candidate under the key, as soon as it is known.

    measure(case) gives seconds. A candidate is not measured where it spills more than the table's own, or where what it returns or
    writes differs; and not believed where two runs of it differ. An exception in one is its reason; if it leaves the GPU unusable,
    the generator ends there: `isolated` goes on behind it.
    """
    own = None
    for fields in (None, *candidates):
        reason = None
        try:
            with kernels.use_backend("triton"), kernels.decode.counters(device), entries({} if fields is None else {key: fields}):
                first, spilled = check.outcome(c, device), spills(c, device)
                expected, most = own or (first, spilled)
                if spilled > most:
                    reason = f"spills {spilled} registers, the table's own {most}"
                else:
                    reason = difference(first, expected)
                seconds = None if reason else measure(c)
                if not reason and not all(same(a, b) for a, b in zip(first, check.outcome(c, device))):
                    seconds, reason = None, "two runs differ"
        except Exception as error:  # too much shared memory, a tile that the kernel cannot take, an illegal address, ...
            seconds, reason = None, one_line(error)
        yield Trial(fields, seconds, reason)
        if fields is None:
            if reason:
                return
            own = first, spilled
        if reason and not _usable(device):
            return


def _usable(device):
    """Whether the GPU still answers, its memory given back."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _until_a_failure(*arguments):
    for trial in compare(*arguments):
        yield trial
        if trial.reason:  # after it nothing on this GPU is certain
            return


def isolated(c, key, candidates, measure, device="cuda", limit=60.0):
    """`compare` in processes of its own: each goes on until a candidate fails, the next one behind it. measure is a function that
    can be imported. limit: seconds for one candidate. The table's own is measured once in each process."""
    rest = [None, *candidates]
    while rest:
        expected = [None, *(f for f in rest if f is not None)]
        try:
            for trial in apart(_until_a_failure, c, key, expected[1:], measure, device, limit=limit):
                expected.pop(0)
                yield trial
                if trial.fields is None and trial.reason:
                    return
        except Died as error:
            failed = expected.pop(0)
            yield Trial(failed, None, str(error))
            if failed is None:
                return
        rest = expected


def better(trials):
    """(the fastest candidate's Trial or None, seconds of the table's own) of the trials of one entry: it gains more than 2 %."""
    own = min((t.seconds for t in trials if t.fields is None and t.seconds), default=None)
    best = min((t for t in trials if t.fields is not None and t.seconds), key=lambda t: t.seconds, default=None)
    return (best if own and best and best.seconds < GAIN * own else None), own


# --- compiling beforehand ----------------------------------------------------------------------------------------------


def compile_all(jobs, arch, progress=lambda done, total: None):
    """[reason or None] for jobs (case, key, fields or None for the table's own): why the compiled code cannot be used on the
    architecture. Compiled on all cores, without a GPU, into Triton's cache on disk, where what runs on the GPU finds it."""
    from .xray import Workers

    done = itertools.count(1)

    def report(job):
        c, (function, arguments), fields = job
        entry = [] if fields is None else [[function, list(arguments), fields]]
        question = {"what": "code", "case": dataclasses.asdict(c), "arch": arch, "fp64_scalars": False, "entries": entry}
        answer = workers.ask(question)
        progress(next(done), len(jobs))
        return answer

    with Workers() as workers, ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        answers = list(pool.map(report, jobs))
    spilled = {}
    for (c, key, fields), answer in zip(jobs, answers):
        if fields is None and "reports" in answer:
            spilled[c, key] = sum(r["spills"] for r in answer["reports"])
    return [_unfit(answer, spilled.get(job[:2])) for job, answer in zip(jobs, answers)]


def _unfit(answer, most):
    if "error" in answer:
        return answer["error"]
    for report in answer["reports"]:
        if report["shared"] > report["shared_limit"]:
            return f"{report['kernel']} needs {report['shared']} bytes of shared memory, there are {report['shared_limit']}"
    spilled = sum(report["spills"] for report in answer["reports"])
    return f"{spilled} spilling instructions, the table's own {most}" if most is not None and spilled > most else None


# --- the file ----------------------------------------------------------------------------------------------------------


class Record:
    """A tuning file: `entries`, which TRILLAMA_TUNING puts in the tables' place, and `trials`, all that was measured and why the
    rest was not. What it holds of other entries stays."""

    def __init__(self, file, gpu, version=None):
        """version: of the torch with which is measured, None for this one."""
        self.file = Path(file)
        self.document = {"gpu": gpu, "torch": version or torch.__version__, "entries": [], "trials": []}
        if self.file.exists():
            try:
                before = json.loads(self.file.read_text(encoding="utf-8"))
                self.document |= {"entries": before["entries"], "trials": before.get("trials", [])}
                measured_on = before["gpu"]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{file} is no tuning file: {error!r}") from None
            if measured_on != gpu:
                raise ValueError(f"{file} was measured on {measured_on}; this is {gpu}: name another file")
        self.write()  # a place that cannot be written is told before anything is measured

    def found(self, key, part=None):
        """The fields that the file has for the key, as a candidate, or None."""
        row = next((e for e in self.document["entries"] if _key(e) == key), None)
        if row is None or part is None:
            return row and row["entry"]
        fields = row["entry"][part]
        return [fields if i == part else {} for i in range(2)] if fields else None

    def note(self, target, key, trials, complete):
        """Takes the trials of an entry so far and writes the file. What was found before gives way to the best of a whole run."""
        known = {"function": key[0], "arguments": list(key[1])}
        others = [t for t in self.document["trials"] if (t["name"], _key(t)) != (target.name, key)]
        rows = [{"name": target.name, "case": str(target), **known, **dataclasses.asdict(t)} for t in trials]
        self.document["trials"] = others + rows
        best, _ = better(trials)
        part = target.entry.part
        if complete or (best and self.found(key, part) is None):
            row = next((e for e in self.document["entries"] if _key(e) == key), None)
            entry = best.fields if best else None
            if part is not None:  # the other one of the pair keeps what it has
                entry = list(row["entry"]) if row else [{}, {}]
                entry[part] = best.fields[part] if best else {}
            self.document["entries"] = [e for e in self.document["entries"] if e is not row]
            if entry and any(entry):
                self.document["entries"].append({**known, "entry": entry})
        self.write()

    def write(self):
        files.rewrite(self.file, json.dumps(self.document, indent=1) + "\n")


def _key(row):
    return row["function"], tuple(row["arguments"])


# --- the command -------------------------------------------------------------------------------------------------------


def seconds_of(c):
    """The device's time of one call, by the replay of a CUDA graph where it can be captured."""
    from .timing import device_seconds

    timing = device_seconds(c)
    if timing.why:  # what the host's launches take says nothing of tiles
        raise RuntimeError(timing.why)
    return timing.graph


def tune(chosen, arch, record, measure=seconds_of, device="cuda", limit=60.0, say=lambda text: None):
    """Measures the targets one after the other and keeps what is found in the Record; yields (target, trials) after each."""
    plans = []
    for target in chosen:
        key, fields = target.candidates(arch)
        before = record.found(key, target.entry.part)
        plans.append((target, key, ([before] if before and before not in fields else []) + fields))
    unfit = [[] for _ in plans]
    if device == "cuda" and torch.version.hip is None:
        jobs = [(t.case, key, f) for t, key, fields in plans for f in (None, *fields)]
        reasons = iter(compile_all(jobs, arch, lambda done, total: say(f"compiled {done} of {total}")))
        for (_, _, fields), trials in zip(plans, unfit):
            next(reasons)  # the table's own is run whatever is said of it
            trials += [Trial(f, None, reason) for f in fields if (reason := next(reasons))]
    for (target, key, fields), trials in zip(plans, unfit):
        fields = [f for f in fields if f not in [t.fields for t in trials]]
        for trial in isolated(target.case, key, fields, measure, device, limit):
            trials.append(trial)
            record.note(target, key, trials, complete=False)
        if any(t.fields is None and t.seconds for t in trials):
            record.note(target, key, trials, complete=True)
        yield target, trials


def main(argv=None):
    parser = cli.Parser(prog="python -m trillama.bench.tune", description="Measures tile sizes. Needs a GPU.")
    add = parser.add_argument
    add("entries", nargs="*", metavar="ENTRY", help=f"of {', '.join(ENTRIES)}; default: all")
    add("--list", action="store_true", help="print what would be tried and measure nothing; needs no GPU")
    add("--arch", default=None, metavar="ARCH", help=f"with --list: of {', '.join(ARCHITECTURES)} (default: this GPU's)")
    add("--model", nargs="+", metavar="MODEL", default=(), help=f"whose shapes, of {', '.join(MODELS)}; default: those of --list")
    add("--dtype", default="bf16", choices=DTYPES)
    add("--limit", type=float, default=60.0, metavar="SECONDS", help="for one candidate; what takes longer is ended (default: 60)")
    add("--output", default="tuning.json", metavar="FILE")
    options = parser.parse_args(argv)
    architectures = [options.arch] if options.arch is not None else []
    for what, given, names in (
        ("ENTRY", options.entries, ENTRIES), ("--model", options.model, MODELS), ("--arch", architectures, ARCHITECTURES),
    ):  # fmt: skip
        cli.known(what, given, names)
    if options.arch and not options.list:
        raise ValueError(f"--arch is {options.arch!r} without --list, expected none: what is measured is the GPU at hand")
    if not 0 < options.limit < math.inf:
        raise ValueError(f"--limit is {options.limit:g}, expected a number of seconds above 0")
    if not options.list:
        files.check("--output", options.output)
    chosen, gpu = targets(options.entries, options.model, options.dtype), torch.cuda.is_available()
    arch = options.arch or (f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}" if gpu else "sm_90")
    if not options.list and not gpu:
        raise ValueError("tune measures on a GPU, and torch finds none (--list needs none)")
    if dispatch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, expected it unset: tune is of compiled code, the interpreter has other tiles")
    if options.list:
        for target in chosen:
            key, fields = target.candidates(arch)
            print(f"{target}: {key[0]}{key[1]}")
            print("".join(f"    {json.dumps(f)}\n" for f in fields), end="")
        return 0

    def say(text):
        print(text, file=sys.stderr)

    record, rows, failures = Record(options.output, torch.cuda.get_device_name()), [], []
    for target, trials in tune(chosen, arch, record, limit=options.limit, say=say):
        best, own = better(trials)
        failures += [f"{target}: {json.dumps(t.fields) if t.fields else 'the own entry'}: {t.reason}" for t in trials if t.reason]
        rows.append((str(target), _us(own), _us(best and best.seconds), json.dumps(best.fields) if best else "the table's own"))
        say("  ".join(rows[-1]))
    if failures:
        print("\n".join(["not measured:", *failures, ""]))
    print("\n".join(table(("entry", "us", "us now", "fields"), rows)))
    print(f"export TRILLAMA_TUNING={Path(options.output).resolve()}")
    return 0


def _us(seconds):
    return f"{seconds * 1e6:.1f}" if seconds else "-"


if __name__ == "__main__":
    sys.exit(cli.status(main))
