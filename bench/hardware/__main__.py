"""`python -m trillama.bench.hardware`: proves and measures everything on the GPU at hand, the most valuable first.

    [--minutes 10] [--out DIR] [--only SECTION ...] [--list] [--rehearse]

Every result is appended to DIR/results.jsonl the moment it exists; DIR/log.txt has what the workers print. First what all
sections launch is compiled on all cores, then things are timed one by one. The end is a summary of at most 10,000 characters,
failures first.
`python -m trillama.bench.report DIR/results.jsonl` makes tables and plots of it.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

from ..apart import Worker, side_by_side
from . import SECTIONS, Card, carry_out, section, table

WIDTH = 10_000  # characters of the summary
COMPILE, CORES, START = 1.6, 14, 3.0  # estimates: seconds a kernel and its launcher, workers, seconds until a worker works


def estimate(jobs, parallel):
    """(seconds of compiling, seconds after it) that the jobs of a section take on a fast card with 16 cores."""
    compiling = sum(job.compiled for job in jobs) * COMPILE / CORES
    working = sum(job.seconds for job in jobs) / (CORES if parallel else 1)
    return compiling, working + (START if jobs else 0)


def show_list(plan):
    total = 0
    for name, jobs in plan.items():
        compiling, working = estimate(jobs, section(name).PARALLEL)
        total += compiling + working
        print(f"{name:10} {len(jobs):4} cases  {compiling + working:4.0f} s, {compiling:.0f} of them compiling  {title(name)}")
        for job in jobs:
            print(f"    {job.name:72} {job.seconds:6.2f} s  {job.compiled:3} kernels")
    print(f"together   {sum(map(len, plan.values())):4} cases  {total:4.0f} s on a fast card with 16 cores (an estimate)")


def title(name):
    return section(name).__doc__.splitlines()[0]


class Record:
    """The results so far, each on disk before the next one begins."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / "results.jsonl", "a+b")  # noqa: SIM115 - as long as the process
        self._whole_lines()
        self.lines = []

    def _whole_lines(self):
        """A run that was killed before may have cut its last line: it goes, or nobody could read what is added to it."""
        self.file.seek(0)
        text = self.file.read()
        self.file.truncate(text.rfind(b"\n") + 1)

    def add(self, name, job, status="ok", /, **fields):
        line = {**fields, "section": name, "job": job, "status": status}
        self.lines.append(line)
        try:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:  # a full disk: the summary still has it
            print(f"  {name}: {job}: not on disk: {error}", flush=True)
        if status != "ok":
            print(f"  {name}: {job}: {status}: {fields.get('error')}", flush=True)

    def of(self, name):
        return [line for line in self.lines if line["section"] == name]


def measure(plan, record, log, minutes, rehearse):
    begin = time.monotonic()
    until = begin + 60 * minutes - 12  # the summary, and the end of what runs
    workers = max(1, min(CORES, (os.cpu_count() or 2) - 2))
    patience = 10 if rehearse else 1  # an interpreter is no GPU

    def note(key, result):
        record.add(*key, result.pop("status", "ok"), **result)

    def end(key, status, error, seconds):
        if status != "ok" or error:
            record.add(*key, status, error=error, seconds=round(seconds, 2))

    def pool(names, action):
        tasks = [
            ((name, job.name), carry_out, (name, action, job.work), patience * (30 + 6 * job.compiled + 10 * job.seconds))
            for name in names
            for job in plan[name]
            if action == "run" or job.compiled
        ]
        if tasks:
            side_by_side(tasks, workers, log, rehearse, until, note, end)

    def say(text):
        print(f"[{time.monotonic() - begin:4.0f} s] {text}", flush=True)

    alone = [name for name in plan if not section(name).PARALLEL and name != "facts"]
    for name in plan:
        if name == next(iter(alone), None):
            say(f"compiling what {', '.join(alone)} need, on {workers} processes")
            pool(alone, "warm")
        say(f"{name}: {len(plan[name])} cases")
        if section(name).PARALLEL:
            pool([name], "run")
            continue
        worker = Worker(log, rehearse)
        limit = time.monotonic() + patience * (1.5 * estimate(plan[name], False)[1] + 30)
        for job in plan[name]:
            key, now = (name, job.name), time.monotonic()
            if now > min(limit, until):
                record.add(*key, "left out", error="no time was left" if now > until else "its section's time was over")
                continue
            allowed = min(patience * (20 + 6 * job.seconds), until + 10 - now)
            outcome = worker.do(carry_out, (name, "run", job.work), allowed, functools.partial(note, key))
            end(key, *outcome, time.monotonic() - now)
        worker.end()
    say("done")


