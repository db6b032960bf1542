"""`python -m trillama.bench.hardware`: what goes wrong costs itself only and is written down; the whole of it, rehearsed."""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import jobs
import pytest
import torch
from trillama.bench import apart, hardware, report
from trillama.bench.hardware import SECTIONS, Card, safety
from trillama.bench.hardware import __main__ as command

pytestmark = pytest.mark.host


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """A worker on a pretended GPU, as a function of a job's name: ((status, error), its results)."""
    made = apart.Worker(tmp_path / "log.txt", rehearse=True)

    def do(job, *arguments, limit=jobs.LONG):
        results = []
        return made.do(job, arguments, limit, results.append), results

    do.worker, do.log = made, tmp_path / "log.txt"
    yield do
    made.end()


def test_an_error_costs_its_job_and_not_the_process(worker):
    assert worker(jobs.works, 3)[0] == ("ok", None)
    pid = worker.worker.process.pid
    assert [r["i"] for r in worker(jobs.works, 3)[1]] == [0, 1, 2]
    (status, error), results = worker(jobs.fails)
    assert status == "failed"
    assert re.fullmatch(r"ValueError: no such thing \(jobs\.py:\d+\)", error)
    assert results == [{"i": 0}]
    assert worker(jobs.memory)[0] == ("out of memory", "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")
    assert worker(jobs.chatters) == (("ok", None), [{"i": 0}])
    assert worker.worker.process.pid == pid
    log = worker.log.read_text()
    assert "a library says something on stdout\n" in log
    assert "and not by Python\n" in log


def test_a_process_that_cannot_be_started_costs_its_job(worker, monkeypatch):
    """No memory for a fork, no file handles, no server to fork from."""
    from multiprocessing.process import BaseProcess

    too_long = OSError("AF_UNIX path too long")
    for error in (BlockingIOError(11, "Resource temporarily unavailable"), MemoryError(), EOFError("unexpected EOF"), too_long):

        def start(process, error=error):
            raise error

        monkeypatch.setattr(BaseProcess, "start", start)
        status, said = worker(jobs.works)[0]
        assert status == "crashed"
        assert said.startswith(f"no process could be started: {type(error).__name__}")
        monkeypatch.undo()
        assert worker(jobs.works, 2)[0] == ("ok", None)
        worker.worker.end()
    with pytest.raises(apart.Died, match="no process could be started: OSError: no handles"):
        monkeypatch.setattr(apart, "_context", lambda: (_ for _ in ()).throw(OSError("no handles")))
        list(apart.apart(jobs.works))


@pytest.mark.slow
def test_the_server_that_forks_may_be_killed(worker):
    from multiprocessing.forkserver import _forkserver

    worker(jobs.works)
    os.kill(_forkserver._forkserver_pid, signal.SIGKILL)
    outcome, _ = worker(jobs.works, 2)
    assert outcome == ("ok", None) or outcome[0] == "crashed"
    worker.worker.end()
    assert worker(jobs.works, 2)[0] == ("ok", None)


