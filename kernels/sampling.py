"""Both ends of a decode step: the token before the layers, and after the head the choice of the next one.

    p = softmax(logits / temperature), cut off by top_k, top_p and min_p        id = argmax(log p + g),  g = -log(E)

E are exponential draws, a function of seed, row, step and id alone; the argmax of log p + g is distributed as p (Gumbel 1954). The
cut is one number a row: with d = (largest logit - logit) / temperature, which is never negative, every id with d <= cut stays,

    top_k    the least cut that keeps k ids                            (of equals with the last, all stay)
    top_p    the least cut whose ids have top_p of what top_k left     (likewise)
    min_p    -log(min_p)

found without a sort: floats that are not negative are ordered as their bits are, and the bits are settled two at a time.
"""

import math
from typing import Optional

import torch

from . import tuning
from .decode import _counters
from .dispatch import (
    architecture,
    await_inputs,
    call,
    cdiv,
    check,
    dependence,
    fresh,
    jit,
    launch,
    next_power_of_2,
    number,
    register,
    register_limit,
    release_dependents,
    remembered,
    taped,
    tl,
    unread,
    uses_triton,
    whole,
    written,
)

# --- reference: functions of tensors alone, of fixed shapes and read by no host, so that a CUDA graph can hold them ------------


def sample(logits, state, *, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None, seen=None):
    """One id [B] a row, drawn from float32 logits [B, vocabulary]; the options are those of `choose_`.

    state: int64 [B], of `start` and `advance`. seen: bool [B, vocabulary], the ids that a row has, for the repetition_penalty.
    """
    if repetition_penalty is not None:
        logits = penalise(logits, seen, repetition_penalty)
    if is_greedy(temperature):
        return logits.argmax(-1)
    return (warp(logits, temperature, top_k, top_p, min_p) - clocks(state, logits.shape[-1]).log()).argmax(-1)


def is_greedy(temperature):
    return temperature < 1e-5


def penalise(logits, seen, penalty):
    """The logits of ids in `seen` are divided by the penalty, or multiplied if negative (Keskar et al. 2019, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def warp(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Logits divided by the temperature, the largest of a row 0; those that are not to be drawn are -inf."""
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:  # Holtzman et al. 2020, arXiv:1904.09751
        ascending = logits.sort(-1).values
        beyond = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        logits = logits.masked_fill(logits < ascending.gather(-1, beyond), -math.inf)
    if min_p:  # Nguyen et al. 2024, arXiv:2407.01082; the largest is 0
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    return logits


# Draws are a function of seed, row, step and id: splitmix64 (Steele, Lea and Flood 2014), whose output is a hash of a counter. A
# generator's draws would depend on how many rows there are, and its state would have to be kept out of a graph.
UNSIGNED = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN, MIX_1, MIX_2 = (n - 2**64 for n in UNSIGNED)  # as int64


def start(seed, rows, device):
    """The state [B] of the first step: of each row a counter that begins where seed and row say."""
    return mix(mix(torch.tensor(seed)) + torch.arange(rows)).to(device)


def advance(state):
    """The state of the next step."""
    return state + GOLDEN


def clocks(state, size):
    """Draws [B, size] in float32, exponentially distributed with mean 1, all above 0 and finite."""
    counter = torch.arange(size, device=state.device) * GOLDEN + mix(state)[:, None]
    uniform = (_shift(mix(counter), 1).float() + 0.5) * 2.0**-63  # small ones keep all their bits: they decide
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))


def mix(z):
    """A bijection of int64 in which every bit of the argument moves half the bits of the result."""
    z = (z ^ _shift(z, 30)) * MIX_1
    z = (z ^ _shift(z, 27)) * MIX_2
    return z ^ _shift(z, 31)


