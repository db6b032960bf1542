"""`python -m trillama.bench.hardware`: what goes wrong costs itself only and is written down; the whole of it, rehearsed."""

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

    def do(job, *arguments, limit=120):
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

    for error in (BlockingIOError(11, "Resource temporarily unavailable"), MemoryError(), EOFError("unexpected EOF")):

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


def test_the_server_that_forks_may_be_killed(worker):
    from multiprocessing.forkserver import _forkserver

    worker(jobs.works)
    os.kill(_forkserver._forkserver_pid, signal.SIGKILL)
    outcome, results = worker(jobs.works, 2)
    assert outcome == ("ok", None) or outcome[0] == "crashed"
    worker.worker.end()
    assert worker(jobs.works, 2)[0] == ("ok", None)


def test_an_error_on_this_side_costs_the_job(worker):
    def note(value):
        raise TypeError("Object of type Tensor is not JSON serializable")

    assert worker.worker.do(jobs.works, (), 120, note) == ("failed", "TypeError: Object of type Tensor is not JSON serializable")
    assert worker(jobs.works, 2)[0] == ("ok", None)


def test_a_job_of_many_results_ends_in_time(worker):
    """Each comes soon enough, all of them do not."""
    worker(jobs.works)
    results, start = [], time.monotonic()
    outcome = worker.worker.do(jobs.slow, (100, 0.2), 60, results.append, until=start + 2)
    assert outcome == ("left out", "no time was left for its end")
    assert 0 < len(results) < 20
    assert time.monotonic() - start < 30


def test_a_worker_compiles_on_one_core(worker):
    assert worker(jobs.threads)[1] == [{"i": 1}]


def test_a_kill_between_two_jobs_costs_none(worker):
    worker(jobs.works)
    worker.worker.process.kill()
    worker.worker.process.join()
    outcome, results = worker(jobs.works, 2)
    assert outcome == ("ok", None)
    assert len(results) == 2


def test_a_cut_line_is_not_added_to(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"section": "facts", "job": "é", "status": "ok"}\n{"section": "fa', encoding="utf-8")
    command.Record(tmp_path).add("rows", "job")
    assert [line["section"] for line in report.load(file)] == ["facts", "rows"]


def test_a_full_disk_leaves_the_summary(tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, "No space left on device")

    record = command.Record(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    record.add("rows", "job", "failed", error="so")
    assert [line["job"] for line in record.lines] == ["job"]
    assert "rows: job: not on disk: [Errno 28] No space left on device" in capsys.readouterr().out


def test_a_crash_and_a_hang_cost_their_job(worker):
    assert worker(jobs.dies)[0] == ("crashed", "ended by SIGSEGV")
    assert worker(jobs.leaves)[0] == ("crashed", "ended with status 7")
    worker(jobs.works)
    start = time.monotonic()
    assert worker(jobs.hangs, limit=2) == (("hung", "no answer within 2 s"), [{"i": 0}])
    assert time.monotonic() - start < 60
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


def test_an_interruption_side_by_side_leaves_nobody_and_blames_nobody(tmp_path):
    ends, pids = [], []

    def note(key, value):
        pids.append(value["pid"])
        signal.raise_signal(signal.SIGINT) if len(pids) == 2 else None

    tasks = [(i, jobs.lingers, (), 30) for i in range(4)]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        apart.side_by_side(tasks, 2, tmp_path / "log.txt", True, start + 300, note, lambda *end: ends.append(end))
    assert ends == []
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_side_by_side(tmp_path):
    work, results, ends = [jobs.works, jobs.leaves, jobs.works, jobs.fails], [], {}
    tasks = [(i, job, (), 120) for i, job in enumerate(work)]
    apart.side_by_side(
        tasks, 2, tmp_path / "log.txt", True, time.monotonic() + 300, lambda key, r: results.append((key, r["i"])),
        lambda key, status, error, seconds: ends.update({key: status}),
    )  # fmt: skip
    assert ends == {0: "ok", 1: "crashed", 2: "ok", 3: "failed"}
    assert sorted(results) == [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0)]
    late = time.monotonic() - 1
    apart.side_by_side(tasks, 2, tmp_path / "log.txt", True, late, None, lambda key, status, *_: ends.update({key: status}))
    assert set(ends.values()) == {"left out"}


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
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 302


def rehearse(folder, *options, **environment):
    argv = [sys.executable, "-m", "trillama.bench.hardware", "--rehearse", "--out", str(folder), *options]
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")} | environment
    return subprocess.run(argv, capture_output=True, text=True, timeout=900, cwd=folder, env=clean)


@pytest.mark.slow
def test_an_interruption_keeps_what_there_is(tmp_path):
    argv = [sys.executable, "-m", "trillama.bench.hardware", "--rehearse", "--out", str(tmp_path), "--only", "facts", "right"]
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=clean) as run:
        file = tmp_path / "results.jsonl"
        for _ in range(600):
            time.sleep(0.1)
            if file.exists() and file.read_text().count("\n") >= 2:
                break
        run.terminate()
        out = run.communicate(timeout=120)[0]
    assert "interrupted" in out
    assert "A REHEARSAL: nothing here was measured." in out
    assert file.read_text().count("\n") >= 2
    assert (tmp_path / "summary.txt").is_file()


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "facts" else pytest.mark.slow) for name in SECTIONS])
def test_rehearsal(tmp_path, name):
    """Every line that a GPU would run, run: at small sizes, with a clock that means nothing and values that do."""
    run = rehearse(tmp_path, "--minutes", "14", "--only", *{"facts", name})
    assert run.returncode == 0, run.stdout[-3000:] + (tmp_path / "log.txt").read_text()[-3000:]
    results = [json.loads(r) for r in (tmp_path / "results.jsonl").read_text().splitlines()]
    statuses = {r["status"] for r in results if r["section"] == name}
    left = [r["error"] for r in results if r["status"] == "left out"]
    assert statuses <= {"ok", "left out"}, [r for r in results if r["status"] != "ok"]
    if name == "safety" and not safety.executable():
        assert statuses == {"left out"}
    else:
        assert left == (["there is one GPU only"] if name == "right" else [])
    done = {r["job"] for r in results if r["section"] == name}
    assert done == {job.name for job in command.section(name).jobs(Card("a pretended H100", 90, 256 << 20, True))}
    assert "No failure." in run.stdout
    assert hardware.SECTIONS[0] == "facts"