@pytest.mark.slow
def test_what_all_processes_are_forked_from_asks_for_no_gpu():
    """Not even how many there are: after that no fork of it could use one."""
    code = f"""
import importlib, torch

def refuse(*_, **__):
    raise AssertionError("asked for a GPU")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
for name in {apart.PRELOADED}:
    try:
        importlib.import_module(name)
    except ImportError:
        assert name == "triton"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_an_error_on_this_side_costs_the_job(worker):
    def note(value):
        raise TypeError("Object of type Tensor is not JSON serializable")

    assert worker.worker.do(jobs.works, (), 120, note) == ("failed", "TypeError: Object of type Tensor is not JSON serializable")
    assert worker(jobs.works, 2)[0] == ("ok", None)


def test_a_job_of_many_results_ends_in_time(worker):
    """Each comes soon enough, all of them do not."""
    worker(jobs.works)
    results = []
    outcome = worker.worker.do(jobs.slow, (3000, 0.2), 60, results.append, until=time.monotonic() + 2)
    assert outcome == ("left out", "no time was left for its end")
    assert len(results) < 11  # a fifth of a second each: two seconds hold no more on any machine


def test_a_worker_compiles_on_one_core(worker):
    assert worker(jobs.threads)[1] == [{"i": 1}]


def test_a_kill_between_two_jobs_costs_none(worker):
    worker(jobs.works)
    worker.worker.process.kill()
    worker.worker.process.join()
    outcome, results = worker(jobs.works, 2)
    assert outcome == ("ok", None)
    assert len(results) == 2


def test_runs_into_one_folder_do_not_mix(tmp_path):
    """Nor where the one before was killed in the middle of a line, or had only begun."""
    file = tmp_path / "results.jsonl"
    text = '{"section": "facts", "job": "é", "status": "ok"}\n{"section": "fa'
    file.write_text(text, encoding="utf-8")
    (tmp_path / "log-2.txt").write_text("of another")
    records = [command.Record(tmp_path) for _ in range(2)]
    for record, number in zip(records, (3, 4)):
        record.add("rows", f"job {number}")
        assert record.results.name == f"results-{number}.jsonl"
        assert (record.log.name, record.summary.name) == (f"log-{number}.txt", f"summary-{number}.txt")
        assert [line["job"] for line in report.load(record.results)] == [f"job {number}"]
    assert file.read_text(encoding="utf-8") == text


def test_a_full_disk_leaves_the_summary(tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, "No space left on device")

    record = command.Record(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    record.add("rows", "job", "failed", error="so")
    assert [line["job"] for line in record.lines] == ["job"]
    assert "rows: job: not on disk: [Errno 28] No space left on device" in capsys.readouterr().out
    assert "NOT ON DISK: 1 of 1 results: [Errno 28] No space left on device" in command.summary({"rows": []}, record, False)


def test_what_had_no_room_is_written_as_soon_as_there_is_some(tmp_path, capsys):
    """In whole lines, whatever part of one the disk has taken."""
    record = command.Record(tmp_path)

    class Disk:
        room = 20

        def write(self, text):
            if not self.room:
                raise OSError(28, "No space left on device")
            taken = file.write(text[: self.room])
            self.room -= taken
            return taken

        def fileno(self):
            return file.fileno()

    file, record.file = record.file, Disk()
    for job in ("a", "b"):
        record.add("rows", job)
    assert record.missing == 2
    assert record.results.stat().st_size == 20
    record.file.room = 1000
    record.add("rows", "c")
    assert record.missing == 0
    assert "NOT ON DISK" not in command.summary({"rows": []}, record, False)
    assert [line["job"] for line in report.load(record.results)] == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert out.count("not on disk") == 2


@pytest.mark.slow
def test_a_crash_and_a_hang_cost_their_job(worker):
    assert worker(jobs.dies)[0] == ("crashed", "ended by SIGSEGV")
    assert worker(jobs.leaves)[0] == ("crashed", "ended with status 7")
    worker(jobs.works)
    start = time.monotonic()
    assert worker(jobs.hangs, limit=5) == (("hung", "no answer within 5 s"), [{"i": 0}])
    assert time.monotonic() - start < jobs.LONG
    assert worker(jobs.works)[0] == ("ok", None)


def test_a_device_that_is_lost_gets_a_new_process(worker):
    """After a failed capture torch 2.11 captures no more, after an illegal address no call works: another process goes on."""
    (status, error), results = worker(jobs.captures)
    assert status == "ok"
    assert "operation not permitted" in results[0]["why"]
    assert error.startswith("a capture failed")
    assert worker.worker.process is None
    assert worker(jobs.poisons) == (("ok", "RuntimeError: CUDA error: an illegal memory access was encountered"), [{"i": 0}])
    assert worker.worker.process is None
    assert worker(jobs.works)[0] == ("ok", None)


def test_a_capture_that_failed_unseen(worker):
    """torch.compile's, or one within a case of `right`: what is behind it would fail, or prove nothing."""
    status, error = worker(jobs.captures_elsewhere)[0]
    assert status == "failed"
    assert "operation not permitted when stream is capturing" in error
    assert worker.worker.process is None
    (status, error), results = worker(jobs.proves)
    assert [(r["case"], r.get("status")) for r in results] == [("wrong", "failed"), ("breaks", "failed")]
    assert status == "failed"
    assert "after a capture that failed" in error
    assert worker.worker.process is None
    assert worker(jobs.works)[0] == ("ok", None)


