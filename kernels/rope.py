"""Rotary position embedding, alone and fused with the write into the key/value cache.

    (a, b) -> (a cos - b sin, b cos + a sin)          Su et al. 2021, arXiv:2104.09864

for the pairs (x[i], x[i + R/2]) of Hugging Face's checkpoints or, interleaved, (x[2i], x[2i + 1]) of Meta's. A rotation is
undone by the opposite angle, so the backward is the forward with the sine's sign flipped, and nothing but the tables is saved.
"""

import math
from typing import Optional

import torch

from . import reference, tuning
from .dispatch import (
    architecture,
    await_inputs,
    call,
    call_back,
    cdiv,
    check,
    check_same,
    dependence,
    fresh,
    jit,
    launch,
    promoted,
    register,
    release_dependents,
    remembered,
    taped,
    tl,
    uses_triton,
    written,
)

# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _both(a, b):
    """a & b, where None is no mask."""
    if a is None:
        both = b
    elif b is None:
        both = a
    else:
        both = a & b
    return both


@jit
def _heads(
    x_ptr, x_strides, out_ptr, out_strides, read, write, first, last, cos, sin,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotates (or, if cos is None, copies) the heads first..last of some tokens, BLOCK_H at a time; x_ptr and out_ptr are the
    addresses of the tokens' head 0."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    head = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
    x_ptr += head * x_strides[1]
    out_ptr += head * out_strides[1]
    for _ in range(first, last, BLOCK_H):
        if INTERLEAVED:
            col = tl.arange(0, 2 * BLOCK_HALF).to(tl.int64)[None, None, :]
            inside = col < 2 * HALF if HALF < BLOCK_HALF else None
            x = tl.load(x_ptr + col * x_strides[3], _both(read, inside))
            if cos is not None:
                a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_H, BLOCK_HALF, 2)).to(tl.float32))
                x = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)
            tl.store(out_ptr + col * out_strides[3], x.to(dtype), _both(write, inside))
        else:
            col = tl.arange(0, BLOCK_HALF).to(tl.int64)[None, None, :]
            inside = col < HALF if HALF < BLOCK_HALF else None
            a = tl.load(x_ptr + col * x_strides[3], _both(read, inside))
            b = tl.load(x_ptr + (col + HALF) * x_strides[3], _both(read, inside))
            if cos is not None:
                a32, b32 = a.to(tl.float32), b.to(tl.float32)
                a, b = (a32 * cos - b32 * sin).to(dtype), (b32 * cos + a32 * sin).to(dtype)
            tl.store(out_ptr + col * out_strides[3], a, _both(write, inside))
            tl.store(out_ptr + (col + HALF) * out_strides[3], b, _both(write, inside))
        if BLOCK_REST > 0:
            col = 2 * HALF + tl.arange(0, BLOCK_REST).to(tl.int64)[None, None, :]
            x = tl.load(x_ptr + col * x_strides[3], _both(read, col < D))
            tl.store(out_ptr + col * out_strides[3], x, _both(write, col < D))
        x_ptr += tl.cast(x_strides[1], tl.int64) * BLOCK_H
        out_ptr += tl.cast(out_strides[1], tl.int64) * BLOCK_H


