"""What the README shows, executed: its snippets of Python in order, its commands as far as their options, and its replacements of
Liger's calls."""

import builtins
import importlib
import re
import symtable
from pathlib import Path

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import apply_rope, rms_norm, swiglu
from trillama.kernels.dispatch import INTERPRETED

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
LINES = [line for language, code in BLOCKS if language in ("bash", "") for line in code.replace(" && ", "\n").splitlines()]
COMMANDS = [line for line in LINES if re.match(r"trillama \w|python -m trillama|torchrun ", line)]


@pytest.fixture(scope="module")
def pasted():
    """The names of a session into which one snippet after the other is pasted."""
    return {}


@pytest.mark.host
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run_in_order(number, pasted, request, capsys, monkeypatch):
    """Without network, as they stand; what a comment behind a `print` says is what is printed."""
    code = SNIPPETS[number]
    if "transformers" in code:
        pytest.importorskip("transformers")
    if '"smollm2"' in code:
        request.getfixturevalue("smollm2_path")
        monkeypatch.setenv("TRILLAMA_BACKEND", "reference")  # the step of kernels/cpu.py, compiled, has tests of its own
    monkeypatch.delenv("RANK", raising=False)
    torch._dynamo.reset()
    exec(compile(code, f"README.md, snippet {number + 1}", "exec"), pasted)
    for said in re.findall(r"print\(.*\) +# (.*)", code):
        assert said in capsys.readouterr().out.splitlines()


@pytest.mark.host
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_each_snippet_has_what_it_names(number):
    """So that it runs alone as well."""
    tables = [symtable.symtable(SNIPPETS[number], "README.md", "exec")]
    made = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    for table in tables:  # grows
        tables += table.get_children()
    named = {s.get_name() for table in tables for s in table.get_symbols() if s.is_global() or table.get_type() == "module"}
    assert named - made <= set(dir(builtins))


@pytest.mark.host
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.sub(r"\W+", " ", command)[:60].strip())
def test_commands_have_the_options_that_they_are_given(command, trillama, capsys):
    module, name = re.search(r"-m (trillama\.bench\.\w+)", command), re.search(r"trillama\)? (\w+)", command)
    if module:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module[1] + (".__main__" if module[1].endswith("hardware") else "")).main(["--help"])
        status, told = stop.value.code, capsys.readouterr().out
    else:
        status, told, _ = trillama(name[1], "--help")
    assert status == 0
    asked = re.findall(r"--[a-z][\w-]*", command.removeprefix("torchrun --nproc-per-node"))
    assert [option for option in asked if option not in told] == []


@pytest.mark.skipif(INTERPRETED, reason="Liger's kernels do not run in the interpreter")
def test_replacements_of_liger(triton, device, dtype):
    """Both on the same input: ours is at least as close to float64."""
    norm = pytest.importorskip("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    rope = pytest.importorskip("liger_kernel.ops.rope").LigerRopeFunction
    silu_mul = pytest.importorskip("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    x, weight = torch.randn(5, 256).to(dtype), torch.randn(256).to(dtype)
    exact = oracle.rms_norm(x.double(), weight.double(), 1e-5)
    oracle.check(rms_norm(x.to(device), weight.to(device), 1e-5, offset=0.0, casting="llama"), exact, exact.to(dtype))
    theirs = norm.apply(x.to(device), weight.to(device), 1e-5, 0.0, "llama", False)
    assert oracle.error(theirs.cpu(), exact) < 0.02

    gate, up = torch.randn(5, 256).to(dtype), torch.randn(5, 256).to(dtype)
    exact = oracle.swiglu(gate.double(), up.double())
    oracle.check(swiglu(gate.to(device), up.to(device)), exact, exact.to(dtype))
    assert oracle.error(silu_mul.apply(gate.to(device), up.to(device)).cpu(), exact) < 0.02

    D, angles = 64, torch.rand(1, 9, 32)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    q, k = (torch.randn(1, 9, h, D).to(dtype).transpose(1, 2) for h in (4, 2))
    ours = apply_rope(q.to(device), k.to(device), cos[0, :, : D // 2].to(device), sin[0, :, : D // 2].to(device))
    theirs = rope.apply(q.clone().to(device), k.clone().to(device), cos.to(device, dtype), sin.to(device, dtype))
    for mine, other in zip(ours, theirs):
        assert oracle.error(mine.cpu(), other.cpu().double()) < 0.02
