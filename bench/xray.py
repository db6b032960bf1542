"""What the compiled kernels are made of, on a machine that needs no GPU: `trillama xray [OP ...] [--arch sm_90 ...]`.

The op is called as a user calls it; its launches are noted instead of made and compiled for the architecture asked for, and the
machine code is read: registers, spills, shared memory, occupancy, access widths, matrix instructions, the hottest loop by pipe.

Where the matrix work is the bound, the loop gives two ceilings as fractions of tensor peak, in cycles of a multiprocessor:
    no overlap        tensor / (tensor + issue), issue = all instructions of the loop at four warp instructions a clock;
                      once more, "skipped", without those that a branch in the loop may jump over
    perfect overlap   tensor / the busiest of all pipes and of issue
Where memory is the bound: the share of issue slots that the kernel needs when data comes at the datasheet's bandwidth; below 1
the instructions can hide behind memory. All are properties of the compiled code, not timings: nothing is executed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..model import cli, presets
from . import files, plots, sass
from .cases import DTYPES, MODELS, OPS, case
from .plots import table
from .roofline import GPUS, MULTIPROCESSORS

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
USUAL = ("sm_80", "sm_90", "sm_100")


# --- compiling without a GPU -------------------------------------------------------------------------------------------


class Compiler:
    """A Triton driver that can be asked for nothing but what to compile for."""

    numbers = itertools.count(1 << 20)

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
        self.device = next(self.numbers)  # Triton keeps compiled kernels by device: a fresh one for each target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(arch, fp64_scalars=False):
    """Within the block Triton compiles for `arch`; fp64_scalars: Python floats arrive as float64, as they do from torch.compile."""
    import triton
    from triton import compiler

    class Widened(compiler.ASTSource):
        def __init__(self, fn, signature, *rest, **options):
            super().__init__(fn, {name: "fp64" if t == "fp32" else t for name, t in signature.items()}, *rest, **options)

    before, source = triton.runtime.driver._active, compiler.ASTSource
    triton.runtime.driver.set_active(Compiler(arch))
    if fp64_scalars:
        compiler.ASTSource = Widened
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)
        compiler.ASTSource = source


def launches(function):
    """The launches (kernel, grid, arguments, options) that `function` would make under the Triton backend."""
    from ..kernels import use_backend
    from ..kernels.dispatch import observe

    noted = []
    with use_backend("triton"), observe(lambda *launch: noted.append(launch) or True):
        function()
    return noted


def launches_of_others(function):
    """The same for code that is not ours: what reaches Triton's JIT functions."""
    from triton.runtime.jit import JITFunction

    noted, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: noted.append((self, grid, args, options))
    try:
        function()
    finally:
        JITFunction.run = run
    return noted


def compiled(launch):
    """The CompiledKernel of a noted launch, through the JIT function's own specialisation of its arguments."""
    kernel, grid, arguments, options = launch
    return kernel.warmup(*arguments, grid=grid, **options)


# --- reading the machine code ------------------------------------------------------------------------------------------


