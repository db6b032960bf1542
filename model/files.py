"""A model's files: what checkpoints, tokenizers and those who write them share.

The files come from strangers. Whatever is wrong with one ends in a CheckpointError of one line, after bounded time and memory.
"""

import contextlib
import json
import mmap
import os
import reprlib
from pathlib import Path

LARGEST_JSON = 256 << 20  # the largest tokenizer.json known has 35 MB


class CheckpointError(ValueError):
    """One line: the file and the field in it, what it was and what was expected."""


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100


def brief(value):
    """A value from a file as it may stand in an error: on one line and of limited length."""
    return _repr.repr(value)


def read_json(path):
    """The object in a JSON file."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path}: has {size} bytes, expected at most {LARGEST_JSON}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is not JSON: {brief(str(error))}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is {brief(value)}, expected a JSON object")
    return value


def mapped(file, offset, size):
    """The bytes [offset, offset + size) of an open file as a memoryview. The pages are read on use, private to the process, and
    go when the last view of them does."""
    if size == 0:
        return memoryview(b"")
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(file.fileno(), offset + size - start, offset=start, access=mmap.ACCESS_COPY)
    return memoryview(pages)[offset - start :]


def check_new_folder(folder):
    """Raises a ValueError where a folder of that name cannot be made, or is there."""
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder}: exists, expected the name of a new folder")
    place = next(place for place in folder.absolute().parents if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: cannot be made, {place} is {'not writable' if place.is_dir() else 'no folder'}")


@contextlib.contextmanager
def naming(file, advice=""):
    """Within the block an error of the system's names a file: that of a full disk knows none. advice: the end of the line."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # a line of our own
            raise
        raise OSError(f"{os.fsdecode(error.filename or file)}: {error.strerror}{advice}") from None
