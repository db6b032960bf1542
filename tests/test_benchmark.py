"""`pytest --benchmark`: that it measures what it says, prints its table and writes its files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trillama.bench.cases import OPS, Case, available, case, torch_dtype
from trillama.bench.peers import ENGINES, why_not
from trillama.kernels import QuantizedWeight, decode, use_backend

pytestmark = pytest.mark.host
PEERS = [name for name in ENGINES if name not in ("trillama", "compile")]  # what is compiled is eager
ROOT = Path(__file__).parent.parent


def small(op, backward=False):
    decode = OPS[op].phase == "decode"
    return case(op, "SmolLM2-135M", tokens=None if decode else 12, context=40 if decode else None, dtype="fp32", backward=backward)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in available() for name in PEERS if why_not(op, name, "cpu") != ""])
def test_the_others_compute_the_same(op, name):
    """A speed-up over something that computes something else would be worth nothing."""
    if why_not(op, name, "cpu"):
        pytest.skip(why_not(op, name, "cpu"))
    c = small(op)
    inputs = c.inputs()
    copies = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    with use_backend("reference"):
        ours = c.prepare(inputs)()
        theirs = replace(c, engine=name).prepare(copies)()
    if op == "choose_ cut":
        return  # a draw: their distributions are compared in test_sampling.py
    if op == "choose_":
        ours, theirs = inputs["ids"], copies["ids"]
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for n in ("k_cache", "v_cache") if op == "rope_append_" else ():
        torch.testing.assert_close(inputs[n], copies[n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [op for op in available() if OPS[op].differentiable])
def test_backward_is_the_backward_alone(op):
    c = small(op, backward=True)
    with use_backend("reference"):
        run = c.prepare(c.inputs())
        first, second = run(), run()
    assert len(first) == len(OPS[op].differentiable)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("op", available())
def test_least_bytes_are_those_of_the_arguments(op):
    """Counted on the tensors themselves: all of what goes in and comes out, but of caches and tables only what is used."""
    c = case(op, "SmolLM2-135M", tokens=3 if OPS[op].phase == "decode" else 7, context=11 if OPS[op].phase == "decode" else None)
    inputs = c.inputs()
    with use_backend("reference"):
        outputs = c.prepare(inputs)()
    tensors = [*inputs.values(), *(outputs if isinstance(outputs, tuple) else (outputs,))]
    if op == "embed_next_":
        tensors.append(tensors.pop(1)[:1])  # of the table one row
    total = sum(t.nbytes for t in tensors if isinstance(t, (torch.Tensor, QuantizedWeight)))
    if op == "rope_append_":  # the tables' rows of the tokens, the caches' new rows
        total -= sum(inputs[n].numel() * inputs[n].element_size() for n in ("cos", "sin", "k_cache", "v_cache"))
        total += 2 * 3 * 32 * 4 + inputs["k"].numel() * 2 * 2
    assert c.moved == total
    assert torch_dtype(c.dtype) == torch.bfloat16


def test_calls_are_timed_as_in_a_step(monkeypatch):
    """With the arrival counters of a step at hand, the first call and those on the host."""
    pytest.importorskip("pytest_benchmark")
    from trillama.bench import bench_kernels

    called = []

    class Probe:
        extra_info = {}  # noqa: RUF012 - what pytest-benchmark has there
        stats = SimpleNamespace(stats=SimpleNamespace(min=1.0))

        def __call__(self, run):
            run()

    class Watched(Case):
        def prepare(self, inputs):
            return lambda: called.append(decode._own.counters.device.type)

    monkeypatch.setattr(bench_kernels, "DEVICE", "cpu")
    c = Watched(**vars(case("decode_attention", "SmolLM2-135M", context=64, dtype="fp32")))
    bench_kernels.test_kernel(Probe(), None, c)
    assert called == ["cpu", "cpu"]
    assert getattr(decode._own, "counters", None) is None


@pytest.mark.slow
def test_the_command(tmp_path):
    """The whole way on a few entries: table, JSON, plots."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("matplotlib")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith("PYTEST")}
    plots = tmp_path / "plots"
    command = [sys.executable, "-m", "pytest", "--benchmark", "--benchmark-plots", str(plots), "-q", "-p", "no:cacheprovider",
               "-k", "rms_norm-SmolLM2-135M-1"]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith(("op ", "rms_norm", "add_rms_norm"))]
    assert lines[0].split()[-4:] == ["compile", "sdpa", "liger", "flash_attn"]
    assert any(line.startswith("rms_norm ") for line in lines)
    if not torch.cuda.is_available():
        assert "the reference path, on this CPU" in run.stdout
        assert all("needs a GPU" in line for line in lines[1:])
    assert (plots / "rms_norm.png").read_bytes()[:4] == b"\x89PNG"
    kept = ROOT / ".benchmarks" / "kernels.json"
    if f"which cannot be kept: {kept}: " in run.stdout:  # somebody else's checkout
        return
    written = json.loads(kept.read_text())
    entry = next(r for r in written["results"] if (r["name"], r["engine"]) == ("rms_norm", "trillama"))
    assert entry["first_call_s"] > 0
    moved = case("rms_norm", "SmolLM2-135M", tokens=entry["tokens"], dtype=entry["dtype"]).moved
    assert entry["gb_s"] == pytest.approx(moved / entry["us"] / 1e3)


@pytest.mark.slow
def test_what_a_gpu_adds(monkeypatch):
    """On a pretended one: the device's time comes from a process of its own, with what it means on this card."""
    from types import SimpleNamespace

    from trillama.bench import bench_kernels, timing
    from trillama.bench.apart import Worker
    from trillama.bench.hardware import rehearsal

    def benchmark(function):
        function()

    benchmark.extra_info, benchmark.stats = {}, SimpleNamespace(stats=SimpleNamespace(min=1.0))
    monkeypatch.setattr(bench_kernels, "DEVICE", "cuda")
    monkeypatch.setattr(bench_kernels, "Worker", lambda: Worker(rehearse=True))
    monkeypatch.setattr(timing.Captures, "broken", None)
    with rehearsal.pretend(), use_backend("reference"):
        clock = bench_kernels.clock.__wrapped__()
        bench_kernels.test_kernel(benchmark, next(clock), small("rms_norm"))
        next(clock, None)
    found = benchmark.extra_info
    assert found["us"] == found["graph_us"] > 0
    assert found["why"] is None
    assert found["of_bound"] > 0
    for name, known in (("NVIDIA H100 80GB HBM3", True), ("NVIDIA H100 PCIe", False), ("NVIDIA A100-SXM4-40GB", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert (bench_kernels.rates(small("rms_norm"), 1.0)["of_bound"] is not None) == known
