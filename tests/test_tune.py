"""The tuner's search, its processes and the file that overrides the tables; what it measures needs a GPU."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys

import clocks
import pytest
import torch
from trillama.bench import apart, check, tune
from trillama.bench.cases import case
from trillama.kernels import decode, dispatch, rms_norm, tuning, use_backend
from trillama.kernels.dispatch import INTERPRETED, observe

pytestmark = pytest.mark.host
OBSTACLE = dispatch.interpreter_obstacle() if INTERPRETED else "launches on the CPU need Triton's interpreter"
interpreted = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

SMALL = case("rms_norm", "SmolLM2-135M", tokens=3, dtype="fp32")
KEY = ("rows", (576, 4))


class Small(tune.Target):
    """rms_norm, small enough for the interpreter."""

    case = SMALL


TARGET = Small("rms_norm", "SmolLM2-135M", "fp32")


def launched_with(rows):
    seen = []
    with use_backend("triton"), observe(lambda kernel, grid, arguments, options: seen.append((grid, options)) or True):
        rms_norm(torch.randn(rows, 64), None)
    return seen[0]


@pytest.fixture
def forgetful():
    yield
    tuning.measured.cache_clear()
    tune._forget()


def read_by_the_tables(file, monkeypatch):
    monkeypatch.setenv("TRILLAMA_TUNING", str(file))
    tuning.measured.cache_clear()
    tune._forget()


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="launches on the CPU need Triton's interpreter")
def test_a_file_takes_the_place_of_the_table(tmp_path, monkeypatch, forgetful):
    before = launched_with(32)
    own = tuning.rows(64, 4)
    record = tune.Record(tmp_path / "tuning.json", "some GPU")
    trials = [tune.Trial(None, 2e-6), tune.Trial({"block_rows": own.block_rows // 2, "warps": 2}, 1e-6)]
    record.note(TARGET, ("rows", (64, 4)), trials, complete=True)
    read_by_the_tables(tmp_path / "tuning.json", monkeypatch)
    grid, options = launched_with(32)
    assert (grid[0], options["num_warps"]) == (2 * before[0][0], 2)
    assert tuning.rows(128, 4) == tuning.rows.__wrapped__(128, 4)  # what was not measured stays


@pytest.mark.parametrize("content", ["", "[]", '{"entries": [{"function": "rows"}]}'])
def test_a_broken_file_is_named(tmp_path, monkeypatch, forgetful, content):
    file = tmp_path / "tuning.json"
    file.write_text(content)
    read_by_the_tables(file, monkeypatch)
    with pytest.raises(ValueError, match=f"TRILLAMA_TUNING names {file}") as caught:
        tuning.rows(64, 4)
    assert "\n" not in str(caught.value)


def test_nothing_found_is_lost(tmp_path, monkeypatch, forgetful):
    """Entries of other runs stay, both of a pair keep what each has, and half a run takes nothing back."""
    file, pair = tmp_path / "tuning.json", ("attention_backward", (90, 64, 2))
    dq, dkv = (tune.Target(name, "Llama-3.2-1B") for name in ("dq", "dkv"))
    own, slower = tune.Trial(None, 10e-6), tune.Trial({"warps": 2}, 9.9e-6)
    fast, faster = tune.Trial({"warps": 8}, 8e-6), tune.Trial({"warps": 1}, 7e-6)

    def found():
        return {(e["function"], tuple(e["arguments"])): e["entry"] for e in json.loads(file.read_text())["entries"]}

    tune.Record(file, "H").note(TARGET, KEY, [own, slower], complete=False)
    assert found() == {}  # a gain of one per cent is none
    tune.Record(file, "H").note(TARGET, KEY, [own, slower, fast], complete=False)
    assert found() == {KEY: {"warps": 8}}
    tune.Record(file, "H").note(dkv, pair, [own, tune.Trial([{}, {"warps": 4}], 5e-6)], complete=True)
    tune.Record(file, "H").note(dq, pair, [own, tune.Trial([{"stages": 3}, {}], 5e-6)], complete=True)
    assert found() == {KEY: {"warps": 8}, pair: [{"stages": 3}, {"warps": 4}]}
    read_by_the_tables(file, monkeypatch)
    first, second = tuning.attention_backward(90, 64, 2)
    assert (first.stages, second.warps) == (3, 4)
    assert tune.Record(file, "H").found(pair, 0) == [{"stages": 3}, {}]
    assert tune.Record(file, "H").found(KEY) == {"warps": 8}

    record = tune.Record(file, "H")
    record.note(TARGET, KEY, [own], complete=False)
    record.note(TARGET, KEY, [own, slower], complete=False)
    assert found()[KEY] == {"warps": 8}
    record.note(TARGET, KEY, [own, slower, faster], complete=True)
    assert found()[KEY] == {"warps": 1}
    record.note(TARGET, KEY, [own, slower], complete=True)  # a whole run in which the tables' own was the best
    record.note(dq, pair, [own], complete=True)
    assert found() == {pair: [{}, {"warps": 4}]}
    assert [p.name for p in tmp_path.iterdir()] == ["tuning.json"]

    with pytest.raises(ValueError, match="measured on H; this is A: name another file"):
        tune.Record(file, "A")
    file.write_text("{}")
    for content in ("[1]", "{}", '{"entries": []}', '{"entries": [], "gpu"'):
        other = tmp_path / "other.json"
        other.write_text(content)
        with pytest.raises(ValueError, match="is no tuning file"):
            tune.Record(other, "some GPU")
        assert other.read_text() == content
    with pytest.raises(ValueError, match="no tuning file"):
        tune.Record(file, "H")


# --- what is varied --------------------------------------------------------------------------------------------------


def test_every_kind_of_entry_can_be_varied():
    kinds = {name for name, kind in inspect.getmembers(tuning, dataclasses.is_dataclass)}
    assert set(tune.VARIED) == kinds
    near = tune.neighbours(tuning.Attention(128, 64, 8, 1))
    assert {"block_m": 64} in near
    assert {"stages": 2} in near
    assert {"stages": 0} not in near
    assert tune.neighbours(tuning.Choose(2048, 1024, 8)) == [{"block": 1024}, {"block": 4096}, {"warps": 4}, {"warps": 16}]
    assert {"block_k": 16} not in tune.neighbours(tuning.Linear(2, 16, 32, 16, 4, 4), fixed=("block_k",))


def listed(*options, **environment):
    """`--list` in a process of its own, in which Triton compiles: (status, stdout, stderr)."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")} | environment
    command = [sys.executable, "-m", "trillama.bench.tune", "--list", *options]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_every_entry_has_a_few_candidates():
    """The ones whose calls ask for another function, or for none, would not be found."""
    status, out, _ = listed()
    assert status == 0
    lines = out.splitlines()
    heads = [i for i, line in enumerate(lines) if not line.startswith(" ")]
    assert len(heads) == len(tune.targets())
    for target, begin, end in zip(tune.targets(), heads, [*heads[1:], len(lines)]):
        assert lines[begin].startswith(f"{target}: {target.entry.function}(")
        fields = [json.loads(line) for line in lines[begin + 1 : end]]
        assert 1 <= len(fields) <= tune.MOST
        assert len({json.dumps(f) for f in fields}) == len(fields)
        if target.entry.part is not None:
            assert all(len(f) == 2 and not f[1 - target.entry.part] for f in fields)
    sizes = {"attention", "dq", "dkv", "decode"}
    for name in sizes:
        assert {t.case.m.head_dim for t in tune.targets([name])} == {64, 128, 256}
    assert [t.name for t in tune.targets(["linear"])] == ["linear", "linear-swiglu", "linear-int8", "linear-int4"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 120])
