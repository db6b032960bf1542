"""The sections `right` and `safety` of bench.hardware: rehearsed they find nothing, and whatever is broken they find."""

import json
import os
import stat
import sys

import pytest
import torch
from trillama.bench import oracle, proofs
from trillama.bench.hardware import Card, rehearsal, right, safety
from trillama.bench.hardware.__main__ import estimate

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]
SMALL = Card("a pretended H100", 90, 1 << 28, small=True)


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that is only pretended; the reference stands in where the interpreter does not work."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        monkeypatch.setenv("TRILLAMA_BACKEND", "reference")
    with rehearsal.pretend():
        yield


def results(**work):
    return [json.loads(json.dumps(r)) for r in right.run(**json.loads(json.dumps(work)))]


# --- what there is to do ---------------------------------------------------------------------------------------------


def test_the_plan():
    """Every op in every dtype, within a minute and a half or so; names are unique, work is JSON."""
    plan = right.jobs(Card.nominal())
    assert len({job.name for job in plan}) == len(plan)
    assert all(json.loads(json.dumps(job.work)).keys() == job.work.keys() for job in plan)
    listed = [(job.work["op"], job.work["dtype"], name) for job in plan if job.work["what"] == "op" for name in job.work["names"]]
    assert len(listed) == len(set(listed)) >= 300
    assert {(op, dtype) for op, dtype, _ in listed} == {(op, d) for op in proofs.TRIALS for d in ("bf16", "fp16", "fp32")}
    assert {name for op, dtype, name in listed if (op, dtype) == ("decode_linear", "bf16")} == {
        proofs.bare(name) for name in proofs.DECODE_LINEAR if name[0] != "-"
    }
    assert sorted(i for job in plan if job.work["what"] == "linear" for i in job.work["some"]) == list(range(len(right.LINEAR)))
    assert sum(estimate(safety.jobs(Card.nominal()), True)) < 60
    assert sum(estimate(plan, True)) < 96  # seconds, of an estimate


def test_cases_have_names_of_their_own():
    for op, cases in proofs.TRIALS.items():
        assert len({proofs.bare(name) for name in cases}) == len(cases), op


@pytest.mark.few(5)
@pytest.mark.parametrize("job", right.jobs(SMALL), ids=lambda job: job.name)
def test_rehearsal(pretended, job):
    found = results(**job.work)
    assert found
    assert [r for r in found if r.get("status", "ok") not in ("ok", "left out")] == []
    assert all(r["wrong"] <= r["allowed"] for r in found if "wrong" in r)


# --- faults ----------------------------------------------------------------------------------------------------------


def unwritten(gate, up):
    y = torch.empty_like(gate)
    y[:-1] = (torch.sigmoid(gate) * gate * up)[:-1]
    return y


def outside(gate, up):
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    y.copy_(torch.sigmoid(gate.float()) * gate * up)
    y.as_strided((1,), (1,), y.storage_offset() + y.numel())[0] = 1.0
    return y


def reads_outside(gate, up):
    shifted = gate.as_strided(gate.shape, gate.stride(), gate.storage_offset() + 1)
    return (torch.sigmoid(gate.float()) * gate * up + 0 * shifted).to(gate.dtype)


def in_place(gate, up):
    return torch.sigmoid(gate.float()).mul(gate).mul(up).to(gate.dtype) + up.mul_(1.0).sum() * 0


def half_a_percent(gate, up):
    return (torch.sigmoid(gate.float()) * gate * up * 1.005).to(gate.dtype)


def broken(gate, up):
    raise RuntimeError("misaligned\nand more")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (unwritten, "relative error inf"), (outside, "written outside: behind a tensor"), (reads_outside, "relative error inf"),
        (in_place, "an argument has been written to"), (half_a_percent, "relative error 4.99e-03, allowed"),
        (broken, "RuntimeError: misaligned"),
    ],
)  # fmt: skip
def test_a_fault_is_found_and_named(pretended, monkeypatch, fault, message):
    names = ["contiguous (3, 7, 100)", "contiguous (2, 3, 64)"]
    assert [r.get("status") for r in results(what="op", op="swiglu", dtype="fp16", names=names)] == [None, None]
    monkeypatch.setattr(proofs.kernels, "swiglu", fault)
    first, second = results(what="op", op="swiglu", dtype="fp16", names=names)
    assert first["status"] == second["status"] == "failed"  # and one does not keep the other from being tried
    assert message in first["error"]
    assert first["error"].startswith("contiguous (3, 7, 100), fp16: ")
    lines = right.show([first, second])
    assert lines[-1] == "2 cases, 2 failed"


