"""The decode step as one unit: what a CUDA graph holds of it, replayed, kept; that no host reads it; that who has ended is free."""

import contextlib
import copy
import gc
import subprocess
import sys
import threading
import types
from dataclasses import dataclass

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from trillama.kernels import dispatch, sampling, use_backend
from trillama.kernels.dispatch import INTERPRETED, dependent_launch
from trillama.model import KVCache, Llama, generate, generation, llama, warmup

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 256,
    "eos_token_id": 0,
}  # fmt: skip
PROMPTS = [[5, 9, 11], [7], [3, 1, 4, 1, 5]]
SAMPLED = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3}
HOT = {"temperature": 2.0}
OPTIONS = pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])


pytestmark = pytest.mark.host


def make(**changes):
    torch.manual_seed(1)
    return Llama({**CONFIG, **changes}).eval()


@pytest.fixture
def model():
    """On the reference: an op of ours is one call for a dispatch mode, whatever computes it."""
    with use_backend("reference"):
        yield make()


@dataclass
class Borrowed:
    """A tensor whose memory is somebody else's."""

    memory: StorageWeakRef
    dtype: torch.dtype
    place: int
    size: tuple
    stride: tuple

    def fetch(self):
        assert not self.memory.expired(), "a graph reads memory that was freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.place, self.size, self.stride)


class Recording(TorchDispatchMode):
    """In place of a CUDA graph, which holds what reaches the device and nothing else: the ops of a block, without effect until they
    are replayed, on the same memory. As a graph does, it keeps nobody's memory but its own."""

    def __init__(self, work):
        super().__init__()
        self.calls, self.made, self.before, self.replays = [], {}, [], 0
        with self:
            work()
        for tensor, value in reversed(self.before):  # capturing runs nothing
            tensor.copy_(value)
        del self.before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "the host reads a value"
        kwargs = kwargs or {}
        for i, argument in enumerate(function._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        out = function(*args, **kwargs)
        given = {id(t) for t in tree_flatten((args, kwargs))[0]}
        self.made |= {id(t): t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor) and id(t) not in given}
        self.calls.append((function, *(tree_map(self.borrow, t) for t in (args, kwargs, out))))
        return out

    def borrow(self, value):
        if not isinstance(value, torch.Tensor) or id(value) in self.made:
            return value
        return Borrowed(StorageWeakRef(value.untyped_storage()), value.dtype, value.storage_offset(), value.shape, value.stride())

    def replay(self):
        self.replays += 1
        for function, *held in self.calls:
            args, kwargs, out = (tree_map(lambda v: v.fetch() if isinstance(v, Borrowed) else v, t) for t in held)
            if not function.is_view:
                for mine, new in zip(tree_flatten(out)[0], tree_flatten(function(*args, **kwargs))[0]):
                    if isinstance(mine, torch.Tensor):
                        mine.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """A GPU's way of running a step, on the CPU: a list of the captures."""
    made = []

    def capture(work):
        made.append(Recording(work))
        return made[-1].replay

    monkeypatch.setattr(generation, "capture", capture)
    monkeypatch.setattr(generation, "capturable", lambda model: True)
    return made