def test_the_list_is_of_the_architecture_asked_for(arch):
    _, out, _ = listed("dq", "--arch", f"sm_{arch}")
    assert f": attention_backward({arch}, 128, 2)\n" in out


@pytest.mark.slow
def test_the_interpreter_is_not_tuned():
    """Its tiles are others, and its architecture is always the same: a list of them would mislead."""
    message = "trillama: error: TRITON_INTERPRET is set, expected it unset: tune is of compiled code"
    status, out, error = listed("dq", TRITON_INTERPRET="1")
    assert (status, out) == (2, "")
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--list --arch foo", "--arch is 'foo', expected one of sm_80, "),
        ("--list --arch sm_foo", "--arch is 'sm_foo', expected one of sm_80, "),
        ("--list --arch=", "--arch is '', expected one of sm_80, "),
        ("--arch sm_80", "--arch is 'sm_80' without --list, expected none"),
        *((f"--list --limit {value}", f"--limit is {value}, expected a number of seconds") for value in ("-3", "0", "nan", "inf")),
        ("--list softmax", "ENTRY is 'softmax', expected one of attention, "),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(line, message, monkeypatch):
    monkeypatch.setattr(tune.Target, "candidates", None)
    with pytest.raises(ValueError) as caught:
        tune.main(line.split())
    assert str(caught.value).startswith(message)