@functools.cache
def _tool(name):
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin):
    """(resource usage, SASS) as `cuobjdump` prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return [
            subprocess.run(
                [_tool("cuobjdump"), what, file.name], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
            ).stdout
            for what in ("-res-usage", "-sass")
        ]


def tcgen05_flops(ptx):
    """FLOP of each tcgen05.mma, which takes its shape from a descriptor (PTX ISA, instruction descriptor)."""
    values = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx))
    shapes = []
    for kind, operands in re.findall(r"tcgen05\.mma\.cta_group::1\.kind::(\w+)\s+(.*?);", ptx):
        d = next(int(values[r]) for r in reversed(re.findall(r"%r\d+", operands)) if r in values)
        shapes.append(2 * ((d >> 24 & 0x1F) << 4) * ((d >> 17 & 0x3F) << 3) * {"tf32": 8, "f16": 16}.get(kind, 32))
    return shapes


def read_nvidia(kernel, arch):
    sm = MULTIPROCESSORS[int(arch[3:])]
    meta = kernel.metadata
    usage, text = disassemble(kernel.asm["cubin"])
    registers, stack = (int(re.search(rf"Function {meta.name}:\s.*?{key}:(\d+)", usage, re.S)[1]) for key in ("REG", "STACK"))
    code = sass.body(sass.parse(text, meta.name, [f / meta.num_warps for f in tcgen05_flops(kernel.asm["ptx"])]))
    names = Counter(x.opcode for x in code)
    programs, limit = sm.occupancy(registers, meta.shared, meta.num_warps, getattr(meta, "tmem_size", 0))
    report = {
        "registers": registers,
        "stack": stack,
        "spills": names["LDL"] + names["STL"],
        "shared": meta.shared,
        "shared_limit": sm.shared_block,
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "programs_per_multiprocessor": programs,
        "occupancy": programs * meta.num_warps / sm.warps,
        "limited_by": limit,
        "loads": sass.widths(code, sass.LOADS),
        "stores": sass.widths(code, sass.STORES),
        "matrix": sorted({x.opcode for x in code if x.pipe == "tensor"}),
        "f64": sum(x.is_f64 for x in code),
        "instructions": len(code),
        "mix": sass.mix(code),
        "loop": None,
    }
    loop = sass.hottest(code)
    if loop:
        report["loop"] = read_loop(loop, sass.steady(code, loop), sm, meta.num_warps)
    return report


def read_loop(loop, steady, sm, warps):
    """The loop by pipe and, if it has matrix instructions, its ceilings; cycles are those of one program and iteration. steady: the
    loop without what a branch may skip (`conditional` instructions); `no_overlap_skipped` is the ceiling if it always does."""
    cycles = dict.fromkeys(sass.PIPES, 0.0)
    for x in loop:
        cycles[x.pipe] += x.cycles(sm) * warps
    cycles["issue"] = len(loop) * warps / 4
    flops = round(sum(x.flops for x in loop) * warps)
    peak = flops / sm.tensor  # cycles that this work takes at the architecture's peak

    def ceiling(instructions):
        return round(peak / (cycles["tensor"] + instructions * warps / 4), 3) if flops else None

    return {
        "instructions": len(loop),
        "conditional": len(loop) - len(steady),
        "mix": sass.mix(loop),
        "cycles": {pipe: round(c, 1) for pipe, c in cycles.items()},
        "loads": sass.widths(loop, sass.LOADS),
        "stores": sass.widths(loop, sass.STORES),
        "flops": flops,
        "bytes": sum(x.bits // 8 * 32 for x in loop if x.opcode in sass.LOADS + sass.STORES and x.opcode[0] != "U"),
        "no_overlap": ceiling(len(loop)),
        "no_overlap_skipped": ceiling(len(steady)),
        "perfect_overlap": round(peak / max(cycles.values()), 3) if flops else None,
        "busiest": max(cycles, key=cycles.get),
    }


def read_amd(kernel):
    """What the assembly of an AMD kernel says of itself: no pipes, no ceilings."""
    text, meta = kernel.asm["amdgcn"], kernel.metadata

    def count(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    def access(kind):
        found = Counter(re.findall(rf"\b(?:global|buffer)_{kind}_(\w+)", text))
        sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}
        widths = Counter()
        for name, n in found.items():
            widths[next((bits for size, bits in sizes.items() if name.startswith(size)), 16)] += n
        return dict(widths)

    return {
        "registers": count("vgpr_count"),
        "stack": count("private_segment_fixed_size"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "shared": meta.shared,
        "shared_limit": 65536,
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "programs_per_multiprocessor": None,
        "occupancy": None,
        "limited_by": None,
        "loads": access("load"),
        "stores": access("store"),
        "matrix": sorted(set(re.findall(r"v_mfma_\w+?_\d+x\d+x\d+", text))),
        "f64": len(re.findall(r"\bv_\w*f64\w*", text)),
        "instructions": len(re.findall(r"^\t[a-z]\w+(?:\s|$)", text, re.M)),
        "mix": None,
        "loop": None,
    }


def examine(case, arch, fp64_scalars=False):
    """One report a launch of the case, compiled for `arch`."""
    reports = []
    with compiling_for(arch, fp64_scalars):
        for launch in launches_of(case):
            kernel = compiled(launch)
            grid = launch[1]
            reports.append(
                {
                    **identity(case, arch),
                    "kernel": kernel.metadata.name.strip("_"),
                    "programs": math.prod(grid(launch[3]) if callable(grid) else grid),
                    **(read_nvidia(kernel, arch) if arch.startswith("sm_") else read_amd(kernel)),
                    "moved": case.moved,
                }
            )
            per = per_16_bytes(reports[-1])
            reports[-1] |= {"per_16_bytes": per, "issue_at_full_bandwidth": memory_bound_issue(case, arch, per)}
    return reports


def identity(case, arch):
    return {
        "op": case.name, "model": case.model, "case": case.label, "shape": case.shape, "dtype": case.dtype, "arch": arch,
        "engine": case.engine,
    }  # fmt: skip


def per_16_bytes(report):
    """Warp instructions issued for every 16 bytes: those of the whole launch over the least bytes where no loop carries the work,
    else those of the loop over what its accesses move with all lanes active."""
    if report["mix"] is None:
        return None
    loop = report["loop"]
    if loop is None:
        return round(report["instructions"] * report["warps"] * report["programs"] * 16 / report["moved"], 3)
    return round(loop["instructions"] * 16 / loop["bytes"], 3) if loop["bytes"] else None


def memory_bound_issue(case, arch, per_16_bytes):
    """Share of the issue slots that a memory-bound kernel takes at the datasheet's bandwidth; None for the others."""
    gpu = next((g for g in GPUS.values() if f"sm_{g.arch}" == arch), None)
    if gpu is None or per_16_bytes is None or case.flops / gpu.rate(case.itemsize) > case.moved / gpu.bandwidth:
        return None
    clocks = gpu.tensor / MULTIPROCESSORS[gpu.arch].tensor  # of all multiprocessors together, a second
    return round(per_16_bytes * gpu.bandwidth / clocks / 16 / 4, 3)


