"""What the README shows, executed: the snippets of "Drop it into your model", and its replacements of Liger's calls."""

import re
from pathlib import Path

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import apply_rope, rms_norm, swiglu
from trillama.kernels.dispatch import INTERPRETED

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"## Drop it into your model\n(.*?)\n## ", README, re.S)[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", SECTION, re.S)


@pytest.mark.host
@pytest.mark.parametrize("number", range(4))
def test_snippets_run(number, tmp_path):
    assert len(SNIPPETS) == 4
    names = {"torch": torch, "folder": str(tmp_path)}
    if "transformers" in SNIPPETS[number]:
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    torch._dynamo.reset()
    exec(compile(SNIPPETS[number], f"README.md, snippet {number + 1}", "exec"), names)


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