def test_a_backward_varies_nothing_of_its_forward():
    for name, function in (("attention", "attention"), ("dq", "attention_backward"), ("dkv", "attention_backward")):
        assert tune.ENTRIES[name].function == function
        assert tune.ENTRIES[name].backward == (name != "attention")
    forward, backward = (tune.Target(name, "SmolLM2-135M").key("sm_90") for name in ("rms_norm", "rms_norm-backward"))
    assert forward != backward


# --- measuring -------------------------------------------------------------------------------------------------------


@interpreted
def test_the_fastest_that_computes_the_same_is_found():
    """With a clock that likes small tiles; a tile that the kernel cannot take is named and costs nothing else."""
    own = tuning.rows(576, 4)
    assert (own.block_rows, own.warps) == (2, 4)
    candidates = [{"warps": 8}, {"block_rows": 3}, {"block_rows": 1, "warps": 2}]
    trials = list(tune.compare(SMALL, KEY, candidates, clocks.clock, "cpu"))
    assert [t.fields for t in trials] == [None, *candidates]
    assert [t.seconds and round(t.seconds * 1e6) for t in trials] == [8, 16, None, 2]
    assert [bool(t.reason) for t in trials] == [False, False, True, False]
    best, before = tune.better(trials)
    assert (best.fields, before) == ({"block_rows": 1, "warps": 2}, trials[0].seconds)
    assert tuning.rows(576, 4) == own


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "key", "fields"),
    [
        ("embed_next_", ("elementwise", (576, 4)), {"warps": 2}),
        ("choose_", ("choose", (80, 49152)), {"block": 4096}),
        ("choose_ cut", ("choose", (80, 49152)), {"block": 1024}),
        ("rope_append_", ("rope", (32, 0, 3, 4)), {"block_s": 1}),
        ("decode_attention", ("decode", (80, 64, 4, 3)), {"block_n": 16}),
    ],
)
def test_what_an_op_writes_counts(op, key, fields, monkeypatch):
    """Ops that change their arguments get fresh ones each time; what they leave there is compared, as what they return."""
    c = case(op, "SmolLM2-135M", context=600, dtype="fp32")
    inside = []

    def measure(c):
        inside.append(decode._own.counters is not None)
        return 1.0

    own, other = tune.compare(c, key, [fields], measure, "cpu")
    assert (own.reason, other.reason) == (None, None)
    assert inside == [True, True]  # as in a model's step, where no call clears counters of its own

    calls, whole = [], check.outcome
    left = len(whole(c, "cpu"))
    assert left > (1 if op.endswith("_") else 0)

    def spoiled(c, device):
        result = whole(c, device)
        calls.append(result)
        if len(calls) == 3:  # the candidate's first
            result[-1].view(-1)[-1:] += 1
        return result

    monkeypatch.setattr(check, "outcome", spoiled)
    own, other = tune.compare(c, key, [fields], measure, "cpu")
    assert other.seconds is None
    assert f"tensor {left - 1}" in other.reason


