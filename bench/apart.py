"""What may crash, hang or leave a GPU unusable runs in a process of its own and costs only itself.

Processes are forked from one that has done the imports and has never touched a GPU. Where `rehearse` is set, they do so on a
pretended one (`hardware.rehearsal`).
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback

JOB = "--- "  # begins the line of the log that names a job


class Died(RuntimeError):
    """What ended a job before its end, in one line. status: "failed" by an exception, "out of memory", "crashed" or "hung"."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


def apart(function, *arguments, limit=60.0):
    """Yields what the generator `function(*arguments)` yields, from a process of its own, which ends with it.

    The function is importable, arguments and values can be pickled. Raises Died where the function raises, where its process ends
    before it, and where `limit` seconds go by without a value.
    """
    worker = Worker()
    try:
        yield from worker.values(function, arguments, limit)
    finally:
        worker.end()


# --- the parent's side -------------------------------------------------------------------------------------------------


class Worker:
    """A process that does jobs one after the other; it is started with the first, and again after it has ended. A process whose
    GPU can no longer be trusted (an illegal address, a capture that failed) ends with its job.

    log: the file to which goes what it and its libraries print. alone: False where others work on the same cores.
    """

    def __init__(self, log=None, rehearse=False, alone=True):
        self.log, self.rehearse, self.alone, self.process = log, rehearse, alone, None

    def start(self):
        if self.log is None:
            handle, self.log = tempfile.mkstemp(suffix=".log")
            os.close(handle)
            self.own = self.log
        self.connection, theirs = _context().Pipe()
        self.process = _context().Process(target=_serve, args=(theirs, str(self.log), self.rehearse, self.alone), daemon=True)
        self.process.start()
        theirs.close()

    def values(self, function, arguments, limit):
        """Yields what function(*arguments) yields there; raises Died where it does not come to its end, or hangs for limit s."""
        if self.process is not None and not self.process.is_alive():
            self.end()  # killed from outside between two jobs: no fault of this one
        if self.process is None:
            self.start()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who has died meanwhile says so below
            self.connection.send((function, arguments))
        while True:
            if not self.connection.poll(limit):
                self.end()
                raise Died("hung", f"no answer within {limit:.0f} s")
            try:
                what, value = self.connection.recv()
            except (EOFError, OSError):
                self.process.join(10)
                code, said = self.process.exitcode, self.last_words()
                self.end()
                raise Died("crashed", _how(code) + (f": {said}" if said else "")) from None
            if what == "value":
                yield value
                continue
            status, error, lost = value
            if lost:
                self.end()
            if status != "ok" or lost:
                raise Died(status, error or lost)
            return

    def do(self, function, arguments, limit, note):
        """The same with note(value) for each value: returns (status, error), "ok" and None if all went well."""
        try:
            for value in self.values(function, arguments, limit):
                note(value)
        except Died as death:
            return death.status, str(death)
        return "ok", None

    def last_words(self):
        """The last line that was printed before a crash, if it was for this process alone."""
        if getattr(self, "own", None) is None:
            return ""
        with open(self.own, errors="replace") as file:
            said = [line.strip() for line in file if line.strip() and not line.startswith(JOB)]
        return said[-1] if said else ""

    def end(self):
        """Ends the process, and what it has started."""
        if self.process is not None:
            process, self.process = self.process, None
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(10)  # one that waits for a GPU may outlive even that
            self.connection.close()
        if getattr(self, "own", None) is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.own)
            self.own = self.log = None


def side_by_side(tasks, workers, log, rehearse, until, note, end):
    """Does tasks (key, function, arguments, limit) on so many workers. note(key, value), end(key, status, error, seconds): called
    for each, one at a time. What has not begun by `until` (time.monotonic) is "left out"."""
    waiting, lock = queue.SimpleQueue(), threading.Lock()
    for task in tasks:
        waiting.put(task)

    def work_on():
        worker = Worker(log, rehearse, alone=False)
        try:
            while True:
                try:
                    key, function, arguments, limit = waiting.get_nowait()
                except queue.Empty:
                    return

                def told(value, key=key):
                    with lock:
                        note(key, value)

                start = time.monotonic()
                outcome = ("left out", "no time was left")
                if start < until:
                    outcome = worker.do(function, arguments, min(limit, until + 10 - start), told)
                with lock:
                    end(key, *outcome, time.monotonic() - start)
        finally:
            worker.end()

    threads = [threading.Thread(target=work_on, daemon=True) for _ in range(max(1, min(workers, len(tasks))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "triton", "trillama.kernels"])
    return context


def _how(code):
    try:
        return f"ended by {signal.Signals(-code).name}"
    except (TypeError, ValueError):
        return f"ended with status {code}"


# --- the worker's side -------------------------------------------------------------------------------------------------


def _serve(connection, log, rehearse, alone):
    os.setsid()  # so that what a job starts can be ended with it
    with open(log, "ab") as file:  # what compilers and drivers print as they end a process
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    with contextlib.ExitStack() as stack:
        if not alone:
            import torch

            torch.set_num_threads(1)
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        if rehearse:
            from .hardware.rehearsal import pretend

            stack.enter_context(pretend())
        while True:
            try:
                function, arguments = connection.recv()
            except EOFError:
                return
            print(f"{JOB}{function.__module__}.{function.__name__} {arguments}", file=sys.stderr, flush=True)
            status, error = _attempt(function, arguments, lambda value: connection.send(("value", value)))
            lost = _lost()
            connection.send(("end", (status, error, lost)))
            if lost:
                os._exit(0)  # what has lost its device hangs or crashes as it cleans up


def _attempt(function, arguments, note):
    """(status, error) of a job; each value that it yields is noted."""
    import torch

    try:
        for value in function(*arguments) or ():
            note(value)
        return "ok", None
    except torch.cuda.OutOfMemoryError as error:
        return "out of memory", one_line(error)
    except BaseException as error:
        traceback.print_exc()
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
        own = [f for f in frames if "trillama" in f.filename or "site-packages" not in f.filename]
        where = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
        return "failed", one_line(error) + where
    finally:
        gc.collect()


def one_line(error):
    """An exception as its type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].strip()}"[:300] if text else type(error).__name__


def _lost():
    """Why this process can do nothing more on its GPU, if so."""
    import torch

    from .timing import Captures

    if Captures.broken:
        return f"a capture failed: {Captures.broken}"
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            return one_line(error)
    return None
