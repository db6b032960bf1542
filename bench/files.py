"""Files that a command is told to write: refused before anything is measured, and whole whenever the command ends."""

import errno
import os
from pathlib import Path

from ..model.files import naming

FIXED = errno.EACCES, errno.EPERM, errno.EBUSY  # a folder in which nothing may be made, a file that is a container's mount


def check(option, file):
    """Raises ValueError where the file that the option names cannot be written. One that is there stays as it is."""
    there = os.path.exists(file)
    if there and not os.path.isfile(file) and not os.path.isdir(file):
        return  # a pipe, whose reader would take this for the end of it, or a device
    try:
        open(file, "ab").close()
        if not there:
            os.unlink(os.path.realpath(file))
    except OSError as error:
        raise ValueError(f"{option} is {file}, expected a file that can be written: {error.strerror}") from None


def rewrite(file, text):
    """Puts the text in the place of the file in one step: whoever reads it or ends this process finds all of the old or the new.
    A pipe or a device is written to. An OSError names the file."""
    file = Path(file)
    with naming(file):
        if file.exists() and not file.is_file():
            file.write_text(text, encoding="utf-8")
        else:
            _replace(Path(os.path.realpath(file)), text)  # of a link, what it points to


def _replace(file, text):
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        if error.errno not in FIXED:
            raise
        file.write_text(text, encoding="utf-8")
    finally:
        if partial.exists():
            partial.unlink()
