"""No kernel reads or writes outside of its tensors: seen in every access of a run, and for row kernels proved for the whole grid.

The compiled code is checked too, with bounds on views, races and uninitialised shared memory, where a driver that executes it on
host memory is at hand.
"""

import importlib.util
import json
import os
import subprocess
import sys
import venv
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from trillama.bench import traffic
from trillama.bench.cases import OPS, available, case
from trillama.kernels.dispatch import INTERPRETED

pytestmark = pytest.mark.host
KINDS = [(op, backward) for op in available() for backward in ((False, True) if OPS[op].differentiable else (False,))]


SCRATCH = {"best_ptr", "d_ptr", "id_ptr"}  # room for as many programs, and for as many ids that stay, as there can be


@pytest.mark.few(10)
@pytest.mark.skipif(not INTERPRETED, reason="accesses are followed in Triton's interpreter")
@pytest.mark.parametrize(("op", "backward"), KINDS)
@pytest.mark.parametrize("model", ["SmolLM2-135M", pytest.param("Phi-3-mini", marks=pytest.mark.slow)])
def test_every_access_lies_inside(op, backward, model):
    """At sizes that no tile divides: an access beyond an argument raises, and the last element of each is among those touched."""
    decode = OPS[op].phase == "decode"
    c = case(op, model, batch=2, tokens=1 if decode else 7, context=83 if decode else None, dtype="fp16", backward=backward)
    inputs = {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in c.inputs().items()}
    for launch in traffic.count(c, inputs):
        for buffer in launch.buffers:
            scratch = buffer.name in SCRATCH
            assert scratch or any(touched[-4:].any() for touched in buffer.touched.values()), f"{launch.kernel}: {buffer.name}"


PROVED = {"_rms_norm_kernel", "_rms_norm_backward_kernel", "_swiglu_kernel", "_swiglu_backward_kernel"}


@pytest.fixture(scope="module")
def sanitizer(request):
    """The Python of an environment with the sanitizer: its own Triton and numpy, everything else from this one."""
    folder = Path(request.config.cache.mkdir("sanitizer"))
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        wanted = ["triton==3.6.0", "triton-viz==3.0", "numpy<2.4"]
        done = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True, timeout=900)
        if done.returncode:
            pytest.skip(f"the sanitizer cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        (packages,) = (folder / "lib").glob("python3*/site-packages")
        also = [path for path in sys.path if path.endswith("-packages")]
        (packages / "also.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in also))
        (folder / "complete").touch()
    return python


@pytest.mark.slow
def test_the_row_kernels_are_proved_safe(sanitizer):
    """For every program and every element. Kernels with branches or loops that depend on data are beyond this sanitizer."""
    kinds = [(op, backward) for op, backward in KINDS if op in ("rms_norm", "add_rms_norm", "swiglu")]
    cases = [case(op, "SmolLM2-135M", batch=2, tokens=13, dtype="fp32", backward=backward) for op, backward in kinds]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sanitizer, Path(__file__).with_name("sanitize.py")], env=environment, capture_output=True, text=True, timeout=900,
        input="".join(json.dumps(asdict(c)) + "\n" for c in cases),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = [line.split("\t") for line in done.stdout.splitlines()]
    wrong = [r for r in results if r[3] != ("safe" if r[2] == "-" else "caught")]
    assert not wrong
    assert {kernel for _, kernel, argument, _ in results if argument == "-"} == PROVED


# The last program to arrive reads what the others wrote and moves on the state that they read: an atomic counter orders them, which
# the check for races does not know.
STATE = "write by CTA #23 of bytes of 'state_ptr'"
ARRIVAL = {"decode_attention": ("read by",), "choose_": ("read by",), "choose_ cut": ("read by", STATE)}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nullgpu") is None, reason="no driver that executes compiled code on host memory")
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_compiled_code_touches_what_it_may(arch):
    """Every access of the machine's code within its view, none to shared memory that nobody wrote, no two programs at odds."""
    jobs = []
    for op, backward in KINDS:
        sizes = {"tokens": 1, "context": 700} if OPS[op].phase == "decode" else {"tokens": 75}
        jobs.append([arch, asdict(case(op, "SmolLM2-135M", batch=2, backward=backward, **sizes))])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("emulate.py")], env=environment, capture_output=True, text=True,
        input="".join(json.dumps(job) + "\n" for job in jobs),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {op for op, *_ in results} == {op + (" backward" if backward else "") for op, backward in KINDS}
    wrong = [(op, kernel, f) for op, kernel, found in results for f in found if not f.startswith(ARRIVAL.get(op, ()))]
    assert not wrong
