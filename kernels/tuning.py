"""Tile sizes by architecture, head size and dtype: the only place that knows GPUs.

Every entry compiles without register spills and within its architecture's shared memory (tests/test_compiled.py holds them to
it). Nothing here was timed: among the configurations that fit, the one with the better instruction mix was taken (bench/LOG.md).
"""

import dataclasses
import functools
import json
import os
import re
from dataclasses import dataclass

from .dispatch import INTERPRETED, next_power_of_2, triton

# The version that compiles, where an entry depends on it: from one source they make code of different sizes.
TRITON = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2]) if triton else (0, 0)


@functools.cache
def measured():
    """What `python -m trillama.bench.tune` measured on this machine, if TRILLAMA_TUNING names its file: the fields of entries, by
    (function, arguments)."""
    file = os.environ.get("TRILLAMA_TUNING")
    if not file:
        return {}
    try:
        with open(file, encoding="utf-8") as opened:
            return {(e["function"], tuple(e["arguments"])): e["entry"] for e in json.load(opened)["entries"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"TRILLAMA_TUNING names {file}, expected a file of trillama.bench.tune: {error!r}") from None


def tunable(choose):
    """The entry that the function chooses, remembered (it is asked for at every launch), unless a measured one takes its place."""

    @functools.cache
    @functools.wraps(choose)
    def entry(*arguments, **named):
        chosen = choose(*arguments, **named)
        fields = measured().get((choose.__name__, (*arguments, *named.values())))
        if fields is None:
            return chosen
        if isinstance(chosen, tuple):  # one entry a kernel
            return tuple(dataclasses.replace(c, **f) for c, f in zip(chosen, fields))
        return dataclasses.replace(chosen, **fields)

    return entry


@dataclass(frozen=True)
class Rows:
    """A tile of whole rows (block_rows x block_n), or one row walked in steps of block_n where it does not fit in registers."""

    block_rows: int
    block_n: int
    warps: int


@tunable
def rows(n, itemsize, tensors=1):
    """Row kernels that hold `tensors` rows of n elements at once.

    A thread keeps 64 bytes of each row: four 128-bit accesses in flight, few enough registers for full occupancy, and the
    shuffles of the reduction spread over many elements. Short rows share a program, so that a warp owns whole rows.
    """
    block_n = next_power_of_2(n)
    per_thread = 64 // itemsize
    widest = 65536 // itemsize if tensors == 1 else 8192
    if block_n > widest:  # a held row would spill
        return Rows(1, 8192 if tensors == 1 else 4096, 8)
    warps = max(1, min(32, block_n // (32 * per_thread)))
    if (block_n, itemsize, tensors) == (8192, 4, 1):  # of 16 warps ptxas makes three programs a multiprocessor, and spills for it
        warps = 32
    if warps >= 4:
        return Rows(1, block_n, warps)
    return Rows(max(1, 4 * 32 * per_thread // block_n), block_n, 4)


def programs(arch):
    """Programs among which a reduction over rows is divided: a few per multiprocessor. Fixed by the architecture alone, so that
    the same input gives the same bits."""
    return {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}.get(arch, 128) * 2


@dataclass(frozen=True)
class Rope:
    """A step of block_h heads of block_s tokens, block_half pairs and block_rest untouched elements of each."""

    block_s: int
    block_h: int
    block_half: int
    block_rest: int
    warps: int


@tunable
def rope(half, rest, common, itemsize):
    """half: pairs of a head; rest: elements that pass through; common: greatest common divisor of the numbers of heads.

    A thread keeps one 128-bit piece of each half of a head. A step takes a power of two of heads that divides both numbers of
    heads, so that no thread idles on a missing head; the rest of the program goes to further tokens.
    """
    block_half = next_power_of_2(half)
    lanes = max(1, block_half * itemsize // 16)
    block_h = min(common & -common, max(1, 32 // lanes))
    warps = 1
    return Rope(max(1, warps * 32 // (lanes * block_h)), block_h, block_half, next_power_of_2(rest) if rest else 0, warps)


@tunable
def elementwise(n, itemsize):
    """Elementwise kernels over rows of n: a thread computes two 128-bit pieces, a program of 4 warps walks no further."""
    size = 2 * 4 * 32 * 16 // itemsize
    exact = n & -n  # the largest power of two that divides n: no thread idles behind the end of the row
    block_n = min(size, exact if exact >= size // 8 else next_power_of_2(n))
    return Rows(size // block_n, block_n, 4)


@dataclass(frozen=True)
class Decode:
    """block_m packed query rows against block_n keys at a time; a row's keys are cut every `split` keys, or into max_splits
    longer parts; block_e elements of the output are combined at a time. registers: a limit, None is ptxas' own."""

    block_m: int
    block_n: int
    block_d: int
    block_e: int
    split: int
    max_splits: int
    warps: int
    stages: int
    registers: int | None = None


@tunable
def decode(arch, head_dim, itemsize, rows):
    """`rows`: the query heads of a group times the new tokens.

    A step of 64 keys of 256 bytes fills two buffers of 32 KiB while a third is in use: one multiprocessor's share of the
    bandwidth-latency product several times over. 512 keys a split keep the float32 partials of a group of eight at 3 % of the
    cache's bytes; 64 splits of eight heads are several programs for every multiprocessor.
    """
    block_d = max(16, next_power_of_2(head_dim))
    # float32 products are made of scalar multiplications, which keep more in registers
    block_m = min(64 if itemsize == 2 and block_d <= 128 else 32, max(16, next_power_of_2(rows)))
    block_n = max(16, min(64, 64 * 256 // (block_d * itemsize)))
    if itemsize == 4 and block_m == 32:
        block_n = 16
    warps = 8 if block_m * block_d > 64 * 128 or itemsize == 4 else 4
    stages = 3 if arch in (80, 90, 100) else 2  # elsewhere a block has 99 KiB of shared memory
    # Shared memory leaves room for two programs; yet ptxas spills a few registers rather than pass the 128 that would leave four.
    registers = 255 if warps == 4 and block_d > 64 else None
    return Decode(block_m, block_n, block_d, min(512, next_power_of_2(rows * head_dim)), 512, 64, warps, stages, registers)


@dataclass(frozen=True)
class Attention:
    """A tile of block_m queries that walks the keys block_n at a time, `stages` tiles of keys and values in flight, read through
    tensor descriptors or pointers. In the kernel for dk and dv, edge_stages: those at the edges of the mask, None: as elsewhere;
    gather: a few threads copy the statistics of a tile, not each thread all that it needs of them (attention._dkv_steps).
    registers: a limit, None is ptxas' own."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False
    edge_stages: int | None = None
    gather: bool = False
    registers: int | None = None


def block_d(head_dim):
    return max(16, next_power_of_2(head_dim))


@tunable
def attention(arch, head_dim, itemsize):
    """The forward pass of attention."""
    if itemsize == 4:
        return Attention(32, 32, 4, 2) if head_dim <= 64 else Attention(32 if head_dim <= 128 else 16, 16, 8, 2)
    described = arch >= 90 and (arch < 120 or TRITON >= (3, 7))  # Triton 3.6 spills what it makes of them on sm_120
    if head_dim <= 64:
        return Attention(128, 64, 4, 3, described)
    if head_dim <= 128:
        if arch in (90, 100):
            return Attention(128, 128, 8, 2, True)
        # 64 keys at a time, ptxas 12.8 has two or three registers too few
        return Attention(128, 32, 8, 2) if TRITON < (3, 7) else Attention(128, 64, 8, 2, described)
    return Attention(64, 32, 4, 2, True) if described else Attention(64, 16, 4, 2)


@tunable
def attention_backward(arch, head_dim, itemsize):
    """The backward pass: the kernel for dq, which walks the keys, and the one for dk and dv, which walks the queries."""
    if itemsize == 4:
        if head_dim <= 64:
            return Attention(32, 32, 4, 1), Attention(32, 32, 8 if arch in (86, 89) else 4, 1)  # of 4 warps ptxas spills there
        return Attention(16, 16, 8, 1), Attention(32 if head_dim <= 128 else 16, 16, 8, 1)
    edges = None if arch == 90 else 1  # one tile at a time: a loop so short, pipelined, costs too many registers
    gather = TRITON < (3, 7)  # later ones do so by themselves, but for a few registers
    # One program fills the shared memory of sm_100; yet ptxas spills there rather than pass the 128 registers that would leave two.
    registers = 255 if arch == 100 and head_dim > 64 else None
    if head_dim <= 64:
        return Attention(128, 64, 8, 2), Attention(64 if arch in (90, 100) else 32, 128, 8, 2, False, edges, gather)
    if head_dim <= 128:
        dq = Attention(128, 32, 8, 3) if arch < 90 else Attention(128, 64, 8, 2, registers=registers)
        # On sm_90 128 keys, so that queries are read half as often; they fit, in any version, by those few registers.
        if arch == 90:
            return dq, Attention(32, 128, 8, 3, False, 1, True)
        return dq, Attention(64, 64, 8, 2, False, edges, gather, registers)
    return Attention(64, 16 if arch in (86, 89, 120) else 32, 8, 2), Attention(32, 32, 8, 2, False, edges, gather)


def l2_bytes(arch):
    """The part of the L2 cache that keys and values may fill."""
    return {80: 24, 86: 4, 89: 48, 90: 32, 100: 64, 120: 64}.get(arch, 4) * 2**20


@dataclass(frozen=True)
class Linear:
    """block_n rows of a weight at a time, `slices` times block_k columns of them, against block_m rows of x; `stages` such tiles
    in flight."""

    block_m: int
    block_n: int
    block_k: int
    slices: int
    warps: int
    stages: int


@tunable
def linear(arch, columns, itemsize, swiglu, rows, group=None):
    """`columns` of the weight, whose elements have `itemsize` bytes, `rows` of x. group: of 4-bit weights, else None.

    16 rows, the least a tensor core takes, make the most programs. Each of the four warps takes its own slice of the columns. A
    tile has 1 KiB of a row where the row is long enough: whole DRAM bursts, and three tiles in flight are 48 KiB a program, more
    than a multiprocessor's share of the bandwidth-latency product. Short rows take 512 bytes, so that little of the last tile is
    empty; so do SwiGLU, whose tiles are two, 8 bits, where 512 bytes are as many columns, and float32, whose products keep more
    in registers. In 4 bits a slice is a group, and a tile 512 columns.
    """
    block_m = next_power_of_2(rows)
    if group is not None:  # two rows at least: of one row, Triton 3.8 miscompiles batched products of more batches than warps
        return Linear(max(2, block_m), 16, group, 512 // group, 4, 4)
    if INTERPRETED:  # programs run one after the other there: few and large
        return Linear(block_m, 256, 128, 4, 4, 1)
    long = columns >= 2048 and itemsize == 2 and not swiglu
    return Linear(block_m, 16, (256 if long else 128) // itemsize, 4, 4, 4)


LANES = 128  # ids of a group: 16 bytes of bfloat16 for each of 16 threads


@dataclass(frozen=True)
class Choose:
    """`block` logits a program; `groups`, a power of two, holds all groups of LANES ids. registers: a limit, None is ptxas' own."""

    block: int
    groups: int
    warps: int
    registers: int | None = None


@tunable
def choose(arch, vocabulary):
    """The choice of the next id: 16 bytes of bfloat16 a thread, which spreads a usual vocabulary over 24 to 128 multiprocessors;
    what one program does at the end of a row has as many threads. ptxas spills a few registers rather than pass 128 on sm_100,
    and 80 on sm_80, unless it is told that it may."""
    return Choose(2048, next_power_of_2(-(-vocabulary // LANES)), 8, 168 if arch in (80, 100) else None)
