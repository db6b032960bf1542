"""Tile sizes by architecture, head size and dtype: the only place that knows GPUs.

Every entry compiles without register spills and within its architecture's shared memory (tests/test_compiled.py holds them to
it). Nothing here was timed: among the configurations that fit, the one with the better instruction mix was taken (bench/LOG.md).
"""

from dataclasses import dataclass

from .dispatch import next_power_of_2


@dataclass(frozen=True)
class Rows:
    """A tile of whole rows (block_rows x block_n), or one row walked in steps of block_n where it does not fit in registers."""

    block_rows: int
    block_n: int
    warps: int


def rows(n, itemsize, tensors=1):
    """Row kernels that hold `tensors` rows of n elements at once.

    A thread keeps 64 bytes of each row: four 128-bit accesses in flight, few enough registers for full occupancy, and the
    shuffles of the reduction spread over many elements. Short rows share a program, so that a warp owns whole rows.
    """
    block_n = next_power_of_2(n)
    per_thread = 64 // itemsize
    widest = (65536 if itemsize == 2 else 32768) // (2 if tensors == 1 else 4)
    if block_n > widest:  # a held row would spill
        return Rows(1, 8192, 8)
    warps = max(1, min(32, block_n // (32 * per_thread)))
    if warps >= 4:
        return Rows(1, block_n, warps)
    return Rows(max(1, 4 * 32 * per_thread // block_n), block_n, 4)


def programs(arch):
    """Programs among which a reduction over rows is divided: a few per multiprocessor. Fixed by the architecture alone, so that
    the same input gives the same bits."""
    return {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}.get(arch, 128) * 2
