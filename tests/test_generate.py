"""generate: against transformers' greedy search, against itself, and its draws against probabilities computed in numpy."""

import importlib
import math
import types

import numpy as np
import pytest
import torch
from trillama.model import Llama, generate
from trillama.model.generation import sample

flags = importlib.import_module("trillama.model.generation")
pytestmark = pytest.mark.host

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": None,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 3, 5, 7, 9, 11]}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "phi3": {"original_max_position_embeddings": 16, "rope_scaling": LONGROPE, "pad_token_id": None},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": None},
}
PROMPTS = [[5, 17, 3, 88, 21, 9, 40], [11], [2, 2, 60, 71], [33, 8, 4, 4, 4, 90, 13, 55, 62, 7, 1, 30]]


def tiny(family="llama", **changes):
    """A model whose greedy search does not run into a loop at once: larger weights than a fresh model has."""
    torch.manual_seed(3)
    model = Llama({"model_type": family, **SIZES, **FAMILIES[family], **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.25)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers(family):
    transformers = pytest.importorskip("transformers")
    name = {"llama": "Llama", "mistral": "Mistral", "phi3": "Phi3", "qwen3": "Qwen3", "smollm3": "SmolLM3"}[family]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[family], "bos_token_id": None})
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.25)
    ours = Llama(config)
    ours.load_state_dict(theirs.state_dict())
    for prompt, penalty in zip(PROMPTS, (None, 1.3, None, 0.9)):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(ids, max_new_tokens=25, do_sample=False, repetition_penalty=penalty)
        got = generate(ours, ids, max_new_tokens=25, repetition_penalty=penalty)
        assert got.tolist() == wanted[:, len(prompt) :].tolist()
        assert len(set(got[0].tolist())) > 3


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "smollm3"])
def test_batch_of_unequal_prompts(family, use_cache):
    model = tiny(family)
    together = generate(model, PROMPTS, max_new_tokens=20, use_cache=use_cache)
    assert together.dtype == torch.int64
    assert together.shape == (4, 20)
    for row, prompt in zip(together, PROMPTS):
        assert row.tolist() == generate(model, [prompt], max_new_tokens=20)[0].tolist()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[3:], PROMPTS], ids=["short", "long", "batch"])
def test_longrope_with_and_without_cache(prompts):
    """The keys in the cache were made with the short factors when the sequence outgrows them."""
    model = tiny("phi3")
    cached = generate(model, prompts, max_new_tokens=30)
    assert cached.tolist() == generate(model, prompts, max_new_tokens=30, use_cache=False).tolist()


def test_inputs():
    model = tiny()
    wanted = generate(model, [PROMPTS[0]] * 2, max_new_tokens=5).tolist()
    for ids in (torch.tensor([PROMPTS[0]] * 2), torch.tensor([PROMPTS[0]] * 2, dtype=torch.int32), np.array([PROMPTS[0]] * 2)):
        assert generate(model, ids, max_new_tokens=5).tolist() == wanted
    assert generate(model, (tuple(PROMPTS[0]),) * 2, max_new_tokens=5).tolist() == wanted
    assert generate(model, PROMPTS, max_new_tokens=0).shape == (4, 0)
    assert generate(model, [[1] * 60], max_new_tokens=4).shape == (1, 4)


def test_ends():
    model = tiny()
    free = generate(model, PROMPTS, max_new_tokens=20)
    eos = [free[0, 6].item(), free[2, 3].item()]
    rows = []
    for row in free.tolist():
        stop = next((i for i, token in enumerate(row) if token in eos), 19)
        rows.append(row[: stop + 1] + [row[stop]] * (19 - stop))
    longest = max(next((i + 1 for i, token in enumerate(row) if token in eos), 20) for row in free.tolist())
    assert any(row[-1] == row[-2] for row in rows)
    for ends in (eos, tuple(eos), set(eos), torch.tensor(eos)):
        assert generate(model, PROMPTS, max_new_tokens=20, eos=ends).tolist() == [row[:longest] for row in rows]
    one = generate(model, PROMPTS[:1], max_new_tokens=20, eos=eos[0])
    assert one.tolist() == [free[0, : free[0].tolist().index(eos[0]) + 1].tolist()]

    own = tiny(eos_token_id=eos)
    own.load_state_dict(model.state_dict())
    assert generate(own, PROMPTS, max_new_tokens=20).tolist() == [row[:longest] for row in rows]
    assert generate(own, PROMPTS, max_new_tokens=20, eos=[]).tolist() == free.tolist()


def test_no_step_after_the_last_end():
    model, calls = tiny(), []
    eos = generate(model, PROMPTS[:1], max_new_tokens=5)[0, -1].item()
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    n = generate(model, PROMPTS[:1], max_new_tokens=40, eos=eos).shape[1]
    assert len(calls) == n


def test_late_flag(monkeypatch):
    """As on a GPU, where the host learns of the end of a step while the next one runs: the same ids, the same stream."""
    model, steps = tiny(), []
    eos = generate(model, PROMPTS, max_new_tokens=20)[:, 5].tolist()
    wanted = generate(model, PROMPTS, max_new_tokens=20, eos=eos).tolist()

    class Late(flags._Flag):
        def __init__(self, flag):
            self.late, self.value, self.arrived = True, flag, types.SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(flags, "_Flag", Late)
    assert generate(model, PROMPTS, max_new_tokens=20, eos=eos, stream=steps.append).tolist() == wanted
    assert len(steps) == len(wanted[0])


