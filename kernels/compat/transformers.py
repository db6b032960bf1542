"""Hugging Face transformers on trillama's kernels: the attention implementation "trillama", and `patch(model)`.

    import trillama.kernels.compat.transformers as trillama             # registers the name
    model.set_attn_implementation("trillama")                           # or from_pretrained(..., attn_implementation="trillama")
    trillama.patch(model)                                               # RMSNorm, rotary embedding and MLP of this instance

transformers asks for a mask once a forward pass and hands it to every layer. Ours holds what the kernels need, as int32 tensors of
four axes, which transformers passes on untouched:

    None                 dense: all keys, aligned bottom-right (causal) or all visible
    [B, 1, 1, 1 + n]     one query a row (decoding): the number of keys it sees and, if some in between are hidden (n = T), their
                         places in the cache; n = 0: they are the first ones
    [2, 1, 1, n + 1]     several queries a row: where sequences start among the flat queries and keys. Padding, and what a static
                         cache has not filled yet, are sequences of their own; nothing is copied
    Packed               several sequences in one row, told apart by position_ids

A mask that none of these can express is refused. Works with transformers 4.57 and 5.
"""

import functools
import inspect
import types
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from .. import attention as kernels
from ..decode import decode_attention
from ..dispatch import register
from ..glu import swiglu
from ..reference import span
from ..rmsnorm import rms_norm
from ..rope import apply_rope

NAME = "trillama"
__all__ = ["NAME", "attention", "attention_mask", "patch", "unpatch"]


def _refuse(what):
    raise ValueError(f"attention {NAME!r}: {what}; use attn_implementation='sdpa' or 'eager' for this")


# --- the mask: once a forward pass ---------------------------------------------------------------------------------------


@dataclass
class Packed:
    """starts: int32 [B S + 1], where the sequences start in the flat batch, filled up with B S. count: how many there are, on
    the CPU, so that the layers do not wait for the GPU one by one."""

    starts: torch.Tensor
    count: torch.Tensor


def _read(mask_function):
    """(causal, window, ids of packed sequences) of the functions that transformers composes a mask of."""
    if mask_function is masking_utils.causal_mask_function:
        return True, None, None
    if mask_function is getattr(masking_utils, "bidirectional_mask_function", None):
        return False, None, None
    name = mask_function.__qualname__.split(".")[0]
    if name in ("sliding_window_overlay", "packed_sequence_mask_function", "remap_positions_for_packed_sequence", "and_masks"):
        inner = mask_function.__closure__[0].cell_contents
        if name == "sliding_window_overlay":
            return False, inner, None
        if name == "packed_sequence_mask_function":
            return False, None, inner
        parts = [_read(part) for part in (inner if name == "and_masks" else (inner,))]
        windows, ids = [w for _, w, _ in parts if w is not None], [i for _, _, i in parts if i is not None]
        return any(c for c, _, _ in parts), min(windows) if windows else None, ids[0] if ids else None
    _refuse(f"no kernel for the mask pattern {mask_function.__qualname__}")


def attention_mask(
    batch_size, q_length=None, kv_length=None, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, config=None,
    cache_position=None, device=None, **kwargs,
):  # fmt: skip
    """The mask function behind the name "trillama", called by transformers; see the module's docstring for what it returns."""
    if cache_position is not None:  # 4.57
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    causal, window, ids = _read(mask_function)
    if window is not None and window != getattr(config, "sliding_window", window):
        _refuse(f"a mask with a window of {window}, but the layers are told {config.sliding_window}")
    device = next((t.device for t in (attention_mask, q_offset, ids) if isinstance(t, torch.Tensor)), torch.device(device or "cpu"))
    traced = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    if ids is not None:
        return _packed(ids, traced)
    length = q_offset + q_length - kv_offset  # keys there are; a tensor where the cache is static
    valid = None
    if attention_mask is not None:
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if not traced:
            every, whole = _known(valid, length, q_length > 1)
            if every and (isinstance(length, torch.Tensor) or valid.shape[1] >= length):
                valid = None
            elif causal and not whole:
                _refuse("a padding mask with holes")
    if not causal:
        if valid is not None or isinstance(length, torch.Tensor):
            _refuse("padding or a static cache without causality")
        return None
    if valid is None and not isinstance(length, torch.Tensor) and length >= kv_length:
        return None
    if valid is not None:
        valid = nn.functional.pad(valid, (0, kv_length - valid.shape[1]))
    if q_length == 1:
        return _keys(batch_size, kv_length, q_offset, kv_offset, length, valid, window, device)
    return _sequences(batch_size, q_length, kv_length, length, valid, traced, device)


