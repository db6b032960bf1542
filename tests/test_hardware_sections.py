"""Sections of bench.hardware: what decode, attention, rows and training compare computes the same, what they say follows."""

import itertools
import json
import os

import pytest
import torch
from trillama.bench import hardware, peers
from trillama.bench.cases import Model
from trillama.bench.hardware import Card, attention, decode, rows, training
from trillama.kernels import use_backend
from trillama.model import Llama

pytestmark = pytest.mark.host
SECTIONS = {"decode": decode, "attention": attention, "rows": rows, "training": training}
CARDS = [Card.nominal(), Card("H200", 90, 139 << 30), Card("a small one", 90, 8 << 30), Card("pretended", 90, 256 << 20, True)]
FACTS = [{"bytes_per_s": 3e12, "flop_per_s": 8e14, "gpu": "NVIDIA H100 80GB HBM3"}]


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_jobs_are_named_once_and_can_be_written_down(name, card):
    jobs = SECTIONS[name].jobs(card)
    assert len({job.name for job in jobs}) == len(jobs) > 0
    for job in jobs:
        assert json.loads(json.dumps(job.work)).keys() == job.work.keys()
        assert min(job.seconds, job.compiled + 1) > 0


@pytest.mark.parametrize("name", hardware.SECTIONS)
def test_a_section_shows_what_it_has(name):
    """The frame hands it the results of the statuses that it names; some say only how a job ended."""
    module = hardware.section(name)
    shown = getattr(module, "SHOWN", ("ok",))
    assert set(shown) <= {"ok", "failed", "out of memory", "crashed", "hung", "left out"}
    assert "ok" in shown
    ends = [{"section": name, "job": "a", "status": s, "error": "a capture failed", "seconds": 1.0} for s in shown]
    assert isinstance(hardware.table(ends, name), list)


def test_ours_comes_before_others():
    """A peer that takes its time, or its process along, must not cost our own numbers."""
    for section in (attention, rows):
        engines = [job.work.get("engine", "trillama") for job in section.jobs(Card.nominal())]
        assert [ours for ours, _ in itertools.groupby(engines, lambda e: e == "trillama")] == [True, False]
    assert training.jobs(Card.nominal())[0].work["engine"] == "trillama"


# --- others on our weights -------------------------------------------------------------------------------------------

