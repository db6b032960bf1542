"""Hugging Face transformers on trillama's kernels: the attention implementation "trillama", and `patch(model)`.

    import trillama.kernels.compat.transformers as trillama             # registers the name
    model.set_attn_implementation("trillama")                           # or from_pretrained(..., attn_implementation="trillama")
    trillama.patch(model)                                               # RMSNorm, rotary embedding and MLP of this instance

transformers asks for a mask once a forward pass and hands it to every layer. Ours holds what the kernels need:

    None                     dense: all keys, aligned bottom-right (causal) or all visible
    [B + 1, 1, 1, 1 + n]     one query a row (decoding): the number of keys it sees and, if some in between are hidden (n = T),
                             their places in the cache; n = 0: they are the first ones
    [B + 1, 1, 2, 4 + n]     several queries a row, and in [:, :, 0] for the queries, in [:, :, 1] for the keys: where the sequences
                             that a row is cut into begin. Padding, and what a static cache has not filled yet, are sequences of
                             their own; nothing is copied. n > 0: hidden keys between visible ones, and the order that brings the
                             visible ones to the front of the row, where a layer copies them to
    [B + 1, 1, 2, 3 + n]     the same where a query sees all keys of its sequence, wherever they stand (encoders, cross attention)
    Packed                   several sequences in one row, told apart by position_ids

The tensors are int32 of four axes, which transformers passes on untouched, `generate` with a static cache included, and which every
tool can move, recompute and trace. A row more than the batch has (it holds the totals) is what no mask can have that is meant to be
broadcast to the scores: so a user's own mask of four axes is never taken for one of ours. A mask function that none of these can
express is refused. Works with transformers 4.57 and 5.
"""

import functools
import inspect
import logging
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from .. import attention as kernels
from ..decode import decode_attention
from ..dispatch import check, finite, register, steady, whole
from ..glu import swiglu
from ..reference import span, visible, wide
from ..rmsnorm import rms_norm
from ..rope import apply_rope

NAME = "trillama"
OP = f"attention {NAME!r}"
__all__ = ["NAME", "attention", "attention_mask", "patch", "patched", "unpatch"]


def _refuse(what):
    raise ValueError(f"{OP}: {what}; use attn_implementation='sdpa' or 'eager' for this")


# --- the mask: once a forward pass ---------------------------------------------------------------------------------------


@dataclass
class Packed:
    """starts: int32 [B S + 1], where the sequences start in the flat batch, filled up with B S. count: how many there are, on
    the CPU, so that the layers do not wait for the GPU one by one."""

    starts: torch.Tensor
    count: torch.Tensor

    def to(self, device, non_blocking=False):
        """On another device: what moves the arguments of a layer of a model that is split calls this."""
        return Packed(self.starts.to(device, non_blocking=non_blocking), self.count)


def _read(mask_function):
    """(causal, window to the left, window to both sides, ids of packed sequences) of the functions that transformers composes a
    mask of."""
    if mask_function is masking_utils.causal_mask_function:
        return True, None, None, None
    if mask_function is getattr(masking_utils, "bidirectional_mask_function", None):
        return False, None, None, None
    name = mask_function.__qualname__.split(".")[0]
    if mask_function.__closure__ and name in (
        "sliding_window_overlay", "sliding_window_bidirectional_overlay", "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence", "and_masks",
    ):  # fmt: skip
        inner = mask_function.__closure__[0].cell_contents
        if name == "sliding_window_overlay":
            return False, inner, None, None
        if name == "sliding_window_bidirectional_overlay":
            return False, None, inner, None
        if name == "packed_sequence_mask_function":
            return False, None, None, inner
        causal, lefts, boths, ids = zip(*(_read(part) for part in (inner if name == "and_masks" else (inner,))))
        lefts, boths, ids = ([x for x in part if x is not None] for part in (lefts, boths, ids))
        return any(causal), min(lefts, default=None), min(boths, default=None), ids[0] if ids else None
    _refuse(f"no kernel for the mask pattern {mask_function.__qualname__}")