def _shift(z, bits):
    """z >> bits of an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def settle_(new, ids, ended, finished, ends, seen=None, lengths=None):
    """What follows from the new id of each row, but for rows that have ended: these keep theirs. As `choose_` says."""
    ids.copy_(torch.where(ended, ids, new))
    if seen is not None:
        seen.scatter_(1, ids[:, None], True)
    ended |= (ids[:, None] == ends).any(-1)
    finished.copy_(ended.all())
    if lengths is not None:
        lengths.masked_fill_(ended, 0)


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _embed_kernel(
    ids_ptr, table_ptr, lengths_ptr, positions_ptr, x_ptr, table_strides,
    VOCABULARY: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of the token of one row; the first program of the row counts it. An id outside the table gives NaN."""
    release_dependents(PDL)
    await_inputs(PDL)
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    col = block * BLOCK + tl.arange(0, BLOCK)
    id = tl.full((BLOCK,), tl.load(ids_ptr + row), tl.int64)  # Triton 3.9's interpreter takes no scalar for a part of a mask
    known = (col < N) & (id >= 0) & (id < VOCABULARY)
    x = tl.load(table_ptr + id * table_strides[0] + col.to(tl.int64) * table_strides[1], known, other=float("nan"))
    tl.store(x_ptr + row * N + col, x, col < N)
    if block == 0:
        length = tl.load(lengths_ptr + row)
        tl.store(positions_ptr + row, length)
        tl.store(lengths_ptr + row, length + 1)


_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(n) for n in UNSIGNED)
_LANES = tl.constexpr(tuning.LANES)


@jit
def _mix(z):
    """`mix` of uint64"""
    z = (z ^ (z >> 30)) * tl.cast(_MIX_1, tl.uint64)
    z = (z ^ (z >> 27)) * tl.cast(_MIX_2, tl.uint64)
    return z ^ (z >> 31)


@jit
def _gumbel(key, id):
    """-log of `clocks`; key: the mixed state of the row. log1p(-u) as log(1 - u) u / (1 - (1 - u)), which keeps all bits of u."""
    hash = _mix(id.to(tl.uint64) * tl.cast(_GOLDEN, tl.uint64) + key)
    u = tl.minimum(((hash >> 1).to(tl.float32) + 0.5) * 1.0842021724855044e-19, 0.99999994)
    w = 1.0 - u
    return -tl.log(tl.where(w == 1.0, u, -tl.log(w) * u / tl.where(w == 1.0, 1.0, 1.0 - w)))


@jit
def _penalised(logits_ptr, seen_ptr, id, inside, penalty):
    """The logits of some ids in float32, -inf outside."""
    x = tl.load(logits_ptr + id, inside, other=float("-inf")).to(tl.float32)
    if seen_ptr is not None:
        seen = tl.load(seen_ptr + id, inside, other=0)
        penalty = tl.cast(penalty, tl.float32)
        x = tl.where(seen, tl.where(x < 0, x * penalty, tl.div_rn(x, tl.zeros_like(x) + penalty)), x)
    return x


@jit
def _distance(top, x, temperature):
    """How far x lies below `top`: never negative, infinite for -inf. Rounded as PyTorch rounds."""
    return tl.div_rn(top - x, tl.zeros_like(x) + tl.cast(temperature, tl.float32))


@jit
def _finite(top):
    return tl.where(top == float("-inf"), 0.0, top)


@jit
def _score(x, top, key, id, temperature, GREEDY: tl.constexpr):
    """What the chosen id has the most of."""
    return x if GREEDY else _gumbel(key, id) - _distance(_finite(top), x, temperature)


