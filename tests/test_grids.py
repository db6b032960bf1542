"""Grids at absurd sizes: CUDA takes 2^31 - 1 programs on the first axis of a grid and 65,535 on the others, so only the first may
grow with the user's sizes. Nothing is launched, and the tensors have no memory."""

import pytest
import torch
from trillama import kernels as k
from trillama.kernels import attention, glu, rmsnorm, rope, use_backend
from trillama.kernels.dispatch import observe
from trillama.kernels.sampling import choose_, embed_next_

MANY = 70_000  # more than the axes behind the first take


def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape, dtype=torch.int32):
    return empty(*shape, dtype=dtype)


def decode(B, Hq, Hk, S, T, page=None, **options):
    cache = empty(B, Hk, T, 64) if page is None else empty(999, Hk, page, 64)
    table = None if page is None else integers(B, T // page)
    k.decode_attention(empty(B, Hq, S, 64), cache, cache, integers(B), block_table=table, **options)


def turned(B, Hq, Hk, S, append=False):
    q, new, cos = empty(B, Hq, S, 64), empty(B, Hk, S, 64), empty(999, 32, dtype=torch.float32)
    positions = integers(S)
    if not append:
        k.apply_rope(q, new, cos, cos, positions=positions)
        return rope._apply_rope(q, new, cos, cos, positions, False, True)
    cache = empty(B, Hk, 2 * S, 64)
    return k.rope_append_(q, new, new, cos, cos, cache, cache, positions)


def rows(count, n):
    x, weight = empty(count, n), empty(n)
    k.rms_norm(x, weight)
    k.add_rms_norm(x, x, weight)
    rmsnorm._rms_norm_backward(x, x, weight, x, 1e-6, 0.0, "llama", True)
    k.swiglu(x, x)
    glu._swiglu_backward(x, x, x)


def attend(B, H, S):
    q = empty(B, H, S, 64)
    k.flash_attention(q, q, q)
    lse = empty(B, H, S, dtype=torch.float32)
    attention._attention_backward(q, None, q, q, q, q, lse, None, None, 1.0, None, None, 0, True, True)


def attend_packed(sequences, H, longest):
    x, starts = empty(sequences, H, 64), integers(sequences + 1)
    k.flash_attention_varlen(x, x, x, starts, starts, longest, longest)


def ends(rows, vocabulary, **options):
    ids, ended = integers(rows, dtype=torch.int64), empty(rows, dtype=torch.bool)
    embed_next_(ids, empty(vocabulary, 4096), integers(rows))
    choose_(
        empty(rows, vocabulary), ids, ended, empty(dtype=torch.bool), ends=integers(2, dtype=torch.int64),
        state=integers(rows, dtype=torch.int64), lengths=integers(rows), **options,
    )  # fmt: skip


CALLS = {
    "decode, sequences": lambda: decode(MANY, 8, 2, 1, 4096),
    "decode, pages": lambda: decode(MANY, 8, 2, 1, 4096, page=16),
    "decode, heads": lambda: decode(2, MANY, MANY, 1, 4096),
    "decode, heads and tiles": lambda: decode(1, 8 * 4096, 4096, 512, 4096),
    "decode, tokens": lambda: decode(1, 4, 1, 2**20, 2**20, window=99),
    "rope, sequences": lambda: turned(MANY, 8, 2, 1),
    "rope, heads": lambda: turned(1, MANY, MANY, 1),
    "rope, odd heads": lambda: turned(1, MANY + 1, MANY, 3),
    "rope, tokens": lambda: turned(2, 8, 2, 2**24),
    "rope, append": lambda: turned(MANY, MANY, 7, 1, append=True),
    "rows, short": lambda: rows(2**33, 8),
    "rows, long": lambda: rows(2**22, 300_000),
    "attention, sequences": lambda: attend(MANY, 8, 1),
    "attention, heads": lambda: attend(1, MANY, 1),
    "attention, tokens": lambda: attend(1, 128, 2**24),
    "attention, packed": lambda: attend_packed(MANY, 8, 1),
    "product, columns": lambda: k.decode_linear(empty(1, 64), empty(2**31, 64)),
    "ends of a step, rows": lambda: ends(3_000_000, 128_256),
    "ends of a step, rows drawn": lambda: ends(MANY, 512, temperature=1.0, top_p=0.9),
    "ends of a step, vocabulary": lambda: ends(3, 2**27),
}


@pytest.mark.parametrize("name", CALLS)
def test_only_the_first_axis_of_a_grid_grows(name):
    grids = []
    with use_backend("triton"), torch.no_grad(), observe(lambda kernel, grid, *_: grids.append((*grid, 1, 1)[:3]) or True):
        CALLS[name]()
    assert grids
    assert all(x < 2**31 and y <= 65_535 and z <= 65_535 for x, y, z in grids), grids
