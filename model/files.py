"""Reading a model's files: what checkpoints and tokenizers share.

The files come from strangers. Whatever is wrong with one ends in a CheckpointError of one line, after bounded time and memory.
"""

import json
import mmap
import reprlib

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
