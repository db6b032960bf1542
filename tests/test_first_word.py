"""Nobody waits for the compiler of the CPU's step: who compiles, when, how often, and what is done meanwhile."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trillama.kernels import beside, cpu_code, use_backend
from trillama.model import KVCache, Llama, generate

pytestmark = pytest.mark.host
NEED = ("_product_at", "float32", "float32", "bfloat16")
TOLD = "compiling the decode step for this CPU in the background, once: until that is done answers are slower"


def until(condition, seconds=300):
    """The machine may have other things to do: only what never comes true fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def python(program, *arguments):
    return [sys.executable, "-c", program, *map(str, arguments)]


# --- the process beside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("pass", "done"),
        ("raise SystemExit('no compiler here')", "no compiler here"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import time; time.sleep(99)", "no end within 1 s"),
    ],
)
def test_the_end_is_noted(program, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "LIMIT", 1 if "sleep" in program else 300)
    beside.watch(tmp_path / "note", python(program))
    assert beside.read(tmp_path / "note") == outcome
    beside.watch(tmp_path / "note", python("raise SystemExit('a second time')"))
    assert beside.read(tmp_path / "note") == outcome


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_who_is_killed_has_not_failed(tmp_path):
    beside.watch(tmp_path / "note", python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert beside.read(tmp_path / "note") == ""
    beside.watch(tmp_path / "note", python("pass"))
    assert beside.read(tmp_path / "note") == "done"


def test_two_at_once_are_one(tmp_path):
    note, log = tmp_path / "note", tmp_path / "log"
    slow = python("import sys, time; open(sys.argv[1], 'a').write('x'); time.sleep(3)", log)
    both = [beside.start(note, slow) for _ in range(2)]
    until(lambda: any(process.poll() is not None for process in both))
    with beside.lock(note) as free:
        assert not free
    until(lambda: all(process.poll() is not None for process in both))
    assert (beside.read(note), log.read_text()) == ("done", "x")
    with beside.lock(note) as free:
        assert free


@pytest.mark.skipif(os.name == "nt", reason="sessions are a POSIX thing")
def test_it_outlives_its_parent_and_holds_nothing_of_it(tmp_path):
    """The parent's pipes end with the parent; Ctrl-C and the end of a terminal reach only its own session."""
    parent = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import beside
beside.start(Path(sys.argv[1]), [sys.executable, "-c", '''
import os, sys, time
open(sys.argv[1], "w").write(f"{os.getsid(0)} {os.nice(0)}")
while not os.path.exists(sys.argv[2]):
    time.sleep(0.02)
''', sys.argv[2], sys.argv[3]])
print(os.getsid(0), os.nice(0))
"""
    note, seen, end = (tmp_path / name for name in ("note", "seen", "end"))
    arguments = note, seen, end, Path(beside.__file__).parent
    done = subprocess.run(python(parent, *arguments), capture_output=True, text=True, timeout=300)  # would wait for its pipes
    assert beside.read(note) == "", "it has not ended yet"
    until(lambda: seen.exists() and len(seen.read_text().split()) == 2)
    (session, nice), (own, usual) = done.stdout.split(), seen.read_text().split()
    assert session != own
    assert int(usual) > int(nice)
    end.touch()
    until(lambda: beside.read(note) == "done")


def test_applications_with_python_within_are_not_started_again(monkeypatch):
    assert beside.interpreter() == sys.executable
    for name in ("/usr/bin/uwsgi", "", None):
        monkeypatch.setattr(sys, "executable", name)
        assert beside.interpreter() is None
    monkeypatch.undo()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert beside.interpreter() is None


# --- when it is asked for ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The notes for which a process was asked for; none is started. Nothing is on disk until a test says so."""
    notes = []
    monkeypatch.setattr(cpu_code, "loaded", set())
    monkeypatch.setattr(cpu_code, "_asked", set())
    monkeypatch.setattr(cpu_code, "_load", lambda wanted: False)
    monkeypatch.setattr(cpu_code.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(beside, "start", lambda note, command: notes.append(note) or subprocess.Popen(python("pass")))
    cpu_code._tell.cache_clear()
    return notes


def test_one_process_asks_once(asked, tmp_path, caplog):
    for _ in range(3):
        assert not cpu_code.ready({NEED}, tmp_path)
    assert len(asked) == 1
    assert not cpu_code.ready({NEED, ("_copied",)}, tmp_path)
    assert len(set(asked)) == 2
    assert [r.message.partition(":")[0] for r in caplog.records] == [
        "compiling the decode step for this CPU in the background, once"
    ] * 2


def test_nobody_asks_while_another_is_at_it(asked, tmp_path, caplog):
    note = tmp_path / "cpu" / cpu_code._key({NEED})
    with beside.lock(note):
        assert not cpu_code.ready({NEED}, tmp_path)
    assert (asked, caplog.records) == ([], [])


def test_a_failure_is_told_and_not_tried_again(asked, tmp_path, caplog):
    note = tmp_path / "cpu" / cpu_code._key({NEED})
    note.parent.mkdir()
    note.write_text("ended by SIGSEGV")
    for _ in range(2):
        assert not cpu_code.ready({NEED}, tmp_path)
    assert asked == []
    (record,) = caplog.records
    assert record.message == f"the decode step is left to PyTorch, slower than compiled: ended by SIGSEGV ({note})"


def test_without_a_place_for_notes(asked, tmp_path, monkeypatch, caplog):
    """A file where the folder should be, as even root cannot write there: no process, no exception; what Numba has kept is used."""
    (tmp_path / "file").touch()
    for _ in range(2):
        assert not cpu_code.ready({NEED}, tmp_path / "file")
    assert asked == []
    (record,) = caplog.records
    assert "TRILLAMA_CACHE names another folder" in record.message
    monkeypatch.setattr(cpu_code, "_load", lambda wanted: True)
    assert cpu_code.ready({NEED}, tmp_path / "file")


def test_code_that_has_gone_is_asked_for_again(asked, tmp_path, monkeypatch):
    note = tmp_path / "cpu" / cpu_code._key({NEED})
    note.parent.mkdir()
    beside.write(note, beside.DONE)
    monkeypatch.setattr(cpu_code, "_load", lambda wanted: True)
    assert cpu_code.ready({NEED}, tmp_path)
    assert asked == []
    monkeypatch.setattr(cpu_code, "_load", lambda wanted: False)
    assert not cpu_code.ready({NEED}, tmp_path)
    assert asked == [note]
    assert beside.read(note) == ""


def test_who_waits_compiles_here(asked, tmp_path, monkeypatch, caplog):
    """After whoever is at it, and once: with a place for the note or without; `asked` is nobody."""
    (tmp_path / "file").touch()
    compiled = []
    numba = SimpleNamespace(compile=compiled.append, kept=lambda: True)
    monkeypatch.setitem(sys.modules, "trillama.kernels.cpu", numba)
    note = tmp_path / "cpu" / cpu_code._key({NEED})
    with beside.lock(note):
        monkeypatch.setattr(beside, "LIMIT", 0.2)  # it hangs
        assert cpu_code.ready({NEED}, tmp_path, wait=True)
    assert (compiled, cpu_code.loaded, beside.read(note)) == ([NEED], {NEED}, "done")
    assert cpu_code.ready({NEED}, tmp_path, wait=True)
    cpu_code.loaded.clear()
    assert cpu_code.ready({NEED}, tmp_path / "file", wait=True)
    assert (asked, len(compiled)) == ([], 2)
    told = "compiling the decode step for this CPU, once: up to half a minute"
    assert [record.message for record in caplog.records] == [told] * 2


def test_the_key_sees_what_decides_where_code_is(monkeypatch):
    before = cpu_code._key({NEED})
    assert cpu_code._key({NEED, ("_copied",)}) != before
    monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere")
    assert cpu_code._key({NEED}) != before


def test_no_numba_no_word(asked, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cpu_code.importlib.util, "find_spec", lambda name: None)
    assert not cpu_code.ready({NEED}, tmp_path)
    assert (asked, caplog.records, list(tmp_path.iterdir())) == ([], [], [])


# --- in a model --------------------------------------------------------------------------------------------------------


CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 17000, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip


def model():
    """Its head is worth compiling for, its layers are not: two seconds of compiling."""
    torch.manual_seed(0)
    return Llama.random(CONFIG, device="cpu", dtype=torch.float32)


def test_what_a_model_needs():
    layers = model().model.layers
    head = model().lm_head.weight
    assert cpu_code.needs(torch.float32, layers, head) == {NEED}
    assert cpu_code.needs(torch.bfloat16, layers, head.bfloat16()) == set()  # half the bytes are too few
    assert cpu_code.needs(torch.float16, layers, head) == set()
    rounded = head.bfloat16().float()
    assert cpu_code.needs(torch.float32, layers, rounded) == {("_product_at", "float32", "bfloat16", "bfloat16"), ("_copied",)}


def test_a_sequence_is_computed_one_way(monkeypatch):
    """Code that becomes ready in the middle is for the next sequence, or the next turn."""
    ours, answers = model(), iter([False, True, True])
    monkeypatch.setattr(Llama, "prepare", lambda self: next(answers))
    found = []
    with use_backend("auto"):
        cache = KVCache(ours.config, 1, 40)
        for ids in ([[1, 2, 3]], [[1, 2, 3, 4, 5, 6, 7, 8, 9]]):
            generate(ours, ids, max_new_tokens=3, eos=[], cache=cache, stream=lambda _: found.append(cache.streams["compiled"]))
        cache.reset()
        ours(torch.tensor([[1, 2]]), cache)
    assert found == [False] * 3 + [True] * 3
    assert next(answers, "all asked") == "all asked"


SCRIPT = f"""
import sys, time
import torch
from trillama.kernels import beside, cpu_code, use_backend
from trillama.model import Llama, generate
from trillama.model.presets import cache_folder

torch.manual_seed(0)
model = Llama.random({CONFIG!r}, device="cpu", dtype=torch.float32)
with use_backend("reference"):
    expected = generate(model, [[1, 2, 3]], max_new_tokens=5, eos=[]).tolist()
assert generate(model, [[1, 2, 3]], max_new_tokens=5, eos=[]).tolist() == expected
if "fresh" in sys.argv:
    assert not any(name in sys.modules for name in ("numba", "trillama.kernels.cpu")), "someone has waited"
    (note,) = [cache_folder() / "cpu" / cpu_code._key(cpu_code.needs(torch.float32, model.model.layers, model.lm_head.weight))]
    end = time.monotonic() + 1200
    while not beside.read(note) and time.monotonic() < end:
        time.sleep(0.05)
    assert beside.read(note) == "done"
    assert generate(model, [[1, 2, 3]], max_new_tokens=5, eos=[]).tolist() == expected
from trillama.kernels import cpu
assert cpu_code.loaded == {{{NEED!r}}}
assert not cpu._product_at.stats.cache_misses, "compiled in this process"
assert len(cpu._product_at.signatures) == 1
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_a_new_machine(tmp_path):
    """The first words come from PyTorch; what compiles meanwhile serves the next sequence, and the next process from its first."""
    pytest.importorskip("numba")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRILLAMA_BACKEND", "TRITON_INTERPRET")}
    environment |= {"TRILLAMA_CACHE": str(tmp_path / "ours"), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}

    def run(*arguments):
        done = subprocess.run(python(SCRIPT, *arguments), capture_output=True, text=True, env=environment, timeout=1500)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert run("fresh") == f"{TOLD}\n"
    assert run() == ""