def test_a_step_that_replays_something_else_is_found(pretended, monkeypatch):
    work = right.generation.Step.work

    def other(step):
        work(step)
        step.ids.add_(1).remainder_(64)

    def eagerly():
        return right.mock.patch.object(right.generation.Step, "__call__", lambda step, width: other(step))

    monkeypatch.setattr(right, "eagerly", eagerly)
    found = results(what="step", model="tiny", dtype="fp16", bits=None, rows=1, new=3)
    assert ["replayed" in r["case"] for r in found if r.get("status") == "failed"] == [True, True]
    assert all("differs from eager steps at id 1" in r["error"] for r in found if "error" in r)


@pytest.mark.slow
def test_a_step_that_is_not_captured_is_found(pretended, monkeypatch):
    monkeypatch.setattr(right.generation.Step, "__call__", lambda step, width: step.work())
    found = results(what="step", model="tiny", dtype="fp16", bits=None, rows=1, new=3)
    assert [r["error"][-21:] for r in found if "error" in r] == ["no graph was captured"] * 2


def test_large_attention_sees_one_wrong_row(pretended, monkeypatch):
    flash = proofs.kernels.flash_attention

    def wrong(*tensors, **options):
        out = flash(*tensors, **options)
        return torch.cat((out[:, :, :-1], out[:, :, :-1].flip(2)[:, :, :1]), 2)

    monkeypatch.setattr(proofs.kernels, "flash_attention", wrong)
    assert [r["status"] for r in results(what="large", dtype="fp16", head_dim=64, small=True)] == ["failed", "failed"]


def test_nan_is_never_within_what_is_allowed():
    exact, nan = torch.ones(4, dtype=torch.float64), torch.full((4,), float("nan"), dtype=torch.float16)
    for plain in (nan, torch.ones(4).half()):
        with pytest.raises(AssertionError):
            oracle.check(nan, exact, plain)


def test_views_keep_their_strides_when_they_move():
    base = torch.arange(120.0).view(4, 30)
    with proofs.poisoned(512):
        for t in (base[:, 10:20], base.t()[3:5], base[:1].expand(7, 30), base[:, ::3]):
            moved = proofs.move(t, "cpu")
            assert moved.stride() == t.stride()
            assert torch.equal(moved, t)
            assert moved.data_ptr() % 16 == t.data_ptr() % 16
            assert not moved._is_view()


# --- compute-sanitizer -----------------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACE = """========= COMPUTE-SANITIZER
========= Error: Potential RAW hazard detected at __shared__ 0x40 in block (0,0,0) : _forward_kernel
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)
"""


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (0, CLEAN, {"errors": 0, "warnings": 0}),
        (9, "========= Invalid __global__ read of size 2 bytes\n=========     at _x_kernel\n========= ERROR SUMMARY: 4 errors\n",
         {"errors": 4, "status": "failed", "error": "4 errors: Invalid __global__ read of size 2 bytes"}),
        (9, RACE, {"errors": 2, "warnings": 1, "status": "failed"}),
        (9, RACE.replace("RAW", "WAW"), {"errors": 0, "warnings": 3}),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", {"errors": 0, "warnings": 1}),
        (1, "AssertionError: wrong\n" + CLEAN, {"status": "failed", "error": "exit status 1: AssertionError: wrong"}),
        (1, "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation.\n" + CLEAN,
         {"status": "left out"}),
        (-11, "", {"status": "left out", "error": "it says nothing"}),
        (safety.LATE, CLEAN, {"status": "left out"}),
    ],
)  # fmt: skip
def test_what_the_tool_says(code, text, expected):
    found = safety.judged(code, text)
    assert {name: found[name] for name in expected} == expected
    assert ("status" in found) == ("status" in expected)


def test_every_group_is_of_cases_that_exist():
    for cases in safety.GROUPS.values():
        for op, names in cases.items():
            assert {proofs.bare(n) for n in proofs.TRIALS[op]} >= set(names)
    assert {op for cases in safety.GROUPS.values() for op in cases} == set(proofs.TRIALS)


def test_without_the_tool_it_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (result,) = safety.run(**safety.jobs(SMALL)[0].work)
    assert result["status"] == "left out"
    assert safety.show([result])[1:] == ["  left out: rows: compute-sanitizer is not installed"]


@pytest.mark.slow
def test_the_tool_runs_the_cases(monkeypatch, tmp_path):
    """In its place a script that runs what it is given."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\n"$@" || exit 1\necho "{CLEAN}"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (result,) = safety.run("memcheck", "decode", small=True)
    assert result == {"tool": "memcheck", "group": "decode", "errors": 0, "warnings": 0}
    assert safety.show([{**result, "status": "ok"}]) == ["memcheck: 1 of 1 groups without a finding, 0 warnings"]
