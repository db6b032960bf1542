"""Jobs that go wrong in all the ways that a process can; test_hardware.py has workers do them."""

import os
import signal
import time

PARALLEL = False
LONG = 600  # seconds that a job hangs: who is back before that has not waited for it


def works(n=2):
    for i in range(n):
        yield {"i": i, "pid": os.getpid()}


def fails():
    yield {"i": 0}
    raise ValueError("no such thing\nand more")


def memory():
    import torch

    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


def dies():
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves():
    os._exit(7)


def hangs():
    yield {"i": 0}
    time.sleep(LONG)


def lingers():
    yield {"pid": os.getpid()}
    time.sleep(LONG)


def chatters():
    print("a library says something on stdout")
    os.write(1, b"and not by Python\n")
    yield {"i": 0}


def captures():
    import torch
    from trillama.bench import timing

    x = torch.ones(3, device="cuda")
    yield {"why": timing.measure(lambda: lambda: x.sum().item(), 12, 12).why}


def poisons():
    """What an illegal address leaves behind: every later call of the device fails."""
    import torch

    def synchronize(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.synchronize = synchronize
    yield {"i": 0}


def captures_elsewhere():
    """torch.compile's graph cannot be captured: nobody of ours notes it, but torch 2.11's allocator captures no more."""
    import torch

    def graph(*_, **__):
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    torch.cuda.graph = graph
    yield {"i": 0}
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def proves():
    """Cases of `right`: the second breaks all captures."""
    from trillama.bench.hardware import right

    def wrong():
        raise AssertionError("other values")

    yield from right.verdict("op", "wrong", "fp16", wrong, 0)
    yield from right.verdict("op", "breaks", "fp16", lambda: list(captures_elsewhere()), 0)
    yield from right.verdict("op", "behind it", "fp16", lambda: None, 0)


def slow(n, seconds):
    for i in range(n):
        time.sleep(seconds)
        yield {"i": i}


def threads():
    import torch._inductor.async_compile

    yield {"i": torch._inductor.async_compile.get_compile_threads()}


def profiles():
    from trillama.bench.hardware import decode, rehearsal

    rehearsal._Profile.events = lambda self: []
    yield from decode.run("kernels", shape="tiny", precision="bf16", context=20, steps=1)
