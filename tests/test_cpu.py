"""The decode step compiled for a CPU, against transformers, the reference and float64."""

import contextlib
import os
import subprocess
import sys

import pytest
import rounding
import torch
from trillama.bench import oracle
from trillama.kernels import cpu_code, quantize, reference, rms_norm, use_backend
from trillama.model import KVCache, generate

cpu = pytest.importorskip("trillama.kernels.cpu", reason="Numba is not installed")
test_model = pytest.importorskip("test_model", reason="transformers is not installed")
pytestmark = pytest.mark.host


class Everything(set):
    """All that may be needed: what is not compiled yet, Numba compiles as it is called."""

    def __contains__(self, need):
        return True

    def __bool__(self):
        return True

    def issuperset(self, needs):
        return True


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small models are worth compiling for here, at once. What environments say of backends does not count."""
    monkeypatch.setattr(cpu_code, "WORTH", 0)
    monkeypatch.setattr(cpu_code, "loaded", Everything())
    with use_backend("auto"):
        yield


@contextlib.contextmanager
def counted(monkeypatch):
    """The calls of `decode_layers`: True for those that it took."""
    taken, whole = [], cpu.decode_layers
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "decode_layers", lambda *a: taken.append(whole(*a)) or taken[-1])
        yield taken


def foreseen(model, *names):
    """What is compiled beside, for what is foreseen of a model, is what was called: nothing else, and in the same types."""
    needs = cpu_code.needs(model.model.norm.weight.dtype, model.model.layers, model.lm_head.weight)
    for need in (need for need in needs if need[0] in names):
        function, arguments = cpu._code(need)
        assert arguments in function.overloads
    assert {need[0] for need in needs} >= set(names)


# --- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.few(8)
@torch.no_grad()
@pytest.mark.parametrize("case", test_model.CASES)
def test_families(case, monkeypatch):
    """Prefill of 5, then steps of one and of three tokens, across the window's and the scaling's boundaries."""
    ours, theirs = test_model.make(case)
    ids = test_model.prompt(tokens=25)
    memory = test_model.transformers.DynamicCache(config=theirs.config)
    cache = KVCache(ours.config, 2, 25)
    with counted(monkeypatch) as taken:
        for chunk in ids.split([5] + [1] * 14 + [3, 3], 1):
            assert oracle.error(ours(chunk, cache), theirs(chunk, past_key_values=memory).logits) < rounding.logits()
    assert len(taken) == 16
    assert all(x is not None for x in taken)


@torch.no_grad()
def test_interleaved_pairs(monkeypatch):
    """Pairs of neighbours, as in Meta's checkpoints, against the reference."""
    ours, _ = test_model.make("llama-bias")
    for block in ours.model.layers:
        block.self_attn.interleaved = True
    ids, logits = test_model.prompt(tokens=12), {}
    for name in ("auto", "reference"):
        cache = KVCache(ours.config, 2, 12)
        with use_backend(name):
            logits[name] = torch.cat([ours(chunk, cache) for chunk in ids.split([4] + [1] * 8, 1)], 1)
    assert oracle.error(logits["auto"], logits["reference"]) < rounding.logits()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_low_precision(bits, monkeypatch):
    """A step in bfloat16, with quantised weights too, is as near to float32 as the reference's."""
    ours, _ = test_model.make("qwen3", hidden_size=128, intermediate_size=160)
    ours = ours.bfloat16()
    ids = test_model.prompt(3, 30)
    exact = test_model.Llama(ours.config)
    exact.load_state_dict({name: t.float() for name, t in ours.state_dict().items()})
    if bits:
        for mine, theirs in zip(ours.modules(), exact.modules()):
            if isinstance(mine, type(ours.lm_head)) and mine is not ours.lm_head:
                mine.quantize_(bits)
                theirs.weight.copy_(mine.weight.dequantize())
    expected, found = exact.eval()(ids)[:, 20:], {}
    for name in ("auto", "reference"):
        cache = KVCache(ours.config, 3, 30, torch.bfloat16)
        with use_backend(name), counted(monkeypatch) as taken:
            ours(ids[:, :20], cache)
            found[name] = torch.cat([ours(ids[:, t : t + 1], cache) for t in range(20, 30)], 1)
        assert sum(x is not None for x in taken) == (10 if name == "auto" else 0)
    assert oracle.error(found["auto"], expected) < 1.5 * oracle.error(found["reference"], expected) < 0.1
    foreseen(ours, "_layers")