def test_stream():
    model, steps = tiny(), []
    ids = generate(model, PROMPTS, max_new_tokens=9, stream=lambda new: steps.append(new.clone()))
    assert torch.stack(steps, 1).tolist() == ids.tolist()
    steps.clear()
    ids = generate(model, PROMPTS, max_new_tokens=20, eos=ids[0, 2].item(), stream=lambda new: steps.append(new.clone()))
    assert torch.stack(steps, 1).tolist() == ids.tolist()


def test_seeds():
    model = tiny()

    def draw(seed, **options):
        return generate(model, PROMPTS, max_new_tokens=12, temperature=1.5, seed=seed, **options).tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, use_cache=False) == draw(1)
    torch.manual_seed(7)
    first = draw(None)
    torch.manual_seed(7)
    assert draw(None) == first
    assert draw(None) != first
    assert draw(1, top_k=1) == generate(model, PROMPTS, max_new_tokens=12).tolist()
    assert generate(model, PROMPTS, max_new_tokens=12, temperature=1e-9).tolist() == draw(1, top_k=1)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    draw(3)
    assert torch.equal(before, torch.random.get_rng_state())


# --- sampling --------------------------------------------------------------------------------------------------------


def probabilities(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """What one row may be drawn with, in float64 by way of sorted lists."""
    p = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    keep = set(order[:top_k])
    p = np.array([x if i in keep else 0.0 for i, x in enumerate(p)])
    p /= p.sum()
    if top_p is not None:
        total, keep = 0.0, set()
        for i in order:
            if total < top_p and p[i] > 0:
                keep.add(i)
                total += p[i]
        p = np.array([x if i in keep else 0.0 for i, x in enumerate(p)])
        p /= p.sum()
    if min_p is not None:
        p = np.where(p >= min_p * p.max(), p, 0.0)
    return p / p.sum()


OPTIONS = [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 0.7}, {"top_p": 1e-6},
    {"top_p": 1.0}, {"min_p": 0.1}, {"min_p": 1.0}, {"min_p": 0.0},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.08},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distribution(options):
    """100,000 draws: nothing that has no probability, and frequencies within 5 standard deviations."""
    rows, n = 2, 100_000
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(rows, 24)) * 2).float()
    generator = torch.Generator().manual_seed(11)
    options = {"temperature": 1.0, **options}
    for row in logits:
        p = probabilities(row.double().numpy(), **options)
        ids = sample(row.expand(n, -1), generator=generator, **options)
        counts = torch.bincount(ids, minlength=24).numpy()
        assert counts[p == 0].sum() == 0
        deviation = np.sqrt(n * p * (1 - p)) + 1e-9
        assert (np.abs(counts - n * p) <= 5 * deviation + 1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kept_ids_are_transformers(options):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(2)) * 3
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper, "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper, "min_p": transformers.MinPLogitsWarper,
    }  # fmt: skip
    scores = logits
    for name, value in {"temperature": 1.0, **options}.items():
        scores = warpers[name](value)(None, scores)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for _ in range(300):
        ids = sample(logits, **{"temperature": 1.0, **options})
        seen[torch.arange(50), ids] = True
    assert not (seen & (scores == -math.inf)).any()
    likely = scores.softmax(-1) > 0.1
    assert (seen | ~likely).all()


def test_extreme_logits():
    """No infinity, no NaN, whatever comes out of a model and however cold the temperature."""
    logits = torch.tensor([[-1e30, 0.0, 1e30], [-math.inf, -math.inf, 2.0], [3e38, -3e38, 0.0]])
    for temperature in (1e-5, 1e-3, 1.0, 1e4):
        for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
            assert sample(logits, temperature, **options).tolist() == [2, 2, 0]


def test_unlucky_draws(monkeypatch):
    """A clock of exactly 0 must not let an id of probability 0 win."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert sample(torch.tensor([[-200.0, 0.0, -math.inf]]), 1.0).tolist() == [1]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": []}, "input_ids is [], expected a list of lists"),
        ({"input_ids": [1, 2]}, "input_ids is [1, 2], expected a list of lists"),
        ({"input_ids": "hello"}, "input_ids is 'hello'"),
        ({"input_ids": [[1], []]}, "input_ids[1] is empty"),
        ({"input_ids": [[1, 97]]}, "input_ids[0][1] is 97, expected a token id from 0 to 96"),
        ({"input_ids": [[-1]]}, "input_ids[0][0] is -1"),
        ({"input_ids": [[1.5]]}, "input_ids[0][0] is 1.5"),
        ({"input_ids": torch.ones(2, 3)}, "input_ids is torch.float32 (2, 3), expected integers"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, "input_ids is torch.int64 (3,)"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, "input_ids[0] is empty"),
        ({"input_ids": [[1] * 70]}, "input_ids and max_new_tokens come to 70 + 4 tokens, but the model has 64 positions"),
        ({"max_new_tokens": 63}, "input_ids and max_new_tokens come to 2 + 63 tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected an integer from 0 on"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"temperature": -0.1}, "temperature is -0.1, expected a number from 0 on"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0, expected an integer from 1 on"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a number above 0, at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"eos": 97}, "eos is 97, expected a token id from 0 to 96"),
        ({"eos": [1, "x"]}, "eos is [1, 'x']"),
    ],
    ids=str,
)
def test_errors(options, message):
    with pytest.raises(ValueError) as error:
        generate(tiny(), **{"input_ids": [[1, 2]], "max_new_tokens": 4, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