def _known(valid, length, several):
    """(whether all keys are valid, whether those of each row that exist are neighbours: asked only of several queries).

    The one time in a pass that the host waits for the GPU. It has to know: padding takes other kernels on other shapes, and a mask
    with holes an error instead of wrong numbers. transformers waits here too, for `sdpa` without a window and for
    `flash_attention_2`.
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
    return Packed(nn.functional.pad(starts, (0, 1), value=ids.numel()).int(), first.sum().cpu())


def _keys(batch, T, q_offset, kv_offset, length, valid, window, device):
    """[B, 1, 1, 1 + n]: the keys that the only query of a row sees."""
    if valid is None:
        count = torch.as_tensor(length, device=device).clamp(max=T).to(torch.int32)
        return count.expand(batch).reshape(batch, 1, 1, 1)
    key = torch.arange(T, device=device)
    seen = valid & (key < length)
    if window is not None:
        seen = seen & (key + kv_offset > q_offset - window)
    places = torch.argsort(~seen, dim=1, stable=True)
    return torch.cat((seen.sum(1, keepdim=True), places), 1).to(torch.int32)[:, None, None]


def _sequences(batch, S, T, length, valid, traced, device):
    """[2, 1, 1, 4 B + 1]: each row is cut into left padding, its tokens, right padding and the keys that do not exist yet."""
    length = torch.as_tensor(length, device=device)
    if valid is None:
        start, stop = torch.zeros(batch, dtype=torch.long, device=device), length.expand(batch)
    else:
        key = torch.arange(T, device=device)
        seen = valid & (key < length)
        start = torch.where(seen, key, length).amin(1)
        stop = torch.where(seen, key + 1, start[:, None]).amax(1)
        if traced:
            torch._assert_async((stop - start == seen.sum(1)).all(), "attention 'trillama': a padding mask with holes")
    row = torch.arange(batch, device=device)[:, None]
    ends = length.expand(batch)
    keys = torch.stack((start, stop, ends, torch.full_like(start, T)), 1)
    queries = torch.stack((start, stop, ends, ends), 1) - (length - S)
    flat = torch.stack(((row * S + queries.clamp(0, S)).flatten(), (row * T + keys).flatten()))
    return nn.functional.pad(flat, (1, 0)).to(torch.int32)[:, None, None]


# --- attention: once a layer -----------------------------------------------------------------------------------------


def attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window="unknown", softcap=None, is_causal=None,
    **kwargs,
):  # fmt: skip
    """The attention function behind the name "trillama", called by transformers: query [B, Hq, S, D], key and value
    [B, Hk, T, D]; returns ([B, S, Hq, D], None)."""
    config = getattr(module, "config", None)
    if dropout:
        _refuse(f"dropout of {dropout} on the attention weights")
    for name in ("output_attentions", "s_aux", "position_bias", "head_mask", "cache"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            _refuse(f"the argument {name}")
    if sliding_window == "unknown":
        sliding_window = None
        if getattr(config, "sliding_window", None) is not None:
            _refuse(f"{type(module).__name__} does not say whether its window is the config's {config.sliding_window}")
    if torch.is_autocast_enabled(query.device.type):
        lower = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(lower) for t in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(config, "is_causal", True)
    op = f"attention {NAME!r}"
    softcap, sliding_window = kernels._check(op, query, key, value, softcap, sliding_window, ("B", "H", "S", "D"))
    B, _, S, D = query.shape
    left, right = span(is_causal, sliding_window)
    options = (left, right, D**-0.5 if scaling is None else scaling, softcap)
    differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)

    if kwargs.get("cu_seq_lens_q") is not None:
        cuts = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        out = _flat(functools.partial(kernels._run, op), query, key, value, *cuts, *options, False)
    elif isinstance(attention_mask, Packed):
        out = _flat(_packed_attention, query, key, value, attention_mask.starts, attention_mask.count, *options, differentiable)
    elif attention_mask is None:
        if is_causal and S == 1 and not differentiable:
            lengths = torch.full((B,), key.shape[2], dtype=torch.int32, device=query.device)
            out = _decode(query, key, value, lengths, None, scaling, sliding_window, softcap)
        else:
            out = kernels._run(op, query, key, value, None, None, *options, False)[0].transpose(1, 2)
    elif attention_mask.dtype != torch.int32 or attention_mask.dim() != 4:
        _refuse(f"a {attention_mask.dtype} mask of shape {tuple(attention_mask.shape)}")
    elif S == 1:
        lengths, places = attention_mask[:, 0, 0, 0], attention_mask[:, 0, 0, 1:]
        folded = places.shape[1] > 0
        out = _decode(
            query, key, value, lengths, places if folded else None, scaling, None if folded else sliding_window, softcap
        )
    else:
        starts_q, starts_k = attention_mask[0, 0, 0], attention_mask[1, 0, 0]
        out = _flat(functools.partial(kernels._run, op), query, key, value, starts_q, starts_k, *options, False)
    return out, None


def _flat(function, q, k, v, *arguments):
    """function of the batch as one row of tokens, [1, H, B S, D], gives (out, lse); returns out as [B, S, H, D]."""
    shape = q.shape[0], q.shape[2], q.shape[1], q.shape[3]
    q, k, v = (t.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return function(q, k, v, *arguments)[0].squeeze(0).transpose(0, 1).reshape(shape)


def _decode(q, k, v, lengths, places, scaling, window, softcap):
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
    out = decode_attention(q, k, v, lengths, scale=scaling, window=window, softcap=softcap, block_table=places)
    return out.transpose(1, 2)


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


def _rotary_embedding(module, x, *args, **kwargs):
    """The tables in float32 whatever x is: rounded to bfloat16 they are off by 2^-9."""
    return type(module).forward(module, x.new_empty(0, dtype=torch.float32), *args, **kwargs)


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


def _replacement(module):
    """The function that takes the place of this module's forward, or None."""
    name = type(module).__name__
    family = next((f for f in sorted(FAMILIES, key=len, reverse=True) if name.startswith(f)), None)
    if family is None or not type(module).__module__.startswith("transformers.models."):
        return None
    kind = name.removeprefix(family)
    if kind == "RMSNorm":
        return _rms_norm if family in _CENTRED else _llama_rms_norm
    if kind == "MLP":
        packed = hasattr(module, "gate_up_proj")
        silu = type(module.activation_fn if packed else module.act_fn).__name__ in _SILU
        return (_packed_mlp if packed else _mlp) if silu else None
    if kind == "RotaryEmbedding" and family != "Gemma3":  # Gemma 3 asks for its tables by layer type
        return _rotary_embedding
    if kind == "Attention":
        return _with_our_rotary(type(module).forward)
    return None


def patch(model):
    """Puts this model's RMSNorm, rotary embedding and (where it is SwiGLU) MLP on trillama's kernels; returns the model.

    model: an instance of transformers' Llama, Mistral, Phi-3, Qwen2, Qwen3, SmolLM3 or Gemma families, with any head. Parameters,
    state dict and class stay as they are; other models are not touched; `unpatch` takes it back. Unpatch before pickling the model
    as a whole. In lower precision the rotary tables stay in float32, everything else rounds as before.
    """
    replaced = 0
    for module in model.modules():
        function = _replacement(module)
        if function is not None and "forward" not in module.__dict__:
            module.forward = types.MethodType(function, module)
            module._trillama_patched = True
        replaced += function is not None
    if not replaced:
        raise ValueError(f"patch: {type(model).__name__} has nothing to patch, expected a model of {', '.join(FAMILIES)}")
    return model


def unpatch(model):
    """Undoes `patch`; returns the model."""
    for module in model.modules():
        if module.__dict__.pop("_trillama_patched", False):
            del module.forward
    return model
