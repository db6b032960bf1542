"""What test_tune.py has `bench.tune` measure with, in processes of their own: seconds by the tile that stands in the table, and
faults at some tiles."""

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
