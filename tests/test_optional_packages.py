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

# All that setup.py asks for but torch, pytest and numpy, and what tests look for beside it.
PACKAGES = (
    "transformers", "triton", "gguf", "numba", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "tqdm", "liger_kernel",
    "flash_attn", "matplotlib", "sentencepiece", "tiktoken", "accelerate", "pytest_benchmark", "pytest_timeout", "xdist",
)  # fmt: skip
NEEDED = ("triton", "safetensors", "tokenizers", "tqdm")  # by many files, which are skipped without them

COLLECT = """
import json, os, sys
import pytest, torch


class Without:
    def __init__(self, finder, packages):
        self.finder, self.packages = finder, packages

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.packages else self.finder.find_spec(name, path, target)


class Seen:
    def pytest_sessionfinish(self, session):
        self.files = sorted({item.path.name for item in session.items})


def collect(packages):
    assert not [name for name in sys.modules if name.partition(".")[0] in packages and not name.startswith("tqdm")]
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    sys.meta_path[:] = [Without(finder, packages) for finder in sys.meta_path]
    seen = Seen()
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    status = pytest.main([*options, sys.argv[1]], [seen])
    return status, getattr(seen, "files", [])


os.environ.update(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
for packages in sys.argv[2:]:
    sys.stdout.flush()
    if os.fork() == 0:
        said = os.dup(1)
        with open(f"{packages.replace(',', '-')[:40]}.txt", "w") as file:
            os.dup2(file.fileno(), 1)
            status, files = collect(packages.split(","))
            sys.stdout.flush()
            words = open(file.name).read()[-3000:] if status else ""
            os.write(said, json.dumps([packages, status, files, words]).encode() + b"\\n")
        os._exit(0)
    os.wait()
"""


def collected(folder, *without):
    """By packages, divided by commas: (status, files with tests, what pytest said if it failed) of collecting without them. One
    process imports what all need and forks for each."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-c", COLLECT, str(TESTS), *without]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return {packages: rest for packages, *rest in map(json.loads, done.stdout.splitlines())}


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the collecting process forks")


@pytest.mark.slow
@forks
def test_every_file_is_collected_without_all_that_few_need(tmp_path):
    packages = ",".join(package for package in PACKAGES if package not in NEEDED)
    status, files, said = collected(tmp_path, packages)[packages]
    assert status == 0, said
    assert {"test_attention.py", "test_rope.py", "test_generate.py", "test_cli.py"} <= set(files)


@forks
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_file_is_collected_without(tmp_path):
    found = collected(tmp_path, *PACKAGES)
    assert list(found) == list(PACKAGES)
    assert {package: said for package, (status, _, said) in found.items() if status} == {}
    for package, (_, files, _) in found.items():
        assert package in NEEDED or len(files) > 40, (package, files)


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