def attention_mask(
    batch_size: int, q_length: int | None = None, kv_length: int | None = None, q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0, mask_function: Callable | None = None, attention_mask: torch.Tensor | None = None,
    config: Any = None, cache_position: torch.Tensor | None = None, device: torch.device | str | None = None,
    allow_is_causal_skip: bool = True, **kwargs: Any,
) -> torch.Tensor | Packed | None:  # fmt: skip
    """The mask function behind the name "trillama", called by transformers; see the module's docstring for what it returns."""
    if cache_position is not None:  # 4.57
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    causal, window, both, ids = _read(mask_function)
    told = getattr(config, "sliding_window", None)
    for size in (window, both):
        if size is not None and size != told:
            _refuse(f"a mask with a window of {size}, but the layers are told {told}")
    device = next((t.device for t in (attention_mask, q_offset, ids) if isinstance(t, torch.Tensor)), torch.device(device or "cpu"))
    traced = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    if both is not None and kv_length <= both:
        both = None  # every query sees every key, with transformers' window and with flash-attention's, one less
    if ids is not None:
        if not causal:
            _refuse("packed sequences without causality")
        return _packed(ids, traced)
    length = q_offset + q_length - kv_offset  # keys there are; a tensor where the cache is static
    if causal and not allow_is_causal_skip and cache_position is None and q_length > 1 and not isinstance(length, torch.Tensor):
        _refuse("a model that computes with the mask itself")  # nothing else lets transformers forbid that there is none
    if not causal:
        if isinstance(length, torch.Tensor):
            _refuse("a static cache without causality")
        if both is None and window is None:
            length = kv_length  # the keys may be another sequence
        elif window is not None or length != q_length or length != kv_length:
            _refuse("a window without causality and with a cache or one side only")
    valid, holes = None, False
    if attention_mask is not None:
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if not traced:
            every, gapless = _known(valid, length, q_length > 1)
            if every and (isinstance(length, torch.Tensor) or valid.shape[1] >= length):
                valid = None
            holes = not gapless
    if valid is None and both is None and (not causal or (not isinstance(length, torch.Tensor) and length >= kv_length)):
        return None
    if valid is not None:
        valid = pad(valid, (0, kv_length - valid.shape[1]))
    if q_length == 1:
        if both is not None:
            _refuse("a window without causality around a single query")
        return _keys(batch_size, kv_length, q_offset, kv_offset, length, valid, window, device)
    if holes:
        if both is not None or (window is not None and window < kv_length):
            _refuse("a padding mask with holes and a window")
        return _gathered(batch_size, q_length, kv_length, length, valid, causal, device)
    return _sequences(batch_size, q_length, kv_length, length, valid, causal or both is not None, traced, device)


def _known(valid, length, several):
    """(whether all keys are valid, whether those of each row that exist are neighbours: asked only of several queries).

    The one time in a pass that the host waits for the GPU. It has to know: padding takes other kernels on other shapes, and a mask
    with holes a copy of the keys. transformers waits here too, for `sdpa` without a window and for `flash_attention_2`.
    """
    every = valid.all()
    if not several:
        return bool(every), True
    seen = valid & (torch.arange(valid.shape[1], device=valid.device) < length)
    begins = seen[:, :1].sum(1) + (seen[:, 1:] & ~seen[:, :-1]).sum(1)
    flags = int(every + 2 * (begins <= 1).all())
    return bool(flags & 1), bool(flags & 2)


def _packed(ids, traced):
    flat = torch.arange(ids.numel(), device=ids.device)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = torch.where(first.flatten(), flat, ids.numel()).sort().values
    return Packed(pad(starts, (0, 1), value=ids.numel()).int(), first.sum().cpu())


def _keys(batch, T, q_offset, kv_offset, length, valid, window, device):
    """[B + 1, 1, 1, 1 + n]: the keys that the only query of a row sees."""
    if valid is None:
        count = torch.as_tensor(length, device=device).clamp(max=T).to(torch.int32)
        return count.expand(batch + 1).reshape(batch + 1, 1, 1, 1)
    key = torch.arange(T, device=device)
    seen = valid & (key < length)
    if window is not None:
        seen = seen & (key + kv_offset > q_offset - window)
    places = torch.argsort(~seen, dim=1, stable=True)
    return pad(torch.cat((seen.sum(1, keepdim=True), places), 1), (0, 0, 0, 1)).to(torch.int32)[:, None, None]