def summary(plan, record, rehearse):
    """At most WIDTH characters: facts, failures, then the tables in order of value, as far as they fit."""
    lines = ["A REHEARSAL: nothing here was measured."] if rehearse else []
    lines += table(record.lines, "facts")
    bad = [r for r in record.lines if r["status"] not in ("ok", "left out")]
    left = [r for r in record.lines if r["status"] == "left out"]
    lines += ["", f"FAILURES: {len(bad)}" if bad else "No failure."]
    lines += [f"  {r['section']}: {r['job']}: {r['status']}: {r.get('error')}"[:240] for r in bad[:25]]
    if len(bad) > 25:
        lines.append(f"  and {len(bad) - 25} more in results.jsonl")
    if left:
        names = {name: sum(r["section"] == name for r in left) for name in plan}
        lines.append("Left out: " + ", ".join(f"{n} of {name}" for name, n in names.items() if n))
    text = "\n".join(lines)
    for name in plan:
        if name == "facts":
            continue
        rows = table(record.lines, name)
        room = WIDTH - len(text) - 80
        lines = []
        for line in ["", f"{name}: {title(name)}", *rows]:
            if room < len(line) + 1:
                lines.append(f"... more of {name} in results.jsonl")
                break
            room -= len(line) + 1
            lines.append(line)
        text += "\n" + "\n".join(lines)
    return text[:WIDTH]


def parser():
    p = argparse.ArgumentParser(prog="python -m trillama.bench.hardware", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--minutes", type=float, default=10, help="all that it may take (default: 10)")
    add("--out", type=Path, metavar="DIR", help="default: hardware-DATE-TIME in the current folder")
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    add("--list", action="store_true", help="sections, cases and estimated seconds; nothing is run")
    add("--rehearse", action="store_true", help="everything at small sizes on a pretended GPU: no number of it means anything")
    return p


def main(argv=None):
    options = parser().parse_args(argv)
    if not options.minutes > 0:
        raise ValueError(f"--minutes is {options.minutes}, expected a number above 0")
    names = [name for name in SECTIONS if not options.only or name in options.only]
    import torch

    if options.list:
        card = Card.at_hand() if torch.cuda.is_available() else Card.nominal()
        show_list({name: list(section(name).jobs(card)) for name in names})
        return 0
    if options.rehearse:
        from . import rehearsal

        rehearsal.environment()
        pretended = rehearsal.pretend()
    else:
        if not torch.cuda.is_available():
            raise ValueError("this measures a GPU, and torch finds none; --rehearse pretends one, --list needs none")
        pretended = contextlib.nullcontext()
    folder = options.out or Path(f"hardware-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    with pretended:
        plan = {name: list(section(name).jobs(Card.at_hand(options.rehearse))) for name in names}
    record = Record(folder)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # `timeout` and Ctrl-C alike: the summary of what there is
    try:
        measure(plan, record, folder / "log.txt", options.minutes, options.rehearse)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    text = summary(plan, record, options.rehearse)
    print("\n" + text, flush=True)
    (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"results: {folder / 'results.jsonl'}")
    return 1 if any(r["status"] not in ("ok", "left out") for r in record.lines) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"trillama: error: {error}", file=sys.stderr)
        sys.exit(2)
