"""The decode step as one unit: what a CUDA graph holds of it, replayed; that no host reads it; what has ended costs nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trillama.kernels import sampling, use_backend
from trillama.kernels.dispatch import INTERPRETED
from trillama.model import KVCache, Llama, generate, generation, warmup

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 256,
    "eos_token_id": 0,
}  # fmt: skip
PROMPTS = [[5, 9, 11], [7], [3, 1, 4, 1, 5]]
SAMPLED = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3}
OPTIONS = pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])


pytestmark = pytest.mark.host


def make(**changes):
    torch.manual_seed(1)
    return Llama({**CONFIG, **changes}).eval()


@pytest.fixture
def model():
    """On the reference: an op of ours is one call for a tracer or a dispatch mode, whatever computes it."""
    with use_backend("reference"):
        yield make()


@pytest.fixture
def graphs(monkeypatch):
    """In place of CUDA graphs, which record what reaches the device and nothing else, torch's tracer: a list of the captures."""
    from torch.fx.experimental.proxy_tensor import make_fx

    made, before = [], generation.Step.__init__

    def capture(work):
        traced = make_fx(lambda: work())()
        made.append({"replays": 0, "ops": [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]})

        def replay():
            made[-1]["replays"] += 1
            traced()

        return replay

    def init(self, *arguments):
        before(self, *arguments)
        self.graphs = True

    def undone(work):
        """Tracing runs the work, capturing does not: what it did to the step's tensors is taken back, not what the host counts."""
        step = work.__self__
        tensors = [t for t in (step.ids, step.ended, step.finished, step.state, step.seen, step.cache.lengths) if t is not None]
        kept = [t.clone() for t in tensors]
        replay = capture(work)
        for tensor, value in zip(tensors, kept):
            tensor.copy_(value)
        return replay

    monkeypatch.setattr(generation, "capture", undone)
    monkeypatch.setattr(generation.Step, "__init__", init)
    return made


@OPTIONS
def test_replays_are_the_steps(model, graphs, options, monkeypatch):
    with monkeypatch.context() as plain:
        plain.setattr(generation.Step, "__call__", lambda self, width: self.work())
        expected = generate(model, PROMPTS, max_new_tokens=24, **options)
    assert graphs == []
    assert torch.equal(generate(model, PROMPTS, max_new_tokens=24, **options), expected)
    (graph,) = graphs
    assert graph["replays"] == expected.shape[1] - 2  # after the prompt's id and the step that compiles
    assert any("decode_attention" in op for op in graph["ops"])


def test_other_frequencies_are_another_graph(graphs):
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 10000.0}
    longrope = {"model_type": "phi3", "original_max_position_embeddings": 16, "rope_scaling": factors, "pad_token_id": 0}
    model = make(**longrope)
    ids = generate(model, [[5, 9, 11]], max_new_tokens=24, eos=[])
    assert len(graphs) == 2
    assert torch.equal(ids, generate(model, [[5, 9, 11]], max_new_tokens=24, eos=[], use_cache=False))


class Watch(TorchDispatchMode):
    """The ops of a block with the sizes of what they make; reading a value is refused."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "the host reads a value"
        result = function(*args, **(kwargs or {}))
        sizes = [tuple(t.shape) for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]
        self.seen.append((str(function), sizes))
        return result


@OPTIONS
def test_a_step_reads_nothing_and_allocates_the_same_each_time(model, options):
    default = dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty"))
    options = {**default, "temperature": 0.0, **options}
    options.pop("seed", None)
    cache = KVCache(model.config, 3, 128)
    prompt = torch.randint(64, (3, 4))
    state = sampling.start(1, 3, "cpu")
    with torch.inference_mode():
        step = generation.Step(model, cache, prompt, state, torch.tensor([0]), options, True)
        step.choose(model.lm_head(model.hidden_states(prompt, cache)[:, -1]))
        seen = []
        for _ in range(60):
            with Watch() as watch:
                step.work()
            seen.append(watch.seen)
    assert len(seen[0]) > 10
    assert all(other == seen[0] for other in seen)


def test_rows_that_have_ended_cost_nothing(model, monkeypatch):
    """Their caches are as if empty, so attention reads one key of them; the others are not disturbed."""
    alone = [generate(model, [p], max_new_tokens=40, eos=[])[0].tolist() for p in PROMPTS]
    end = alone[0][3]
    lengths, step = [], Llama.step

    def note(model, ids, cache):
        logits = step(model, ids, cache)
        lengths.append(cache.lengths.tolist())
        return logits

    monkeypatch.setattr(Llama, "step", note)
    ids = generate(model, PROMPTS, max_new_tokens=40, eos=[end]).tolist()
    for row, whole in zip(ids, alone):
        n = whole.index(end) + 1 if end in whole else len(whole)
        assert row[:n] == whole[:n][: len(row)]
        assert set(row[n:]) <= {end}
    steps = alone[0].index(end) + 1
    assert [l[0] for l in lengths[: steps - 1]] == [4 + i for i in range(steps - 1)]
    assert {l[0] for l in lengths[steps - 1 :]} <= {1}
    assert len(lengths) >= steps


def test_a_cache_of_the_caller_keeps_what_has_ended(model):
    end = generate(model, [PROMPTS[0]], max_new_tokens=3, eos=[])[0, 2].item()
    cache = KVCache(model.config, 1, 64)
    ids = generate(model, [PROMPTS[0]], max_new_tokens=9, eos=[end], cache=cache)
    assert cache.lengths.tolist() == [3 + ids.shape[1] - 1]


def test_warmup_names_what_it_compiles(triton, device):
    model = make().to(device)
    compiled = warmup(model, batch=2, max_length=64)
    assert {"linear_kernel", "rope_kernel", "decode_kernel", "rms_norm_kernel", "forward_kernel"} <= compiled.keys()
    if not INTERPRETED:
        assert sum(compiled.values()) > 0
        assert sum(warmup(model, batch=2, max_length=64).values()) == 0