@torch.no_grad()
def test_rows_do_not_see_their_neighbours():
    """The same bits alone, among 3 and among 8 rows of other lengths, on one thread and on all; ended rows of length 0 included."""
    ours, _ = test_model.make("qwen2-window")
    lengths = [150, 4, 1, 130, 20, 129, 128, 0]
    ids, last = test_model.prompt(8, 160), test_model.prompt(8, 1)
    threads = torch.get_num_threads()

    def step(rows):
        cache = KVCache(ours.config, len(rows), 170)
        with use_backend("reference"):
            for n, row in enumerate(rows):  # alone, so that the caches do not depend on the batch either
                one = KVCache(ours.config, 1, 170)
                ours(ids[row : row + 1], one)
                for whole, part in zip(cache.k + cache.v, one.k + one.v):
                    whole[n] = part[0]
        cache.lengths.copy_(torch.tensor([lengths[row] for row in rows]))
        cache.filled = 160
        return ours(last[rows], cache)

    whole = step(list(range(8)))
    assert whole.isfinite().all()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            assert torch.equal(step([2, 0, 7]), whole[[2, 0, 7]])
            for row in range(8):
                assert torch.equal(step([row]), whole[row : row + 1])
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_what_it_leaves_to_the_blocks(monkeypatch):
    ours, _ = test_model.make("llama")
    ids = test_model.prompt(1, 6)

    def taken(model=ours, dtype=torch.float32, backend="auto", tokens=1):
        cache = KVCache(model.config, 1, 20, dtype)
        with counted(monkeypatch) as calls, use_backend(backend):
            model(ids[:, :2], cache)
            cache.lengths.fill_(2)
            model(ids[:, :tokens], cache)
        return any(x is not None for x in calls)

    assert taken()
    assert not taken(backend="reference")
    seen = []
    hook = ours.model.layers[1].register_forward_hook(lambda *a: seen.append(1))
    assert not taken()
    assert len(seen) == 2
    hook.remove()
    assert taken()
    weight = ours.model.layers[2].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not taken()
    weight.data = weight.data.contiguous()
    assert not taken(ours.half(), torch.float16)
    ours.float()
    monkeypatch.setattr(cpu_code, "WORTH", 2**40)
    assert not taken()


@torch.no_grad()
def test_a_position_out_of_range():
    ours, _ = test_model.make("llama")
    cache = KVCache(ours.config, 1, 20)
    ours(test_model.prompt(1, 4), cache)
    before = [t.clone() for t in cache.k]
    for wrong in (20, -3):
        cache.lengths.fill_(wrong)
        cache.filled = 4
        with pytest.raises(IndexError, match="expected 0 to 19"):
            ours(test_model.prompt(1, 1), cache)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.k))


@torch.no_grad()
def test_nan_is_not_hidden():
    ours, _ = test_model.make("llama")
    cache = KVCache(ours.config, 2, 20)
    ours(test_model.prompt(2, 4), cache)
    cache.k[1][0, 0, 2] = float("nan")
    logits = ours(test_model.prompt(2, 1), cache)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@torch.no_grad()
def test_after_a_fork():
    """Numba's threads are lost to a fork, some kinds of them end the process: a child goes without."""
    ours, _ = test_model.make("llama")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's own threads are lost too
    try:
        expected = generate(ours, [[1, 2, 3]], max_new_tokens=5, eos=[]).tolist()
        child = os.fork()
        if not child:
            same = False
            with contextlib.suppress(BaseException):
                same = generate(ours, [[1, 2, 3]], max_new_tokens=5, eos=[]).tolist() == expected and cpu._Pool.lost
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)


