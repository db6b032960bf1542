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

import atexit
import contextlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import progress
import pytest

# The tests are many small products: threads cost more than they give, above all beside other work on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# What somebody has set for their own work is not what is tested.
for name in ("TRILLAMA_TUNING", "TRILLAMA_PDL", *(["TRILLAMA_BACKEND"] * (os.environ.get("TRILLAMA_BACKEND") != "triton"))):
    os.environ.pop(name, None)
while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # a stream that was closed (`pytest <&-`)
    pass
os.close(number)


def _home_for_triton():
    """Where Triton cannot keep code in the home, a folder of this run's: it compiles nothing without one."""
    folder = Path(os.path.expanduser("~"), ".triton", "cache")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if "TRITON_CACHE_DIR" in os.environ or (there.is_dir() and os.access(there, os.W_OK)):
        return
    os.environ["TRITON_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="trillama-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


_home_for_triton()


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
    progress.register(config)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist makes its own of the number of processes
def pytest_cmdline_main(config):
    progress.spread(config)


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
    for spared in (in_all_but_one_dtype, beyond_a_few):
        for item in list(spared(items)):
            item.add_marker(pytest.mark.slow)
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]


def in_all_but_one_dtype(items):
    """Of tests with many cases: by default each case runs in one of the dtypes, in turn, and these, the others, are long.

    The turns are the bits of the Thue-Morse sequence, so that no option that alternates from case to case is tied to a dtype."""
    functions = {}
    for item in items:
        if "dtype" in getattr(item, "fixturenames", ()):
            function, _, case = item.nodeid.partition("[")
            case = re.sub(r"\b(fp32|fp16|bf16)\b", "", case, count=1)
            functions.setdefault(function, {}).setdefault(case, []).append(item)
    for cases in functions.values():
        for number, of_case in enumerate(cases.values() if len(cases) > 3 else ()):
            turn = number.bit_count() % len(of_case)
            yield from of_case[:turn] + of_case[turn + 1 :]


def beyond_a_few(items):
    """Of tests marked few(n) the cases but n by default, which lie as far apart as they can."""
    functions = {}
    for item in items:
        few = item.get_closest_marker("few")
        if few and not item.get_closest_marker("slow"):
            functions.setdefault((item.nodeid.partition("[")[0], few.args[0]), []).append(item)
    for (_, n), cases in functions.items():
        by_default = {round(i * (len(cases) - 1) / max(n - 1, 1)) for i in range(n)}
        yield from (item for number, item in enumerate(cases) if number not in by_default)


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
    with packages_there(), compilers_willing():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with packages_there(), compilers_willing():
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
def compilers_willing():
    """Where Triton's interpreter does not run with what else is installed, or torch's compiler not in the temporary folder, what
    asks for them is skipped for that."""
    try:
        yield
    except Exception as error:
        from trillama.kernels import dispatch

        obstacle = dispatch.INTERPRETED and dispatch.interpreter_obstacle()
        if obstacle and obstacle in str(error):
            pytest.skip(obstacle)
        if " " in tempfile.gettempdir() and "CppCompileError" in str(error):
            pytest.skip(f"torch's Inductor does not quote the temporary folder, {tempfile.gettempdir()}, for the C++ compiler")
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