def _sequences(batch, S, T, length, valid, positions, traced, device):
    """[B + 1, 1, 2, 4 or 3]: each row is cut into left padding, its tokens, right padding and the keys that do not exist yet; or,
    where positions do not matter, into keys that are hidden on the left, all queries with the keys they see, the rest."""
    length = torch.as_tensor(length, device=device)
    if valid is None:
        start, stop = torch.zeros(batch, dtype=torch.long, device=device), length.expand(batch)
    else:
        key = torch.arange(T, device=device)
        seen = valid & (key < length)
        start = torch.where(seen, key, length).amin(1)
        stop = torch.where(seen, key + 1, start[:, None]).amax(1)
        if traced:
            torch._assert_async((stop - start == seen.sum(1)).all(), f"{OP}: a padding mask with holes, in a graph")
    zero = torch.zeros_like(start)
    if positions:
        keys = torch.stack((zero, start, stop, length.expand(batch)), 1)
        queries = (keys - (length - S)).clamp(0, S)
    else:
        keys, queries = torch.stack((zero, start, stop), 1), torch.stack((zero, zero, zero + S), 1)
    return _rows(queries, keys, S, T)


def _rows(queries, keys, S, T):
    """[B + 1, 1, 2, n] of where sequences begin in each row of S queries and T keys, [B, n]: counted through the batch, and the
    totals behind. In memory all of the queries' come first: so a layer has them without a copy."""
    row = torch.arange(len(queries) + 1, device=queries.device)[:, None]
    flat = (pad(begins, (0, 0, 0, 1)) + row * size for begins, size in ((queries, S), (keys, T)))
    return torch.stack([*flat]).to(torch.int32).transpose(0, 1)[:, None]


def _gathered(batch, S, T, length, valid, causal, device):
    """[B + 1, 1, 2, n + max(S, T)]: what is visible at the front of each row; hidden queries behind, as a sequence without keys."""
    length = torch.as_tensor(length, device=device)
    seen = valid & (torch.arange(T, device=device) < length)
    asking = torch.ones(batch, S, dtype=torch.bool, device=device)
    if causal:
        asking = seen.gather(1, (torch.arange(S, device=device) + length - S).expand(batch, S))
    count, keys = (t.sum(1) for t in (asking, seen))
    zero = torch.zeros_like(keys)
    queries = (zero, count, zero + S, zero + S) if causal else (zero, zero + S, zero + S)
    keys = (zero, keys, keys, keys)[: len(queries)]
    cuts = _rows(torch.stack(queries, 1), torch.stack(keys, 1), S, T)
    orders = [torch.argsort(~t, dim=1, stable=True) for t in (asking, seen)]
    orders = torch.stack([pad(t, (0, max(S, T) - t.shape[1], 0, 1)) for t in orders], 1)
    return torch.cat((cuts, orders.to(torch.int32)[:, None]), 3)


# --- attention: once a layer -----------------------------------------------------------------------------------------

