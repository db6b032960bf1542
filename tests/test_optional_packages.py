"""Without an optional package everything works that does not need it, and what needs it says so in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trillama.kernels import dispatch, rms_norm, use_backend
from trillama.model import cli
from trillama.model.checkpoint import CheckpointError
from trillama.model.gguf_file import read_gguf

pytestmark = pytest.mark.host
TESTS = Path(__file__).parent

# What no wheel of ours pulls in, or not on every platform; and gguf and Numba, which a machine without a network may lack.
PACKAGES = (
    "transformers", "triton", "gguf", "numba", "liger_kernel", "flash_attn", "matplotlib", "sentencepiece", "tiktoken",
    "pytest_benchmark",
)  # fmt: skip

COLLECT = """
import importlib, json, os, sys
from pathlib import Path

import pytest, torch


class Without:
    def __init__(self, finder, package):
        self.finder, self.package = finder, package

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == self.package else self.finder.find_spec(name, path, target)


def collect(package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.meta_path[:] = [Without(finder, package) for finder in sys.meta_path]
    problems = []
    for file in sorted(Path(sys.path[0]).glob("test_*.py")):
        try:
            importlib.import_module(file.stem)
        except pytest.skip.Exception:
            pass
        except BaseException as error:
            problems.append(f"{file.name}: {type(error).__name__}: {error}")
    return problems


for package in sys.argv[2:]:
    sys.stdout.flush()
    if os.fork() == 0:
        print(json.dumps([package, collect(package)]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
    if package == "transformers":  # half of the time goes into its imports: from here on all have them
        try:
            import transformers.models.llama.modeling_llama
        except ImportError:
            pass
"""


@pytest.fixture(scope="module")
def problems():
    """By package: the test files that cannot be imported without it. One process imports what all need and forks for each."""
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1])\n" + COLLECT, str(TESTS), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the collecting process forks")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_is_collected_without(package, problems):
    assert problems[package] == []


# --- gguf ------------------------------------------------------------------------------------------------------------

# A file with one tensor "t" of four float32.
GGUF = b"GGUF" + b"".join(n.to_bytes(size, "little") for n, size in (
    (3, 4), (1, 8), (1, 8), (20, 8),
)) + b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"llama" + b"".join(
    (1).to_bytes(8, "little") + b"t" if n is None else n.to_bytes(size, "little")
    for n, size in ((None, 0), (1, 4), (4, 8), (0, 4), (0, 8))
) + bytes(64)  # fmt: skip


def test_a_gguf_file_names_the_package_it_needs(tmp_path, monkeypatch, trillama):
    file = tmp_path / "x.gguf"
    file.write_bytes(GGUF)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(file)
    assert str(caught.value) == f"{file}: is a GGUF file, which needs the package gguf: pip install gguf"
    status, _, err = trillama("generate", "a", "--model", file)
    assert (status, err) == (2, f"trillama: error: {caught.value}\n")


def test_that_file_is_one_where_the_package_is(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(GGUF)
    metadata, tensors = read_gguf(tmp_path / "x.gguf")
    assert metadata == {"general.architecture": "llama"}
    assert tensors["t"].shape == (4,)


def test_a_folder_needs_no_gguf(tiny_folder, monkeypatch, trillama):
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, out, err = trillama("generate", "the capital", "--model", tiny_folder, "--max-new-tokens", 2)
    assert status == 0, err
    monkeypatch.setattr(cli, "_version", lambda name: None if name == "gguf" else "1")
    status, out, err = trillama("doctor")
    assert (status, err) == (0, "")
    assert "gguf MISSING" in out


# --- Triton's interpreter --------------------------------------------------------------------------------------------


@pytest.fixture
def unwilling(monkeypatch):
    """An interpreter like that of Triton 3.6 beside numpy 2.4 or later."""

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments):
                raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

            return launch

    dispatch.interpreter_obstacle.cache_clear()
    monkeypatch.setattr(dispatch, "_probe", Kernel())
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    yield
    dispatch.interpreter_obstacle.cache_clear()


def test_an_interpreter_that_fails_is_named(unwilling):
    pytest.importorskip("triton")
    import numpy
    import triton

    with use_backend("triton"), pytest.raises(RuntimeError) as caught:
        rms_norm(torch.ones(2, 4), None)
    text = str(caught.value)
    assert text.startswith(f"backend 'triton' was asked for, but the interpreter of Triton {triton.__version__} fails with numpy ")
    assert numpy.__version__ in text
    assert "only 0-dimensional arrays" in text
    assert text.count("\n") == 0
    with use_backend("auto"):
        assert rms_norm(torch.ones(2, 4), None).shape == (2, 4)


def test_the_probe_is_right_about_this_interpreter():
    """Where it finds nothing a kernel with a loop runs, and where it does one fails for that reason."""
    if not dispatch.INTERPRETED:
        pytest.skip("kernels are compiled here")
    x = torch.ones(3, 8, requires_grad=True)
    obstacle = dispatch.interpreter_obstacle()
    if obstacle is None:
        with use_backend("triton"):
            rms_norm(x, None).sum().backward()
        assert x.grad.shape == x.shape
        return
    from triton.runtime.errors import InterpreterError

    with pytest.raises(InterpreterError, match="0-dimensional"):
        dispatch._probe[(1,)](1)