def eager(model, *arguments, **options):
    """The ids of a call without graphs, as a list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "capturable", lambda model: False)
        return generate(model, *arguments, **options).tolist()


def ids(model, prompts=PROMPTS, **options):
    return generate(model, prompts, **{"max_new_tokens": 12, "eos": [], **options}).tolist()


def plain(model, prompts=PROMPTS, **options):
    return eager(model, prompts, **{"max_new_tokens": 12, "eos": [], **options})


@OPTIONS
def test_replays_are_the_steps(model, graphs, options):
    expected = eager(model, PROMPTS, max_new_tokens=24, **options)
    assert graphs == []
    assert generate(model, PROMPTS, max_new_tokens=24, **options).tolist() == expected
    (graph,) = graphs
    assert graph.replays == len(expected[0]) - 2  # after the prompt's id and the step that compiles
    assert any("decode_attention" in str(function) for function, *_ in graph.calls)


def test_other_frequencies_are_another_graph(graphs):
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 10000.0}
    longrope = {"model_type": "phi3", "original_max_position_embeddings": 16, "rope_scaling": factors, "pad_token_id": 0}
    with use_backend("reference"):
        model = make(**longrope)
        for _ in range(2):  # the second time from the first step on
            found = ids(model, [[5, 9, 11]], max_new_tokens=24)
            assert len(graphs) == 2
            assert found == plain(model, [[5, 9, 11]], max_new_tokens=24, use_cache=False)


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["own cache", "caller's cache"])
def test_a_step_is_kept_and_what_may_differ_is_written(model, graphs, own):
    """Prompts, seed, the ids that end a row, how many tokens."""
    cache = None if own else KVCache(model.config, 3, 64)
    end = plain(model, seed=4, **HOT)[1][5]
    for count, options in enumerate(({"seed": 3}, {"seed": 4}, {"seed": 4, "eos": [end]}, {"seed": 4, "max_new_tokens": 30})):
        prompts = PROMPTS if count < 2 else PROMPTS[::-1]
        if cache is not None:
            cache.reset()
        got = ids(model, prompts, **HOT, **options, cache=cache)
        assert got == plain(model, prompts, **HOT, **options)
        assert len(graphs) == 1
    assert len({tuple(row) for row in got}) == 3


def test_what_is_constant_in_a_graph_is_another_one(model, graphs, monkeypatch):
    pdl = [False]
    monkeypatch.setattr(generation, "dependence", lambda x: {"PDL": pdl[0]})
    kinds = [{"temperature": 0.9}, {"temperature": 1.1}, {"temperature": 0.9, "top_k": 5}, {"repetition_penalty": 1.5}]
    for round in range(2):
        for kind in kinds:
            assert ids(model, seed=1, **kind) == plain(model, seed=1, **kind)
        assert len(graphs) == 4, round
    ids(model, **kinds[-1], eos=[1, 2])
    assert len(graphs) == 5
    pdl[0] = True
    ids(model, **kinds[-1])
    assert len(graphs) == 6
    ((_, cache),) = model.kept.values()
    assert len(cache.steps) == generation.STEPS
    ids(model, seed=1, **kinds[0])  # the first that went
    assert len(graphs) == 7


def test_a_weight_with_other_strides_in_the_same_place(model, graphs):
    """A square one, transposed: address, shape and dtype are as before."""
    weight = next(p for n, p in model.named_parameters() if n.endswith("o_proj.weight"))
    assert weight.shape[0] == weight.shape[1]
    before = ids(model)
    weight.data = weight.data.T
    try:
        after = ids(model)
        assert after == plain(model) != before
        assert len(graphs) == 2
    finally:
        weight.data = weight.data.T


def test_one_cache_is_kept(model, graphs):
    """With room for more tokens; gone before another is made, and with the model's place, dtype or life."""
    ids(model)
    ids(model, max_new_tokens=100)
    assert len(graphs) == 1
    ((_, cache),) = model.kept.values()
    memory = StorageWeakRef(cache.k[0].untyped_storage())
    del cache
    graphs.clear()
    made = []
    before, KV = KVCache.__init__, KVCache

    def note(self, *arguments):
        made.append(memory.expired())
        before(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KV, "__init__", note)
        assert ids(model, PROMPTS[:2]) == plain(model, PROMPTS[:2])
    assert made[0] is True
    assert len(graphs) == 1
    assert len(model.kept) == 1
    for leave in (lambda: model.to(torch.bfloat16), lambda: model.float(), model.kept.clear):
        ids(model)
        assert model.kept
        leave()
        assert not model.kept