def test_roundings_are_no_difference_and_a_lost_row_is():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        exact = torch.randn(4096, 64, dtype=torch.float64)
        x = exact.to(dtype)
        assert tune.difference([x], [x.clone()]) is None
        assert tune.difference([(exact * (1 + torch.finfo(dtype).eps)).to(dtype)], [x]) is None
        for bad in (0.0, float("nan"), float("inf")):
            y = x.clone()
            y[77] = bad
            assert tune.difference([y], [x]).startswith("tensor 0")
    ids = torch.arange(5)
    assert tune.difference([x, ids + 1], [x, ids]) == "tensor 1 has other values"
    nothing = torch.full((2, 3), float("nan"))
    assert tune.difference([nothing, x[:0]], [nothing.clone(), x[:0]]) is None


@pytest.mark.slow
@interpreted
@pytest.mark.timeout(300)
def test_a_candidate_that_crashes_hangs_or_runs_out_of_memory_costs_only_itself(tmp_path):
    candidates = [{"warps": 16}, {"warps": 1}, {"warps": 2}, {"warps": 8}, {"block_rows": 1}]
    trials = list(tune.isolated(SMALL, KEY, candidates, clocks.faulty, "cpu", limit=20))
    by_warps = {(t.fields or {}).get("warps", json.dumps(t.fields)): t for t in trials}
    assert by_warps[16].seconds == pytest.approx(32e-6)
    assert by_warps[1].reason.startswith("ended by SIGSEGV")
    assert by_warps[2].reason == "no answer within 20 s"
    assert by_warps[8].reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert by_warps['{"block_rows": 1}'].seconds == pytest.approx(4e-6)
    (own,) = tune.isolated(SMALL, KEY, candidates, clocks.nothing_works, "cpu")
    assert own == tune.Trial(None, None, "ended with status 3")


@interpreted
@pytest.mark.timeout(300)
def test_what_was_measured_is_in_the_file_whatever_comes_then(tmp_path, monkeypatch):
    file = tmp_path / "tuning.json"
    ((_, trials),) = tune.tune([TARGET], "sm_80", tune.Record(file, "none"), clocks.clock, "cpu")
    best, own = tune.better(trials)
    document = json.loads(file.read_text())
    assert document["entries"] == [{"function": "rows", "arguments": [576, 4], "entry": best.fields}]
    assert [t["fields"] for t in document["trials"]] == [t.fields for t in trials]
    assert best.seconds < own

    whole = tune.isolated

    def interrupted(*arguments):
        yield from list(whole(*arguments))[:2]
        raise KeyboardInterrupt

    file.unlink()
    monkeypatch.setattr(tune, "isolated", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(tune.tune([TARGET], "sm_80", tune.Record(file, "none"), clocks.clock, "cpu"))
    assert len(json.loads(file.read_text())["trials"]) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_does_not_compile_or_fit_is_known_beforehand():
    """In worker processes, on a machine without a GPU."""
    pytest.importorskip("triton")
    c, key = case("decode_attention", "Llama-3.1-8B"), ("decode", (90, 128, 2, 4))
    jobs = [(c, key, fields) for fields in (None, {"stages": 2}, {"warps": 3}, {"block_n": 128, "stages": 5})]
    own, fewer, odd, large = tune.compile_all(jobs, "sm_90")
    assert (own, fewer) == (None, None)
    assert odd
    assert "shared memory" in large
    assert all("\n" not in reason for reason in (odd, large))


def test_a_process_says_how_it_ended():
    assert list(apart.apart(range, 3)) == [0, 1, 2]
    with pytest.raises(apart.Died, match="TypeError: 'str' object cannot be interpreted as an integer"):
        list(apart.apart(range, "x"))


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where it would write
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="tune measures on a GPU, and torch finds none"):
        tune.main(["rms_norm"])
    with pytest.raises(ValueError, match="ENTRY is 'softmax'"):
        tune.main(["softmax"])


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    assert tune.main(["rms_norm", "choose", "embed", "--model", "SmolLM2-135M", "--output", str(tmp_path / "tuning.json")]) == 0
    document = json.loads((tmp_path / "tuning.json").read_text())
    assert {t["name"] for t in document["trials"]} == {"rms_norm", "rms_norm-backward", "choose", "embed"}
    assert all(t["seconds"] for t in document["trials"] if t["fields"] is None)