def launches_of(case):
    ready, note = [], launches if case.engine == "trillama" else launches_of_others
    note(lambda: ready.append(case.prepare(case.inputs(empty=True))))
    return note(ready[0])


# --- worker processes and the cache ------------------------------------------------------------------------------------
# Compiled code needs a process in which Triton was imported without its interpreter, memory traffic one with it, and a compiler may
# end its process: so reports are always made by workers, which read one job a line and answer with one line. Importing takes longer
# than most jobs, so one process of each kind does it and forks into as many workers as are asked for.


def _serve():
    """A worker for every connection that comes in over standard input, until that closes."""
    import torch._dynamo  # noqa: F401 - what the first backward would import
    from triton.runtime import cache

    from ..kernels.dispatch import INTERPRETED
    from .traffic import quicken

    if INTERPRETED:
        quicken()
    elif hasattr(cache, "triton_key"):
        cache.triton_key()  # a hash of all of Triton, which every compilation asks for: a second
    control = socket.socket(fileno=0)
    while connections := socket.recv_fds(control, 1, 1)[1]:
        if os.fork() == 0:
            _work(socket.socket(fileno=connections[0]).makefile("rw"))
            os._exit(0)
        os.close(connections[0])


def _work(connection):
    from . import traffic, tune
    from .cases import Case

    for line in connection:
        job = json.loads(line)
        try:
            case = Case(**job["case"])
            if job["what"] == "traffic":
                answer = {"reports": [traffic.summary(case)]}
            else:
                with tune.entries({(f, tuple(arguments)): fields for f, arguments, fields in job.get("entries", ())}):
                    answer = {"reports": examine(case, job["arch"], job["fp64_scalars"])}
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            elsewhere = "; TRITON_CACHE_DIR names another folder" if isinstance(error, OSError) else ""
            answer = {"error": f"{type(error).__name__}: {text.splitlines()[-1].strip()}{elsewhere}"}
        connection.write(json.dumps(answer) + "\n")
        connection.flush()


