"""Training steps of transformers' Llama, 4 layers as wide as Llama 3.2 1B: its own attention, SDPA, our kernels, Liger's.

Forward, backward and fused AdamW in bfloat16 over 4 x 2048 tokens, the same weights and the same tokens for everybody.
"""

import torch

from .. import peers, plots, timing
from ..cases import MODELS, Model
from . import Job

PARALLEL = False
ENGINES = ("trillama", "sdpa", "sdpa, compiled", "trillama, compiled", "eager", "liger")  # Liger patches the module: it comes last
CHECKED, TIMED = 3, 6  # steps until the loss is read, and those that are timed


def jobs(card):
    size = {"layers": 4, "batch": 4, "tokens": 2048}
    if card.small:
        size = {"layers": 1, "batch": 2, "tokens": 16, "small": True}
    found = []
    for engine in ENGINES:
        if engine == "liger" and peers.why_not("rms_norm", "liger", "cuda") is not None:
            continue
        compiled = 25 if "compiled" in engine else 14 if engine == "trillama" else 10 if engine == "liger" else 0
        found.append(Job(engine, {"engine": engine, **size}, 9.0 if "compiled" in engine else 4.0, compiled))
    return found


def run(engine, layers, batch, tokens, small=False):
    model, step = training(engine, layers, batch, tokens, small)
    torch.cuda.reset_peak_memory_stats()
    losses = [step() for _ in range(CHECKED)]
    losses = [loss.item() for loss in losses]
    seconds = timing.elapsed(step, TIMED if not small else 1)
    yield {
        "engine": engine, "layers": layers, "batch": batch, "tokens": tokens, "us": seconds * 1e6, "losses": losses,
        "tokens_per_s": batch * tokens / seconds, "peak_bytes": torch.cuda.max_memory_allocated(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def warm(engine, layers, batch, tokens, small=False):
    if "compiled" in engine:  # a graph is compiled for its shapes
        training(engine, layers, batch, tokens, small)[1]()
    else:
        training(engine, 1, 1, min(128, tokens), small)[1]()
    torch.cuda.synchronize()


def training(engine, layers, batch, tokens, small):
    """(model, one training step, which returns the loss) with weights and tokens drawn anew, always the same."""
    import transformers

    name, _, compiled = engine.partition(", ")
    shape = Model(64, 4, 2, 16, 128, vocab=256) if small else MODELS["Llama-3.2-1B"]
    sizes = {**shape.config(), "num_hidden_layers": layers, "vocab_size": 256 if small else 32768, "tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model(**sizes, pad_token_id=0)
    if name == "trillama":
        from ...kernels.compat import transformers as adapter
    attention = name if name in ("eager", "trillama") else "sdpa"
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.02)
    if name == "trillama":
        adapter.patch(model)
    elif name == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    model.train()
    ids = torch.randint(0, config.vocab_size, (batch, tokens), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    # In parts: torch 2.11 cannot trace how our adapter reads the mask functions that transformers makes of positions.
    forward = peers.compiled(model, fullgraph=False) if compiled else model

    def step():
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return model, step


def show(results, known=()):
    results = [r for r in results if "us" in r]
    if not results:
        return []
    ours = next((r["us"] for r in results if r["engine"] == "trillama"), None)
    first = results[0]
    rows = [
        (r["engine"], f"{r['tokens_per_s']:,.0f}", f"{r['us'] / 1e3:.1f}", f"{r['us'] / ours:.2f}" if ours else "-",
         f"{r['peak_bytes'] / 2**30:.2f}", *(f"{loss:.4f}" for loss in r["losses"]))
        for r in results
    ]  # fmt: skip
    header = ("engine", "tokens/s", "ms a step", "over ours", "peak GiB", *(f"loss {i + 1}" for i in range(len(first["losses"]))))
    return plots.table(header, rows)
