"""`python -m trillama.bench.hardware`: proves and measures everything on the GPU at hand, the most valuable first.

    [--minutes 10] [--out DIR] [--only SECTION ...] [--list] [--rehearse]

Every result is written to DIR/results.jsonl the moment it exists; DIR/log.txt has what the workers print, DIR/summary.txt the end:
a summary of at most 10,000 characters, failures first. Where DIR holds a run already, the files of this one are results-2.jsonl
and so on. First what all sections launch is compiled on all cores, then things are timed one by one.
`python -m trillama.bench.report DIR/results.jsonl` makes tables and plots of it.

Exit status: 0 where something was measured and all of it went well, 1 where something failed, nothing was measured or a result is
not on disk, 2 where it cannot begin, 130 after an interruption, which keeps what there is and ends with the summary as well.
"""

import contextlib
import datetime
import functools
import importlib.util
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

from ...model import cli
from ..apart import Died, Worker, apart, one_line, side_by_side
from . import SECTIONS, Card, at_hand, carry_out, section, table

WIDTH = 10_000  # characters of the summary
COMPILE, CORES, START = 1.6, 14, 3.0  # estimates: seconds a kernel and its launcher, workers, seconds until a worker works
MOST = 0.5  # of the time that is left, for what comes before something else: compiling, and a section of the parallel ones


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


def tell(text):
    """Prints it, if it can be: no run ends because nobody reads it any more (`| head`, a closed terminal) or a disk is full."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass  # there may be room for the summary


class Record:
    """The results so far, each on disk before the next one begins, or with the next one for which there is room: `missing` is how
    many are not, `why` the error. Its files are new: where the folder holds those of a run, these get a number."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            self.results, self.log, self.summary = (
                folder / (name if number == 1 else f"-{number}.".join(name.split(".")))
                for name in ("results.jsonl", "log.txt", "summary.txt")
            )
            if not self.log.exists() and not self.summary.exists():
                with contextlib.suppress(FileExistsError):
                    self.file = open(self.results, "xb", buffering=0)  # noqa: SIM115 - as long as the process
                    break
        self.lines, self.unwritten, self.missing, self.why = [], b"", 0, None

    def add(self, name, job, status="ok", /, **fields):
        line = {**fields, "section": name, "job": job, "status": status}
        self.unwritten += json.dumps(line).encode() + b"\n"
        self.lines.append(line)
        self.missing += 1
        self.write()
        if self.missing:  # the summary still has it
            tell(f"  {name}: {job}: not on disk: {self.why}")
        if status != "ok":
            tell(f"  {name}: {job}: {status}: {fields.get('error')}")

    def write(self):
        try:
            while self.unwritten:  # a full disk may take a part of a line, the rest of which follows
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            self.why = error
        else:
            self.missing = 0

    def of(self, name):
        return [line for line in self.lines if line["section"] == name]


def measure(plan, record, until, rehearse):
    """Does all jobs of the plan and writes down what comes of them; what has not begun by `until` is left out."""
    begin = time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(CORES, cores - 2))
    patience = 10 if rehearse else 1  # an interpreter is no GPU

    def note(key, result):
        record.add(*key, result.pop("status", "ok"), **result)

    def end(key, status, error, seconds):
        name, job = key
        if status == "ok" and not any(line["job"] == job for line in record.of(name)):
            status, error = "failed", error or "it gave no result"
        if status != "ok" or error:
            record.add(*key, status, error=error, seconds=round(seconds, 2))

    cold = set()

    def warmed(key, status, error, seconds):
        if status in ("left out", "out of memory"):  # so many side by side may be more than the card holds
            cold.add(key)  # it compiles when it is run
        elif status != "ok" or error:
            record.add(*key, status, error=f"as it compiled: {error}", seconds=round(seconds, 2))

    def pool(names, action, until, end):
        tasks = [
            ((name, job.name), carry_out, (name, action, job.work), patience * (30 + 6 * job.compiled + 10 * job.seconds))
            for name in names
            for job in plan[name]
            if action == "run" or job.compiled
        ]
        if tasks:
            side_by_side(tasks, workers, record.log, rehearse, until, note, end)

    def part():
        now = time.monotonic()
        return now + MOST * (until - now)

    def say(text):
        tell(f"[{time.monotonic() - begin:4.0f} s] {text}")

    alone = [name for name in plan if not section(name).PARALLEL and name != "facts"]
    for name in plan:
        if name == next(iter(alone), None):
            say(f"compiling what {', '.join(alone)} need, on {workers} processes")
            pool(alone, "warm", part(), warmed)
        say(f"{name}: {len(plan[name])} cases")
        if section(name).PARALLEL:
            pool([name], "run", until if name == [*plan][-1] else part(), end)
            continue
        worker = Worker(record.log, rehearse)
        limit = time.monotonic() + patience * (1.5 * estimate(plan[name], False)[1] + 30)
        try:
            for job in plan[name]:
                key, now = (name, job.name), time.monotonic()
                if now > min(limit, until):
                    record.add(*key, "left out", error="no time was left" if now > until else "its section's time was over")
                    continue
                allowed = patience * (20 + 6 * job.seconds + 6 * job.compiled * (key in cold))
                outcome = worker.do(carry_out, (name, "run", job.work), allowed, functools.partial(note, key), until + 10)
                end(key, *outcome, time.monotonic() - now)
        finally:
            worker.end()
    say("done")


