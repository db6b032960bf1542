"""Row kernels, forward and backward, and those of a decode step, beside eager PyTorch, torch.compile and Liger; a call's host cost.

16,384 tokens, from 8,192 columns on 8,192. GB/s are of the least bytes: every input read once, every output written once.
"""

import dataclasses
import timeit

import torch

from .. import peers, plots, timing
from ..cases import OPS, Case, case
from . import Job, facts

PARALLEL = False
SECONDS = 0.02
BOTH = ("rms_norm", "add_rms_norm", "apply_rope", "swiglu")
WIDTHS = ("Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.1-70B", "Qwen3-0.6B", "Llama-3.1-405B")  # 4096, 2048, 8192, 1024, 16384
TINY = "SmolLM2-135M"
LINEAR = ("decode_linear", "decode_linear swiglu", "decode_linear int8", "decode_linear int4")
STEP = ("rope_append_", "embed_next_", "choose_", "choose_ cut")
HOST = ("rms_norm", "add_rms_norm", "apply_rope", "swiglu", "decode_linear", "decode_attention", "rope_append_", "choose_")


def jobs(card):
    small = card.small
    found = []

    def add(c, *engines):
        for engine in engines:
            if peers.why_not(c.op, engine, "cuda") is not None:
                continue
            passes = 2 if c.backward else 1
            work = dataclasses.asdict(dataclasses.replace(c, engine=engine))
            compiled = {"trillama": 1, "compile": 3, "liger": 1}.get(engine, 0) * passes
            seconds = passes * (0.8 if engine == "compile" else 0.2)
            found.append(Job(f"{engine} {c.op}, {c.model}, {c.shape}", {"what": "case", **work}, seconds, compiled))

    for model in WIDTHS if not small else (TINY,):
        for op in BOTH:
            tokens = 32 if small else 16384 if case(op, model).m.hidden < 8192 else 8192
            others = ("eager", "compile") if model in (WIDTHS[0], TINY) else ("compile",) if model in WIDTHS[:3] else ()
            add(case(op, model, tokens=tokens, backward=True), "trillama", "liger", *others)
    for model in ("Llama-3.1-8B", "Llama-3.2-1B") if not small else (TINY,):
        for op in LINEAR if not small else LINEAR[::2]:
            for batch in (1, 8) if not small else (1,):
                add(case(op, model, batch=batch, context=16), "trillama", *(("eager",) if "int" not in op else ()))
        for op in STEP if not small else STEP[:-1]:
            for batch in (1, 8) if not small else (1,):
                add(case(op, model, batch=batch, context=64 if small else 8192), "trillama", "eager")
    found.sort(key=lambda job: peers.ENGINES.index(job.work["engine"]))
    host = {"what": "host", "repeats": 1 if small else 200}
    found.insert(len([job for job in found if job.work["engine"] == "trillama"]), Job("host", host, 3.0, len(HOST)))
    return found


def run(what, **work):
    if what == "host":
        yield from host(work["repeats"])
        return
    for c in passes(work):
        t = timing.device_seconds(c, SECONDS)
        yield {**dataclasses.asdict(c), "label": c.label, "bytes": c.moved, "flops": c.flops, **t.asdict()}


def warm(what, **work):
    if what == "host":
        for op in HOST:
            prepared(op)()
        return
    for c in passes(work):
        if c.engine == "trillama" and OPS[c.op].phase != "decode":  # how many rows there are is compiled into nothing of ours
            c = dataclasses.replace(c, tokens=min(64, c.tokens), context=min(64, c.context))
        c.prepare(c.inputs("cuda"))()


def passes(work):
    """The case, forward and, where it says so, backward."""
    c = Case(**work)
    return [dataclasses.replace(c, backward=backward) for backward in ((False, True) if c.backward else (False,))]


# --- what the host does ----------------------------------------------------------------------------------------------


def prepared(op):
    c = case(op, TINY, tokens=1, context=64)
    return c.prepare(c.inputs("cuda"))


def host(repeats):
    """Microseconds that a call takes the host: with Triton's launch, and without it: checks, the choice of a tile, the outputs."""
    from ...kernels import use_backend
    from ...kernels.dispatch import observe

    def best(function):
        times = []
        for _ in range(min(5, repeats)):
            torch.cuda.synchronize()
            times.append(timeit.timeit(function, number=repeats) / repeats)
        return min(times) * 1e6

    for op in HOST:
        call = prepared(op)
        call()
        whole = best(call)
        with use_backend("triton"), observe(lambda *launch: True):
            yield {"host": op, "call_us": whole, "without_launch_us": best(call)}


# --- the tables ------------------------------------------------------------------------------------------------------


def show(results, known=()):
    """known: the results of `facts`, for the fractions of what the card can do."""
    bandwidth, _ = facts.ceilings(known)
    cases = {}
    for r in results:
        if "bytes" in r:
            key = r["op"], r["label"], r["batch"] * r["tokens"]
            cases.setdefault(key, {})[r["engine"], r["backward"]] = r
    rows = []
    for (op, label, tokens), runs in cases.items():
        cells = []
        for backward in (False, True):
            mine = runs.get(("trillama", backward))
            if mine is None:
                cells.append(["", *["-"] * 4] if bandwidth else [""] * 4)
                continue
            rate = mine["bytes"] / mine["us"] * 1e6
            others = [runs.get((engine, backward)) for engine in ("eager", "compile", "liger")]
            cells.append([
                f"{mine['us']:.1f}" if OPS[op].phase == "decode" else f"{rate / 1e9:.0f}",
                *([f"{rate / bandwidth:.0%}"] if bandwidth else []),
                *(f"{r['us'] / mine['us']:.2f}" if r else "-" for r in others),
            ])  # fmt: skip
        rows.append((op, label, tokens, cells))
    share = ["of copy"] if bandwidth else []
    others = ("eager", "comp.", "liger")
    both = [(op, label, n, *a, *b) for op, label, n, (a, b) in rows if OPS[op].differentiable]
    step = [(op, label, n, *a[: len(share) + 2]) for op, label, n, (a, _) in rows if not OPS[op].differentiable]
    lines = plots.table(("op", "", "rows", "GB/s", *share, *others, "bwd", *share, *others), both, left=2) if both else []
    if step:
        lines += plots.table(("op", "", "rows", "us", *share, "eager"), step, left=2)
    if lines:
        lines.append("Columns of others: their time over ours.")
    costs = [f"{r['host']} {r['call_us']:.0f} ({r['without_launch_us']:.0f})" for r in results if "host" in r]
    if costs:
        lines.append(f"us of the host for a call (without Triton's launch): {', '.join(costs)}")
    return lines