@pytest.mark.usefixtures("signals")
def test_an_interruption_side_by_side_leaves_nobody_and_blames_nobody(tmp_path):
    ends, pids = [], []

    def note(key, value):
        pids.append(value["pid"])
        signal.raise_signal(signal.SIGINT) if len(pids) == 2 else None

    tasks = [(i, jobs.lingers, (), jobs.LONG) for i in range(4)]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        apart.side_by_side(tasks, 2, tmp_path / "log.txt", True, start + jobs.LONG, note, lambda *end: ends.append(end))
    assert ends == []
    assert len(pids) == 2
    while pids:  # until the server that has forked them has seen it
        assert time.monotonic() - start < jobs.LONG
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[0], 0)
            time.sleep(0.1)
            continue
        pids.pop(0)


def test_side_by_side(tmp_path):
    work, results, ends = [jobs.works, jobs.leaves, jobs.works, jobs.fails], [], {}
    tasks = [(i, job, (), jobs.LONG) for i, job in enumerate(work)]
    apart.side_by_side(
        tasks, 2, tmp_path / "log.txt", True, time.monotonic() + jobs.LONG, lambda key, r: results.append((key, r["i"])),
        lambda key, status, error, seconds: ends.update({key: status}),
    )  # fmt: skip
    assert ends == {0: "ok", 1: "crashed", 2: "ok", 3: "failed"}
    assert sorted(results) == [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0)]
    late = time.monotonic() - 1
    apart.side_by_side(tasks, 2, tmp_path / "log.txt", True, late, None, lambda key, status, *_: ends.update({key: status}))
    assert set(ends.values()) == {"left out"}


def test_what_cannot_be_ended_is_not_waited_for(worker, monkeypatch):
    """A process that waits for a GPU outlives SIGKILL; Python would wait for it at its own end."""
    import multiprocessing

    worker(jobs.works)
    process = worker.worker.process
    monkeypatch.setattr(worker.worker, "kill", lambda: None)
    monkeypatch.setattr(type(process), "join", lambda process, timeout: None)
    worker.worker.end()
    assert process not in multiprocessing.active_children()
    monkeypatch.undo()
    os.kill(process.pid, signal.SIGKILL)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """The command as on a GPU, whose jobs do what `job(key)` does, in this process: (exit status, lines, summary)."""
    asked = []

    class Worker:
        def __init__(self, log, rehearse):
            pass

        def do(self, function, arguments, limit, note, until):
            asked.append((arguments[1], limit, until))
            for value in begun.job(arguments[0]):
                note(value)
            return "ok", None

        def end(self):
            pass

    def side_by_side(tasks, workers, log, rehearse, until, note, end):
        for key, _, (_, action, _), limit in tasks:
            asked.append((action, limit, until))
            for value in begun.job(key[0]) if action == "run" else ():
                note(key, value)
            end(key, *(begun.warm if action == "warm" else ("ok", None)), 1.0)

    def begun(*options):
        status = command.main(["--out", str(tmp_path), *options])
        return status, report.load(tmp_path / "results.jsonl"), (tmp_path / "summary.txt").read_text()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "apart", lambda *_, **__: iter([Card("H100", 90, 78 << 30)]))
    monkeypatch.setattr(command, "Worker", Worker)
    monkeypatch.setattr(command, "side_by_side", side_by_side)
    begun.job, begun.warm, begun.asked = lambda name: [{"i": 1}], ("ok", None), asked
    return begun