class Workers:
    """`ask(job)` from any thread: every thread has workers of its own, which are replaced if the compiler ends one."""

    def __init__(self):
        self.own = threading.local()
        self.lock = threading.Lock()
        self.servers = {}
        self.connections = []

    def start(self, what):
        """Begins with the imports; nothing has to wait for them yet."""
        if what not in self.servers:
            self.servers[what] = self._start(what)

    def _start(self, what):
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if what == "traffic":
            environment["TRITON_INTERPRET"] = "1"
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", "from trillama.bench.xray import _serve; _serve()"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            return subprocess.Popen(command, stdin=theirs, env=environment, **quiet), ours

    def _connect(self, what):
        with self.lock:
            self.start(what)
            mine, its = socket.socketpair()
            with its, contextlib.suppress(BrokenPipeError):
                socket.send_fds(self.servers[what][1], [b"+"], [its.fileno()])
            with mine:  # the file keeps it open
                connection = mine.makefile("rw")
            self.connections.append(connection)
        return connection

    def ask(self, job):
        what = job["what"]
        connection = getattr(self.own, what, None) or self._connect(what)
        setattr(self.own, what, connection)
        line = ""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.write(json.dumps(job) + "\n")
            connection.flush()
            line = connection.readline()
        if line:
            return json.loads(line)
        setattr(self.own, what, None)
        return {"error": "the compiler ended its process"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):
                connection.close()
        for process, control in self.servers.values():
            control.close()
            process.kill()  # it would take two seconds to end by itself; its workers end with their connections
            process.wait()


def cache_folder():
    return presets.cache_folder() / "xray"


@functools.cache
def _version():
    """A hash of everything that a report depends on beside its job: sources and versions."""
    import trillama.kernels

    state = hashlib.sha256(f"{platform.machine()} {versions()}".encode())
    for folder in (Path(__file__).parent, Path(trillama.kernels.__file__).parent):
        for file in sorted(folder.glob("*.py")):
            state.update(file.read_bytes())
    return state.hexdigest()