CONFIG = Model(48, 6, 2, 16, 80, 3, 96, True).config()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Llama({**CONFIG, "initializer_range": 0.2}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def test_the_decoder_computes_our_logits(model, prompt):
    """Token by token from an empty cache, two rows: position, mask, rotation and cache are all met."""
    decoder = peers.Decoder(model, 2, 16)
    with torch.no_grad(), use_backend("reference"):
        expected = model(prompt)
        for i, ids in enumerate(prompt.T):
            new, logits = decoder(ids, torch.tensor([i]))
            torch.testing.assert_close(logits, expected[:, i], atol=1e-4, rtol=1e-4)
            assert torch.equal(new, logits.argmax(-1))


def test_the_twin_computes_our_logits_on_our_memory(model, prompt):
    pytest.importorskip("transformers")
    twin = peers.twin(model, CONFIG)
    with torch.no_grad(), use_backend("reference"):
        torch.testing.assert_close(twin(prompt).logits, model(prompt), atol=1e-4, rtol=1e-4)
    ours = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert {t.untyped_storage().data_ptr() for t in twin.parameters()} == ours


def test_both_can_be_deeper_than_the_model(model):
    """What is compiled ahead has the layers of the whole model, each a parameter of its own, in the memory of fewer."""
    pytest.importorskip("transformers")
    for deep in (peers.Decoder(model, 1, 8, layers=7), peers.twin(model, CONFIG, layers=7)):
        own = [p for p in deep.parameters() if p.dim() == 2]
        assert len({id(p) for p in own}) == len(own) > 7 * 4 - 1
        memory = {t.untyped_storage().data_ptr() for t in deep.parameters()}
        assert memory == {t.untyped_storage().data_ptr() for t in model.parameters()}
        with torch.no_grad():
            if isinstance(deep, peers.Decoder):
                deep(torch.tensor([1]), torch.tensor([0]))
            else:
                deep(torch.tensor([[1]]))


# --- what is said ----------------------------------------------------------------------------------------------------


def test_products_are_those_of_the_mask():
    """Against the pairs counted one by one."""
    pairs = sum(1 for q in range(5) for k in range(5) if k <= q)
    assert attention.products(8, 3, True, [5]) == 4 * 3 * 8 * pairs
    assert attention.products(8, 3, False, [5, 2]) == 4 * 3 * 8 * (25 + 4)


def test_where_a_token_goes():
    """Kernels of a step by the weights that they read; what is not ours keeps its name; another order keeps all names."""
    launched = ["embed_kernel", "linear_kernel 96 x 48", "linear_kernel 48 x 80"]
    spent, clock = [], 0
    for _ in range(2):
        for name, us in (("_embed_kernel", 1), ("Memset (Device)", 2), ("_linear_kernel", 30), ("_linear_kernel", 10)):
            spent.append((name, clock, us))
            clock += us + 1
    found = decode.table(spent[::-1], launched, 2)
    assert found["kernels"] == [
        ["linear_kernel 96 x 48", 1, 30], ["linear_kernel 48 x 80", 1, 10], ["Memset (Device)", 1, 2], ["embed_kernel", 1, 1]
    ]  # fmt: skip
    assert (found["busy_us"], found["span_us"]) == (43, (clock - 1) / 2)
    odd = decode.table(spent[:-1], launched, 2)["kernels"]
    assert {name for name, *_ in odd} == {"_linear_kernel", "_embed_kernel", "Memset (Device)"}


def test_the_table_of_decode():
    """Bytes over time as fractions of what was measured and of the datasheet; others as multiples of our best time."""
    key = {"shape": "Llama-3.1-8B", "precision": "bf16", "batch": 1, "context": 128}
    bytes = {"weight_bytes": int(15e9), "cache_bytes": int(1e9)}
    ours = [
        {"engine": "trillama", **key, **bytes, "pdl": on, "us": us, "tokens_per_s": 1e6 / us}
        for on, us in ((False, 8000.0), (True, 6400.0))
    ]
    other = {"engine": "transformers", **key, **bytes, "us": 16000.0, "tokens_per_s": 62.5, "difference": 0.01}
    _, row, note = decode.show([*ours, other], FACTS)
    fractions = [f"{16e9 / 6400e-6 / bandwidth:.0%}" for bandwidth in (3e12, 3.35e12)]
    assert row.split()[4:] == ["8.000", "6.400", "156", "16.00", *fractions]
    assert note == "Llama-3.1-8B bf16 x1 at 128: transformers 16.000 ms = 2.50x (logits 1e-02 from ours)"


def test_the_table_of_attention():
    key = {"kind": "dense", "D": 128, "heads": 32, "kv": 8, "causal": True, "S": 4096, "batch": 4}
    results = [
        {**key, "engine": engine, "backward": backward, "flops": 4e11, "us": us}
        for engine, backward, us in (("trillama", False, 1000.0), ("trillama", True, 2000.0), ("cudnn", False, 800.0))
    ]
    step = {**key, "kind": "cached", "batch": 8, "S": 8192, "bytes": 27e7, "engine": "trillama", "us": 100.0}
    del step["causal"]
    frame = {"section": "attention", "job": "a", "status": "ok"}
    known = [{**FACTS[0], "section": "facts", "job": "card", "status": "ok"}]
    lines = hardware.table([{**r, **frame} for r in (*results, step, {"error": "a capture failed"})] + known, "attention")
    assert lines == attention.show([*results, step], FACTS)
    assert lines[1].split()[5:] == ["400", "50%", "-", "0.80", "-", "-", "200", "25%", "-", "-", "-", "-"]
    assert lines[3].split()[-4:] == ["2.70", "90%", "-", "-"]
    assert "%" not in "".join(attention.show(results))  # of what, nobody has said


def test_the_tables_of_rows_and_training():
    case = {"op": "swiglu", "label": "ffn 8192", "batch": 1, "tokens": 16384, "bytes": 8e8}
    results = [{**case, "engine": e, "backward": False, "us": us} for e, us in (("trillama", 400.0), ("liger", 500.0))]
    host = {"host": "swiglu", "call_us": 21.4, "without_launch_us": 5.2}
    lines = rows.show([*results, host, {"error": "a capture failed"}], FACTS)
    assert lines[1].split()[4:9] == ["2000", "67%", "-", "-", "1.25"]
    assert lines[-1].endswith("swiglu 21 (5)")
    steps = [
        {"engine": e, "us": us, "tokens_per_s": 8192e6 / us, "peak_bytes": 2 << 30, "losses": [10.4, 10.3]}
        for e, us in (("trillama", 50e3), ("sdpa", 60e3))
    ]
    assert training.show(steps)[2].split() == ["sdpa", "136,533", "60.0", "1.20", "2.00", "10.4000", "10.3000"]


# --- a rehearsal -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="a pretended GPU's kernels need the interpreter")
@pytest.mark.parametrize("engine", ["trillama", "gpt-fast-like", "transformers, compiled"])
def test_a_pretended_card_decodes(engine):
    """The captured step, and others on its weights and caches, whose logits are within bfloat16's noise of ours."""
    pytest.importorskip("transformers")
    from trillama.bench.hardware import rehearsal

    what = {"what": "ours", "precision": "bf16", "batch": 1, "contexts": (20,), "dependent": (False,)}
    work = {**(what if engine == "trillama" else {"what": engine, "context": 20}), "shape": "tiny", "steps": 1}
    decode.random_model.cache_clear()
    with rehearsal.pretend(), use_backend("reference" if engine != "trillama" else "auto"):
        (result,) = decode.run(**work)
    decode.random_model.cache_clear()
    assert result["weight_bytes"] == 2 * 64 * (256 + 128 + 64 + 3 * 128 + 3)  # head, qkv, o, mlp, norms
    assert result["cache_bytes"] == 20 * 2 * 2 * 16 * 2
    assert result.get("difference", 0.0) < 0.03


def test_a_training_step_is_the_same_for_everybody():
    pytest.importorskip("transformers")
    from trillama.bench.hardware import rehearsal

    losses = {}
    with rehearsal.pretend(), use_backend("reference"):
        for engine in ("trillama", "sdpa", "eager"):
            (result,) = training.run(engine, 1, 2, 16, True)
            losses[engine] = result["losses"]
    assert len(losses["sdpa"]) == training.CHECKED
    assert losses["sdpa"][0] > losses["sdpa"][-1]
    for engine in ("trillama", "eager"):
        assert losses[engine] == pytest.approx(losses["sdpa"], abs=0.02)  # bfloat16 has 3e-2 at 5.5


def test_to_rewind_is_not_timed(monkeypatch):
    """transformers' caches take a call a layer for it, ours one."""
    calls = []

    def elapsed(function, repeats, warm):
        calls.append("begin")
        function()
        calls.append("end")
        return 8.0

    monkeypatch.setattr(decode.timing, "elapsed", elapsed)
    assert decode.each(lambda: calls.append("step"), lambda: calls.append("rewind"), 4) == 2.0
    assert calls == ["rewind", "begin", *["step"] * 4, "end"] * 4
