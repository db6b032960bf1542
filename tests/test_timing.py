"""The clock of the benchmarks, on a pretended GPU: what it captures, what it holds in memory, and what a failed capture costs."""

import functools
from dataclasses import replace

import pytest
import torch
from trillama.bench import peers, timing
from trillama.bench.cases import OPS, Case, available, case
from trillama.bench.hardware import rehearsal
from trillama.kernels import decode, use_backend

pytestmark = pytest.mark.host


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(timing.Captures, "broken", None)
    with rehearsal.pretend(), use_backend("reference"):
        yield rehearsal.CARD


def small(op, **changes):
    few = {"tokens": 1, "context": 24} if OPS[op].phase == "decode" else {"tokens": 8}
    return case(op, "SmolLM2-135M", dtype="fp32", **few, **changes)


@pytest.mark.parametrize(("op", "backward"), [("rms_norm", False), ("rms_norm", True), ("swiglu", True), ("choose_", False)])
def test_a_call_is_timed_by_events_and_by_a_graph(card, op, backward):
    t = timing.device_seconds(small(op, backward=backward))
    assert t.events > 0
    assert t.why is None
    assert t.seconds == t.graph > 0


def test_forward_and_capture_are_on_one_stream(card):
    """Autograd runs a backward on the stream of its forward: if that is not the one that captures, the capture fails."""
    seen = {"forward": [], "run": []}

    def make():
        seen["forward"].append(torch.cuda.current_stream())
        x = torch.randn(4, device="cuda", requires_grad=True)
        y = x.square().sum()

        def run():
            seen["run"].append(torch.cuda.current_stream())
            return torch.autograd.grad(y, x, retain_graph=True)

        return run

    assert timing.measure(make, 16, 16).why is None
    assert len({*seen["forward"], *seen["run"]}) == 1


def test_it_measures_inside_counters(card):
    """As a model's step does: without them each call that splits its keys clears its own, one more kernel."""
    found = []
    timing.measure(lambda: lambda: found.append(decode._own.counters), 4, 4)
    assert found
    assert all(c is not None for c in found)
    assert getattr(decode._own, "counters", None) is None


def test_a_failed_capture_is_named_and_nothing_is_captured_after_it(card):
    x = torch.ones(3, device="cuda")
    waits = timing.measure(lambda: lambda: x.sum().item(), 12, 12)
    assert waits.graph is None
    assert waits.seconds == waits.events > 0
    assert "operation not permitted when stream is capturing" in waits.why
    after = timing.measure(lambda: lambda: x + 1, 12, 12)
    assert after.graph is None
    assert after.why.startswith("an earlier capture in this process failed")


@pytest.mark.parametrize(("memory", "l2"), [(80 << 30, 50 << 20), (139 << 30, 60 << 20), (24 << 30, 72 << 20), (8 << 30, 4 << 20)])
def test_sets_of_arguments_fit(card, monkeypatch, memory, l2):
    """For every case of the benchmark: no more than three times the cache, or two sets, or half of the memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory, memory))
    monkeypatch.setattr(card, "L2_cache_size", l2)
    for op in available():
        for model in ("SmolLM2-135M", "Llama-3.1-8B", "Llama-3.1-70B/8"):
            for batch in (1, 64) if OPS[op].phase == "decode" else (1,):
                c = case(op, model, batch=batch)
                n = timing.sets(c.moved, c.held)
                assert n >= 1
                assert n * c.held <= max(3 * l2, 2 * c.held), (op, model, batch)
                assert n == 1 or n * c.held <= memory / 2, (op, model, batch)
                if n < 64 and (n + 1) * c.held <= min(3 * l2, memory // 2):
                    assert n * c.moved >= 3 * l2, (op, model, batch)


def test_held_is_what_the_arguments_take():
    for op in available():
        c = small(op)
        storages = {}
        for value in c.inputs().values():
            parts = vars(value).values() if not isinstance(value, torch.Tensor) and hasattr(value, "__dict__") else (value,)
            storages |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts if isinstance(t, torch.Tensor)}
        assert c.held == sum(storages.values()), op


def test_each_case_compiles_in_a_fresh_state(monkeypatch):
    """With fullgraph=True the ninth shape of a function passes the limit of recompilations, an error."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for tokens in range(1, 12):
        c = replace(small("rms_norm"), tokens=tokens, engine="compile")
        inputs = c.inputs()
        torch.testing.assert_close(c.prepare(inputs)(), peers.eager.rms_norm(**inputs))
    assert isinstance(c, Case)


def test_bandwidth_and_rate(card):
    assert timing.copy_bandwidth() > 0
    assert timing.product_rate(64) > 0