def versions():
    """Of what compiles and of what is compiled, where it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("triton", "torch", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _nothing(done, total):
    pass


def answers(questions, workers, cached=True, progress=_nothing):
    """The reports on every question (`code_questions`, `traffic_questions`), a list each, made by as many workers as there are
    cores; what has no report has one with an "error". Reports are kept on disk until a source or version changes."""
    done = itertools.count(1)

    def one(question):
        about, job = question
        key = hashlib.sha256(json.dumps([_version(), job], sort_keys=True).encode()).hexdigest()[:32]
        file = cache_folder() / f"{key}.json"
        answer = None
        if cached:
            with contextlib.suppress(OSError, ValueError):
                answer = json.loads(file.read_text())
        if answer is None:
            answer = workers.ask(job)
            if cached and "reports" in answer:
                with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
                    file.parent.mkdir(parents=True, exist_ok=True)
                    partial = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
                    partial.write_text(json.dumps(answer))
                    partial.replace(file)
        progress(next(done), len(questions))
        return answer.get("reports") or [{**about, "error": answer.get("error", "launches nothing")}]

    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        # The last ones first: backward and new architectures take the longest, and no core should wait for one of them.
        return list(pool.map(one, reversed(questions)))[::-1]


def code_questions(cases, architectures, fp64_scalars=False):
    """What the kernels of every case are made of on every architecture."""
    return [
        (identity(case, arch), {"what": "code", "case": dataclasses.asdict(case), "arch": arch, "fp64_scalars": fp64_scalars})
        for case in cases
        for arch in architectures
    ]


def traffic_questions(cases):
    """`traffic.summary` of every case."""
    return [(identity(case, "memory"), {"what": "traffic", "case": dataclasses.asdict(case)}) for case in cases]


def _flat(lists):
    return list(itertools.chain.from_iterable(lists))


def survey(cases, architectures=USUAL, fp64_scalars=False, cached=True):
    """Reports of every case on every architecture, in that order."""
    with Workers() as workers:
        return _flat(answers(code_questions(cases, architectures, fp64_scalars), workers, cached))


# --- the command -------------------------------------------------------------------------------------------------------


def _widths(found):
    return "+".join(str(w) for w in sorted(found, key=str)) or "-"


def _fraction(x):
    return "-" if x is None else f"{x:.2f}"


def text(reports, traffic=()):
    """The reports as tables, one an op, each with the bytes it moves (`traffic.summary`) where they were counted."""
    lines = []
    for (op, dtype), group in itertools.groupby(reports, lambda r: (r["op"], r["dtype"])):
        group = list(group)
        good = [r for r in group if "error" not in r]
        lines.append(f"{op}, {dtype}")
        rows = [
            (
                r["case"], r["kernel"], r["arch"], r["registers"], f"{r['spills']} ({r['stack']} B)" if r["stack"] else r["spills"],
                f"{r['shared'] / 1024:.1f}/{r['shared_limit'] // 1024}" + ("!" if r["shared"] > r["shared_limit"] else ""),
                "-" if r["occupancy"] is None else f"{r['occupancy']:.0%}", r["limited_by"] or "-",
                _widths(r["loads"]), _widths(r["stores"]), "+".join(r["matrix"]) or "-", r["f64"],
                _fraction(r["per_16_bytes"]), _fraction(r["issue_at_full_bandwidth"]),
            )
            for r in good
        ]  # fmt: skip
        header = ("case", "kernel", "arch", "regs", "spills", "shared KiB", "occupancy", "by", "loads", "stores", "matrix", "f64",
                  "instr/16 B", "issue")  # fmt: skip
        if rows:
            lines += [f"  {line}" for line in table(header, rows, left=3)]
        looped = [r for r in good if r["loop"] and r["loop"]["flops"] and r["issue_at_full_bandwidth"] is None]
        rows = [
            (
                r["case"], r["kernel"], r["arch"], l["instructions"], *l["mix"].values(),
                f"{l['cycles']['tensor']:.0f}", f"{l['cycles']['issue']:.0f}", f"{l['busiest']} {l['cycles'][l['busiest']]:.0f}",
                _fraction(l["no_overlap"]), f"{l['no_overlap_skipped']:.2f} ({l['conditional']})" if l["conditional"] else "-",
                _fraction(l["perfect_overlap"]),
            )
            for r in looped
            for l in (r["loop"],)
        ]  # fmt: skip
        header = ("hottest loop", "", "", "instr", *sass.PIPES, "cycles: tensor", "issue", "busiest", "ceiling: none",
                  "skipped", "perfect")  # fmt: skip
        if rows:
            lines += ["", *(f"  {line}" for line in table(header, rows, left=3))]
        counted = [t for t in traffic if (t["op"], t["dtype"]) == (op, dtype)]
        lines += [f"  {r['case']}  {r['arch']}: {r['error']}" for r in (*group, *counted) if "error" in r]
        lines += [
            f"  memory, {t['case']}, {t['shape']}: {t['hbm']:,} bytes, {t['hbm'] / t['least']:.3f} of the least; "
            f"{t['requested'] / t['least']:.2f} asked of the caches"
            for t in counted
            if "error" not in t
        ]
        lines.append("")
    return "\n".join([*lines, *LEGEND])


LEGEND = (
    "Properties of compiled code, not timings.",
    "spills: instructions on local memory (stack). shared: a program's, of what it may have. occupancy: warps, and their limit.",
    "loads, stores: widths in bits of all accesses to global memory. issue: share of issue slots needed at full memory bandwidth.",
    "Loop: instructions of one warp by pipe; cycles of a multiprocessor for one program and iteration; ceilings: fraction of the",
    "tensor cores' peak if nothing overlaps with them (skipped: without the instructions that a branch may skip) and if all does.",
    "memory: counted from the kernels' own accesses, every 32-byte sector once a launch.",
)


def _arguments():
    parser = cli.Parser(prog="trillama xray", description="What the compiled kernels are made of. Needs no GPU.")
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="default: all that there are, with their backwards")
    add("--backward", action="store_true", help="the backward of OP too")
    add("--arch", nargs="+", metavar="ARCH", help=f"of {', '.join(ARCHITECTURES)} (default: {', '.join(USUAL)})")
    add("--dtype", nargs="+", metavar="DTYPE", default=["bf16"], help="bf16, fp16, fp32 (default: bf16)")
    add("--model", nargs="+", metavar="MODEL", help="take the shapes from these models (default: Llama-3.1-8B)")
    add("--all", action="store_true", help="all shapes on all architectures: minutes")
    add("--json", metavar="FILE", help="write the reports to FILE, - for standard output instead of the tables")
    add("--plot", metavar="FILE", help="draw the loops and instruction mixes (needs matplotlib)")
    add("--no-cache", action="store_true", help="compile again what was examined before")
    return parser


def chosen(options):
    """(cases, architectures) that the options ask for."""
    ops = cli.known("OP", options.ops, OPS) or [*OPS]
    architectures = cli.known("--arch", options.arch or (ARCHITECTURES if options.all else USUAL), ARCHITECTURES)
    dtypes = cli.known("--dtype", options.dtype, DTYPES)
    models = cli.known("--model", options.model or (), MODELS)
    return [
        case(op, model, dtype=dtype, backward=backward)
        for op in ops
        for backward in ((False, True) if OPS[op].differentiable and (options.backward or not options.ops) else (False,))
        for dtype in dtypes
        for model in (models or (OPS[op].models if options.all else ("Llama-3.1-8B",)))
    ], architectures


def _progress(done, total):
    if sys.stderr.isatty():
        print(f"\r{done} of {total} examined" + ("\n" if done == total else ""), end="", file=sys.stderr, flush=True)


def main(argv=None):
    options = _arguments().parse_args(argv)
    cases, architectures = chosen(options)
    if importlib.util.find_spec("triton") is None:
        raise ValueError("xray compiles the Triton kernels, but Triton is not installed (it has wheels for Linux only)")
    if options.json and options.json != "-":
        files.check("--json", options.json)
    if options.plot:
        plots.check("--plot", options.plot)
    with Workers() as workers:
        for what in ("code", "traffic"):
            workers.start(what)  # they import torch while this process does
        return _run(options, cases, architectures, workers)


def _run(options, cases, architectures, workers):
    from .traffic import small

    one_each = {(case.op, case.backward, case.dtype): small(case) for case in reversed(cases)}  # the ratio is every model's
    code, memory = code_questions(cases, architectures), traffic_questions(one_each.values())
    found = answers(code + memory, workers, cached=not options.no_cache, progress=_progress)
    reports, traffic = _flat(found[: len(code)]), _flat(found[len(code) :])
    if options.json:
        document = json.dumps({"versions": versions(), "reports": reports, "traffic": traffic}, indent=1)
        if options.json == "-":
            print(document)
        else:
            files.rewrite(options.json, document + "\n")
    if options.json != "-":
        print(text(reports, traffic))
    if options.plot:
        plots.xray([r for r in reports if "error" not in r], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.status(main))
