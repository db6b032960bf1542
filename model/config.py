"""What a config.json says, checked: the sizes of a model, and the families as a table of differences from Llama.

A field that may change the model and is not known here is refused by name. The names are Hugging Face's.
"""

from dataclasses import dataclass, fields
from typing import Optional

from ..kernels.frequencies import context_length, rope_frequencies, rope_parameters
from .limits import brief, check


@dataclass(frozen=True)
class Family:
    """How a family differs from the others: the optional fields that it knows, and what no field says."""

    optional: dict  # with the defaults of transformers
    output_bias: bool = True  # whether attention_bias means o_proj too
    qk_norm: bool = False  # RMSNorm of each head of q and k before the rotation


COMMON = {
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "tie_word_embeddings": False, "eos_token_id": 2, "sliding_window": None, "rope_theta": 10000.0,
    "rope_scaling": None, "rope_parameters": None, "rope_interleaved": False, "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}  # fmt: skip
BIASES = {"attention_bias": False, "mlp_bias": False}
LAYERS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
QWEN = {**LAYERS, "max_position_embeddings": 32768, "eos_token_id": None}
FAMILIES = {
    "llama": Family(BIASES),
    "mistral": Family({"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}),
    "phi3": Family({"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000}),
    "qwen2": Family({**QWEN, "attention_bias": True}, output_bias=False),
    "qwen3": Family({**QWEN, "attention_bias": False, "head_dim": 128}, qk_norm=True),
    "smollm3": Family({
        **BIASES, **LAYERS, "sliding_window": None, "max_position_embeddings": 32768, "rope_theta": 2e6, "eos_token_id": 128001,
        "tie_word_embeddings": True, "no_rope_layers": None, "no_rope_layer_interval": 4,
    }),
}  # fmt: skip
LARGEST = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 1024,
    "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 256, "max_position_embeddings": (1 << 31) - 1,
}  # fmt: skip
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "eos_token_id")  # null is not the same as missing
# What says nothing about the forward pass: provenance, training, how to generate, the plumbing of transformers.
INERT = """
    model_type architectures auto_map dtype torch_dtype transformers_version use_cache bos_token_id pad_token_id unk_token_id
    pretraining_tp attention_dropout hidden_dropout resid_pdrop embd_pdrop is_llama_config id2label label2id problem_type
    tokenizer_class return_dict chunk_size_feed_forward output_attentions output_hidden_states task_specific_params
    finetuning_task bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix
    remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens temperature tf_legacy_loss
    tie_encoder_decoder top_k top_p typical_p torchscript use_bfloat16 pruned_heads attn_implementation
"""
INERT = frozenset(INERT.split())
INERT_PREFIXES = ("_", "unsloth", "transformers.js")


@dataclass(frozen=True)
class Config:
    """A model's sizes under Hugging Face's names. Made by `Config.read`, which checks them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    context_length: int  # positions that may be used: max_position_embeddings, or what a scaling makes of it
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope_parameters: dict  # flat, in the dialect of transformers 5
    rope_interleaved: bool  # rotary pairs (0, 1), (2, 3), ... as in Meta's files
    windows: tuple[Optional[int], ...]  # of each layer
    rotary: tuple[bool, ...]  # whether a layer rotates q and k
    eos_token_id: tuple[int, ...]

    @classmethod
    def read(cls, source):
        """The Config of a config.json's dict, or of any object that has its fields; a ValueError names what does not fit."""
        if isinstance(source, cls):
            return source
        if not isinstance(source, dict):
            source = source.to_dict() if hasattr(source, "to_dict") else vars(source)
        family, given = _known_fields(source)
        given["rope_parameters"] = rope = rope_parameters(given)
        values = {
            **given,
            "context_length": min(context_length(rope), LARGEST["max_position_embeddings"]),
            "qkv_bias": given.get("attention_bias", False),
            "output_bias": given.get("attention_bias", False) and family.output_bias,
            "mlp_bias": given.get("mlp_bias", False),
            "qk_norm": family.qk_norm,
            "windows": _windows(given),
            "rotary": _rotary(given),
            "eos_token_id": _token_ids(given["eos_token_id"]),
        }
        config = cls(**{field.name: values[field.name] for field in fields(cls)})
        for length in (1, config.context_length):  # bad factors, for short or for long sequences, are met here and not midway
            rope_frequencies(rope, config.head_dim, length)
        return config


def _known_fields(source):
    """(family, all fields that it knows), checked; what is missing has the family's default."""
    name = source.get("model_type") or "llama"
    _check("model_type", name, isinstance(name, str) and name in FAMILIES, f"one of {', '.join(FAMILIES)}")
    known = {**dict.fromkeys(REQUIRED), **COMMON, **FAMILIES[name].optional}
    for field, value in source.items():
        if value and field not in known and field not in INERT and not field.startswith(INERT_PREFIXES):
            raise ValueError(f"config: {field} is {brief(value)}, a field that is not supported for the model_type {name}")
    given = {"model_type": name}
    for field, default in known.items():
        value = source.get(field, default)
        given[field] = default if value is None and field not in NULLABLE else value
        if isinstance(default, bool):
            _check(field, given[field], isinstance(given[field], bool), "true or false")
    for field in REQUIRED:
        _check_integer(field, given[field], LARGEST[field])
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    if given["head_dim"] is None:
        _check("hidden_size", hidden, hidden % heads == 0, f"a multiple of num_attention_heads = {heads}")
        given["head_dim"] = hidden // heads
    if given["num_key_value_heads"] is None:
        given["num_key_value_heads"] = heads
    for field, largest in LARGEST.items():
        _check_integer(field, given[field], largest)
    groups = heads % given["num_key_value_heads"] == 0
    _check("num_key_value_heads", given["num_key_value_heads"], groups, f"a divisor of num_attention_heads = {heads}")
    _check("head_dim", given["head_dim"], given["head_dim"] % 2 == 0, "an even number")
    _check("hidden_act", given["hidden_act"], given["hidden_act"] in ("silu", "swish"), "'silu'")
    for field in ("rms_norm_eps", "initializer_range"):
        _check(field, given[field], type(given[field]) in (int, float) and 0 <= given[field] < 1, "a number from 0 to below 1")
    return FAMILIES[name], given


def _windows(given):
    """For each layer its sliding window: the same on all layers, or on those that `layer_types` or `max_window_layers` name."""
    layers, window, types = given["num_hidden_layers"], given["sliding_window"], given.get("layer_types")
    if not given.get("use_sliding_window", True):
        window = None
    if window is not None:
        _check_integer("sliding_window", window, LARGEST["max_position_embeddings"])
    if "layer_types" not in given or (window is None and types is None):
        return (window,) * layers
    if types is None and "no_rope_layers" in given:  # SmolLM3 restricts the layers that have no positions
        types = ["full_attention" if rotary else "sliding_attention" for rotary in _rotary(given)]
    elif types is None:
        first = given["max_window_layers"]
        _check("max_window_layers", first, type(first) is int and first >= 0, "an integer from 0 on")
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    kinds = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    fits = isinstance(types, (list, tuple)) and len(types) >= layers and all(kind in kinds for kind in types)
    _check("layer_types", types, fits, f"{' or '.join(kinds)} for each of {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types[:layers])


def _rotary(given):
    """For each layer whether it has a rotary embedding: `no_rope_layers` holds 1 where it has one."""
    layers = given["num_hidden_layers"]
    flags = given.get("no_rope_layers")
    if flags is None:
        interval = given.get("no_rope_layer_interval", layers + 1)
        _check_integer("no_rope_layer_interval", interval, LARGEST["num_hidden_layers"] + 1)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    fits = isinstance(flags, (list, tuple)) and len(flags) >= layers and all(flag in (0, 1) for flag in flags)
    _check("no_rope_layers", flags, fits, f"0 or 1 for each of {layers} layers")
    return tuple(bool(flag) for flag in flags[:layers])


def _token_ids(value):
    ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    _check("eos_token_id", value, all(type(i) is int and i >= 0 for i in ids), "a token id or a list of them")
    return tuple(ids)


def _check_integer(field, value, largest):
    _check(field, value, type(value) is int and 1 <= value <= largest, f"an integer from 1 to {largest}")


def _check(field, value, fits, expected):
    check(f"config: {field}", value, fits, expected)
