"""The package as a user gets it: what is installed, and what importing it does not do."""

import inspect
import re
import shutil
import subprocess
import sys
import textwrap
import typing
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.host
ROOT = Path(__file__).parent.parent


def python(code, *, path=None, cwd=None, **environment):
    """The output of `code` in a fresh interpreter, in a directory that is not the repository."""
    import os

    env = {**os.environ, **environment}
    env.pop("TRITON_INTERPRET", None)
    env.pop("PYTHONPATH", None)
    if path:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which a wheel of this tree was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "model", "bench"):  # as pip builds in it
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_wheel_holds_the_namespace_and_nothing_else(installed):
    assert sorted(p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")) == ["bin", "trillama"]
    assert sorted(p.name for p in (installed / "trillama").iterdir() if p.name != "__pycache__") == ["bench", "kernels", "model"]
    for folder in ("kernels", "kernels/compat", "model", "bench"):
        shipped = {p.name for p in (installed / "trillama" / folder).glob("*.py")}
        assert shipped == {p.name for p in (ROOT / folder).glob("*.py")}
    assert list(installed.glob("trillama-*.dist-info/licenses/LICENSE"))
    assert all((installed / "trillama" / folder / "py.typed").is_file() for folder in ("kernels", "model", "bench"))


def test_what_the_wheel_says_of_itself(installed):
    (package,) = metadata.distributions(name="trillama", path=[str(installed)])
    said = package.metadata
    assert (said["Name"], said["License-Expression"], said["Author"]) == ("trillama", "Apache-2.0", "The trillama authors")
    assert said["Requires-Python"] == ">=3.10"
    assert said["Description-Content-Type"] == "text/markdown"
    description = said["Description"] or said.get_payload()
    assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "flash-attention" in said["Keywords"]
    classifiers = said.get_all("Classifier")
    assert {"Typing :: Typed", *(f"Programming Language :: Python :: 3.{n}" for n in range(10, 14))} <= set(classifiers)
    assert not any(c.startswith("License ::") for c in classifiers)  # of which PyPI wants none beside an expression
    assert package.version == _stated_version()


def _stated_version():
    return re.search(r'version="(.+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]


def test_one_version(installed, tmp_path):
    """As installed, and from a checkout that is not: with what setup.py says, whatever else is installed."""
    code = """
        import trillama.kernels as k
        try:
            k.versions
        except AttributeError as error:
            assert str(error) == "module 'trillama.kernels' has no attribute 'versions'"
            print(k.__version__)
    """
    assert python(code, path=installed, cwd=tmp_path) == _stated_version()
    checkout = tmp_path / "checkout"
    (checkout / "trillama").mkdir(parents=True)
    (checkout / "trillama" / "kernels").symlink_to(checkout / "kernels")
    (checkout / "kernels").symlink_to(ROOT / "kernels")
    assert python(code, path=checkout, cwd=tmp_path) == _stated_version()
    for file in ("CHANGELOG.md", "CITATION.cff"):
        assert _stated_version() in (ROOT / file).read_text(encoding="utf-8"), file


def test_the_source_distribution_has_everything():
    """Every file of the repository is Python in a package, or named in MANIFEST.in."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("no repository")
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    named = {name for line in re.findall(r"^include (.*)$", manifest, re.M) for name in line.split()}
    assert named <= set(tracked)
    by_themselves = {"README.md", "LICENSE", "setup.py", "pyproject.toml", "MANIFEST.in", ".gitignore"}
    packaged = re.compile(r"(kernels|model|bench)/.*(\.py|py\.typed)|docs/.*\.(md|svg)|tests/.*|bench/results/.*")
    assert {name for name in tracked if not packaged.fullmatch(name)} <= named | by_themselves


def test_public_functions_are_annotated():
    """All parameters and the result, with what `typing.get_type_hints` can resolve."""
    import trillama.model
    from trillama.kernels import reference
    from trillama.kernels.compat import flash_attn
    from trillama.model import parallel

    modules = [trillama.kernels, trillama.model, reference, flash_attn]
    public = [getattr(module, name) for module in modules for name in module.__all__] + [parallel.join]
    if adapter := optional("trillama.kernels.compat.transformers"):
        public += [getattr(adapter, name) for name in adapter.__all__]
    checked = 0
    for thing in public:
        functions = [thing]
        if inspect.isclass(thing):
            functions = [inspect.unwrap(f) for n, f in vars(thing).items() if callable(f) and n in PUBLIC_METHODS]
        for function in filter(callable, functions):
            hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
            assert {*parameters, "return"} - {"self", "cls"} <= set(hints), function
            checked += 1
    assert checked > 45


PUBLIC_METHODS = ("__init__", "forward", "to", "dequantize", "encode", "decode", "apply_chat_template")


def optional(name):
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        return None


def test_works_from_the_wheel_in_any_directory(installed, tmp_path):
    code = """
        import torch, trillama.kernels, trillama.model, trillama.bench
        print(trillama.kernels.__file__)
        print(trillama.kernels.rms_norm(torch.ones(2, 4), None).sum().item())
    """
    file, total = python(code, path=installed, cwd=tmp_path).split("\n")
    assert Path(file).is_relative_to(installed)
    assert float(total) == pytest.approx(8, abs=1e-4)


def test_importing_touches_neither_driver_nor_compiler(tmp_path):
    """No GPU is asked for, nothing is compiled or tuned, and Triton, transformers and matplotlib stay out until they are used."""
    code = """
        import sys, torch
        def refuse(*a, **k): raise AssertionError("importing asked for a GPU")
        torch.cuda.is_available = torch.cuda.current_device = torch.cuda.get_device_properties = refuse
        torch.cuda.get_device_capability = torch.cuda.init = torch.cuda._lazy_init = refuse
        import trillama.kernels, trillama.model
        if "triton" in sys.modules:
            import triton
            driver = triton.runtime.driver
            assert driver.__dict__.get("_active") is None and driver.__dict__.get("active") is None
        print(sorted(m for m in ("transformers", "matplotlib", "gguf", "pytest") if m in sys.modules))
    """
    assert python(code, cwd=tmp_path) == "[]"


def test_works_without_triton(tmp_path):
    """On macOS and Windows there is no Triton: the reference path answers, and asking for the kernels says what is missing."""
    code = """
        import sys
        sys.modules["triton"] = None
        import torch, trillama.kernels as K, trillama.model
        x, w = torch.randn(2, 3, 4, 8), torch.randn(8)
        cos, sin = K.rope_tables(10000.0, 8, 16)
        q, k = K.apply_rope(x, x[:, :1], cos, sin)
        print(K.flash_attention(q, k, k).shape == x.shape, K.swiglu(x, x).shape == x.shape, K.rms_norm(x, w).shape == x.shape)
        try:
            with K.use_backend("triton"):
                K.rms_norm(x, w)
        except RuntimeError as error:
            print(error)
    """
    first, second = python(code, cwd=tmp_path).split("\n")
    assert first == "True True True"
    assert second == "backend 'triton' was asked for, but Triton is not installed"


@pytest.mark.slow
def test_transformers_works_beside_it(tmp_path):
    """Hugging Face has a package called `kernels`, which transformers imports: ours must not stand in its way."""
    pytest.importorskip("transformers")
    code = """
        import importlib.util, trillama.kernels, transformers
        from transformers import LlamaConfig, LlamaForCausalLM
        spec = importlib.util.find_spec("kernels")
        print(spec is None or "trillama" not in (spec.origin or ""))
        config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        print(type(LlamaForCausalLM(config)).__name__)
    """
    assert python(code, cwd=tmp_path).split("\n") == ["True", "LlamaForCausalLM"]


@pytest.mark.slow
def test_backend_is_chosen_by_environment_and_by_call(tmp_path):
    code = """
        import torch, trillama.kernels as K
        from trillama.kernels.dispatch import backend
        print(backend())
        with K.use_backend("auto"):
            print(backend())
        K.use_backend("triton")
        print(backend())
        for call in (lambda: K.rms_norm(torch.ones(1, 2), None), lambda: K.use_backend("cuda")):
            try:
                call()
            except (RuntimeError, ValueError) as error:
                print(error)
    """
    assert python(code, cwd=tmp_path, TRILLAMA_BACKEND="reference").split("\n") == [
        "reference", "auto", "triton",
        "backend 'triton' was asked for, but this is a cpu tensor, which Triton takes only under TRITON_INTERPRET=1",
        "backend is 'cuda', expected one of auto, triton, reference",
    ]  # fmt: skip
    code = "import torch, trillama.kernels as K\ntry: K.rms_norm(torch.ones(1, 2), None)\nexcept ValueError as e: print(e)"
    message = "TRILLAMA_BACKEND is 'cuda', expected one of auto, triton, reference"
    assert python(code, cwd=tmp_path, TRILLAMA_BACKEND="cuda") == message