# --- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.few(8)
@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, (8, 32), (4, 32), (4, 128)], ids=str)
@pytest.mark.parametrize("shape", [(96, 256), (130, 128), (66, 384)], ids=str)
def test_decode_linear(kind, bits, shape):
    """Against float64; errors at most twice the reference's, and the bits of a row alone."""
    N, K = shape
    weight = (torch.randn(shape) / K**0.5).to(kind)  # gates far below 0 would magnify the error of their own sum
    weight = quantize(weight, *bits) if bits else weight
    exact = weight.dequantize(torch.float64) if bits else weight.double()
    norm, bias = (torch.randn(n).to(kind) for n in (K, N))
    for rows in ((), (1,), (3,), (2, 4)):
        x, residual = torch.randn(*rows, K).to(kind), torch.randn(*rows, N // 2).to(kind)
        for options in ({}, {"bias": bias, "norm": norm}, {"activation": "swiglu", "residual": residual, "bias": bias}):
            y = cpu.decode_linear(x, weight, **options)
            h = rms_norm(x, norm).double() if "norm" in options else x.double()
            wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items() if name != "norm"}
            oracle.check(y, reference.decode_linear(h, exact, **wide), reference.decode_linear(x, weight, **options))
            if len(rows) == 2:
                part = {"residual": residual[1, 2]} if "residual" in options else {}
                assert torch.equal(cpu.decode_linear(x[1, 2], weight, **{**options, **part}), y[1, 2])
    assert cpu.decode_linear(x[:0], weight).shape == (0, 4, N)


@torch.no_grad()
def test_what_it_leaves_to_the_reference():
    x, weight = torch.randn(9, 64), torch.randn(32, 64)
    assert torch.equal(cpu.decode_linear(x, weight), reference.decode_linear(x, weight))
    strided = torch.randn(64, 32).T
    assert torch.equal(cpu.decode_linear(x[:2], strided), reference.decode_linear(x[:2], strided))
    assert torch.equal(cpu.decode_linear(x[:2].half(), weight.half()), reference.decode_linear(x[:2].half(), weight.half()))
    skewed = torch.randn(64, 3).T
    assert torch.equal(cpu.decode_linear(skewed, weight), cpu.decode_linear(skewed.contiguous(), weight))


# --- copies in fewer bytes -------------------------------------------------------------------------------------------


def stored_as(kind, *shape):
    """Float32 weights of a GGUF that stores them so, or of a checkpoint in bfloat16."""
    w = torch.randn(*shape) * torch.rand(shape[0], 1).exp()
    if kind == "BF16":
        return w.bfloat16().float()
    w[1], w[2, :32], w[-1, -32:] = 0, 1e-9, w[-1, -1]  # rows of zeros, subnormal steps, groups of one value
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, kind)
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind).copy())


SHARE = {"Q4_0": 6 / 32, "Q4_1": 6 / 32, "Q8_0": 9 / 32, "BF16": 1 / 2}


@pytest.mark.parametrize("kind", SHARE)
def test_a_copy_has_exactly_the_weights(kind):
    """Found from the values alone; one of them changed in its last bit, and there is no copy."""
    weights = [stored_as(kind, n, 96) for n in (33, 5)]
    copies = cpu.narrowed(weights)
    for w, copy in zip(weights, copies):
        values = copy.dequantize() if kind != "BF16" else copy.float()
        assert torch.equal(values, w)
        assert copy.nbytes == SHARE[kind] * w.nbytes
    again = cpu.narrowed(weights)
    assert all(a is b for a, b in zip(again, copies))
    changed = weights[1][-1, 40:41]
    changed.data.copy_(torch.nextafter(changed, changed + 1))
    assert cpu.narrowed(weights) is weights
    assert cpu.narrowed([torch.nn.Parameter(w) for w in weights[:1]])[0].nbytes == SHARE[kind] * weights[0].nbytes


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "BF16"])
def test_there_is_no_copy_of_other_weights(kind):
    w = stored_as(kind, 40, 64)
    for other in (torch.randn(40, 64), w * 1.1, w.half().float() + 1e-3, w.T, w.bfloat16(), quantize(w, 8)):
        assert cpu.narrowed([w, other])[1] is other
    for wrong in (torch.nan, torch.inf) if kind != "BF16" else ():
        broken = w.clone()
        broken[7, 9] = wrong
        assert cpu.narrowed([broken])[0] is broken


