"""generate: against transformers' greedy search, against itself, and its draws against probabilities computed in numpy."""

import importlib
import math
import types

import numpy as np
import pytest
import torch
from trillama.kernels import sampling
from trillama.kernels.sampling import GOLDEN, advance, clocks, penalise, sample, start, warp
from trillama.model import KVCache, Llama, generate

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
        # Without a cache: transformers 5.17 loses all but the last token where a cached Phi-3 changes to its long factors.
        wanted = theirs.generate(ids, max_new_tokens=25, do_sample=False, repetition_penalty=penalty, use_cache=False)
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
    step = model.step
    model.step = lambda *arguments: calls.append(1) or step(*arguments)
    n = generate(model, PROMPTS[:1], max_new_tokens=40, eos=eos).shape[1]
    assert len(calls) == n - 1  # the first id follows from the prompt


def test_late_flag(monkeypatch):
    """As on a GPU, where the host learns of the end of a step while the next one runs: the same ids, the same stream."""
    model, steps = tiny(), []
    eos = generate(model, PROMPTS, max_new_tokens=20)[:, 5].tolist()
    wanted = generate(model, PROMPTS, max_new_tokens=20, eos=eos).tolist()

    class Late(flags._Flag):
        def __init__(self, flag):
            self.late, self.value, self.arrived = True, flag.clone(), types.SimpleNamespace(synchronize=lambda: None)

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
    options = {"temperature": 1.0, **options}
    for row in logits:
        p = probabilities(row.double().numpy(), **options)
        ids = sample(row.expand(n, -1), start(11, n, "cpu"), **options)
        counts = torch.bincount(ids, minlength=24).numpy()
        assert counts[p == 0].sum() == 0
        deviation = np.sqrt(n * p * (1 - p)) + 1e-9
        assert (np.abs(counts - n * p) <= 5 * deviation + 1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_warp_is_transformers(options):
    """In float64, to the last bits, and the ids that are cut off exactly."""
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper, "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper, "min_p": transformers.MinPLogitsWarper,
    }  # fmt: skip
    wanted = logits
    for name, value in {"temperature": 1.0, **options}.items():
        wanted = warpers[name](value)(None, wanted)
    got = warp(logits, **options)
    assert torch.equal(got == -math.inf, wanted == -math.inf)
    torch.testing.assert_close(got.softmax(-1), wanted.softmax(-1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_penalty_is_transformers(penalty):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(20, 60, generator=generator, dtype=torch.float64) * 3
    ids = torch.randint(0, 60, (20, 30), generator=generator)
    seen = torch.zeros(20, 60, dtype=torch.bool).scatter_(1, ids, True)
    assert not seen.all()
    wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalise(logits, seen, penalty), wanted)
    assert torch.equal(sample(logits, start(0, 20, "cpu"), temperature=0, repetition_penalty=penalty, seen=seen), wanted.argmax(-1))


def test_extreme_logits():
    """No infinity, no NaN, whatever comes out of a model and however cold the temperature."""
    logits = torch.tensor([[-1e30, 0.0, 1e30], [-math.inf, -math.inf, 2.0], [3e38, -3e38, 0.0]])
    for temperature in (1e-5, 1e-3, 1.0, 1e4):
        for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
            assert sample(logits, start(1, 3, "cpu"), temperature=temperature, **options).tolist() == [2, 2, 0]


def test_unlucky_draws(monkeypatch):
    """Neither a clock that runs out at once nor one that never does lets an id of probability 0 win."""
    for hashed in (0, -1, 1):
        monkeypatch.setattr(sampling, "mix", lambda z, hashed=hashed: torch.full_like(z, hashed))
        assert 0 < clocks(torch.tensor([5]), 3).min() < math.inf
        assert sample(torch.tensor([[-200.0, 0.0, -math.inf]]), torch.tensor([5])).tolist() == [1]


def splitmix64(state):
    """In Python's own integers, as published: https://prng.di.unimi.it/splitmix64.c"""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_clocks():
    """The numbers are those of the formula, and they are distributed as they should be."""
    state = advance(start(42, 3, "cpu"))
    got = clocks(state, 1000)
    for row in range(3):
        counter = splitmix64(splitmix64(42) + row) + GOLDEN
        uniform = [np.float32((splitmix64(splitmix64(counter) + id * GOLDEN) // 2 + 0.5) / 2**63) for id in range(1000)]
        np.testing.assert_allclose(got[row].numpy(), -np.log1p(-np.array(uniform, np.float64)), rtol=1e-6)
    many = clocks(start(7, 50, "cpu"), 20_000).double().flatten()
    for power in (1, 2, 3):  # moments of the exponential distribution, within 5 standard deviations
        deviation = math.sqrt((math.factorial(2 * power) - math.factorial(power) ** 2) / len(many))
        assert abs((many**power).mean() - math.factorial(power)) < 5 * deviation
    steps, state = [], start(9, 1, "cpu")
    for _ in range(30):
        steps.append(clocks(state, 20_000)[0])
        state = advance(state)
    steps = torch.stack(steps)
    assert (steps.corrcoef() - torch.eye(30)).abs().max() < 5 / math.sqrt(20_000)


def test_a_row_is_the_same_whatever_its_neighbours():
    model = tiny()
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.2}
    together = generate(model, [PROMPTS[0]] * 4, **options).tolist()
    assert len({tuple(row) for row in together}) == 4
    for count in (1, 2, 3):
        assert generate(model, [PROMPTS[0]] * count, **options).tolist() == together[:count]
    assert generate(model, [PROMPTS[3], PROMPTS[0], PROMPTS[1]], **options)[1].tolist() == together[1]


def test_sampling_reads_nothing_on_the_host():
    """What a CUDA graph can hold: no number is read, no shape depends on data; torch.compile finds one graph in it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    logits, state, seen = torch.randn(3, 50), start(3, 3, "cpu"), torch.rand(3, 50) < 0.3
    with Watch():
        wanted = sample(logits, state, seen=seen, **options)
        advance(state)
    assert not [name for name in Watch.seen if any(word in name for word in ("local_scalar", "nonzero", "unique", "masked_select"))]
    graph = torch.compile(sample, backend="eager", fullgraph=True)
    assert torch.equal(graph(logits, state, seen=seen, **options), wanted)


# --- the cache of a caller -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("held", [1, 9, 11, 15, 17])
def test_cache_that_holds_the_beginning(family, held):
    """Only what follows is computed, and the ids are those of a new start (across the boundary of longrope too)."""
    model, prompt, counted = tiny(family), (PROMPTS[3] * 2)[:18], []
    cache = KVCache(model.config, 1, 40)
    with torch.no_grad():
        model(torch.tensor([prompt[:held]]), cache)
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: counted.append(args[0].shape[1]))
    got = generate(model, [prompt], max_new_tokens=15, cache=cache)
    switched = family == "phi3" and held <= 16
    assert counted[0] == (18 if switched else 18 - held)
    assert got.tolist() == generate(model, [prompt], max_new_tokens=15).tolist()
    assert cache.filled == 18 + 14


@pytest.mark.parametrize("held", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_cache_that_holds_the_beginning_on_triton(triton, device, held):
    model, prompt = tiny().to(device), (PROMPTS[3] * 2)[:18]
    cache = KVCache(model.config, 1, 40, device=device)
    with torch.no_grad():
        model(torch.tensor([prompt[:held]], device=device), cache)
    got = generate(model, [prompt], max_new_tokens=2, cache=cache).tolist()
    assert any("decode" in name for name in triton.names)
    assert got == generate(tiny(), [prompt], max_new_tokens=2).tolist()


def test_stream_may_return_anything_else():
    model = tiny()
    wanted = generate(model, PROMPTS, max_new_tokens=3).tolist()
    for said in (5, True, "abc", {}):
        assert generate(model, PROMPTS, max_new_tokens=3, stream=lambda ids, said=said: said).tolist() == wanted


def test_stream_may_end_rows():
    model, free = tiny(), generate(tiny(), PROMPTS, max_new_tokens=12).tolist()
    steps = []

    def end(ids):
        steps.append(ids.tolist())
        return [len(steps) >= limit for limit in (3, 5, 1, 4)]

    got = generate(model, PROMPTS, max_new_tokens=12, eos=[], stream=end).tolist()
    assert len(steps) == 5
    assert got == [row[:n] + [row[n - 1]] * (5 - n) for row, n in zip(free, (3, 5, 1, 4))]


# --- errors ----------------------------------------------------------------------------------------------------------


def full(tokens):
    cache = KVCache(SIZES, 1, 9)
    cache.advance(1, tokens)
    return cache


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
        ({"cache": KVCache(SIZES, 1, 6), "use_cache": False}, "cache is given, expected None with use_cache=False"),
        ({"cache": KVCache(SIZES, 1, 5)}, "cache has 1 rows of 5, expected 1 of at least 6"),
        ({"cache": KVCache(SIZES, 2, 9)}, "cache has 2 rows of 9, expected 1 of at least 6"),
        ({"cache": full(2)}, "cache holds 2 tokens, expected fewer than the shortest row, 2"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"eos": 97}, "eos is 97, expected a token id from 0 to 96"),
        ({"eos": [1, "x"]}, "eos is [1, 'x']"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors(options, message):
    with pytest.raises(ValueError) as error:
        generate(tiny(), **{"input_ids": [[1, 2]], "max_new_tokens": 4, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