def test_what_is_kept_dies_with_its_owner(graphs):
    """At once: nothing here waits for the garbage collector, which does not know how large a cache is."""
    gc.collect()
    gc.disable()
    try:
        with use_backend("reference"):
            model = make()
            cache = KVCache(model.config, 3, 64)
            ids(model)
            ids(model, cache=cache)
            assert len(graphs) == 2
            graphs.clear()
            theirs, own = (StorageWeakRef(c.k[0].untyped_storage()) for c in (cache, next(iter(model.kept.values()))[1]))
            del cache
            assert theirs.expired()
            assert not own.expired()
            del model
            assert own.expired()
    finally:
        gc.enable()


def test_copies_have_none_of_it(model, graphs, tmp_path):
    ids(model)
    cache = KVCache(model.config, 3, 64)
    ids(model, cache=cache)
    assert cache.steps
    assert not copy.deepcopy(cache).steps
    assert not copy.deepcopy(model).kept
    torch.save(model, tmp_path / "model.pt")
    assert not torch.load(tmp_path / "model.pt", weights_only=False).kept
    assert model.kept


@pytest.mark.parametrize("how", ["assign", "quantize", "in place"])
def test_other_weights(model, graphs, how):
    """Graphs of the old weights are not replayed; weights written into the same memory are what a graph reads."""
    ids(model)
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    if how == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    elif how == "in place":
        model.load_state_dict(other.state_dict())
    else:
        for block in (*model.model.layers, *other.model.layers):
            block.mlp.gate_up_proj.quantize_(8)
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), other.parameters()):
                mine.copy_(theirs)
            for mine, theirs in zip(model.model.layers, other.model.layers):
                mine.mlp.gate_up_proj.weight = theirs.mlp.gate_up_proj.weight
    assert ids(model) == plain(other)
    assert len(graphs) == (1 if how == "in place" else 2)


def test_weights_that_are_replaced_meanwhile_stay_in_memory(model, graphs):
    weights = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]

    def replace(new):
        if len(graphs) == 1:
            model.load_state_dict(make().state_dict(), assign=True)
            assert not any(weight.expired() for weight in weights)

    expected = plain(model)
    assert ids(model, stream=replace) == expected
    assert graphs[0].replays == 10
    graphs.clear()
    model.kept.clear()
    assert all(weight.expired() for weight in weights)


def test_longer_tables_meanwhile(model, graphs):
    """A callback that uses the model for a longer sequence: its rotary tables are new, the graph reads the old ones."""
    model = make(max_position_embeddings=4096)

    def longer(new):
        with torch.inference_mode():
            model(torch.zeros(1, 3000, dtype=torch.int64))
            model.rope.made.popitem()  # as dynamic scaling does
            model(torch.zeros(1, 3000, dtype=torch.int64))

    assert ids(model, stream=lambda new: longer(new) if len(graphs) == 1 and graphs[0].replays == 3 else None) == plain(model)
    assert ids(model) == plain(model)
    assert len(graphs) == 1


def test_a_call_within_a_call(model, graphs):
    inner = []

    def call(new):
        inner.append(ids(model, PROMPTS[::-1], max_new_tokens=5, seed=2, **HOT))

    for _ in range(2):
        assert ids(model, stream=call, seed=1, **HOT) == plain(model, seed=1, **HOT)
    assert len(inner) == 24
    assert all(i == plain(model, PROMPTS[::-1], max_new_tokens=5, seed=2, **HOT) for i in inner)
    assert len(graphs) <= 3
    assert len(model.kept) == 1


def test_calls_of_several_threads(model, graphs):
    expected, got = [plain(model, seed=seed, **HOT) for seed in range(4)], {}

    def call(seed):
        got[seed] = [ids(model, seed=seed, **HOT) for _ in range(3)]

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[seed] for seed in range(4)] == [[row] * 3 for row in expected]


@pytest.mark.parametrize("when", [0, 1, 6])
def test_a_call_that_was_stopped(model, graphs, when):
    """Leaves a step that is as good as new."""
    count = [0]

    def stop(new):
        count[0] += 1
        if count[0] > when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ids(model, PROMPTS[::-1], stream=stop, repetition_penalty=1.3, eos=[3])
    assert len(graphs) == (when > 1)
    assert ids(model, repetition_penalty=1.3, eos=[7]) == plain(model, repetition_penalty=1.3, eos=[7])
    assert len(graphs) == 1