def summary(plan, record, rehearse):
    """At most WIDTH characters: facts, failures, then the tables in order of value, as far as they fit."""
    lines = ["A REHEARSAL: nothing here was measured."] if rehearse else []
    lines += shown(record, "facts")
    bad = [r for r in record.lines if r["status"] not in ("ok", "left out")]
    begun = {(r["section"], r["job"]) for r in record.lines}
    left = [r["section"] for r in record.lines if r["status"] == "left out"]
    left += [name for name, jobs in plan.items() for job in jobs if (name, job.name) not in begun]  # an interruption
    measured = any(r["status"] == "ok" for r in record.lines)
    lines += ["", f"FAILURES: {len(bad)}" if bad else "No failure." if measured else "NOTHING WAS MEASURED."]
    lines += [f"  {r['section']}: {r['job']}: {r['status']}: {r.get('error')}"[:240] for r in bad[:25]]
    if len(bad) > 25:
        lines.append(f"  and {len(bad) - 25} more in {record.results.name}")
    if record.missing:
        lines.append(f"NOT ON DISK: {record.missing} of {len(record.lines)} results: {record.why}")
    if left:
        lines.append("Left out: " + ", ".join(f"{left.count(name)} of {name}" for name in plan if name in left))
    text = "\n".join(lines)
    for name in plan:
        if name == "facts":
            continue
        rows = shown(record, name)
        room = WIDTH - len(text) - 80
        lines = []
        for line in ["", f"{name}: {title(name)}", *rows]:
            if room < len(line) + 1:
                lines.append(f"... more of {name} in {record.results.name}")
                break
            room -= len(line) + 1
            lines.append(line)
        text += "\n" + "\n".join(lines)
    return text[:WIDTH]


def shown(record, name):
    """The section's tables; one that cannot be made of what there is takes no other with it."""
    try:
        return table(record.lines, name)
    except Exception as error:
        traceback.print_exc()
        return [f"no table: {one_line(error)}"]


def parser():
    p = cli.Parser(prog="python -m trillama.bench.hardware", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--minutes", type=float, default=10, help="all that it may take (default: 10)")
    add("--out", type=Path, metavar="DIR", help="default: hardware-DATE-TIME in the current folder")
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    add("--list", action="store_true", help="sections, cases and estimated seconds; nothing is run")
    add("--rehearse", action="store_true", help="everything at small sizes on a pretended GPU: no number of it means anything")
    return p


@contextlib.contextmanager
def caches():
    """Where no home can be written, or a user has no name, nothing could be compiled: caches of this run alone take the places."""

    def tritons():
        import triton

        return triton.knobs.cache.dir

    def inductors():
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        return cache_dir()

    places = {"TRITON_CACHE_DIR": tritons} if importlib.util.find_spec("triton") else {}
    with contextlib.ExitStack() as stack:
        for variable, place in (places | {"TORCHINDUCTOR_CACHE_DIR": inductors}).items():
            try:
                folder = Path(place())
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except Exception as error:
                print(f"{variable} is a temporary folder: {one_line(error)}", flush=True)
                new = tempfile.TemporaryDirectory(prefix="trillama-", ignore_cleanup_errors=True)
                stack.enter_context(mock.patch.dict(os.environ, {variable: stack.enter_context(new)}))
        yield


@contextlib.contextmanager
def interruptible():
    """Within the block SIGTERM, which `timeout` sends, even twice, and SIGHUP, of a terminal that is closed, are as Ctrl-C, and
    only the first of them counts: what follows is the summary of what there is. Under `nohup` SIGHUP stays ignored."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)

    def interrupt(*_):
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)


def planned(names, card):
    """({section: its jobs}, {section: why it has none})"""
    plan, wrong = {}, {}
    for name in names:
        try:
            plan[name] = list(section(name).jobs(card))
        except Exception as error:
            traceback.print_exc()
            plan[name], wrong[name] = [], one_line(error)
    return plan, wrong


def main(argv=None):
    begin = time.monotonic()
    options = parser().parse_args(argv)
    if not options.minutes > 0:
        raise ValueError(f"--minutes is {options.minutes}, expected a number above 0")
    names = [name for name in SECTIONS if not options.only or name in options.only]
    import torch

    if options.list:
        card = Card.at_hand() if torch.cuda.is_available() else Card.nominal()
        show_list({name: list(section(name).jobs(card)) for name in names})
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        raise ValueError("this measures a GPU, and torch finds none; --rehearse pretends one, --list needs none")
    folder = options.out or Path(f"hardware-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    pretended = contextlib.nullcontext()
    if options.rehearse:
        from . import rehearsal

        rehearsal.environment()
        pretended = rehearsal.pretend()
    until = begin + 60 * options.minutes - 12  # the summary, and the end of what runs
    with caches(), interruptible():
        try:
            (card,) = apart(at_hand, options.rehearse, limit=120, rehearse=options.rehearse)
        except Died as error:
            raise ValueError(f"the GPU cannot be asked: {error}") from None
        with pretended:
            plan, wrong = planned(names, card)
        record = Record(folder)
        for name, error in wrong.items():
            record.add(name, "all", "failed", error=error)
        interrupted = False
        try:
            measure(plan, record, until, options.rehearse)
        except KeyboardInterrupt:
            interrupted = True
            tell("interrupted")
        except Exception as error:  # of this program's own: what there is must not be lost
            traceback.print_exc()
            record.add("facts", "the run", "failed", error=one_line(error))
        record.write()  # there may be room by now
        text = summary(plan, record, options.rehearse)
        tell("\n" + text)
        kept = not record.missing
        try:
            record.summary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            kept = False
            tell(f"the summary is not on disk: {error}")
        tell(f"results: {record.results}")
    if interrupted:
        return 130
    statuses = {r["status"] for r in record.lines}
    return 0 if kept and "ok" in statuses and statuses <= {"ok", "left out"} else 1


if __name__ == "__main__":
    sys.exit(cli.status(main))
