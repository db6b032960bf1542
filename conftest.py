"""pytest for trillama: `pytest` runs the tests on any machine, `pytest --benchmark` the kernel benchmarks.

Without a GPU the kernels run in Triton's interpreter (fp32 and fp16: it rounds bf16 wrongly). Where a Triton driver that takes
host memory is active (TRILLAMA_BACKEND=triton and TRITON_INTERPRET unset) compiled code runs instead, in fp16 and bf16.

What tests use:
    device      fixture: "cuda" where there is a GPU, else "cpu"
    triton      fixture: the Triton backend is in force and every launch is recorded; `triton.names` lists the kernels that ran
    dtype       parametrised by whoever asks for it: the dtypes that can be trusted in this mode
    poisoned    fixture: torch.empty and its relatives return NaN, so that an element nobody writes is seen
Formulas in float64 and the comparison rules are in bench/oracle.py.
"""

import contextlib
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

# The tests are many small products: threads cost more than they give, above all beside other work on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_addoption(parser):
    group = parser.getgroup("trillama")
    group.addoption("--benchmark", action="store_true", help="run the kernel benchmarks in bench/ and print the speed-up table")
    group.addoption("--benchmark-plots", metavar="DIR", help="with --benchmark: draw the results into DIR")


@pytest.hookimpl(trylast=True)  # a plugin that brings a driver has by now asked for the Triton backend
def pytest_configure(config):
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRILLAMA_BACKEND") != "triton":
        # Triton decides at import, for its own library too, so this must come before anything imports it.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from trillama.bench.traffic import quicken

        quicken()
    if config.getoption("--benchmark") and config.args_source.name != "ARGS":
        config.args[:] = [str(config.rootpath / "bench" / "bench_kernels.py")]


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--benchmark") and hasattr(config, "_benchmarksession"):
        from trillama.bench.bench_kernels import summary

        session = config._benchmarksession
        session.quiet = True  # its own table would stand behind ours
        terminalreporter.section("kernel benchmarks")
        for line in summary(session.benchmarks, config.rootpath / ".benchmarks", config.getoption("--benchmark-plots")):
            terminalreporter.write_line(line)


def modes():
    """Which code a kernel test runs: "gpu", "interpreter" or "compiled" (a driver that executes compiled code on host memory)."""
    import torch

    if torch.cuda.is_available():
        return "gpu"
    return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        import torch

        trusted = {
            "gpu": (torch.float32, torch.float16, torch.bfloat16),
            "interpreter": (torch.float32, torch.float16),
            "compiled": (torch.float16, torch.bfloat16),
        }[modes()]
        metafunc.parametrize("dtype", trusted, ids=lambda d: {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(d)[6:]])


def pytest_collection_modifyitems(config, items):
    mode = modes()
    host = pytest.mark.skip(reason="not about kernels: runs without a driver")
    gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if mode == "compiled" and item.get_closest_marker("host"):
            item.add_marker(host)
        if mode != "gpu" and item.get_closest_marker("gpu"):
            item.add_marker(gpu)
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file that cannot be imported without a package of setup.py's lists is skipped where that package is not installed."""
    report = yield
    name = re.search(r"^E +ModuleNotFoundError: No module named '(\w+)", str(report.longrepr), re.MULTILINE)
    if report.failed and name and absent(name[1]):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs the package {name[1]}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with packages_there(), interpreter_willing():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with packages_there(), interpreter_willing():
        return (yield)


def absent(package):
    """Whether it is one that setup.py asks for and that cannot be found, whatever a test has put into sys.modules."""
    asked = Path(__file__).with_name("setup.py").read_text(encoding="utf-8").replace("-", "_")
    if not re.search(rf"""["']{package}\b""", asked):
        return False
    return not any(finder.find_spec(package, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))


@contextlib.contextmanager
def packages_there():
    """A test that meets a package which is not installed, and asked nobody about it, is skipped for that."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and absent(error.name.partition(".")[0]):
            pytest.skip(f"needs the package {error.name.partition('.')[0]}")
        raise


@contextlib.contextmanager
def interpreter_willing():
    """Where Triton's interpreter does not run with what else is installed, whatever asks it for a kernel is skipped for that."""
    try:
        yield
    except Exception as error:
        from trillama.kernels import dispatch

        obstacle = dispatch.INTERPRETED and dispatch.interpreter_obstacle()
        if obstacle and obstacle in str(error):
            pytest.skip(obstacle)
        raise


@pytest.fixture
def device():
    return "cuda" if modes() == "gpu" else "cpu"


@pytest.fixture
def triton():
    from trillama.kernels import use_backend
    from trillama.kernels.dispatch import observe

    class Launches:
        names = []  # noqa: RUF012 - one object a test

    launches = Launches()
    launches.names = []

    def note(kernel, grid, arguments, options):
        launches.names.append(getattr(kernel, "fn", kernel).__name__)

    with use_backend("triton"), observe(note):
        yield launches


@pytest.fixture
def poisoned():
    from trillama.bench.proofs import poisoned

    with poisoned():
        yield