@pytest.mark.parametrize("end", [("left out", "no time was left"), ("out of memory", "of 14 side by side")])
def test_compiling_leaves_time_to_measure(begun, tmp_path, end):
    """What was not compiled beforehand has the time to compile as it runs, and is left out by nobody."""
    options = "--only", "training", "--minutes", "5"
    start = time.monotonic()
    begun.warm = end
    status, lines, _ = begun(*options)
    assert status == 0
    assert {line["status"] for line in lines} == {"ok"}
    late = time.monotonic() - start
    warms = [(limit, until - start) for action, limit, until in begun.asked if action == "warm"]
    assert all(100 < seconds < 170 + late for _, seconds in warms)
    cold = [limit for action, limit, _ in begun.asked if action == "run"]
    begun.asked.clear()
    begun.warm = ("ok", None)
    command.main([*options, "--out", str(tmp_path / "again")])
    warm = [limit for action, limit, _ in begun.asked if action == "run"]
    assert sum(a > b for a, b in zip(cold, warm, strict=True)) == len(warms) > 2


def test_a_job_without_a_result_has_failed(begun):
    begun.job = lambda name: []
    status, lines, _ = begun("--only", "training")
    assert status == 1
    assert {(line["status"], line["error"]) for line in lines} == {("failed", "it gave no result")}


def test_a_section_that_cannot_begin_or_be_shown_costs_itself(begun, monkeypatch, tmp_path):
    from trillama.bench.hardware import rows, training

    def broken(*_):
        raise ImportError("no such module\nand more")

    monkeypatch.setattr(training, "jobs", broken)
    status, lines, text = begun("--only", "training", "rows")
    assert status == 1
    assert [(line["job"], line["error"]) for line in lines if line["section"] == "training"] == [
        ("all", "ImportError: no such module")
    ]
    assert len(lines) == 1 + len(rows.jobs(Card("H100", 90, 78 << 30)))
    assert "training: all: failed: ImportError: no such module" in text
    monkeypatch.setattr(rows, "show", broken)
    record = command.Record(tmp_path / "again")
    record.add("rows", "x", "failed", error="so")
    text = command.summary({"rows": []}, record, False)
    assert "no table: ImportError: no such module" in text
    assert "rows: x: failed: so" in text


def test_an_error_of_the_command_leaves_the_summary(begun):
    def job(name):
        raise AttributeError("a bug")

    begun.job = job
    status, _, text = begun("--only", "facts")
    assert status == 1
    assert "facts: the run: failed: AttributeError: a bug" in text


def test_an_interruption_ends_as_that_of_any_command(begun):
    """With its summary, and a status that says so."""

    def job(name):
        yield {"i": 1}
        raise KeyboardInterrupt

    begun.job = job
    status, lines, text = begun("--only", "facts")
    assert status == 130
    assert [line["status"] for line in lines] == ["ok"]
    assert f"Left out: {len(command.section('facts').jobs(Card.nominal())) - 1} of facts" in text


def test_a_run_that_measured_nothing_has_not_gone_well(begun):
    status, lines, text = begun("--only", "facts", "training", "--minutes", "0.01")
    assert status == 1
    assert {line["status"] for line in lines} == {"left out"}
    assert text.splitlines()[1] == "NOTHING WAS MEASURED."
    assert "No failure." not in text


@pytest.mark.parametrize("full", ["results", "summary"])
def test_a_run_that_is_not_on_disk_has_not_gone_well(begun, monkeypatch, tmp_path, capsys, full):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if full == "results" else (command.Path, "write_text")), fail)
    assert command.main(["--out", str(tmp_path), "--only", "facts"]) == 1
    out = capsys.readouterr().out
    count = len(command.section("facts").jobs(Card.nominal()))
    if full == "results":
        assert f"NOT ON DISK: {count} of {count} results: [Errno 28]" in (tmp_path / "summary.txt").read_text()
        assert f"NOT ON DISK: {count} of {count} results: [Errno 28]" in out
    else:
        assert "the summary is not on disk: [Errno 28]" in out


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_nobody_has_to_read_what_is_printed(begun, monkeypatch, error):
    """`| head`, a terminal that was closed, a log on a disk that is full: what is measured is written down all the same."""

    class Gone(io.TextIOWrapper):
        def flush(self):
            raise error

    def job(name):
        yield {"i": 1, "status": "failed", "error": "so"}

    begun.job = job
    with open(os.devnull, "wb") as nowhere:
        monkeypatch.setattr(sys, "stdout", Gone(nowhere, write_through=True))
        status, lines, text = begun("--only", "facts")
        monkeypatch.undo()
    assert status == 1
    assert {line["status"] for line in lines} == {"failed"}
    assert "facts: copy: failed: so" in text


