"""What `pytest` without options does for a person: a process for each core, and lines that say how far it is.

Whoever asks for something, processes (`-n`), files, a way of showing (`-q`, `-v`), gets what pytest makes of it.
"""

import os
import time

import pytest

EVERY = 15  # seconds between two lines
WORK = 600  # seconds of one core that the default tests take, about


def cores():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(config):
    """Of the whole suite, if nothing is said of processes: one a core, up to 8, as each holds a model or two; on a GPU up to 4."""
    import torch

    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ:  # whoever was started has no word on processes either
        return
    if not config.pluginmanager.has_plugin("xdist") or option.numprocesses is not None or option.dist != "no" or option.tx:
        return
    watched = option.usepdb or option.collectonly or option.capture == "no"
    if whole(config) and not watched and not config.pluginmanager.has_plugin("gpuless"):
        option.numprocesses = min(cores(), 4 if torch.cuda.is_available() else 8)
        option.dist = "loadfile"  # what the tests of a file share is made once
        option.tx = ["popen"] * option.numprocesses


def whole(config):
    """Whether the default tests are asked for, all of them."""
    option = config.option
    return config.args_source.name == "TESTPATHS" and not (option.keyword or option.markexpr or option.benchmark or option.lf)


def register(config):
    if config.get_verbosity() == 0 and not hasattr(config, "workerinput") and config.pluginmanager.has_plugin("terminalreporter"):
        config.pluginmanager.register(Progress(config, config.pluginmanager.get_plugin("terminalreporter")), "trillama_progress")


class Progress:
    """Instead of a letter for each test a line every EVERY seconds, and each failure at once."""

    def __init__(self, config, terminal, clock=time.monotonic):
        self.config, self.terminal, self.clock = config, terminal, clock
        self.began = self.spoken = clock()
        self.tests = self.done = self.failed = 0
        terminal.showfspath = False
        terminal._show_progress_info = False

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self, report, config):
        category, _, word = yield
        return category, "", word

    def pytest_collection_finish(self, session):
        self.start(len(session.items))

    def pytest_xdist_node_collection_finished(self, node, ids):
        self.start(len(ids))

    def start(self, tests):
        if self.tests or not tests:
            return
        self.tests, self.began, self.spoken = tests, self.clock(), self.clock()
        processes = self.config.getoption("numprocesses", None) or 1
        expected = f", {duration(WORK / processes)} or so" if whole(self.config) else ""
        self.say(f"{tests:,} test{'s' * (tests > 1)}, {processes} at a time{expected}; the long ones are left to `pytest -m slow`")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed += 1
            self.say(f"{'FAILED' if report.when == 'call' else 'ERROR '} {report.nodeid}", red=True)
        self.done += report.when == "teardown"
        if self.clock() - self.spoken >= EVERY and report.when == "teardown":
            self.spoken = self.clock()
            failed = f", {self.failed} failed" if self.failed else ""
            where = report.nodeid.partition("::")[0]
            passed = f"{100 * self.done // self.tests:3d} %, {self.done:,} of {self.tests:,} tests"
            self.say(f"{passed} in {duration(self.spoken - self.began)}{failed}, at {where}")

    def say(self, line, **markup):
        self.terminal.ensure_newline()
        self.terminal.write_line(line, **markup)


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
