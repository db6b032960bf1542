"""Rotary frequencies: theta, and the ways to stretch a trained context, as cosine and sine tables.

A config is read in both of Hugging Face's dialects: `rope_theta` beside `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5), `rope_type` or `type`. The formulas are those of transformers, evaluated in float64 and rounded once: angles
in float32 are off by up to 0.008 radians at position 131,071.
"""

import math
from typing import Any

import torch


def rope_tables(
    config_or_theta: object, head_dim: int, max_positions: int, *, scaling: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(cos, sin): float32 tables [max_positions, R/2] with the row p holding cos and sin of p * frequency_i.

    config_or_theta: theta, or an object or dict with Hugging Face's fields. scaling: a `rope_scaling` dict in place of the
    config's. head_dim: D, of which R = D * partial_rotary_factor are rotated. Kinds: default, linear (arXiv:2306.15595),
    dynamic (NTK-aware), llama3, yarn (arXiv:2309.00071), longrope (arXiv:2402.13753; also called su); the last two carry
    their attention factor in the tables. The frequencies of dynamic and longrope depend on the length of the sequence: these
    are the tables of a sequence of max_positions tokens, so longrope takes its long factors if that exceeds
    original_max_position_embeddings. Raises a ValueError that names the field for anything unknown or out of range.
    """
    for name, value in (("head_dim", head_dim), ("max_positions", max_positions)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"rope_tables: {name} is {value!r}, expected a positive integer")
    frequencies, attention_factor = rope_frequencies(rope_parameters(config_or_theta, scaling), head_dim, max_positions)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64, device="cpu"), frequencies)
    device = torch.get_default_device() if device is None else device
    return tuple((table * attention_factor).float().to(device) for table in (angles.cos(), angles.sin()))


def rope_frequencies(rope, head_dim, length):
    """(frequencies, attention factor) for a sequence of `length` tokens: radians a position, [R/2] in float64, and a number.

    rope: what `rope_parameters` returns.
    """
    size = int(head_dim * _number(rope, "partial_rotary_factor", 1.0))
    if size % 2 or not 0 < size <= head_dim:
        raise ValueError(f"partial_rotary_factor gives {size} of {head_dim} values a head, expected an even number from 2 on")
    return KINDS[rope["rope_type"]](rope, size, length)


def rope_parameters(config_or_theta, scaling=None):
    """What a config says about its rotary embedding as one flat dict in the dialect of transformers 5, `rope_type` checked."""
    if isinstance(config_or_theta, (int, float)):
        config_or_theta = {"rope_theta": config_or_theta}
    field = config_or_theta.get if isinstance(config_or_theta, dict) else lambda name: getattr(config_or_theta, name, None)
    own = field("rope_parameters") or {}
    given = scaling or field("rope_scaling") or own
    for source in (own, given):
        if not isinstance(source, dict) or any(isinstance(value, dict) for value in source.values()):
            raise ValueError(f"rope_scaling is {str(source)[:80]}, expected one flat dict for all layers")
    rope = {name: value for name, value in given.items() if value is not None}
    for name in ("rope_theta", "partial_rotary_factor", "max_position_embeddings"):
        value = own.get(name) if field(name) is None else field(name)
        if value is not None:
            rope.setdefault(name, value)
    rope.setdefault("rope_theta", 10000.0)
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    if kind == "su" or (kind == "yarn" and field("model_type") == "phi3"):  # what early Phi-3 files call it
        rope["rope_type"] = kind = "longrope"
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rope_type is {kind!r}, expected one of {', '.join(KINDS)}")
    if kind in ("llama3", "yarn", "longrope"):  # Phi-3 keeps the original length outside of the dict: that one wins
        original = field("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or rope.get("max_position_embeddings")
    _number(rope, "rope_theta", above=1)
    return rope


def same_frequencies(rope, length):
    """(first, last): the sequence lengths that have the frequencies of `length` tokens; last may be inf. rope: as above."""
    limit = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}.get(rope["rope_type"])
    boundary = _number(rope, limit) if limit else math.inf
    if length <= boundary:
        return 1, boundary
    return (boundary + 1, math.inf) if rope["rope_type"] == "longrope" else (length, length)


def context_length(rope):
    """How many positions a model is meant for: max_position_embeddings, or what its linear, dynamic or yarn factor gives."""
    length = _number(rope, "max_position_embeddings")
    if rope["rope_type"] in ("linear", "dynamic", "yarn"):
        length = max(length, int(_number(rope, "original_max_position_embeddings", length) * _number(rope, "factor", 1.0)))
    return length


# --- the kinds: (rope, R, length of the sequence) -> (frequencies [R/2] in float64, attention factor) ----------------


def _default(rope, size, length):
    return rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size), 1.0


def _linear(rope, size, length):
    return _default(rope, size, length)[0] / _number(rope, "factor"), 1.0


def _dynamic(rope, size, length):
    if size < 4:
        raise ValueError(f"rope_type is 'dynamic' with {size} rotated values a head, expected at least 4")
    factor, trained = _number(rope, "factor"), _number(rope, "max_position_embeddings")
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return _default({"rope_theta": rope["rope_theta"] * stretch ** (size / (size - 2))}, size, length)


def _llama3(rope, size, length):
    """Frequencies that make many turns in the original context are kept, those of few are divided, between them a ramp."""
    frequencies, _ = _default(rope, size, length)
    factor, original = _number(rope, "factor"), _number(rope, "original_max_position_embeddings")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if low >= high:
        raise ValueError(f"high_freq_factor is {high}, expected more than low_freq_factor = {low}")
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (kept + (1 - kept) / factor) * frequencies, 1.0


def _yarn(rope, size, length):
    frequencies, _ = _default(rope, size, length)
    theta, original = rope["rope_theta"], _number(rope, "original_max_position_embeddings")
    factor = _stretch(rope)

    def dimension(turns):  # of the frequency that makes so many turns in the original context
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(_number(rope, "beta_fast", 32)), dimension(_number(rope, "beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float64, device="cpu") - low) / (high - low if high != low else 0.001)
    stretched = ramp.clamp(0, 1)

    def magnitude(mscale):
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = magnitude(_number(rope, "mscale")) / magnitude(_number(rope, "mscale_all_dim"))
    else:
        attention_factor = magnitude(1)
    return frequencies * (stretched / factor + 1 - stretched), _number(rope, "attention_factor", attention_factor)


def _longrope(rope, size, length):
    frequencies, _ = _default(rope, size, length)
    original, factor = _number(rope, "original_max_position_embeddings", above=1), _stretch(rope)
    name = "long_factor" if length > original else "short_factor"
    factors = rope.get(name)
    if not isinstance(factors, (list, tuple)) or len(factors) != size // 2 or not all(_positive(f) for f in factors):
        raise ValueError(f"{name} is {str(factors)[:60]}, expected a list of {size // 2} positive numbers")
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = torch.tensor(factors, dtype=torch.float64, device="cpu")
    return frequencies / factors, _number(rope, "attention_factor", attention_factor)


KINDS = {
    "default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
}  # fmt: skip


def _stretch(rope):
    """The factor, or where a config leaves it out the ratio of the lengths after and before the stretching."""
    if "factor" in rope:
        return _number(rope, "factor")
    return _number(rope, "max_position_embeddings") / _number(rope, "original_max_position_embeddings")


def _positive(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e15


def _number(rope, name, default=None, above=0):
    """rope[name], which has to be a number greater than `above`; `default` where it is missing."""
    value = rope.get(name)
    value = default if value is None else value
    if not _positive(value) or value <= above:
        raise ValueError(f"{name} is {str(value)[:60]}, expected a number above {above} for rope_type {rope['rope_type']}")
    return value