# Keywords of an attention call that mean nothing to its numbers. Every other one that is set is refused.
_WITHOUT_MEANING = frozenset(
    ("cache_position", "deterministic", "labels", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
     "output_router_logits", "position_ids", "return_dict", "seq_idx", "token_type_ids", "use_cache")
)  # fmt: skip


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | Packed | None, dropout: float = 0.0, scaling: float | None = None,
    sliding_window: int | str | None = "unknown", softcap: float | None = None, is_causal: bool | None = None,
    output_attentions: bool = False, cu_seq_lens_q: torch.Tensor | None = None, cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None, max_length_k: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The attention function behind the name "trillama", called by transformers: query [B, Hq, S, D], key and value
    [B, Hk, T, D]; returns ([B, S, Hq, D], None), or with output_attentions the weights [B, Hq, S, T] in the place of None.

    A mask of the user's own, [B or 1, Hq or 1, S or 1, T or 1], boolean or integer (what is not 0 is seen) or floating-point (added
    to the scores), and output_attentions are computed in plain PyTorch with all scores in memory; a warning says so once.
    """
    config = getattr(module, "config", None)
    if dropout:
        _refuse(f"dropout of {dropout} on the attention weights")
    for name, argument in kwargs.items():
        if name not in _WITHOUT_MEANING and not _is_nothing(argument):
            _refuse(f"the argument {name}")
    if isinstance(sliding_window, str):
        sliding_window = None
        if getattr(config, "sliding_window", None) is not None:
            _refuse(f"{type(module).__name__} does not say whether its window is the config's {config.sliding_window}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else finite(OP, "scaling", scaling)
    sliding_window = None if sliding_window is None else whole(OP, "sliding_window", sliding_window)
    if _autocast(query):
        lower = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(lower) for t in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(config, "is_causal", True)
    softcap, sliding_window = kernels._check(OP, query, key, value, softcap, sliding_window, ("B", "H", "S", "D"))
    B, Hq, S, _ = query.shape
    T = key.shape[2]
    check(key.shape[0] == B, lambda: f"{OP}: key has shape {tuple(key.shape)}, expected batch size {B} as query")

    cuts = _cuts(query, key, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    mask = None if cuts or B == 0 else _beside(attention_mask, query)
    if mask is not None and not _is_ours(mask, B, S, T):
        _check_mask(mask, (B, Hq, S, T))
        _warn_once("a mask of four axes")
        out, weights = _plain(query, key, value, mask if mask.is_floating_point() else mask != 0, scaling, softcap)
        return out, weights if output_attentions else None
    left, right = _span(config, mask, is_causal, sliding_window, S, T)
    if output_attentions:
        _warn_once("output_attentions")
        return _plain(query, key, value, _visible(mask, cuts, B, S, T, left, right, query.device), scaling, softcap)

    options = (left, right, scaling, softcap)
    differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if cuts:
        out = _flat(_run, query, key, value, *cuts, *options, False)
    elif isinstance(mask, Packed):
        out = _flat(_packed_attention, query, key, value, mask.starts, mask.count, *options, differentiable)
    elif mask is None:
        if is_causal and S == 1 and not differentiable:
            lengths = torch.full((B,), T, dtype=torch.int32, device=query.device)
            out = _decode(query, key, value, lengths, None, scaling, sliding_window, softcap)
        else:
            out = _run(query, key, value, None, None, *options, False)[0].transpose(1, 2)
    elif S == 1:
        lengths, places = _one_query(mask)
        window = sliding_window if places is None else None  # of the places it is known which are inside
        decode = _decode_differentiably if differentiable else _decode
        out = decode(query, key, value, lengths, places, scaling, window, softcap)
    else:
        starts, orders = _several_queries(mask, S, T)
        if orders is not None:
            query, key, value = (_ordered(t, order) for t, order in zip((query, key, value), (orders[0], orders[1], orders[1])))
        out = _flat(_run, query, key, value, *starts, *options, False)
        if orders is not None:
            out = torch.zeros_like(out).scatter(1, orders[0][:, :, None, None].expand_as(out), out)
    return out, None


def _autocast(x):
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _is_nothing(argument):
    return argument is None or argument is False or (isinstance(argument, (tuple, list, dict)) and not argument)


def _cuts(query, key, mask, *cuts):
    """Where the sequences in one row begin, for queries and keys, or () if there are none."""
    if all(a is None for a in cuts):
        return ()
    if any(a is None for a in cuts):
        raise ValueError(f"{OP}: expected all or none of cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k")
    rows = query.shape[0]
    check(
        rows == 1,
        lambda: f"{OP}: cu_seq_lens_q and {rows} rows, expected the sequences in one row, as DataCollatorWithFlattening makes them",
    )
    if mask is not None and not isinstance(mask, Packed):
        _refuse("cu_seq_lens_q together with an attention mask")
    kernels._check_starts(OP, query[0, 0], key[0, 0], *cuts)
    return cuts[:2]


def _beside(mask, query):
    """The mask on the device of the query: a model may be split over several."""
    if mask is None:
        return None
    if not isinstance(mask, (torch.Tensor, Packed)):
        _refuse(f"a mask of type {type(mask).__name__}")
    device = (mask.starts if isinstance(mask, Packed) else mask).device
    if device == query.device:
        return mask
    check(device.type != "meta", lambda: f"{OP}: the mask is on meta, expected {query.device} as query")
    return mask.to(query.device)


def _is_ours(mask, B, S, T):
    """Whether `attention_mask` above has made it: it has a row more than the batch."""
    if isinstance(mask, Packed):
        return True
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[:3] != (B + 1, 1, min(2, S)):
        return False
    most = max(S, T)
    return mask.shape[3] in ((1, 1 + T) if S == 1 else (3, 4, 3 + most, 4 + most))


def _check_mask(mask, shape):
    if mask.dim() != 4 or mask.is_complex() or any(n not in (1, size) for n, size in zip(mask.shape, shape)):
        _refuse(f"a {mask.dtype} mask of shape {tuple(mask.shape)} for scores of shape {shape}")


def _span(config, mask, is_causal, window, S, T):
    """(left, right) as `span` has it, of a layer that is told `window` and gets the mask, one of ours."""
    if isinstance(mask, torch.Tensor) and S > 1 and mask.shape[3] in (3, 3 + max(S, T)):
        if window is not None and window < T:
            _refuse(f"a window of {window} keys and a mask without one")
        return None, None
    if is_causal or window is None:
        return span(is_causal, window)
    if mask is None:
        return window - 1, window - 1  # as flash-attention has it in transformers
    both = getattr(config, "sliding_window", None)  # the masks of transformers count the distance, its layers this or one more
    if S > 1 and window not in (both, (both or 0) + 1):
        _refuse(f"a window of {window} keys without causality, but the mask has the config's {both}")
    return both, both


def _one_query(mask):
    """(lengths [B], places [B, T] or None)"""
    mask = mask[:-1, 0, 0]
    return mask[:, 0], mask[:, 1:] if mask.shape[1] > 1 else None


def _several_queries(mask, S, T):
    """((starts of the queries, of the keys), None or (order of the queries [B, S], of the keys [B, T]))"""
    most, n = max(S, T), mask.shape[3]
    cuts = n if n <= 4 else n - most
    starts = tuple(mask[:, 0, side, :cuts].flatten()[: cuts * (len(mask) - 1) + 1] for side in (0, 1))
    if cuts == n:
        return starts, None
    return starts, tuple(mask[:-1, 0, side, cuts : cuts + size].long() for side, size in ((0, S), (1, T)))


def _ordered(x, order):
    """x [B, H, S, D] in another order of each row, [B, S]."""
    return x.gather(2, order[:, None, :, None].expand_as(x))


_run = functools.partial(kernels._run, OP)


def _flat(function, q, k, v, *arguments):
    """function of the batch as one row of tokens, [1, H, B S, D], gives (out, lse); returns out as [B, S, H, D]."""
    shape = q.shape[0], q.shape[2], q.shape[1], q.shape[3]
    q, k, v = (t.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return function(q, k, v, *arguments)[0].squeeze(0).transpose(0, 1).reshape(shape)


def _decode(q, k, v, lengths, places, scale, window, softcap):
    """[B, 1, Hq, D]. Hidden keys are skipped through a block table with pages of one token: page b stride_b / stride_t + t of the
    cache, seen as pages, is the token t of row b."""
    if places is not None:
        if any(t.stride(0) % t.stride(2) or t.stride() != k.stride() for t in (k, v)):
            k, v = k.contiguous(), v.contiguous()
        B, H, T, D = k.shape
        stride_b, stride_h, stride_t, stride_d = k.stride()
        row = stride_b // stride_t
        k, v = (t.as_strided(((B - 1) * row + T, H, 1, D), (stride_t, stride_h, stride_t, stride_d)) for t in (k, v))
        places = places + row * torch.arange(B, dtype=torch.int32, device=q.device)[:, None]
    out = decode_attention(q, k, v, lengths, scale=scale, window=window, softcap=softcap, block_table=places)
    return out.transpose(1, 2)


def _decode_differentiably(q, k, v, lengths, places, scale, window, softcap):
    """The same where a gradient is wanted: each row is its query with the keys it sees, and a sequence of the other keys."""
    if places is not None:
        k, v = (_ordered(t, places.long()) for t in (k, v))
    B, T = k.shape[0], k.shape[2]
    row = torch.arange(B, dtype=torch.int32, device=q.device)
    starts_q, starts_k = (torch.stack(two, 1).flatten() for two in ((row, row + 1), (row * T, row * T + lengths)))
    starts = pad(starts_q, (0, 1), value=B), pad(starts_k, (0, 1), value=B * T)
    return _flat(_run, q, k, v, *starts, *span(True, window), scale, softcap, False)


# --- in plain PyTorch: what the kernels do not give -------------------------------------------------------------------


@functools.cache
def _tell_once(what):
    warnings.warn(f"{OP}: {what} is computed in plain PyTorch, with all scores in memory", stacklevel=4)


def _warn_once(what):
    if not torch.compiler.is_compiling():
        _tell_once(what)


@steady
def _plain(q, k, v, mask, scale, softcap):
    """(out [B, S, Hq, D], weights [B, Hq, S, T]) under a mask [B or 1, Hq or 1, S or 1, T or 1], boolean or added to the scores:
    every intermediate in float32, 0 where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    q32, k32, v32 = (t.to(wide(t.dtype)) for t in (q, k, v))
    scores = torch.matmul(q32 * scale, k32.repeat_interleave(group, 1).mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    out = torch.matmul(weights, v32.repeat_interleave(group, 1))
    return out.to(q.dtype).transpose(1, 2), weights.to(q.dtype)


def _visible(mask, cuts, B, S, T, left, right, device):
    """Boolean [B or 1, 1, S, T]: what our masks let the kernels see."""
    if mask is None and not cuts:
        return visible(torch.arange(T - S, T, device=device), T, left, right)[None, None]
    if isinstance(mask, torch.Tensor) and S == 1:
        lengths, places = _one_query(mask)
        if places is None:
            return visible(lengths[:, None].long() - 1, T, left, 0)[:, None]
        first = torch.arange(T, device=device) < lengths[:, None]
        return torch.zeros_like(first).scatter(1, places.long(), first)[:, None, None]
    orders = None
    if cuts:
        starts = cuts[:2]
    elif isinstance(mask, Packed):
        starts = mask.starts, mask.starts
    else:
        starts, orders = _several_queries(mask, S, T)
    (which_q, from_end_q), (which_k, from_end_k) = (_sequence(s, B, n) for s, n in zip(starts, (S, T)))
    distance = from_end_k[:, None, :] - from_end_q[:, :, None]
    within = (which_q > 0) & (which_q < len(starts[0]))
    seen = within[:, :, None] & (which_q[:, :, None] == which_k[:, None, :])
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    if orders is not None:
        for axis, order in ((1, orders[0][:, :, None]), (2, orders[1][:, None, :])):
            seen = torch.zeros_like(seen).scatter(axis, order.expand_as(seen), seen)
    return seen[:, None]


def _sequence(starts, rows, size):
    """(the number, from 1, of the sequence that each token [rows, size] belongs to, its place counted from the sequence's end)"""
    token = torch.arange(rows * size, device=starts.device)
    sequence = torch.searchsorted(starts.long(), token, right=True)
    ends = pad(starts.long(), (0, 1), value=rows * size)[sequence]
    return sequence.view(rows, size), (token - ends).view(rows, size)


# The number of packed sequences is known only at run time: an op of its own, so that no graph depends on it.


def _packed_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, count: torch.Tensor,
    left: int | None, right: int | None, scale: float, softcap: float | None, need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    starts = starts[: int(count) + 1]
    return kernels._attention(q, k, v, starts, starts, scale, softcap, left, right, need_lse)


def _packed_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    starts: torch.Tensor, count: torch.Tensor, left: int | None, right: int | None, scale: float, softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    starts = starts[: int(count) + 1]
    return kernels._attention_backward(dout, None, q, k, v, out, lse, starts, starts, scale, softcap, left, right, True, True)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.rest = inputs[5:-1]


def _gradients(ctx, dout, dlse):
    return *_packed_backward_op(dout, *ctx.saved_tensors, *ctx.rest), *([None] * 7)


_packed_attention = register(
    "packed_attention", _packed_forward, lambda q, *rest: kernels._outputs(q, rest[-1]),
    backward=_gradients, setup_context=_save,
)  # fmt: skip
_packed_backward_op = register(
    "packed_attention_backward", _packed_backward, lambda dout, q, k, v, *rest: kernels._gradients_like(q, k, v, True, True)
)

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)