@pytest.mark.few(1)
@torch.no_grad()
@pytest.mark.parametrize("kind", SHARE)
def test_a_step_reads_the_copies(kind):
    """Its logits are as near to float64 as the reference's, alone and among others the same bits."""
    ours, _ = test_model.make("qwen3", hidden_size=128, intermediate_size=160)
    for w in ours.parameters():
        if w.dim() == 2:
            w.copy_(stored_as(kind, *w.shape) / 32)
    exact = test_model.Llama(ours.config).double()
    exact.load_state_dict({name: t.double() for name, t in ours.state_dict().items()})
    ids, logits = test_model.prompt(3, 30), {}
    expected = exact(ids)[:, 20:]
    for name in ("auto", "reference"):
        cache = KVCache(ours.config, 3, 30)
        with use_backend(name):
            ours(ids[:, :20], cache)
            logits[name] = torch.stack([ours.step(ids[:, t].contiguous(), cache) for t in range(20, 30)], 1)
        if name == "auto":
            assert cache.streams[torch.float32].kinds[1].itemsize < 4
            assert cache.streams["head"][2].nbytes == SHARE[kind] * ours.lm_head.weight.nbytes
    assert oracle.error(logits["auto"], expected) < 2 * oracle.error(logits["reference"], expected) + 1e-7
    foreseen(ours, "_layers", "_product_at", "_copied")
    cache = KVCache(ours.config, 1, 30)
    ours(ids[1:2, :20], cache)
    assert torch.equal(torch.stack([ours.step(ids[1:2, t], cache) for t in range(20, 30)], 1), logits["auto"][1:2])


@torch.no_grad()
@pytest.mark.parametrize("forget", [KVCache.reset, lambda cache: setattr(cache, "filled", 0) or cache.lengths.zero_()])
def test_a_sequence_sees_weights_that_changed_behind_it(forget):
    """In place, where no version counter sees it: through `.data`, as adapters are merged."""
    ours, _ = test_model.make("llama", hidden_size=96, intermediate_size=160)
    for w in ours.parameters():
        if w.dim() == 2:
            w.copy_(stored_as("Q4_1", *w.shape) / 32)
    ids, cache, found = test_model.prompt(2, 12), KVCache(ours.config, 2, 12), []
    for change in (1, 0.73, 0.5):
        for w in (ours.model.layers[0].mlp.down_proj.weight, ours.lm_head.weight):
            w.data *= change
        forget(cache)
        ours(ids[:, :10], cache)
        found.append(ours.step(ids[:, 10].contiguous(), cache))
        with use_backend("reference"):
            assert oracle.error(found[-1], ours(ids[:, :11])[:, -1]) < rounding.logits()
    assert not torch.equal(found[0], found[1])


@torch.no_grad()
def test_a_cache_whose_tensors_are_replaced():
    """As a search over beams does between two steps, in which tensors come and go."""
    ours, _ = test_model.make("llama")
    ids, cache, order = test_model.prompt(2, 12), KVCache(ours.config, 2, 12), torch.tensor([1, 0])
    for t in range(11):
        ours(ids[:, t : t + 1], cache)
    for tensors in (cache.k, cache.v):
        tensors[:] = [t[order] for t in tensors]
    found = ours(ids[order, 11:], cache)
    with use_backend("reference"):
        assert oracle.error(found, ours(ids)[order, 11:]) < rounding.logits()


def test_pytorch_keeps_its_threads():
    """Those of Numba, which start with the first step, are no reason for PyTorch to use more than it was told to."""
    code = "import torch; from trillama.kernels import cpu; torch.set_num_threads(1); cpu._run(int); print(torch.get_num_threads())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
