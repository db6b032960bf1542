"""The decode step as the model makes it: how many kernels it launches, and that a row does not depend on its neighbours."""

import os

import pytest
import torch
from trillama.model import KVCache, Llama

SHAPES = {
    "llama": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
    "phi3": {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2},
}
LAYERS = 2


def make(shape):
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": LAYERS, "head_dim": 32}
    torch.manual_seed(0)
    return Llama({**sizes, "initializer_range": 0.2, "max_position_embeddings": 128, "eos_token_id": 0, **SHAPES[shape]}).eval()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_six_launches_a_layer(triton, device, shape, batch):
    model = make(shape).to(device)
    cache = KVCache(model.config, batch, 64, device=device)
    with torch.inference_mode():
        model(torch.randint(64, (batch, 9), device=device), cache)
        triton.names.clear()
        model(torch.randint(64, (batch, 1), device=device), cache)
    layer = ["_linear_kernel", "_rope_kernel", "_decode_kernel", *3 * ["_linear_kernel"]]
    assert triton.names == LAYERS * layer + ["_rms_norm_kernel", "_linear_kernel"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there a BLAS sums one row and eight in different order")
def test_a_row_does_not_depend_on_its_neighbours(triton, device, dtype):
    """Bit for bit, three steps of one, three and eight rows from the same cache."""
    model = make("llama").to(device=device, dtype=dtype)
    prompt, steps = torch.randint(64, (8, 11), device=device), torch.randint(64, (3, 8, 1), device=device)
    start = KVCache(model.config, 8, 64, dtype, device)
    with torch.inference_mode():
        model.hidden_states(prompt, start)

    def decode(rows):
        cache = KVCache(model.config, rows, 64, dtype, device)
        for mine, given in zip((*cache.k, *cache.v, cache.lengths), (*start.k, *start.v, start.lengths)):
            mine.copy_(given[:rows])
        cache.filled = start.filled
        with torch.inference_mode():
            return [model.hidden_states(step[:rows], cache) for step in steps]

    together = decode(8)
    for rows in (1, 3):
        assert all(torch.equal(few, many[:rows]) for few, many in zip(decode(rows), together))
