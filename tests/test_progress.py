"""How `pytest` shows where it is, and when it takes more than one process of its own accord."""

from types import SimpleNamespace

import progress
import pytest

pytestmark = pytest.mark.host


class Terminal:
    def __init__(self):
        self.lines = []

    def ensure_newline(self):
        pass

    def write_line(self, line, **markup):
        self.lines.append(line)


def config(source="TESTPATHS", plugins=("xdist",), **given):
    option = {"keyword": "", "markexpr": "", "benchmark": False, "lf": False, "numprocesses": None, "dist": "no", "tx": []}
    option |= {"usepdb": False, "collectonly": False, "capture": "fd", **given}
    return SimpleNamespace(
        args_source=SimpleNamespace(name=source), option=SimpleNamespace(**option),
        getoption=lambda name, default=None: option.get(name, default),
        pluginmanager=SimpleNamespace(has_plugin=lambda name: name in plugins),
    )  # fmt: skip


def test_a_process_that_was_started_starts_none(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    asked = config()
    progress.spread(asked)
    assert asked.option.numprocesses is None


def report(name, outcome="passed", when="call"):
    return SimpleNamespace(nodeid=f"tests/test_x.py::{name}", outcome=outcome, failed=outcome == "failed", when=when)


def test_lines_of_a_run():
    now, terminal = 0.0, Terminal()
    shown = progress.Progress(config(), terminal, lambda: now)
    shown.pytest_collection_finish(SimpleNamespace(items=[]))  # the process that only hands out
    shown.pytest_xdist_node_collection_finished(None, list(range(2000)))
    shown.pytest_xdist_node_collection_finished(None, list(range(2000)))
    for i in range(2000):
        now += 0.125
        failed = i == 500
        shown.pytest_runtest_logreport(report(f"test_{i}", "failed" if failed else "passed"))
        shown.pytest_runtest_logreport(report(f"test_{i}", when="teardown"))
    first, *rest = terminal.lines
    assert first.startswith("2,000 tests, 1 at a time, 10 min 0 s or so")
    assert rest.pop(4) == "FAILED tests/test_x.py::test_500"
    assert len(rest) == 16
    assert rest[0] == "  6 %, 120 of 2,000 tests in 15 s, at tests/test_x.py"
    assert rest[-1].startswith(" 96 %, 1,920 of 2,000 tests in 4 min 0 s, 1 failed")


def test_an_error_outside_the_test_is_shown():
    terminal = Terminal()
    shown = progress.Progress(config("ARGS"), terminal)
    shown.pytest_collection_finish(SimpleNamespace(items=[1]))
    shown.pytest_runtest_logreport(report("test_a", "failed", "setup"))
    assert terminal.lines[0].startswith("1 test")
    assert "or so" not in terminal.lines[0]
    assert terminal.lines[1] == "ERROR  tests/test_x.py::test_a"


def test_the_whole_suite_takes_all_cores(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(progress, "cores", lambda: 3)
    asked = config()
    progress.spread(asked)
    assert (asked.option.numprocesses, asked.option.dist, asked.option.tx) == (3, "loadfile", ["popen"] * 3)


@pytest.mark.parametrize(
    "given",
    [
        {"source": "ARGS"}, {"plugins": ()}, {"plugins": ("xdist", "gpuless")}, {"numprocesses": 0}, {"numprocesses": 2},
        {"usepdb": True}, {"collectonly": True}, {"capture": "no"}, {"keyword": "rope"}, {"markexpr": "slow"}, {"benchmark": True},
        {"lf": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_asked_for_stays(monkeypatch, given):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    asked = config(**given)
    before = dict(vars(asked.option))
    progress.spread(asked)
    assert vars(asked.option) == before


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_cores(monkeypatch, cores):
    monkeypatch.setattr(progress.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert progress.cores() == cores
    monkeypatch.delattr(progress.os, "sched_getaffinity")
    assert progress.cores() >= 1
