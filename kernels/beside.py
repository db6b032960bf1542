"""A command that runs beside this process and outlives it, once for all who want it; how it ended is noted in a file.

    note        "done", or why the command failed, in one line: it is not tried again
    note.lock   locked while somebody is at it; the system unlocks it, whatever ends that process

Run as a script this file is the process that watches the command: it needs nothing but the standard library.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 900  # seconds after which the command is ended
DONE = "done"


def read(note):
    try:
        return note.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def write(note, text):
    """The whole text or none of it, whoever reads meanwhile."""
    part = note.with_suffix(f".{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, note)


@contextlib.contextmanager
def lock(note, patience=0.0):
    """Whether this process now is the one that is at it, for which it waits up to `patience` seconds. OSError without a place."""
    note.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    with open(note.with_suffix(".lock"), "ab") as file:
        while not (mine := _locked(file)) and time.monotonic() < until:
            time.sleep(0.05)
        yield mine


def _locked(file):
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: rather twice than never
        pass
    return True


def interpreter():
    """The command that starts this Python, None where that is not known: an application that is frozen, or has Python within."""
    name = os.path.basename(sys.executable or "").lower()
    return sys.executable if name.startswith(("python", "pypy")) and not getattr(sys, "frozen", False) else None


def start(note, command):
    """Runs the command (a list) and notes its end; returns the process that watches it.

    It has no terminal, so that Ctrl-C and a closed window are not for it, and none of our files: who reads our output does not wait
    for it. It yields to what else wants the processor.
    """
    if os.name == "nt":
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.BELOW_NORMAL_PRIORITY_CLASS
        apart = {"creationflags": flags}
    else:
        apart = {"start_new_session": True}
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen([interpreter(), __file__, str(note), *command], cwd=note.parent, **nowhere, **apart)


def watch(note, command):
    with lock(note, 2.0) as mine:  # patient enough for those who only look whether it is free
        if not mine or read(note):
            return
        outcome = _outcome(command)
        if outcome:
            write(note, outcome)


def _outcome(command):
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=LIMIT, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT} s"
    except OSError as error:
        return f"{command[0]} cannot be started: {error}"
    if not done.returncode:
        return DONE
    if -done.returncode in [getattr(signal, name, None) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")]:
        return None  # somebody's decision, or for want of memory: no fault of the command
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit status {done.returncode}")


def yield_():
    """Leaves the processor to others: processes as such, and where Linux shares it between sessions this session."""
    if hasattr(os, "nice"):
        os.nice(10)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
        file.write("10")


if __name__ == "__main__":
    yield_()
    watch(Path(sys.argv[1]), sys.argv[2:])