# --- patch and unpatch -----------------------------------------------------------------------------------------------

FAMILIES = ("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "SmolLM3", "Gemma", "Gemma2", "Gemma3")
_CENTRED = ("Gemma", "Gemma2", "Gemma3")  # their RMSNorm stores weight - 1 and multiplies in float32
_SILU = ("SiLU", "SiLUActivation")
M = TypeVar("M", bound=torch.nn.Module)
_log = logging.getLogger(__name__)


def _rms_norm(module, hidden_states):
    return rms_norm(hidden_states, module.weight, _eps(module), offset=1.0, casting="gemma")


def _llama_rms_norm(module, hidden_states):
    if module.weight.dtype != hidden_states.dtype:  # Hugging Face's product has the wider dtype
        return module.weight * rms_norm(hidden_states, None, _eps(module))
    return rms_norm(hidden_states, module.weight, _eps(module))


def _eps(module):
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def _mlp(module, x):
    return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))


def _packed_mlp(module, hidden_states):
    return module.down_proj(swiglu(*module.gate_up_proj(hidden_states).chunk(2, -1)))


def _with_float32_tables(forward):
    """A rotary embedding's forward that gives the tables in float32 whatever x is: rounded to bfloat16 they are off by 2^-9."""

    @functools.wraps(forward)
    def in_float32(module, x, *args, **kwargs):
        return forward(module, x.new_empty(0, dtype=torch.float32), *args, **kwargs)

    return in_float32


