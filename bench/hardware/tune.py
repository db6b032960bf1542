"""Tile sizes: the entries of the tuning tables that matter, each beside a few candidates, on the shapes of named models.

A job is one candidate: the table's own entry is measured beside it, and what either computes is compared.
"""

import json

from .. import cases, check, plots, tune
from . import Job

PARALLEL = False
ORDER = ("dkv", "dq", "attention", "decode", "linear", "linear-swiglu", "linear-int4", "linear-int8", "choose")
EIGHT = "Llama-3.1-8B"
SECONDS = {"attention": 0.5, "dq": 0.7, "dkv": 0.7}  # of a candidate; 0.35 elsewhere


def jobs(card):
    targets = [tune.Target(name, model) for name in ORDER for model in tune.ENTRIES[name].models]
    targets.sort(key=lambda target: target.model != EIGHT)
    if card.small:
        targets = [tune.Target("rms_norm", "SmolLM2-135M", "fp16"), tune.Target("choose", "SmolLM2-135M", "fp16")]
    found = []
    for target in targets:
        (function, arguments), candidates = target.candidates(f"sm_{card.arch}")
        most = 2 if card.small else 6 if target.model == EIGHT else 4
        for number, fields in enumerate(candidates[:most]):
            work = {"name": target.name, "model": target.model, "dtype": target.dtype, "function": function,
                    "arguments": list(arguments), "fields": fields, "tokens": 4 if card.small else None}  # fmt: skip
            found.append(Job(f"{target} {number}", work, SECONDS.get(target.name, 0.35), 1 if number else 2))
    return found


def case(name, model, dtype, tokens):
    """The case that decides, in a rehearsal with few tokens."""
    entry = tune.ENTRIES[name]
    few = {} if tokens is None else {"tokens": 1, "context": 8} if cases.OPS[entry.op].phase == "decode" else {"tokens": tokens}
    return cases.case(entry.op, model, dtype=dtype, backward=entry.backward, **few)


def warm(name, model, dtype, function, arguments, fields, tokens):
    with tune.entries({(function, tuple(arguments)): fields}):
        check.outcome(case(name, model, dtype, tokens), "cuda")


def run(name, model, dtype, function, arguments, fields, tokens):
    c, key = case(name, model, dtype, tokens), (function, tuple(arguments))
    own, trial = None, None
    for trial in tune.compare(c, key, [fields], tune.seconds_of):
        own = own or trial
    if own.reason:
        raise RuntimeError(f"the table's own entry: {own.reason}")
    yield {
        "name": name, "model": model, "shape": f"{c.label}, {c.shape}", "dtype": dtype, "function": function,
        "arguments": arguments, "candidate": json.dumps(fields), "reason": trial.reason, "own_us": own.seconds * 1e6,
        **({} if trial.reason else {"us": trial.seconds * 1e6, "gain": own.seconds / trial.seconds}),
    }  # fmt: skip


def trials(results):
    """Those that are of a candidate: others say how a job ended."""
    return [r for r in results if "candidate" in r]


def best(results):
    """{(name, model): the result of the fastest candidate, or one of those without a gain}."""
    found = {}
    for r in trials(results):
        key = r["name"], r["model"]
        if key not in found or r.get("gain", 0) > found[key].get("gain", 0):
            found[key] = r
    return found


def keep(results, record):
    """Puts what was measured into a tune.Record, each candidate beside the table's own entry of its process."""
    found = {}
    for r in trials(results):
        trial = tune.Trial(json.loads(r["candidate"]), r["us"] / 1e6 if "us" in r else None, r["reason"])
        target = tune.Target(r["name"], r["model"], r["dtype"])
        found.setdefault((target, r["function"], tuple(r["arguments"])), []).extend([tune.Trial(None, r["own_us"] / 1e6), trial])
    for (target, *key), beside in found.items():
        record.note(target, tuple(key), beside, complete=True)


def show(results, known=()):
    rows = []
    for (name, model), r in best(results).items():
        gain = r.get("gain", 0)
        fields = r["candidate"] if gain > 1 else "the table's own"
        rows.append((name, model, r["shape"], f"{r['own_us']:.1f}", f"{r['us']:.1f}" if gain else "-", f"{gain:.2f}x", fields))
    tried = sum(r["reason"] is None for r in trials(results))
    header = ("entry", "model", "shape", "us", "best us", "gain", "fields")
    return [*plots.table(header, rows, left=3), f"{len(trials(results))} candidates, {tried} of them fit and computed the same"]