def test_a_gpu_that_does_not_answer_is_one_line(begun, monkeypatch, capsys):
    from trillama.model import cli

    def dead(*_, **__):
        raise apart.Died("hung", "no answer within 120 s")

    monkeypatch.setattr(command, "apart", dead)
    assert cli.status(lambda: begun("--only", "facts")) == 2
    assert capsys.readouterr().err == "trillama: error: the GPU cannot be asked: no answer within 120 s\n"


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_only_the_first_signal_counts(first):
    """`timeout` sends two; a terminal that is closed sends another."""
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    with command.interruptible():
        try:
            signal.raise_signal(first)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            seen.append("the summary")
    assert seen == ["the summary"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command.interruptible():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_goes_before_leaves_time(begun):
    start = time.monotonic()
    begun("--only", "right", "safety", "--minutes", "5")
    late = time.monotonic() - start  # the command counts from when it began, between the two
    right, safety = sorted({until - start for _, _, until in begun.asked})
    assert 100 < right < 170 + late
    assert 280 < safety < 300 + late


NVIDIA_SMI = """GPU-00000000-1111-2222-3333-444444444444, 1200 MHz, 90.00 W
GPU-55555555-6666-7777-8888-999999999999, 1980 MHz, [N/A]
"""


@pytest.mark.parametrize(
    ("uuid", "said", "expected"),
    [
        ("55555555-6666-7777-8888-999999999999", NVIDIA_SMI, ["1980 MHz", None]),
        ("00000000-1111-2222-3333-444444444444", NVIDIA_SMI, ["1200 MHz", "90.00 W"]),
        ("aaaaaaaa-6666-7777-8888-999999999999", NVIDIA_SMI, [None, None]),
        ("aaaaaaaa-6666-7777-8888-999999999999", NVIDIA_SMI.splitlines()[0], ["1200 MHz", "90.00 W"]),
        ("00000000-1111-2222-3333-444444444444", "No devices were found", [None, None]),
        ("00000000-1111-2222-3333-444444444444", None, [None, None]),
    ],
)
def test_clocks_are_of_the_gpu_that_is_measured(uuid, said, expected, monkeypatch, tmp_path):
    """Not of the machine's first one; and none where nvidia-smi is absent or knows of none."""
    from types import SimpleNamespace

    from trillama.bench.hardware import facts

    program = tmp_path / "nvidia-smi"
    if said is not None:
        asked = "assert '--query-gpu=uuid,clocks.sm,power.draw' in sys.argv"
        program.write_text(f"#!{sys.executable}\nimport sys\n{asked}\nprint({said!r})\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    assert facts.ask("clocks.sm", "power.draw") == dict(zip(("clocks.sm", "power.draw"), expected))


def test_a_profiler_that_sees_nothing_has_failed(worker):
    """Without CUPTI it reports no kernel: no table of a step in which nothing is done."""
    (status, error), results = worker(jobs.profiles)
    assert (status, results) == ("failed", [])
    assert "the profiler saw no kernel" in error


def test_caches_that_cannot_be_written_are_replaced(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    with command.caches():
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert folder != str(tmp_path / "file" / "cache")
        assert os.path.isdir(folder)
        if importlib.util.find_spec("triton"):
            assert os.path.isdir(os.environ["TRITON_CACHE_DIR"])
    assert not os.path.exists(folder)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "file" / "cache")
    assert "TORCHINDUCTOR_CACHE_DIR is a temporary folder: NotADirectoryError" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "a"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "b"))
    with command.caches():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "b")


