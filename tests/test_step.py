"""The decode step as the model makes it: how many kernels it launches, and that a row does not depend on its neighbours."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trillama.kernels import use_backend
from trillama.kernels.decode import counters
from trillama.kernels.dispatch import observe
from trillama.kernels.sampling import start
from trillama.model import KVCache, Llama
from trillama.model.generation import Step

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


@pytest.mark.few(1)
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


class Library(TorchDispatchMode):
    """The ops of PyTorch itself that put a kernel on a GPU: those that are neither a view nor uninitialised memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not str(function).startswith(("aten.empty", "aten.new_empty", "aten._unsafe_view")):
            self.names.append(str(function))
        return result


OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
}


@pytest.mark.host
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ["llama", "phi3"])
def test_three_launches_beside_the_layers(device, shape, options, batch, monkeypatch):
    """From id to id, PyTorch's own kernels counted too: the embedding with the lengths, the head with its norm, the choice."""
    default = {"temperature": 0.0, **dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty"))}
    model, made = make(shape).to(device), []
    cache, prompt = KVCache(model.config, batch, 64, device=device), torch.randint(64, (batch, 9), device=device)
    ends = torch.tensor([0], device=device)

    def note(kernel, *_):  # and leave it out
        made.append(getattr(kernel, "fn", kernel).__name__)
        return True

    with torch.inference_mode(), counters(device):
        with use_backend("reference"):
            step = Step(model, cache, prompt, start(1, batch, device), ends, {**default, **OPTIONS[options]}, True)
            step.choose(model.lm_head(model.hidden_states(prompt, cache)[:, -1]))
        model.rope(9, 64, prompt.device)
        # As it is without a mode: our functions are called past the dispatcher, so that the mode sees what they call.
        monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
        with use_backend("triton"), observe(note), Library() as library:
            step.work()
    layer = ["_linear_kernel", "_rope_kernel", "_decode_kernel", *3 * ["_linear_kernel"]]
    assert made == ["_embed_kernel", *LAYERS * layer, "_linear_kernel", "_choose_kernel"]
    assert library.names == []
    assert len(made) + len(library.names) <= 6 * LAYERS + 4


@pytest.mark.host
def test_kernels_of_the_library_would_be_seen(device):
    with Library() as library:
        torch.zeros(3, device=device).add_(1)[:, None].sum()
    assert library.names == ["aten.zeros.default", "aten.add_.Tensor", "aten.sum.default"]


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
