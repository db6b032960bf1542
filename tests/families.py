"""Tiny models of transformers' families with random weights, on eager and on trillama, and their inputs."""

import copy

import pytest
import rounding
import torch
from trillama.bench import oracle

transformers = pytest.importorskip("transformers")
trillama = pytest.importorskip("trillama.kernels.compat.transformers")

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("Llama", {}),
    "llama mha": ("Llama", dict(num_key_value_heads=4, mlp_bias=True, attention_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral window": ("Mistral", dict(sliding_window=5)),
    "phi3": ("Phi3", dict(partial_rotary_factor=0.5, sliding_window=None)),
    "phi3 window": ("Phi3", dict(sliding_window=6)),
    "qwen2": ("Qwen2", {}),
    "qwen2 mixed": ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "gemma": ("Gemma", dict(head_dim=16)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=5, attn_logit_softcapping=20.0, query_pre_attn_scalar=16)),
    "gemma3": ("Gemma3", dict(head_dim=16, sliding_window=4, query_pre_attn_scalar=16, layer_types=LAYERS)),
    "smollm3": ("SmolLM3", {}),
}


def models(family, dtype=torch.float32, **changes):
    """(on eager, on trillama's attention and patched) with the same random weights."""
    name, options = FAMILIES[family]
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))(**{**SIZES, **options, **changes})
    make = getattr(transformers, name + "ForCausalLM")._from_config
    theirs = make(copy.deepcopy(config), attn_implementation="eager").to(dtype)
    ours = make(copy.deepcopy(config), attn_implementation="trillama").to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), trillama.patch(ours.eval())


def tokens(B=3, S=13):
    return torch.randint(3, 96, (B, S))


def padding(side, B=3, S=13):
    """Padded on the left, the right, or (a row each) on both."""
    mask = torch.ones(B, S, dtype=torch.long)
    for row in range(1, B):
        n = 4 + 2 * row
        if side == "left" or (side == "mixed" and row % 2):
            mask[row, :n] = 0
        else:
            mask[row, S - n :] = 0
    return mask


def agree(ours, theirs, where=None):
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    assert oracle.error(ours, theirs.double()) <= rounding.logits()
