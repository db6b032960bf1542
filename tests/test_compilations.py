"""What Triton compiles while a model decodes: everything in the first step, nothing later, wherever the lengths go."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.host

STEPS = """
import torch, triton
from trillama.bench import xray
from trillama.bench.cases import Model
from trillama.kernels import tuning, use_backend
from trillama.kernels.decode import counters
from trillama.kernels.dispatch import dependent_launch, observe
from trillama.kernels.sampling import start
from trillama.model import KVCache, Llama
from trillama.model.generation import Step

SAMPLED = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1}
GREEDY = {"temperature": 0.0, **dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty"))}
made, launched = [], []

def compile_only(kernel, grid, arguments, options):
    kernel.warmup(*arguments, grid=grid, **options)
    launched.append(kernel.__name__)
    return True

triton.knobs.runtime.jit_post_compile_hook = lambda **what: made.append((number, what["repr"]))
config = {**Model(256, 4, 2, 64, 512, 1, 64, family="FAMILY").config(), "pad_token_id": 0}
with xray.compiling_for("sm_90"), use_backend("triton"), observe(compile_only), torch.inference_mode():
    llama = Llama(config).to(torch.bfloat16).eval()
    tile = tuning.decode(90, 64, 2, 2)
    # The lengths at which a key more begins another split: each multiple of a split until there are no more splits, and then the
    # first at which all splits are longer.
    boundaries = [tile.split * i for i in range(1, tile.max_splits + 1)]
    cache = KVCache(config, BATCH, boundaries[-1] + 64, torch.bfloat16, "cpu")
    step = Step(llama, cache, torch.zeros(BATCH, 3, dtype=torch.int64), start(1, BATCH, "cpu"), torch.tensor([0]), OPTIONS, True)
    with dependent_launch(DEPENDENT), counters("cpu"):
        cache.filled, number = 440, 0
        step.work()
        first = len(launched)
        for boundary in boundaries:
            cache.filled = boundary - 4
            for _ in range(8):
                number += 1
                step.work()
late = [m for m in made if m[0]]
assert len(launched) == first * (number + 1) == 9 * (number + 1) and len(made) > len(late), (len(launched), first, number)
print(number, len(late), late[:3])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "batch", "options", "dependent"),
    [("llama", 1, "GREEDY", False), ("llama", 3, "SAMPLED", True), ("phi3", 1, "SAMPLED", False)],
)
def test_512_steps_across_every_boundary_of_the_splits(tmp_path, family, batch, options, dependent):
    """Four tokens before to four behind each: nothing is compiled after the first step."""
    code = STEPS.replace("FAMILY", family).replace("BATCH", str(batch))
    code = code.replace("OPTIONS", options).replace("DEPENDENT", str(dependent))
    (tmp_path / "steps.py").write_text(code)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")}
    command = [sys.executable, str(tmp_path / "steps.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "512 0 []"
