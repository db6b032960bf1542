"""The kernel benchmarks, run by `pytest --benchmark`: every op, forward and backward, on the shapes of named models, beside PyTorch
eager, torch.compile, SDPA and, where they are installed, Liger and flash-attention.

On a GPU the time is the device's, by CUDA events and by the replay of a CUDA graph; both go through as many copies of the
arguments as overflow the L2 cache, so that each call finds its data in HBM, as in a model. On a CPU the same table shows the
reference path at smaller shapes, and what only a GPU can tell says so. The first call, which compiles, is timed apart.
"""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from trillama.bench import host, plots
from trillama.bench.apart import Worker
from trillama.bench.cases import OPS, Case, available, case
from trillama.bench.peers import ENGINES, why_not
from trillama.bench.roofline import datasheet
from trillama.bench.timing import timings
from trillama.kernels.decode import counters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_ONLY = "needs a GPU"
MODELS = {
    "cuda": ("SmolLM2-135M", "Llama-3.2-1B", "Phi-3-mini", "Qwen2.5-7B", "Llama-3.1-8B", "Llama-3.1-70B/8"),
    "cpu": ("SmolLM2-135M", "Llama-3.2-1B", "Llama-3.1-8B"),
}
COMPILED_ON_CPU = "Llama-3.2-1B"  # torch.compile takes many seconds a shape there


def cases():
    """What is measured on this machine."""
    for op in available():
        attention = "attention" in op
        for backward in (False, True) if OPS[op].differentiable else (False,):
            for model in MODELS[DEVICE]:
                if DEVICE == "cuda":
                    yield case(op, model, backward=backward)
                    if OPS[op].phase == "decode":
                        yield case(op, model, batch=64)
                else:
                    small = {"context": 1024} if OPS[op].phase == "decode" else {"tokens": 256 if attention else 64}
                    yield case(op, model, dtype="fp32", backward=backward, **small)


def reason(c):
    """None if the case is measured here, "" if its engine has no such op, else why it is not."""
    if c.engine == "compile" and DEVICE == "cpu" and (c.model != COMPILED_ON_CPU or c.backward):
        return GPU_ONLY if c.backward else f"{COMPILED_ON_CPU} only"
    return why_not(c.op, c.engine, DEVICE)


def entries():
    everything = [dataclasses.replace(c, engine=engine) for c in cases() for engine in ENGINES]
    return [
        pytest.param(c, id=f"{c.name}-{c.model}-{c.batch}-{c.engine}".replace(" ", "_")) for c in everything if reason(c) is None
    ]


@pytest.fixture(scope="session")
def clock():
    """The Timing of a case on the GPU, from a process of its own: a failed capture, after which torch 2.11 captures no more, or a
    crash costs one case."""
    worker = Worker()

    def timing(c):
        found = []
        status, error = worker.do(timings, (c,), 300, found.append)
        if not found:
            raise RuntimeError(f"{c.engine} {status}: {error}")
        return found[0]

    yield timing
    worker.end()


@pytest.mark.benchmark(warmup=False, min_rounds=3, max_time=0.15)
@pytest.mark.parametrize("c", entries())
def test_kernel(benchmark, clock, c):
    benchmark.group = f"{c.name} {c.label}, {c.shape}, {c.dtype}"
    benchmark.extra_info |= dataclasses.asdict(c) | {"name": c.name, "label": c.label, "shape": c.shape, "device": DEVICE}
    torch.manual_seed(0)
    with counters(DEVICE):  # as in a model's step: without them each call that needs some clears its own in one more kernel
        start = time.perf_counter()
        run = c.prepare(c.inputs(DEVICE))
        run()
        synchronize()
        benchmark.extra_info["first_call_s"] = time.perf_counter() - start

        def host():
            run()
            synchronize()

        benchmark(host)
    seconds = benchmark.stats.stats.min  # what else the machine does only adds
    if DEVICE == "cuda":
        timing = clock(c)
        benchmark.extra_info |= timing.asdict()
        seconds = timing.seconds
    benchmark.extra_info |= rates(c, seconds)


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def rates(c, seconds):
    """What the time means: GB/s of the least bytes, TFLOP/s, and on a known GPU the fraction of its bound."""
    gpu = datasheet(torch.cuda.get_device_name()) if DEVICE == "cuda" else None
    return {
        "us": seconds * 1e6,
        "gb_s": c.moved / seconds / 1e9,
        "tflop_s": c.flops / seconds / 1e12,
        "flops_bound": c.flops > 100 * c.moved,  # more than a hundred FLOP a byte: no datasheet has memory as the bound there
        "of_bound": gpu.bound(c.moved, c.flops, c.itemsize) / seconds if gpu else None,
    }


# --- the end of the run ------------------------------------------------------------------------------------------------


def summary(benchmarks, folder, draw=None):
    """Writes the results of pytest-benchmark into `folder` (and plots into `draw`); returns the lines of the speed-up table."""
    results = [dict(b.extra_info) for b in benchmarks if "us" in b.extra_info]
    if not results:
        return ["no kernel was measured"]
    file = folder / "kernels.json"
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"torch": torch.__version__, "device": name, "results": results}, indent=1) + "\n")
        kept = f"{len(results)} results in {file}"
    except OSError as error:  # a checkout that is not one's own, a full disk: the table is there all the same
        kept = f"{len(results)} results, which cannot be kept: {file}: {error.strerror}"
    ops = {r["op"] for r in results}
    lines = [*speedups(results), "", *host.report([op for op in available() if op in ops]), kept]
    if draw:
        lines.append(f"plots: {', '.join(map(str, plots.speedups(results, Path(draw))))}")
    return lines


def speedups(results):
    """Our time, and how many times longer each other engine takes."""
    by_case = {}
    for r in results:
        c = Case(**{f.name: r[f.name] for f in dataclasses.fields(Case)})
        by_case.setdefault(dataclasses.replace(c, engine="trillama"), {})[c.engine] = r
    rows = []
    for c, engines in by_case.items():
        ours = engines.get("trillama")
        if ours is None:
            continue
        rate = f"{ours['tflop_s']:.2f} TFLOP/s" if ours["flops_bound"] else f"{ours['gb_s']:.1f} GB/s"
        fraction = GPU_ONLY if ours["device"] == "cpu" else f"{ours['of_bound']:.2f}" if ours["of_bound"] else "-"
        others = [
            f"{engines[e]['us'] / ours['us']:.2f}" if e in engines else reason(dataclasses.replace(c, engine=e)) or "-"
            for e in ENGINES[1:]
        ]
        rows.append((c.name, c.model, c.label, c.shape, c.dtype, f"{ours['us']:.1f}", rate, fraction, *others))
    threads = torch.get_num_threads()
    cpu = f"the reference path, on this CPU with {threads} thread{'s' if threads > 1 else ''}"
    what = cpu if DEVICE == "cpu" else "the Triton kernels, device time"
    header = ("op", "model", "", "shape", "dtype", "us", "rate", "of the bound", *ENGINES[1:])
    return [f"trillama ({what}); the last columns are the times of others over it.", *plots.table(header, rows, left=5)]