@jit(do_not_specialize=[
    "positions_ptr", "position_stride_batch", "position_stride_token", "block_table_ptr", "block_table_stride_row",
    "block_table_stride_page", "tokens", "table_rows", "capacity", "pages", "heads_per_program",
])  # fmt: skip
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, cos_ptr, sin_ptr, positions_ptr, block_table_ptr,
    q_strides, k_strides, v_strides, q_out_strides, k_out_strides, v_out_strides, cos_strides, sin_strides,
    position_stride_batch, position_stride_token, block_table_stride_row, block_table_stride_page, tokens, table_rows, capacity,
    pages, heads_per_program,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program turns some heads of BLOCK_S tokens; the heads are numbered q, then k, then v.

    cos and sin are read once and stay in registers; without them nothing is turned. With v_ptr, k and v go into caches
    [B, Hk, T, D], or [pages, Hk, page, D] through the block table, at the token's position. What lies outside the tables turns to
    NaN, what lies outside the cache is not written. The masked loads have no `other`: a lane that reads nothing writes nothing.
    """
    release_dependents(PDL)
    await_inputs(PDL)
    blocks = tl.cdiv(tokens, BLOCK_S)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)[:, None, None]
    read = token < tokens if BLOCK_S > 1 else None
    pair = tl.broadcast_to(tl.arange(0, BLOCK_HALF).to(tl.int64)[None, None, :], (BLOCK_S, BLOCK_H, BLOCK_HALF))
    known = _both(read, pair < HALF if HALF < BLOCK_HALF else None)
    s = token.to(tl.int64)
    position = s
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * position_stride_batch + s * position_stride_token, read).to(tl.int64)
        known = _both(known, (position >= 0) & (position < table_rows))
    cos, sin = None, None
    if cos_ptr is not None:
        cos = tl.load(cos_ptr + position * cos_strides[0] + pair * cos_strides[1], known)
        sin = tl.load(sin_ptr + position * sin_strides[0] + pair * sin_strides[1], known)
        if positions_ptr is not None:
            cos = tl.where(known, cos, float("nan"))
        if INVERSE:
            sin = -sin

    row, slot = batch, s
    write = read
    if v_ptr is not None:
        slot = position
        write = _both(read, (position >= 0) & (position < capacity))
        if block_table_ptr is not None:
            entry = batch * block_table_stride_row + position // PAGE * block_table_stride_page
            row = tl.load(block_table_ptr + entry, write, other=-1).to(tl.int64)
            slot = position % PAGE
            write &= (row >= 0) & (row < pages)

    first = tl.program_id(1) * heads_per_program
    last = first + heads_per_program
    _heads(
        q_ptr + batch * q_strides[0] + s * q_strides[2], q_strides,
        q_out_ptr + batch * q_out_strides[0] + s * q_out_strides[2], q_out_strides,
        read, read, first, tl.minimum(last, HQ), cos, sin, D, HALF, INTERLEAVED, BLOCK_H, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _heads(
        k_ptr + batch * k_strides[0] + s * k_strides[2], k_strides,
        k_out_ptr + row * k_out_strides[0] + slot * k_out_strides[2], k_out_strides,
        read, write, tl.maximum(first - HQ, 0), tl.minimum(last - HQ, HK), cos, sin,
        D, HALF, INTERLEAVED, BLOCK_H, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    if v_ptr is not None:
        _heads(
            v_ptr + batch * v_strides[0] + s * v_strides[2], v_strides,
            v_out_ptr + row * v_out_strides[0] + slot * v_out_strides[2], v_out_strides,
            read, write, tl.maximum(first - HQ - HK, 0), tl.minimum(last - HQ - HK, HK), None, None,
            D, HALF, INTERLEAVED, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


# --- launcher --------------------------------------------------------------------------------------------------------


def _rotate(q, k, cos, sin, positions, interleaved, inverse, v=None, caches=(None, None), block_table=None):
    """(rotated q, rotated k); with v, k and v go into the caches instead and the second result is k's cache. Without cos there is
    no q, and k and v go there as they are."""
    B, HK, S, D = k.shape
    HQ, half = (0, D // 2) if cos is None else (q.shape[1], cos.shape[1])
    k_out, v_out = (fresh(_empty(k)), None) if v is None else caches
    q_out = k_out if q is None else fresh(_empty(q))
    q = k if q is None else q
    heads = HQ + HK * (1 if v is None else 2)
    if heads == 0:
        return q_out, k_out
    tile = tuning.rope(half, D - 2 * half, math.gcd(HQ, HK), q.element_size())
    blocks = cdiv(S, tile.block_s)
    # Few tokens: the heads are spread over programs. The number of heads is an argument, so nothing is recompiled for it.
    groups = min(heads // tile.block_h, cdiv(tuning.programs(architecture(q)), max(1, B * blocks)))
    heads_per_program = cdiv(cdiv(heads, groups), tile.block_h) * tile.block_h
    page = None if block_table is None else k_out.shape[2]
    launch(
        _rope_kernel,
        (B * blocks, cdiv(heads, heads_per_program)),
        q, k, v, q_out, k_out, v_out, cos, sin, positions, block_table,
        q.stride(), k.stride(), None if v is None else v.stride(),
        q_out.stride(), k_out.stride(), *(None if t is None else t.stride() for t in (v_out, cos, sin)),
        0 if positions is None or positions.dim() == 1 else positions.stride(0),
        0 if positions is None else positions.stride(-1),
        *((0, 0) if block_table is None else block_table.stride()),
        S, 0 if cos is None else cos.shape[0],
        k_out.shape[2] if block_table is None else page * block_table.shape[1], k_out.shape[0], heads_per_program,
        HQ=HQ, HK=HK, D=D, HALF=half, PAGE=page, INTERLEAVED=interleaved, INVERSE=inverse,
        BLOCK_S=tile.block_s, BLOCK_H=tile.block_h, BLOCK_HALF=tile.block_half, BLOCK_REST=tile.block_rest,
        num_warps=tile.warps, **(dependence(q) if S == 1 else {"PDL": False}),
    )  # fmt: skip
    return q_out, k_out


def _empty(x):
    """An uninitialised tensor like x [B, H, S, D], dense, with the axes H and S in memory in the order they have in x."""
    B, H, S, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((B, S, H, D)).transpose(1, 2)
    return x.new_empty((B, H, S, D))


def _placed(x, like):
    """x in the memory layout that `_empty(like)` has; with one head or one token both that there are are the same."""
    if like.stride(1) < like.stride(2) and 1 not in x.shape[1:3]:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


# --- the ops: custom ops for the dispatcher, gradients, checks -----------------------------------------------------------


def _apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: Optional[torch.Tensor],
    interleaved: bool, inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """apply_rope, or with `inverse` the rotation by the opposite angles."""
    if uses_triton(q):
        return _rotate(q, k, cos, sin, positions, interleaved, inverse)
    rotated = reference.turn(q, k, cos, sin, positions, interleaved, inverse)
    return _placed(rotated[0], q), _placed(rotated[1], k)


def _rope_append_(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor,
    v_cache: torch.Tensor, positions: torch.Tensor, block_table: Optional[torch.Tensor], interleaved: bool,
) -> torch.Tensor:  # fmt: skip
    if uses_triton(q):
        written(k_cache, v_cache)
        return _rotate(q, k, cos, sin, positions, interleaved, False, v, (k_cache, v_cache), block_table)[0]
    rotated = reference.rope_append_(
        q, k, v, cos, sin, k_cache, v_cache, positions, block_table=block_table, interleaved=interleaved
    )
    return _placed(rotated, q)


@remembered
def append_(op, k, v, k_cache, v_cache, positions, block_table):
    """What `rope_append_` does with k and v, but that k is not turned; of arguments that fit, within the op of that name."""
    if uses_triton(k):
        written(k_cache, v_cache)
        _rotate(None, k, None, None, positions, False, False, v, (k_cache, v_cache), block_table)
    else:
        taped(reference.append_, op, k, v, k_cache, v_cache, positions, block_table)


def _save(ctx, inputs, output):
    *_, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx, dq, dk):
    cos, sin, positions = ctx.saved_tensors
    turned = call_back(_apply_rope_op, _apply_rope, dq, dk, cos, sin, positions, ctx.interleaved, not ctx.inverse)
    return *turned, None, None, None, None, None


_apply_rope_op = register(
    "apply_rope", _apply_rope, lambda q, k, *_: (_empty(q), _empty(k)), backward=_gradients, setup_context=_save
)
_rope_append_op = register("rope_append_", _rope_append_, lambda q, *_: _empty(q), mutates=("k_cache", "v_cache"))


def _check(op, q, k, cos, sin, positions):
    check_same(op, q=q, k=k)
    check(q.dim() == 4, lambda: f"{op}: q has shape {tuple(q.shape)}, expected [batch, heads, tokens, head size]")
    B, _, S, D = q.shape
    check(
        k.dim() == 4 and k.shape[0] == B and k.shape[2:] == q.shape[2:],
        lambda: f"{op}: k has shape {tuple(k.shape)}, expected ({B}, key heads, {S}, {D}) to fit q",
    )
    check(2 <= D <= 256, lambda: f"{op}: q has head size {D}, expected 2 to 256")
    _check_table(op, q, "cos", cos)
    _check_table(op, q, "sin", sin)
    check(sin.shape == cos.shape, lambda: f"{op}: sin has shape {tuple(sin.shape)}, expected {tuple(cos.shape)} as cos")
    if positions is None:
        check(cos.shape[0] >= S, lambda: f"{op}: q has {S} tokens, but cos ends after {cos.shape[0]} positions")
    else:
        _check_integers(op, q, "positions", positions)
        check(
            positions.shape in ((S,), (B, S)),
            lambda: f"{op}: positions has shape {tuple(positions.shape)}, expected ({S},) or ({B}, {S})",
        )


def _check_table(op, q, name, table):
    check_same(op, same_dtype=False, **{"q": q, name: table})
    if table.dtype != torch.float32 and not table.dtype == q.dtype == torch.float64:
        why = f"q, {str(q.dtype)[6:]}, is turned in float32, so that {name}.float() costs nothing"
        if table.dtype != torch.float64:
            lost = round(math.log2(torch.finfo(table.dtype).eps)) - 2
            why = f"{name}.float() will do, but what was rounded stays off by up to 2^{lost}, as tables of rope_tables are not"
        raise ValueError(f"{op}: {name} is {table.dtype}, expected torch.float32: {why}")
    check(
        table.dim() == 2 and 0 < table.shape[1] <= q.shape[3] // 2,
        lambda: f"{op}: {name} has shape {tuple(table.shape)}, expected [positions, R / 2] with R at most {q.shape[3] // 2 * 2}",
    )
    check(not table.requires_grad, lambda: f"{op}: {name} requires a gradient, but the tables are constants")


def _check_integers(op, q, name, x):
    kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
    check(kind in (torch.int32, torch.int64), lambda: f"{op}: {name} is {kind}, expected an int32 or int64 tensor")
    check(x.device == q.device, lambda: f"{op}: {name} is on {x.device}, expected {q.device} as q")


def _check_cache(op, k, name, cache, paged):
    B, HK, _, D = k.shape
    rows = "pages" if paged else B
    check(
        cache.dim() == 4 and cache.shape[1] == HK and cache.shape[3] == D and (paged or cache.shape[0] == B),
        lambda: f"{op}: {name} has shape {tuple(cache.shape)}, expected ({rows}, {HK}, tokens, {D})",
    )


@remembered
def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q and k rotated by the angles of their tokens' positions, in one launch.

    q: [B, Hq, S, D], k: [B, Hk, S, D], float16, bfloat16 or float32, any strides, D at most 256. cos, sin: float32 [P, R/2],
    R <= D; the last D - R elements pass through, so that D may be odd. positions: int32 or int64 [S] or [B, S], rows of the
    tables, default 0..S-1. interleaved: pairs (0, 1), (2, 3).. as in Meta's checkpoints instead of (0, R/2), (1, R/2 + 1).. as in
    Hugging Face's.

    Computed in float32 and rounded once. Returns new tensors, dense; where the heads of a token lie next to each other in memory
    ([B, S, H, D] transposed) they do so in the result. Differentiable in q and k. A position outside the tables gives NaN from the
    kernel, which cannot raise without a wait for the GPU, and an IndexError from the reference on CPU tensors. Source:
    arXiv:2104.09864.
    """
    q, k = promoted(q, k)
    _check("apply_rope", q, k, cos, sin, positions)
    return call(_apply_rope_op, _apply_rope, q, k, cos, sin, positions, bool(interleaved), False)


