"""What may crash, hang or leave a GPU unusable runs in a process of its own and costs only itself."""

import functools
import multiprocessing
import os
import signal
import tempfile


class Died(RuntimeError):
    """What ended the process, in one line."""


def apart(function, *arguments, limit=60.0):
    """Yields what the generator `function(*arguments)` yields, from a process of its own, which ends with the last value or with
    the generator.

    The function is importable, arguments and values can be pickled. Raises Died where the function raises, where its process
    ends before it, and where `limit` seconds go by without a value. Processes are forked from one that has done the imports.
    """
    with tempfile.NamedTemporaryFile() as log:
        ours, theirs = _context().Pipe(duplex=False)
        process = _context().Process(target=_serve, args=(theirs, log.name, function, arguments), daemon=True)
        process.start()
        theirs.close()
        try:
            while True:
                if not ours.poll(limit):
                    raise Died(f"no answer within {limit:g} s")
                try:
                    what, value = ours.recv()
                except (EOFError, OSError):
                    process.join(10)
                    raise Died(_end(process.exitcode, log)) from None
                if what == "error":
                    raise Died(value)
                if what == "end":
                    return
                yield value
        finally:
            process.kill()
            process.join(10)  # one that waits for a GPU may outlive even that
            ours.close()


def one_line(error):
    """An exception as its type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].strip()}" if text else type(error).__name__


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "triton", "trillama.kernels"])
    return context


def _serve(connection, log, function, arguments):
    with open(log, "wb") as file:  # what compilers and drivers print as they end a process
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        for value in function(*arguments):
            connection.send(("value", value))
        connection.send(("end", None))
    except BaseException as error:
        connection.send(("error", one_line(error)))


def _end(status, log):
    """How a process ended, and the last line that it printed."""
    try:
        how = f"ended by {signal.Signals(-status).name}"
    except (TypeError, ValueError):
        how = f"ended with status {status}"
    lines = log.read().decode(errors="replace").strip().splitlines()
    return f"{how}: {lines[-1].strip()}" if lines else how