def test_a_cache_that_has_grown(model, graphs):
    cache = KVCache(model.config, 3, 40)
    assert ids(model, cache=cache) == plain(model)
    cache.reset()
    for tensors in (cache.k, cache.v):
        tensors[:] = [torch.cat((t, t), 2) for t in tensors]
    cache.max_length = 80
    assert ids(model, cache=cache, max_new_tokens=60) == plain(model, max_new_tokens=60)
    assert len(graphs) == 2


# --- which steps, where, and what if not -----------------------------------------------------------------------------


@pytest.fixture
def second_gpu(monkeypatch):
    """A machine whose second GPU has tensors without values; `current` is the device of its calls, `said` what was done where."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpu = types.SimpleNamespace(current=[0], said=[], models={})

    @contextlib.contextmanager
    def device(device):
        gpu.current.append(torch.device(device).index)
        try:
            yield
        finally:
            gpu.current.pop()

    @contextlib.contextmanager
    def graph(graph, **options):
        gpu.said.append(("capture", gpu.current[-1], options["stream"]))
        yield

    def stream(device=None):
        return types.SimpleNamespace(cuda_stream=7, device=gpu.current[-1] if device is None else torch.device(device).index)

    def replay():
        gpu.said.append(("replay", gpu.current[-1]))

    for name, value in {
        "device": device, "graph": graph, "current_stream": stream, "Stream": stream, "current_device": lambda: gpu.current[-1],
        "stream": lambda stream: contextlib.nullcontext(), "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": lambda: types.SimpleNamespace(replay=replay), "get_device_capability": lambda device: (9, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            with torch.device("cuda:1"):
                gpu.models[dtype] = make()
            torch.set_default_dtype(before)
        yield gpu


def test_all_of_a_call_is_on_the_device_of_the_model(second_gpu):
    assert generate(second_gpu.models[torch.bfloat16], PROMPTS, max_new_tokens=6, eos=[], seed=1).device == torch.device("cuda", 1)
    capture, *replays = second_gpu.said
    assert capture[:2] == ("capture", 1)
    assert capture[2].device == 1
    assert replays == [("replay", 1)] * 4
    assert second_gpu.current == [0]


@pytest.mark.parametrize(
    ("backend", "weights", "absent", "expected"),
    [
        ("auto", torch.bfloat16, False, True),
        ("triton", torch.float16, False, True),
        ("reference", torch.bfloat16, False, False),
        ("auto", torch.float64, False, False),
        ("auto", torch.bfloat16, True, False),
    ],
)
def test_who_computes_decides_on_graphs(second_gpu, monkeypatch, backend, weights, absent, expected):
    """The reference reads lengths on the host, on a GPU too: where it was asked for, in float64, without Triton."""
    model = second_gpu.models[weights]
    if absent:
        monkeypatch.setattr(dispatch, "triton", None)
    with use_backend(backend):
        assert generation.capturable(model) is expected
        generate(model, PROMPTS, max_new_tokens=5, eos=[], seed=1)
    assert bool(second_gpu.said) is expected
    assert bool(model.kept) is expected


def test_ranks_and_cpus_have_no_graphs(model):
    assert not generation.capturable(model)
    with use_backend("auto"):
        assert not generation.capturable(model)


def test_a_capture_that_fails_is_said_in_one_line(second_gpu, monkeypatch):
    @contextlib.contextmanager
    def graph(graph, **options):
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nCompile with ...")

    ended = []
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: ended.append(a), raising=False)
    step = Llama.step

    def failing(model, ids, cache):
        if cache.filled > 5:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might ...")
        return step(model, ids, cache)

    monkeypatch.setattr(Llama, "step", failing)
    with pytest.raises(RuntimeError) as error:
        generate(second_gpu.models[torch.bfloat16], PROMPTS, max_new_tokens=6, eos=[], seed=1)
    reason = "CUDA error: operation not permitted when stream is capturing"
    assert str(error.value) == f"the decode step cannot be captured as a CUDA graph: {reason}"
    assert ended == [(1, (0, 1))]
    monkeypatch.setattr(Llama, "step", step)
    with pytest.raises(RuntimeError, match="captured as a CUDA graph: CUDA error: operation failed due to a previous error"):
        generate(second_gpu.models[torch.bfloat16], PROMPTS, max_new_tokens=6, eos=[], seed=1)
    assert second_gpu.current == [0]


# --- on a GPU --------------------------------------------------------------------------------------------------------


def on_a_gpu(quantize=None, device="cuda"):
    model = make(hidden_size=64, intermediate_size=96).to(device, torch.bfloat16)
    for module in model.modules():
        if quantize and isinstance(module, llama.Linear):
            module.quantize_(quantize)
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True], ids=["", "pdl"])
@pytest.mark.parametrize("quantize", [None, 8, 4], ids=["bf16", "int8", "int4"])
@pytest.mark.parametrize("batch", [1, 8, 16])
@OPTIONS
def test_values_of_replays(options, batch, quantize, pdl):
    """64 tokens of replays against 64 of launches; then again with what is kept, other prompts and another seed."""
    model = on_a_gpu(quantize)
    captures = []
    with pytest.MonkeyPatch.context() as patch, dependent_launch(pdl):
        capture = generation.capture
        patch.setattr(generation, "capture", lambda work: captures.append(1) or capture(work))
        for seed in (3, 4):
            prompts = [[(seed * (i + 2) * (row + 5)) % 64 for i in range(3 + row % 4)] for row in range(batch)]
            arguments = {**options, "seed": seed, "max_new_tokens": 66}
            assert ids(model, prompts, **arguments) == plain(model, prompts, **arguments)
            assert captures == [1]


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "weights"), [("reference", torch.bfloat16), ("auto", torch.float64)])
def test_the_reference_on_a_gpu(backend, weights):
    model = on_a_gpu().to(weights)
    with use_backend(backend):
        assert ids(model) == plain(model)
        assert not model.kept


@pytest.mark.gpu
def test_the_memory_of_what_is_kept_comes_back():
    model = on_a_gpu()
    ids(model)
    model.kept.clear()
    before = torch.cuda.memory_allocated()
    for rows in (1, 2, 3, 1, 2, 3):
        ids(model, PROMPTS[:rows])
    assert model.kept
    model.kept.clear()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_streams_are_in_order():
    model = on_a_gpu()
    expected = plain(model)
    for _ in range(3):
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                got = generate(model, PROMPTS, max_new_tokens=12, eos=[])
            stream.synchronize()
            assert got.tolist() == expected


@pytest.mark.gpu
def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ids(on_a_gpu())  # torch's own stream for captures is of the first GPU then
    model = on_a_gpu(device="cuda:1")
    for _ in range(2):
        assert ids(model) == plain(model)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_after_a_capture_that_failed():
    """In a process of its own. The error is one line, the stream is the one before, and launches go on."""
    program = f"""
import torch
from trillama.model import Llama, generate
model = Llama({CONFIG!r}).eval().to("cuda", torch.bfloat16)
step = Llama.step
def reading(model, ids, cache):
    if torch.cuda.is_current_stream_capturing():
        ids.tolist()
    return step(model, ids, cache)
Llama.step = reading
stream = torch.cuda.current_stream()
try:
    generate(model, [[1, 2, 3]], max_new_tokens=8, eos=[])
except RuntimeError as error:
    print(error)
assert torch.cuda.current_stream() == stream
Llama.step = step
print(generate(model, [[1, 2, 3]], max_new_tokens=2, eos=[]).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("the decode step cannot be captured as a CUDA graph: "), done.stderr
    assert done.stdout.splitlines()[1] == "torch.Size([1, 2])"


# --- the step itself -------------------------------------------------------------------------------------------------


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
