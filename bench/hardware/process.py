"""Jobs in processes of their own: what fails, crashes, hangs or takes all memory costs itself only, and is written down.

The parent writes a job a line, the worker answers with a line for each result and one at the end. A worker whose device can no
longer be trusted (an illegal address, a capture that failed) says so, ends, and another takes its place.
"""

import contextlib
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time

REHEARSE = "--rehearse"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


# --- the parent's side -----------------------------------------------------------------------------------------------


class Worker:
    """A process that does jobs one after the other; it is started with the first, and again after it has ended."""

    def __init__(self, log, rehearse=False, alone=True):
        """log: a file for what the worker and its libraries print. alone: False where others compile on the same cores."""
        self.log, self.alone, self.process = log, alone, None
        self.flags = [REHEARSE] if rehearse else []

    def start(self):
        command = [sys.executable, "-m", "trillama.bench.hardware", "--worker", *self.flags]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        environment = dict(os.environ) if self.alone else {**os.environ, **ONE_THREAD}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, env=environment, **pipes)

    def do(self, module, action, work, limit, note):
        """Runs one job, a function of a module; note(result) is called with each of its results. Returns (status, error): "ok" and
        None, or "failed", "out of memory", "crashed" or "hung" and a line that says how."""
        if self.process is None:
            self.start()
        late = threading.Event()

        def stop():
            late.set()
            self.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            self.process.stdin.write(json.dumps({"module": module, "action": action, "work": work}) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                answer = json.loads(line)
                if "status" not in answer:
                    note(answer["result"])
                    continue
                if answer["ends"]:
                    self.close()
                return answer["status"], answer["error"]
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        code = self.close()
        if late.is_set():
            return "hung", f"no end after {limit:.0f} s"
        return "crashed", f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it has started, too

    def close(self):
        """Ends the process; returns its exit status."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            code = process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        process.stdout.close()
        return code


def side_by_side(tasks, workers, log, rehearse, until, note, end):
    """Does tasks (key, module, action, work, limit) on so many workers. note(key, result), end(key, status, error, seconds): called
    for each, one at a time. What has not begun by `until` (time.monotonic) is "left out"."""
    waiting, lock = queue.SimpleQueue(), threading.Lock()
    for task in tasks:
        waiting.put(task)

    def work_on():
        worker = Worker(log, rehearse, alone=False)
        try:
            while True:
                try:
                    key, module, action, work, limit = waiting.get_nowait()
                except queue.Empty:
                    return

                def told(result, key=key):
                    with lock:
                        note(key, result)

                start = time.monotonic()
                outcome = ("left out", "no time was left")
                if start < until:
                    outcome = worker.do(module, action, work, min(limit, until + 10 - start), told)
                with lock:
                    end(key, *outcome, time.monotonic() - start)
        finally:
            worker.close()

    threads = [threading.Thread(target=work_on) for _ in range(max(1, min(workers, len(tasks))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- the worker's side -----------------------------------------------------------------------------------------------


def serve(rehearse):
    """Reads jobs from stdin until it is closed. Whatever else prints here goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    with contextlib.ExitStack() as stack:
        if rehearse:
            from .rehearsal import pretend

            stack.enter_context(pretend())
        for line in sys.stdin:
            job = json.loads(line)
            print(f"--- {job['module']} {job['action']} {job['work']}", file=sys.stderr, flush=True)
            status, error = attempt(job, lambda result: say(result=result))
            ends = lost()
            say(status=status, error=error or ends, ends=bool(ends))
            if ends:
                os._exit(0)  # a lost device makes destructors hang or crash


def attempt(job, note):
    """(status, error) of a job; each result that it yields is noted."""
    import traceback

    import torch

    try:
        for result in getattr(importlib.import_module(job["module"]), job["action"])(**job["work"]) or ():
            note(result)
        torch.cuda.synchronize()
        return "ok", None
    except torch.cuda.OutOfMemoryError as error:
        return "out of memory", first_line(error)
    except Exception as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "trillama" in f.filename or "site-packages" not in f.filename]
        where = (own or frames)[-1]
        return "failed", f"{first_line(error)} ({os.path.basename(where.filename)}:{where.lineno})"
    finally:
        gc.collect()


def first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def lost():
    """Why this process can do nothing more on its device, if so."""
    import torch

    from ..timing import Captures

    if Captures.broken:
        return f"a capture failed: {Captures.broken}"
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return first_line(error)
    return None