def test_the_list_fits_into_nine_minutes(capsys):
    if torch.cuda.is_available():
        pytest.skip("the list would be of the card at hand")
    assert command.main(["--list"]) == 0
    out = capsys.readouterr().out
    total = out.splitlines()[-1].split()
    assert total[0] == "together"
    assert 60 < int(total[3]) <= 540
    for name in SECTIONS:
        (row,) = (r for r in out.splitlines() if r.startswith(name + " "))
        cases = int(row.split()[1])
        assert cases == len(list(command.section(name).jobs(Card.nominal()))) > 0
    assert sum(map(str.isspace, (r[0] for r in out.splitlines()))) == int(total[1])


def test_names_are_unique_and_work_is_plain():
    for small in (False, True):
        for name in SECTIONS:
            found = list(command.section(name).jobs(Card("H100", 90, 78 << 30, small)))
            assert len({job.name for job in found}) == len(found)
            for job in found:
                assert pickle.loads(pickle.dumps(job.work)) == job.work
                assert command.section(name).PARALLEL or hasattr(command.section(name), "warm") or not job.compiled


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch finds none; --rehearse pretends one"):
        command.main(["--only", "facts"])
    with pytest.raises(ValueError, match=r"--minutes is -1\.0"):
        command.main(["--minutes", "-1"])


def test_the_summary_is_short_and_has_failures_first(tmp_path):
    record = command.Record(tmp_path)
    record.add("facts", "copy", bytes_per_s=3e12)
    for i in range(300):
        record.add("right", f"case {i}", "failed", error="x" * 500)
    record.add("rows", "rms_norm", "left out", error="no time was left")
    plan = {name: [] for name in SECTIONS}
    text = command.summary(plan, record, False)
    assert len(text) <= 10_000
    assert text.splitlines()[0].startswith("copy, read and written: 3.00 TB/s")
    assert text.index("FAILURES: 300") < text.index("decode: ")
    assert "Left out: 1 of rows" in text
    plan["decode"] = [hardware.Job("never begun"), hardware.Job("nor this")]
    assert "Left out: 2 of decode, 1 of rows" in command.summary(plan, record, False)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 302


def rehearse(folder, *options, **environment):
    argv = [sys.executable, "-m", "trillama.bench.hardware", "--rehearse", "--out", str(folder), *options]
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")} | environment
    return subprocess.run(argv, capture_output=True, text=True, timeout=900, cwd=folder, env=clean)


@pytest.mark.slow
@pytest.mark.usefixtures("signals")
def test_an_interruption_keeps_what_there_is(tmp_path):
    argv = [sys.executable, "-m", "trillama.bench.hardware", "--rehearse", "--out", str(tmp_path), "--only", "facts", "right"]
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=clean) as run:
        file = tmp_path / "results.jsonl"
        while run.poll() is None and not (file.exists() and file.read_text().count("\n") >= 2):
            time.sleep(0.1)
        run.terminate()
        out = run.communicate(timeout=600)[0]
    assert run.returncode == 130
    assert "interrupted" in out
    assert "A REHEARSAL: nothing here was measured." in out
    assert file.read_text().count("\n") >= 2
    assert (tmp_path / "summary.txt").is_file()


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(what was printed, the results): every line that a GPU would run, run, at small sizes."""
    folder = tmp_path_factory.mktemp("rehearsal")
    run = rehearse(folder, "--minutes", "14")
    assert run.returncode == 0, run.stdout[-3000:] + (folder / "log.txt").read_text()[-3000:]
    return run, [json.loads(r) for r in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_rehearsal(rehearsed, name):
    """With a clock that means nothing and values that do."""
    run, results = rehearsed
    statuses = {r["status"] for r in results if r["section"] == name}
    left = [r["error"] for r in results if r["section"] == name and r["status"] == "left out"]
    assert statuses <= {"ok", "left out"}, [r for r in results if r["status"] != "ok"]
    if name == "safety" and not safety.executable():
        assert statuses == {"left out"}
    else:
        assert left == (["there is one GPU only"] if name == "right" else [])
    done = {r["job"] for r in results if r["section"] == name}
    assert done == {job.name for job in command.section(name).jobs(Card("a pretended H100", 90, 256 << 20, True))}
    assert "No failure." in run.stdout
    shown = hardware.table(results, name)
    assert len(shown) > 1
    assert all(line in run.stdout for line in shown)
    assert hardware.SECTIONS[0] == "facts"
