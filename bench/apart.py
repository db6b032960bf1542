"""What may crash, hang or leave a GPU unusable runs in a process of its own and costs only itself.

Processes are forked from one that has done the imports and has never touched a GPU. Where `rehearse` is set, they do so on a
pretended one (`hardware.rehearsal`).
"""

import contextlib
import functools
import gc
import math
import multiprocessing.process
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback

JOB = "--- "  # begins the line of the log that names a job
PRELOADED = ("torch._dynamo", "triton", "trillama.kernels")  # imported before anything forks; none of them asks for a GPU


class Died(RuntimeError):
    """What ended a job before its end, in one line. status: "failed" by an exception, "out of memory", "crashed" or "hung"."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


def apart(function, *arguments, limit=60.0, rehearse=False):
    """Yields what the generator `function(*arguments)` yields, from a process of its own, which ends with it.

    The function is importable, arguments and values can be pickled. Raises Died where the function raises, where its process ends
    before it, and where `limit` seconds go by without a value.
    """
    worker = Worker(rehearse=rehearse)
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
        self.log, self.rehearse, self.alone = log, rehearse, alone
        self.process = self.connection = None

    def start(self):
        if self.log is None:
            handle, self.log = tempfile.mkstemp(suffix=".log")
            os.close(handle)
            self.own = self.log
        self.connection, theirs = _context().Pipe()
        with theirs, _children:
            process = _context().Process(target=_serve, args=(theirs, str(self.log), self.rehearse, self.alone), daemon=True)
            process.start()
        self.process = process

    def values(self, function, arguments, limit, until=math.inf):
        """Yields what function(*arguments) yields there; raises Died where it does not come to its end, hangs for limit s, or goes
        on at `until` (time.monotonic), which leaves out the rest of it."""
        if self.process is not None and not self.process.is_alive():
            self.end()  # killed from outside between two jobs: no fault of this one
        if self.process is None:
            try:
                self.start()
            except Exception as error:  # no memory, no file handle, no server to fork from: the next job may have more luck
                self.end()
                shorter = "; TMPDIR names a folder with a shorter one" if "AF_UNIX path too long" in str(error) else ""
                raise Died("crashed", f"no process could be started: {one_line(error)}{shorter}") from None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who has died meanwhile says so below
            self.connection.send((function, arguments))
        while True:
            left = until - time.monotonic()
            if not self.connection.poll(max(0, min(limit, left))):
                self.end()
                if left <= limit:
                    raise Died("left out", "no time was left for its end")
                raise Died("hung", f"no answer within {limit:.0f} s")
            try:
                what, value = self.connection.recv()
            except (EOFError, OSError):
                with _children:
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

    def do(self, function, arguments, limit, note, until=math.inf):
        """The same with note(value) for each value: returns (status, error), "ok" and None if all went well. It never raises: what
        goes wrong on this side, in `note` or with a value, costs the job as well."""
        try:
            for value in self.values(function, arguments, limit, until):
                note(value)
        except Died as death:
            return death.status, str(death)
        except Exception as error:
            traceback.print_exc()
            self.end()  # it may be in the middle of the job
            return "failed", one_line(error)
        return "ok", None

    def last_words(self):
        """The last line that was printed before a crash, if it was for this process alone."""
        if getattr(self, "own", None) is None:
            return ""
        with open(self.own, errors="replace") as file:
            said = [line.strip() for line in file if line.strip() and not line.startswith(JOB)]
        return said[-1] if said else ""

    def kill(self):
        """Kills the process, and what it has started, wherever it is; `end` is for the thread that works with it."""
        process = self.process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()

    def end(self):
        """Ends the process, and what it has started."""
        self.kill()
        if self.process is not None:
            process, self.process = self.process, None
            process.join(10)
            if process.exitcode is None:  # one that waits for a GPU may outlive even that: Python would wait for it at its own end
                multiprocessing.process._children.discard(process)
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if getattr(self, "own", None) is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.own)
            self.own = self.log = None


def side_by_side(tasks, workers, log, rehearse, until, note, end):
    """Does tasks (key, function, arguments, limit) on so many workers. note(key, value), end(key, status, error, seconds): called
    for each, one at a time. What has not begun by `until` (time.monotonic) is "left out", as is the rest of what goes on 10 s
    later. An exception here, such as an interruption, ends all of it: nothing is noted any more."""
    waiting, lock, over = queue.SimpleQueue(), threading.Lock(), threading.Event()
    for task in tasks:
        waiting.put(task)

    def tell(call, *arguments):
        with lock:
            if not over.is_set():
                call(*arguments)

    def work_on(worker):
        try:
            while not over.is_set():
                try:
                    key, function, arguments, limit = waiting.get_nowait()
                except queue.Empty:
                    return
                start = time.monotonic()
                outcome = ("left out", "no time was left")
                if start < until:
                    outcome = worker.do(function, arguments, limit, functools.partial(tell, note, key), until + 10)
                tell(end, key, *outcome, time.monotonic() - start)
        finally:
            worker.end()

    crew = [Worker(log, rehearse, alone=False) for _ in range(max(1, min(workers, len(tasks))))]
    threads = [threading.Thread(target=work_on, args=(worker,), daemon=True) for worker in crew]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(1)  # a signal that another thread was given is seen in between
    finally:
        with lock:
            over.set()
        for worker in crew:
            worker.kill()
        patience = time.monotonic() + 5
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0, patience - time.monotonic()))


# Starting a process looks after all that have ended, and takes from them the status that their own thread waits for.
_children = threading.Lock()


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
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
    import torch
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # it was imported before: the environment says nothing to it
    with contextlib.ExitStack() as stack:
        if not alone:
            torch.set_num_threads(1)
        if rehearse:
            from .hardware.rehearsal import pretend

            stack.enter_context(pretend())
        while True:
            try:
                function, arguments = connection.recv()
            except EOFError:
                return
            with contextlib.suppress(OSError):  # a full disk
                print(f"{JOB}{function.__module__}.{function.__name__} {arguments}", file=sys.stderr, flush=True)
            status, error = _attempt(function, arguments, lambda value: connection.send(("value", value)))
            with contextlib.suppress(OSError):
                sys.stdout.flush()  # what a job has printed stands in the log before what the next one does
            lost = _lost(status)
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


def _lost(status):
    """Why this process can do nothing more on its GPU, if so."""
    import torch

    from .timing import Captures

    if torch.cuda.is_initialized() and not Captures.broken:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            return one_line(error)
        if status == "failed":
            Captures.look()
    return f"a capture failed: {Captures.broken}" if Captures.broken else None