@jit
def _best(
    logits_ptr, seen_ptr, best_ptr, key, temperature, penalty, VOCABULARY: tl.constexpr, GREEDY: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """The id with the best score of a row, of equals the first."""
    group = tl.arange(0, GROUPS)
    known = group * _LANES < VOCABULARY
    score = tl.load(best_ptr + GROUPS + group, known, other=float("-inf"), cache_modifier=".cg")
    if not GREEDY:
        top = tl.load(best_ptr + group, known, other=float("-inf"), cache_modifier=".cg")
        score -= _distance(_finite(tl.max(top, 0)), top, temperature)
    won = tl.min(tl.where(score == tl.max(score, 0), group, GROUPS), 0)
    id = tl.minimum(won * _LANES, VOCABULARY - 1) + tl.arange(0, _LANES)
    x = _penalised(logits_ptr, seen_ptr, id, id < VOCABULARY, penalty)
    score = tl.where(id < VOCABULARY, _score(x, tl.max(x, 0), key, id, temperature, GREEDY), float("-inf"))
    return tl.min(tl.where(score == tl.max(score, 0), id, VOCABULARY), 0)


@jit
def _mass(d_ptr, n, cuts, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """[4]: how many of the n distances, or (without COUNT) what sum of exp(-d), lie up to the cuts, given as bits."""
    total = tl.zeros((4, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        d = tl.load(d_ptr + i, i < n, other=float("inf"))[None, :]
        share = 1.0 if COUNT else tl.exp(-d)
        total += tl.where(d.to(tl.uint32, bitcast=True) <= cuts[:, None], share, 0.0)
    return tl.sum(total, 1)


@jit
def _cut(d_ptr, n, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The least distance up to which `_mass` is at least `wanted`; infinity where it nowhere is."""
    cut = tl.cast(0, tl.uint32)
    unit = tl.cast(1 << 30, tl.uint32)
    for _ in range(16):
        tried = cut + (tl.arange(0, 4) + 1).to(tl.uint32) * unit - 1
        short = _mass(d_ptr, n, tried, COUNT, BLOCK) < wanted
        cut += tl.sum(short.to(tl.int32), 0).to(tl.uint32) * unit
        unit = (unit >> 2).to(tl.uint32)
    return tl.minimum(cut, 0x7F800000).to(tl.uint32).to(tl.float32, bitcast=True)


@jit
def _draw(
    logits_ptr, seen_ptr, best_ptr, d_ptr, id_ptr, key, temperature, penalty, top_k, top_p, farthest,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The id of a row out of those that the cut leaves. best_ptr: the largest logit of each group of ids, and its sum of
    exp(-distance from it). d_ptr, id_ptr: room for the ids and, before them, the groups."""
    group = tl.arange(0, GROUPS)
    known = group * _LANES < VOCABULARY
    best = tl.load(best_ptr + group, known, other=float("-inf"), cache_modifier=".cg")
    top = _finite(tl.max(best, 0))
    near = _distance(top, best, temperature)

    # The cut lies within reach: so much is known from the groups alone, most of which have nothing there.
    reach = tl.cast(float("inf"), tl.float32)
    total = reach
    if top_k is not None:
        tl.store(d_ptr + group, near, known)
        tl.debug_barrier()  # here and below: one thread's stores are other threads' loads
        reach = _cut(d_ptr, tl.cdiv(VOCABULARY, _LANES), top_k, True, BLOCK)
        tl.debug_barrier()
    elif top_p is not None:  # all ids that have an equal share of 1 - top_p or less are beyond the cut
        sums = tl.load(best_ptr + GROUPS + group, known, other=0.0, cache_modifier=".cg")
        total = tl.sum(sums * tl.exp(-near), 0)
        reach = tl.log(VOCABULARY / ((1.0 - tl.cast(top_p, tl.float32)) * total)) + 0.01
    if farthest is not None:  # noqa: SIM102 - Triton does not take `and` for two conditions settled at compile time
        if top_p is None:
            reach = tl.minimum(reach, tl.cast(farthest, tl.float32))

    live = known & (near <= reach)
    tl.store(id_ptr + tl.cumsum(live.to(tl.int32), 0) - 1, group, live)
    groups = tl.sum(live.to(tl.int32), 0)
    tl.debug_barrier()
    n = 0
    for start in range(0, groups, BLOCK // _LANES):
        i = start + tl.arange(0, BLOCK // _LANES)
        id = tl.load(id_ptr + i, i < groups, other=GROUPS)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
        d = _distance(top, _penalised(logits_ptr, seen_ptr, id, id < VOCABULARY, penalty), temperature)
        kept = (id < VOCABULARY) & (d <= reach)
        d, id, kept = tl.reshape(d, (BLOCK,)), tl.reshape(id, (BLOCK,)), tl.reshape(kept, (BLOCK,))
        place = n + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(d_ptr + place, d, kept)
        tl.store(id_ptr + GROUPS + place, id, kept)
        n += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()

    cut = tl.cast(float("inf"), tl.float32)
    if top_k is not None:
        cut = _cut(d_ptr, n, top_k, True, BLOCK)
    if top_p is not None:
        if top_k is not None:
            bits = tl.zeros((4,), tl.uint32) + cut.to(tl.uint32, bitcast=True)
            total = tl.max(_mass(d_ptr, n, bits, False, BLOCK), 0)
        cut = tl.minimum(cut, _cut(d_ptr, n, tl.cast(top_p, tl.float32) * total, False, BLOCK))
    if farthest is not None:
        cut = tl.minimum(cut, tl.cast(farthest, tl.float32))

    score = tl.full((BLOCK,), float("-inf"), tl.float32)
    chosen = tl.full((BLOCK,), VOCABULARY, tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        d = tl.load(d_ptr + i, i < n, other=float("inf"))
        id = tl.load(id_ptr + GROUPS + i, i < n, other=VOCABULARY)
        mine = tl.where((i < n) & (d <= cut), _gumbel(key, id) - d, float("-inf"))
        better = (mine > score) | ((mine == score) & (id < chosen))
        score = tl.where(better, mine, score)
        chosen = tl.where(better, id, chosen)
    return tl.min(tl.where(score == tl.max(score, 0), chosen, VOCABULARY), 0)


@jit(do_not_specialize=["rows", "top_k"])
def _choose_kernel(
    logits_ptr, seen_ptr, state_ptr, ids_ptr, ended_ptr, finished_ptr, ends_ptr, lengths_ptr, best_ptr, d_ptr, id_ptr, counter_ptr,
    temperature, penalty, top_k, top_p, farthest, rows, logits_stride,
    VOCABULARY: tl.constexpr, ENDS: tl.constexpr, BLOCK_ENDS: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK logits of one row, read once: leaves the best of each group of ids. The last program of a row to arrive chooses, and
    looks again at the group that has won or at those that the cut reaches; the last row to be done says whether all have ended.

    best_ptr: float32 [rows, 2, GROUPS], the largest logit of each group and, where all ids stay, its best score without that; with
    top_p alone its sum instead. d_ptr, id_ptr: [rows, GROUPS + VOCABULARY] where there is a cut, else None."""
    release_dependents(PDL)
    await_inputs(PDL)
    BLOCKS: tl.constexpr = (VOCABULARY + BLOCK - 1) // BLOCK
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    logits_ptr += row * logits_stride
    if seen_ptr is not None:
        seen_ptr += row * VOCABULARY
    best_ptr += row * (2 * GROUPS)
    key = tl.cast(0, tl.uint64)
    if not GREEDY:
        key = _mix(tl.load(state_ptr + row).to(tl.uint64, bitcast=True))

    group = block * (BLOCK // _LANES) + tl.arange(0, BLOCK // _LANES)
    known = group * _LANES < VOCABULARY
    id = group[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    x = _penalised(logits_ptr, seen_ptr, id, id < VOCABULARY, penalty)
    top = tl.max(x, 1)
    tl.store(best_ptr + group, top, known)
    if d_ptr is None:
        score = _score(x, top[:, None], key, id, temperature, GREEDY)
        tl.store(best_ptr + GROUPS + group, tl.max(tl.where(id < VOCABULARY, score, float("-inf")), 1), known)
    elif top_p is not None:
        sums = tl.sum(tl.exp(-_distance(_finite(top)[:, None], x, temperature)), 1)
        tl.store(best_ptr + GROUPS + group, sums, known)
    tl.debug_barrier()  # the counter is raised by one thread, after the stores of all
    if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") == BLOCKS - 1:
        tl.store(counter_ptr + row, 0)  # as it was found
        if d_ptr is None:
            chosen = _best(logits_ptr, seen_ptr, best_ptr, key, temperature, penalty, VOCABULARY, GREEDY, GROUPS)
        else:
            skip = row * (GROUPS + VOCABULARY)
            chosen = _draw(
                logits_ptr, seen_ptr, best_ptr, d_ptr + skip, id_ptr + skip, key, temperature, penalty, top_k, top_p, farthest,
                VOCABULARY, BLOCK, GROUPS,
            )  # fmt: skip
        chosen = tl.minimum(chosen, VOCABULARY - 1).to(tl.int64)  # whatever NaN does: what is written is an id

        ended = tl.load(ended_ptr + row)
        chosen = tl.where(ended, tl.load(ids_ptr + row), chosen)
        if ENDS > 0:
            e = tl.arange(0, BLOCK_ENDS)
            ended |= tl.max((tl.load(ends_ptr + e, e < ENDS, other=-1) == chosen).to(tl.int32), 0) > 0
        state = tl.cast(0, tl.int64)
        if not GREEDY:
            state = tl.load(state_ptr + row)
        tl.debug_barrier()  # one thread stores what all have loaded
        tl.store(ids_ptr + row, chosen)
        tl.store(ended_ptr + row, ended)
        if not GREEDY:
            tl.store(state_ptr + row, (state.to(tl.uint64, bitcast=True) + tl.cast(_GOLDEN, tl.uint64)).to(tl.int64, bitcast=True))
        if seen_ptr is not None:
            tl.store(seen_ptr + chosen, True)
        if lengths_ptr is not None:
            tl.store(lengths_ptr + row, 0, ended)
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + rows, 1, sem="acq_rel") == rows - 1:
            tl.store(counter_ptr + rows, 0)
            finished = tl.full((_LANES,), True, tl.int1)
            for start in range(0, rows, _LANES):
                r = start + tl.arange(0, _LANES)
                finished &= tl.load(ended_ptr + r, r < rows, other=1, cache_modifier=".cg")
            tl.store(finished_ptr, tl.min(finished.to(tl.int32), 0) == 1)


# --- launchers -------------------------------------------------------------------------------------------------------


def _embed(ids, table, lengths):
    rows, (vocabulary, columns) = len(ids), table.shape
    x = fresh(torch.empty((rows, 1, columns), dtype=table.dtype, device=table.device))
    positions = fresh(torch.empty((rows, 1), dtype=lengths.dtype, device=table.device))
    written(lengths)
    tile = tuning.elementwise(columns, table.element_size())
    launch(
        _embed_kernel,
        (rows * cdiv(columns, tile.block_n),),
        ids, table, lengths, positions, x, table.stride(), VOCABULARY=vocabulary, N=columns, BLOCK=tile.block_n,
        num_warps=tile.warps, **dependence(table),
    )  # fmt: skip
    return x, positions


def _choose(logits, ids, ended, finished, ends, state, seen, lengths, temperature, top_k, top_p, min_p, penalty):
    rows, vocabulary = logits.shape
    greedy = is_greedy(temperature)
    cut = not greedy and (top_k is not None or top_p is not None or min_p is not None)
    tile = tuning.choose(architecture(logits), vocabulary)
    best = fresh(torch.empty((rows, 2, tile.groups), dtype=torch.float32, device=logits.device))
    distances = numbers = None
    if cut:
        distances = fresh(torch.empty((rows, tile.groups + vocabulary), dtype=torch.float32, device=logits.device))
        numbers = fresh(torch.empty((rows, tile.groups + vocabulary), dtype=torch.int32, device=logits.device))
    if greedy:
        unread(state)
        state = None
    written(ids, ended, finished, state, seen, lengths)
    launch(
        _choose_kernel,
        (rows * cdiv(vocabulary, tile.block),),
        logits, seen, state, ids, ended, finished, ends, lengths, best, distances, numbers,
        taped(_counters, rows + 1, logits.device), temperature, penalty, top_k, top_p, -math.log(min_p) if min_p else None, rows,
        logits.stride(0),
        VOCABULARY=vocabulary, ENDS=len(ends), BLOCK_ENDS=next_power_of_2(len(ends)), GREEDY=greedy, BLOCK=tile.block,
        GROUPS=tile.groups, num_warps=tile.warps, **dependence(logits),
        **register_limit(tile, logits),
    )  # fmt: skip


# --- the ops ---------------------------------------------------------------------------------------------------------


def _embed_next_(ids: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if uses_triton(table):
        return _embed(ids, table, lengths)
    try:
        x = torch.nn.functional.embedding(ids[:, None], table)
    except IndexError:
        found = f"ids are {ids.min().item()} to {ids.max().item()}, expected 0 to {len(table) - 1}, the rows of table"
        raise IndexError(f"embed_next_: {found}") from None
    positions = lengths[:, None].clone()
    lengths += 1
    return x, positions


def _choose_(
    logits: torch.Tensor, ids: torch.Tensor, ended: torch.Tensor, finished: torch.Tensor, ends: torch.Tensor,
    state: Optional[torch.Tensor], seen: Optional[torch.Tensor], lengths: Optional[torch.Tensor], temperature: float,
    top_k: Optional[int], top_p: Optional[float], min_p: Optional[float], repetition_penalty: Optional[float],
) -> None:  # fmt: skip
    if uses_triton(logits):
        return _choose(
            logits, ids, ended, finished, ends, state, seen, lengths, temperature, top_k, top_p, min_p, repetition_penalty
        )
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    new = sample(logits.float(), state, repetition_penalty=repetition_penalty, seen=seen, **options)
    settle_(new, ids, ended, finished, ends, seen, lengths)
    if not is_greedy(temperature):
        state.copy_(advance(state))


_embed_op = register(
    "embed_next_", _embed_next_,
    lambda ids, table, lengths: (table.new_empty((len(ids), 1, table.shape[1])), lengths.new_empty((len(ids), 1))),
    mutates=("lengths",),
)  # fmt: skip
_choose_op = register(
    "choose_", _choose_, lambda *_: None, mutates=("ids", "ended", "finished", "state", "seen", "lengths")
)  # fmt: skip


def _check_vector(op, name, t, dtype, size, like):
    found = (t.dtype, tuple(t.shape), t.device) if isinstance(t, torch.Tensor) else type(t).__name__
    expected = (dtype, (size,) if isinstance(size, int) else size, like.device)
    check(found == expected, lambda: f"{op}: {name} is {found}, expected {expected}")
    check(t.is_contiguous(), lambda: f"{op}: {name} has strides {t.stride()}, expected a contiguous tensor")


@remembered
def embed_next_(ids: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The beginning of a decode step, in one launch: (table[ids] [B, 1, N], positions int32 [B, 1]); lengths are raised by one.

    ids: int64 [B]. table: [vocabulary, N], float16, bfloat16 or float32. lengths: int32 [B], the tokens of each row so far, which
    are the positions of these. An id outside the table gives NaN from the kernel and an IndexError from the reference.
    """
    op = "embed_next_"
    check(table.dim() == 2, lambda: f"{op}: table has shape {tuple(table.shape)}, expected two axes")
    rows = ids.numel()
    _check_vector(op, "ids", ids, torch.int64, rows, table)
    _check_vector(op, "lengths", lengths, torch.int32, rows, table)
    return call(_embed_op, _embed_next_, ids, table, lengths)


@remembered
def choose_(
    logits: torch.Tensor, ids: torch.Tensor, ended: torch.Tensor, finished: torch.Tensor, *, ends: torch.Tensor,
    state: torch.Tensor | None = None, seen: torch.Tensor | None = None, lengths: torch.Tensor | None = None,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> None:  # fmt: skip
    """The end of a decode step, in one launch: the next id of each row, and all that follows from it. Nothing is returned.

    logits: [B, vocabulary], float16, bfloat16 or float32; computed in float32. What is written: ids, int64 [B], the new ids, but
    for rows that have ended, which keep theirs; ended, bool [B], set where the id is one of `ends` (int64 [n]); finished, bool [],
    whether all have ended; state, int64 [B], moved on; seen, bool [B, vocabulary], of the ids that a row has, for the penalty;
    lengths, int32 [B], 0 where ended. The last three may be None where they are not needed.

    temperature below 1e-5: the largest logit, of equals the first. The others in this order: logits of seen ids are divided by
    repetition_penalty, or multiplied if negative; all are divided by temperature; the top_k largest stay, with all that equal the
    last; of these the fewest that have top_p of their probability, likewise; of these the ones at least min_p times as probable as
    the first. A row's draw depends on its logits, its state and the ids alone. Raises ValueError for arguments that do not fit.
    """
    op = "choose_"
    check(
        logits.dim() == 2 and 0 not in logits.shape and 1 in (logits.stride(1), logits.shape[1]),
        lambda: f"{op}: logits has shape {tuple(logits.shape)} and strides {logits.stride()}, expected [B, vocabulary], rows dense",
    )
    rows, vocabulary = logits.shape
    temperature, top_k = number(op, "temperature", temperature), None if top_k is None else whole(op, "top_k", top_k)
    top_p, min_p, repetition_penalty = (
        None if n is None else number(op, name, n)
        for name, n in (("top_p", top_p), ("min_p", min_p), ("repetition_penalty", repetition_penalty))
    )
    _check_vector(op, "ids", ids, torch.int64, rows, logits)
    _check_vector(op, "ended", ended, torch.bool, rows, logits)
    _check_vector(op, "finished", finished, torch.bool, (), logits)
    _check_vector(op, "ends", ends, torch.int64, ends.numel(), logits)
    if not is_greedy(temperature):
        _check_vector(op, "state", state, torch.int64, rows, logits)
    if repetition_penalty is not None:
        _check_vector(op, "seen", seen, torch.bool, (rows, vocabulary), logits)
    if lengths is not None:
        _check_vector(op, "lengths", lengths, torch.int32, rows, logits)
    top_p = None if top_p is not None and top_p >= 1 else top_p
    call(
        _choose_op, _choose_, logits, ids, ended, finished, ends, state, seen if repetition_penalty is not None else None, lengths,
        temperature, top_k, top_p, min_p or None, repetition_penalty,
    )  # fmt: skip
