"""Programmatic dependent launch: what the compiled code of a decode step does before it waits for the kernel before it, and that
the values are the same. That it shortens anything only a GPU can show."""

import os
import subprocess
import sys

import pytest
import torch
from trillama.kernels import decode_linear
from trillama.kernels.dispatch import INTERPRETED, dependent_launch
from trillama.kernels.sampling import choose_, start

pytest.importorskip("triton")

STEP = """
import re, torch
from trillama.bench import xray
from trillama.bench.cases import Model
from trillama.kernels import use_backend
from trillama.kernels.dispatch import dependent_launch, observe
from trillama.kernels.sampling import start
from trillama.model import KVCache, Llama
from trillama.model.generation import Step

OPTIONS = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": None, "repetition_penalty": 1.1}
EVENTS = {
    "ptx": r"griddepcontrol\\.\\w+|prefetch\\.global|(?:ld|st|atom|red)\\.global|cp\\.async\\.c",
    "sass": r"\\b(?:PREEXIT|ACQBULK|CCTL\\.E\\.PF2|LDG|LDGSTS|STG|ATOMG|UTMALDG)\\b",
}
for arch, quantized in (("sm_80", False), ("sm_90", False), ("sm_90", True), ("sm_100", False)):
    made = []
    with xray.compiling_for(arch), use_backend("triton"), observe(lambda *l: made.append(l) or True), torch.inference_mode():
        model = Llama(Model(256, 4, 2, 64, 512, 1, 64).config()).to(torch.bfloat16).eval()
        if quantized:
            for layer in model.model.layers:
                layer.mlp.gate_up_proj.quantize_(4)
                layer.mlp.down_proj.quantize_(8)
        cache = KVCache(model.config, 1, 1024, torch.bfloat16, "cpu")
        cache.advance(1, 9)
        step = Step(model, cache, torch.zeros(1, 3, dtype=torch.int64), start(1, 1, "cpu"), torch.tensor([0]), OPTIONS, True)
        with dependent_launch(True):
            step.work()
        for launch in made:
            kernel = xray.compiled(launch)
            code = {"ptx": kernel.asm["ptx"], "sass": xray.disassemble(kernel.asm["cubin"])[1]}
            print(arch, launch[0].__name__.strip("_"), kernel.metadata.launch_pdl, *(
                ",".join(dict.fromkeys(re.findall(events, code[form]))) for form, events in EVENTS.items()
            ))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """{architecture: [(kernel, launch option, first occurrences in PTX, in SASS), ...]} of a step with the switch on."""
    file = tmp_path_factory.mktemp("step") / "step.py"
    file.write_text(STEP)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for line in done.stdout.splitlines():
        arch, name, option, ptx, sass = line.split(" ")
        found.setdefault(arch, []).append((name, option == "True", ptx.split(","), sass.split(",")))
    return found


LAYER = ["linear_kernel", "rope_kernel", "decode_kernel", *3 * ["linear_kernel"]]


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_everything_waits_before_it_touches_what_others_write(kernels, arch):
    """Before the wait there are the release of the next kernel and, in products, a look ahead at the weights: nothing else."""
    step = ["embed_kernel", *LAYER, "linear_kernel", "choose_kernel"]
    assert [name for name, *_ in kernels[arch]] == step * (len(kernels[arch]) // 9)
    for name, option, ptx, sass in kernels[arch]:
        assert option
        ahead = name == "linear_kernel"
        begin = ["griddepcontrol.launch_dependents", *["prefetch.global"] * ahead, "griddepcontrol.wait"]
        assert ptx[: len(begin)] == begin
        assert sass[: len(begin)] == ["PREEXIT", *["CCTL.E.PF2"] * ahead, "ACQBULK"]
        assert {"ld.global", "st.global"} <= set(ptx[len(begin) :])


@pytest.mark.slow
@pytest.mark.host
def test_older_architectures_know_nothing_of_it(kernels):
    assert len(kernels["sm_80"]) == 9
    for _, option, ptx, sass in kernels["sm_80"]:
        assert not option
        assert not [event for event in ptx if "griddep" in event or "prefetch" in event]
        assert not {"PREEXIT", "ACQBULK"} & set(sass)


@pytest.mark.host
def test_the_switch(monkeypatch):
    from trillama.kernels import dispatch

    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "architecture", lambda x: 90)
    off, on = {"PDL": False}, {"PDL": True, "launch_pdl": True}
    monkeypatch.delenv("TRILLAMA_PDL", raising=False)
    assert dispatch.dependence(None) == off
    monkeypatch.setenv("TRILLAMA_PDL", "1")
    assert dispatch.dependence(None) == on
    with dependent_launch(False):
        assert dispatch.dependence(None) == off
    assert dispatch.dependence(None) == on
    monkeypatch.setattr(dispatch, "architecture", lambda x: 89)
    with dependent_launch(True):
        assert dispatch.dependence(None) == off


@pytest.mark.skipif(INTERPRETED, reason="compiled code alone has it")
def test_the_values_are_the_same(triton, device, dtype):
    x, w, norm = (torch.randn(*shape, device=device).to(dtype) for shape in ((2, 200), (70, 200), (200,)))
    results = []
    for on in (False, True):
        with dependent_launch(on):
            logits = decode_linear(x, w, norm=norm)
            ids, ended = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.bool, device=device)
            state, finished = start(1, 2, device), torch.zeros((), dtype=torch.bool, device=device)
            choose_(logits, ids, ended, finished, ends=ids[:0], state=state, temperature=1.0, top_k=9)
            results.append((logits, ids))
    assert all(torch.equal(a, b) for a, b in zip(*results))