def _apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' function of this name: cos, sin [B or 1, S, R], their halves the same."""
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    B, S, R = cos.shape
    positions = None
    if B > 1:
        positions = torch.arange(B * S, dtype=torch.int32, device=q.device).view(B, S)
    cos, sin = (t.reshape(B * S, R)[:, : R // 2].float() for t in (cos, sin))
    q, k = apply_rope(q, k, cos, sin, positions=positions)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 2 else (q, k)


def _with_our_rotary(forward):
    """A copy of an attention's forward that finds our `apply_rotary_pos_emb` where it looks up transformers'."""
    forward = inspect.unwrap(forward)
    names = {**forward.__globals__, "apply_rotary_pos_emb": _apply_rotary_pos_emb}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _origin(cls):
    """transformers' class that a class of modules is, or is derived of; None: neither."""
    return next((c for c in cls.__mro__ if c.__module__.startswith("transformers.models.")), None)


def _forward(cls):
    """The forward that takes the place of that of a class of modules, or None."""
    origin = _origin(cls)
    family = origin and next((f for f in sorted(FAMILIES, key=len, reverse=True) if origin.__name__.startswith(f)), None)
    kind = origin.__name__.removeprefix(family) if family else None
    if kind == "RMSNorm":
        return _rms_norm if family in _CENTRED else _llama_rms_norm
    if kind == "MLP":
        return _packed_mlp if family == "Phi3" else _mlp
    if kind == "RotaryEmbedding" and family != "Gemma3":  # Gemma 3 asks for its tables by layer type
        return _with_float32_tables(cls.forward)
    if kind == "Attention":
        return _with_our_rotary(cls.forward)
    return None


class _Patched:
    """First base of the classes that patched modules have: forward is looked up in the class, as of any module, so that replicas,
    copies and what hooks keep of it compute with their own weights."""

    def __reduce_ex__(self, protocol):
        if _Patched not in type(self).__bases__:  # a class that someone else has put above
            return super().__reduce_ex__(protocol)
        return _new, (type(self).__bases__[1],), *super().__reduce_ex__(max(2, protocol))[2:]


@functools.cache
def _with_our_forward(cls):
    """The class of patched modules of class cls, to the eye the same; None where there is nothing to replace."""
    forward = _forward(cls)
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return forward and type(cls)(cls.__name__, (_Patched, cls), {**names, "forward": forward})


@functools.cache
def _without_our_forward(cls):
    """The class that a patched one, or one that someone has derived of it, was made of."""
    if _Patched in cls.__bases__:
        return cls.__bases__[1]
    bases = tuple(_without_our_forward(base) if issubclass(base, _Patched) else base for base in cls.__bases__)
    return type(cls)(cls.__name__, bases, {n: a for n, a in vars(cls).items() if n not in ("__dict__", "__weakref__")})


def _new(cls):
    """An empty patched module, which unpickling fills."""
    return (made := _with_our_forward(cls)).__new__(made)


def _kept(module):
    """Names under which the instance holds its class's forward: hooks put their own in its place and call what was there."""
    return [
        name for name, a in vars(module).items()
        if isinstance(a, types.MethodType) and a.__self__ is module and a.__func__ is type(module).forward
    ]  # fmt: skip


def _become(module, cls):
    kept = _kept(module)
    module.__class__ = cls
    for name in kept:
        vars(module)[name] = types.MethodType(cls.forward, module)
    if "forward" in kept:  # what a hook that was removed has left; a replica would compute with the weights of this module
        del vars(module)["forward"]


def _is_replaceable(module):
    if isinstance(module, _Patched) or _with_our_forward(type(module)) is None:
        return False
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)  # of an MLP
    return act is None or type(act).__name__ in _SILU


def _has_its_own(module):
    """Whether a module computes by a forward that is not transformers': the instance's, or that of a class derived of theirs."""
    if "forward" in vars(module) and not _kept(module):
        return True
    return type(module).forward is not _origin(type(module)).forward


def patch(model: M) -> M:
    """Puts this model's RMSNorm, rotary embedding and (where it is SwiGLU) MLP on trillama's kernels; returns the model.

    model: an instance of transformers' Llama, Mistral, Phi-3, Qwen2, Qwen3, SmolLM3 or Gemma families, with any head. Each module
    gets a class derived of its own, under the same name: parameters, state dict and isinstance stay as they are, copies, replicas,
    pickles, hooks and wrappers work, before and after. Other models are not touched; `unpatch` takes it back, `patched` says
    what was replaced, as does a line of the logger "trillama.kernels.compat.transformers". In lower precision the rotary tables
    stay in float32, everything else rounds as before.

    Raises ValueError if there is nothing to replace. A module with a forward that is not transformers', set on the instance or in a
    class derived of theirs, stays as it is, with a warning. A pickle of the whole model loads where trillama is installed.
    """
    left = []
    for module in model.modules():
        if _is_replaceable(module):
            if _has_its_own(module):
                left.append(module)
            else:
                _become(module, _with_our_forward(type(module)))
    found = patched(model)
    if left:
        warnings.warn(f"patch: left as they are, with a forward of their own: {_listed(_count(left))}", stacklevel=2)
    if not found:
        raise ValueError(f"patch: {type(model).__name__} has nothing to patch, expected a model of {', '.join(FAMILIES)}")
    _log.info("patch: %s", _listed(found))
    return model


def unpatch(model: M) -> M:
    """Undoes `patch`; returns the model."""
    for module in model.modules():
        if isinstance(module, _Patched):
            _become(module, _without_our_forward(type(module)))
    return model


def patched(model: torch.nn.Module) -> dict[str, int]:
    """How many modules of the model are on trillama's kernels, by the name of their class."""
    return _count(module for module in model.modules() if isinstance(module, _Patched))


def _count(modules):
    return dict(Counter(type(module).__name__ for module in modules))


def _listed(counts):
    return ", ".join(f"{n} {name}" for name, n in counts.items())
