"""What tests have done in processes of their own. For `bench.tune`: seconds by the tile that stands in the table, and faults at
some tiles. For `trillama doctor`: checks that go wrong."""

import os
import signal
import time

import torch
from trillama.kernels import tuning


def tile():
    return tuning.rows(576, 4)


def clock(c):
    return 1e-6 * tile().block_rows * tile().warps


def faulty(c):
    if tile().warps == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if tile().warps == 2:
        time.sleep(600)
    if tile().warps == 8:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has")
    return clock(c)


def nothing_works(c):
    os._exit(3)


def check(op, device):
    if op == "rms_norm":
        os.kill(os.getpid(), signal.SIGSEGV)
    if op == "swiglu":
        time.sleep(600)
    if op == "apply_rope":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
    yield "ok"


def check_of_a_wrong_kernel(op, device):
    """The op's own check, its kernel and what it returns off by a thousandth."""
    from trillama.bench import check
    from trillama.kernels import dispatch

    whole, calls = check.outcome, []

    def spoiled(c, device, change=lambda t: t):
        result = whole(c, device, change)
        if dispatch.backend() == "triton":
            calls.append(c)
            result = [t * (1 + 2e-3) if len(calls) == 2 and t.is_floating_point() else t for t in result]
        return result

    check.outcome = spoiled
    yield from check.check(op, device)