@remembered
def rope_append_(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor,
    v_cache: torch.Tensor, positions: torch.Tensor, *, block_table: torch.Tensor | None = None, interleaved: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rotates q and k, writes k and v into the caches at `positions`, and returns the rotated q: one launch.

    q, k, cos, sin, interleaved: as in `apply_rope`. v: [B, Hk, S, D]. k_cache, v_cache: [B, Hk, T, D], or pages [pages, Hk, page,
    D] with block_table [B, n] (int32 or int64; position p of row b lies in page block_table[b, p // page]). positions: int32 or
    int64 [S] or [B, S]. Two tokens must not share a place. The kernel writes nothing for a position outside the cache; the
    reference raises an IndexError for CPU tensors. Not differentiable.
    """
    op = "rope_append_"
    _check(op, q, k, cos, sin, positions)
    check(positions is not None, lambda: f"{op}: positions is None, expected an int32 or int64 tensor")
    check_same(op, q=q, v=v, k_cache=k_cache, v_cache=v_cache)
    check(v.shape == k.shape, lambda: f"{op}: v has shape {tuple(v.shape)}, expected {tuple(k.shape)} as k")
    _check_cache(op, k, "k_cache", k_cache, block_table is not None)
    check(
        v_cache.shape == k_cache.shape,
        lambda: f"{op}: v_cache has shape {tuple(v_cache.shape)}, expected {tuple(k_cache.shape)} as k_cache",
    )
    if block_table is not None:
        _check_integers(op, q, "block_table", block_table)
        check(
            block_table.dim() == 2 and block_table.shape[0] == q.shape[0],
            lambda: f"{op}: block_table has shape {tuple(block_table.shape)}, expected ({q.shape[0]}, pages)",
        )
    interleaved = bool(interleaved)
    return call(_rope_append_op, _rope_append_, q, k, v, cos, sin, k_cache, v_cache, positions, block_table, interleaved)
