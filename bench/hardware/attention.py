"""Attention, forward and backward, beside SDPA's kernels and FlexAttention; sequences of unequal length; one token over a cache.

16,384 tokens in all, q, k and v as views of one projection. FLOP of two products, those that the mask leaves; a backward pass
counts as two and a half forward passes.
"""

import functools
import importlib.util
import inspect

import torch
import torch.nn.functional as F

from ... import kernels
from .. import peers, plots, timing
from . import Job, facts

PARALLEL = False
TOKENS = 16384
LENGTHS = (64, 1024, 4096, 16384)  # in the table
LONG = 0.5e-3  # seconds of device time that the host's part of a call, autograd's included, stays below
OTHERS = ("flash", "cudnn", "math", "flex")  # columns of the table
ORDER = ("trillama", "flash", "cudnn", "torch", "mask", "flash_attn", "math", "flex")
SHAPES = [  # head size, heads, key/value heads, causal, lengths
    (128, 32, 8, True, (4096, 8192, 2048, 16384, 1024, 512)),
    (64, 32, 8, True, (4096, 16384, 8192, 2048, 1024, 512)),
    (128, 32, 8, False, (4096, 16384, 1024)),
    (64, 32, 8, False, (4096, 16384, 1024)),
    (256, 32, 8, True, (4096, 16384, 1024)),
    (128, 48, 48, True, (4096, 16384, 1024)),
    (64, 48, 48, True, (4096, 16384, 1024)),
    (256, 32, 8, False, (4096,)),
    (128, 48, 48, False, (4096,)),
    (64, 48, 48, False, (4096,)),
    (256, 48, 48, True, (4096,)),
]
DECODE = [(1, 8192), (8, 8192), (1, 65536), (64, 1024), (64, 8192), (8, 1024), (1, 1024), (8, 65536), (64, 65536)]


def jobs(card):
    shapes, tokens, contexts = SHAPES, TOKENS, DECODE
    if card.small:
        shapes, tokens, contexts = [(64, 4, 2, True, (64,)), (64, 2, 2, False, (64,))], 64, [(2, 70)]
    room = card.memory // 4
    found = []

    def add(what, engine, title, seconds, compiled=0, **work):
        found.append(Job(f"{what} {engine} {title}", {"what": what, "engine": engine, **work}, seconds, compiled))

    for D, heads, kv, causal, lengths in shapes:
        for S in lengths:
            work = {"D": D, "heads": heads, "kv": kv, "causal": causal, "S": S, "tokens": tokens}
            title = f"{D}, {heads}/{kv}, {'causal' if causal else 'full'}, {S}"
            first = lengths[0] == S
            add("dense", "trillama", title, 0.3, 10 if first else 0, **work)
            add("dense", "flash", title, 0.3, **work)
            if D < 256 or first:
                add("dense", "cudnn", title, 0.4, **work)
            scores = 5 * 4 * tokens * heads * S  # in float32, and what the backward pass makes of them
            if scores < room and S in (64, 1024):
                add("dense", "math", title, 0.8, **work)
            if first and causal and heads == shapes[0][1]:
                add("dense", "flex", title, 3.0, 12, **work)
            if importlib.util.find_spec("flash_attn"):
                add("dense", "flash_attn", title, 0.4, **work)
    D, heads, kv = (64, 4, 2) if card.small else (128, 32, 8)
    for engine, compiled in (("trillama", 12), *([] if card.small else [("torch", 0)])):  # torch's is for GPUs only
        add("varlen", engine, f"{D}, {heads}/{kv}", 0.6, compiled, D=D, heads=heads, kv=kv, tokens=tokens)
    for batch, context in contexts:
        for engine in ("trillama", "flash", "mask"):
            size = 4 * batch * context * kv * D
            if size > 2 * room or (engine == "mask" and batch * context > 1 << 19):
                continue
            compiled = 3 if engine == "trillama" and (batch, context) == contexts[0] else 0
            work = {"D": D, "heads": heads, "kv": kv, "batch": batch, "context": context}
            add("cached", engine, f"{batch} x {context}", 0.4, compiled, **work)
    return sorted(found, key=lambda job: ORDER.index(job.work["engine"]))


def run(what, **work):
    yield from {"dense": dense, "varlen": varlen, "cached": cached}[what](**work)


def warm(what, engine, **work):
    if what == "cached":
        list(cached(engine, **{**work, "batch": min(2, work["batch"])}, seconds=None))
        return
    if engine == "trillama":  # lengths and batches are compiled into nothing of ours
        work["tokens"] = min(256, work["tokens"])
        if what == "dense":
            work["S"] = min(128, work["S"])
    list((dense if what == "dense" else varlen)(engine, **work, seconds=None))


# --- as many queries as keys -----------------------------------------------------------------------------------------


def packed(*shape):
    """q, k, v as views of random [..., tokens, heads + 2 kv, D]; shape: (..., tokens, heads, kv, D)."""
    *leading, heads, kv, D = shape
    return torch.empty(*leading, heads + 2 * kv, D, dtype=torch.bfloat16, device="cuda").normal_().split([heads, kv, kv], -2)


def products(D, heads, causal, lengths):
    """FLOP of a forward pass over sequences of these lengths, as bench.cases counts them."""
    return sum(4 * heads * D * (S * S - (S * (S - 1) // 2 if causal else 0)) for S in lengths)


def dense(engine, D, heads, kv, causal, S, tokens, seconds=0.05):
    """q, k, v [B, H, S, D]."""
    B = max(1, tokens // S)
    flops = B * products(D, heads, causal, [S])
    call = attention(engine, causal, S)

    def inputs():
        return [t.transpose(1, 2) for t in packed(B, S, heads, kv, D)]

    shape = {"D": D, "heads": heads, "kv": kv, "causal": causal, "S": S, "batch": B}
    size = 2 * B * S * D
    yield from passes(engine, call, inputs, {"kind": "dense", **shape}, flops, size * (heads + 2 * kv), size * heads, seconds)


def passes(engine, call, inputs, shape, flops, taken, given, seconds):
    """Results of both passes; what they take and give, in bytes."""

    def forward():
        arguments = inputs()
        return torch.no_grad()(lambda: call(*arguments))

    def backward():
        arguments = [t.detach().requires_grad_() for t in inputs()]
        out = call(*arguments)
        gradient = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, arguments, gradient, retain_graph=True)

    backend = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}.get(engine)
    for make, work, moved in ((forward, flops, taken + given), (backward, 2.5 * flops, 2 * taken + 2 * given)):
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend or "FLASH_ATTENTION")):
            if seconds is None:
                make()()
                continue
            t = timing.measure(make, moved, taken + 2 * given, seconds, graph=work < 1e15 * LONG)
        yield {"engine": engine, **shape, "backward": make is backward, "flops": work, **t.asdict()}


def attention(engine, causal, S):
    if engine == "trillama":
        return functools.partial(kernels.flash_attention, causal=causal)
    if engine == "flash_attn":
        from flash_attn import flash_attn_func

        return lambda q, k, v: flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal).transpose(1, 2)
    if engine == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, S, S, device="cuda") if causal else None
        compiled = peers.compiled(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


# --- sequences of unequal length, packed -----------------------------------------------------------------------------


def varlen(engine, D, heads, kv, tokens, seconds=0.05):
    """Causal sequences, each twice as long as the one before."""
    lengths = [tokens // 2**i for i in range(5, 0, -1)]
    lengths.insert(0, tokens - sum(lengths))
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    longest = max(lengths)
    if engine == "trillama":
        call = functools.partial(kernels.flash_attention_varlen, cu_seqlens_q=starts, cu_seqlens_k=starts)
        call = functools.partial(call, max_seqlen_q=longest, max_seqlen_k=longest)
    else:
        from torch.nn.attention.varlen import varlen_attn

        named = inspect.signature(varlen_attn).parameters  # torch 2.11 needs not be told
        grouped = {"enable_gqa": True} if "enable_gqa" in named else {}

        def call(q, k, v):
            return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), **grouped)

    shape = {"kind": "varlen", "D": D, "heads": heads, "kv": kv, "causal": True, "S": longest, "batch": len(lengths)}
    size = 2 * tokens * D
    flops = products(D, heads, True, lengths)
    yield from passes(
        engine, call, lambda: packed(tokens, heads, kv, D), shape, flops, size * (heads + 2 * kv), size * heads, seconds
    )


# --- one query over a cache ------------------------------------------------------------------------------------------


def cached(engine, D, heads, kv, batch, context, seconds=0.05):
    """Bytes of the cache a second. flash: without a mask over a cache that is exactly full, its best case; mask: as for a cache
    with room, by whatever torch chooses."""
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")

    def make():
        shapes = ((heads, 1), (kv, context), (kv, context))
        q, k, v = (torch.empty(batch, *hn, D, dtype=torch.bfloat16, device="cuda").normal_() for hn in shapes)
        if engine == "trillama":
            return lambda: kernels.decode_attention(q, k, v, lengths)
        if engine == "mask":
            return lambda: peers.sdpa.decode_attention(q, k, v, lengths)
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    moved = 2 * batch * D * (2 * kv * context + 2 * heads)
    backends = torch.nn.attention.SDPBackend
    every = [backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION, backends.CUDNN_ATTENTION, backends.MATH]
    with torch.nn.attention.sdpa_kernel(backends.FLASH_ATTENTION if engine == "flash" else every), torch.no_grad():
        if seconds is None:
            make()()
            return
        t = timing.measure(make, moved, moved, seconds)
    yield {
        "engine": engine, "kind": "cached", "D": D, "heads": heads, "kv": kv, "batch": batch, "S": context, "bytes": moved,
        **t.asdict(),
    }  # fmt: skip


# --- the tables ------------------------------------------------------------------------------------------------------


def show(results, known=()):
    """known: the results of `facts`, for the fractions of what the card can do."""
    bandwidth, rate = facts.ceilings(known)
    cases, dense, cached = {}, [], []
    for r in results:
        if "us" not in r:  # a word of the frame's
            continue
        key = r["kind"], r["D"], r["heads"], r["kv"], r.get("causal"), r["S"], r["batch"]
        cases.setdefault(key, {})[r["engine"], r.get("backward", False)] = r

    def side(runs, engines, amount, ceiling, digits, backward=False):
        """Our rate, its share of the ceiling, and the times of others over ours."""
        mine = runs.get(("trillama", backward))
        if mine is None:
            return ["-"] * (1 + bool(ceiling) + len(engines))
        done = mine[amount] / mine["us"] * 1e6
        share = [f"{done / ceiling:.0%}"] if ceiling else []
        others = [runs.get((engine, backward)) for engine in engines]
        return [f"{done / 1e12:.{digits}f}", *share, *(f"{r['us'] / mine['us']:.2f}" if r else "-" for r in others)]

    for (kind, D, heads, kv, causal, S, batch), runs in cases.items():
        if kind == "cached":
            cached.append((f"{D} {heads}/{kv}", S, batch, *side(runs, ("flash", "mask"), "bytes", bandwidth, 2)))
        elif kind == "varlen" or S in LENGTHS:
            mask = "varlen" if kind == "varlen" else "causal" if causal else "full"
            engines = ("torch", *OTHERS[1:]) if kind == "varlen" else OTHERS
            both = [cell for backward in (False, True) for cell in side(runs, engines, "flops", rate, 0, backward)]
            dense.append((f"{D} {heads}/{kv}", mask, S, batch, *both))
    lines = []
    if dense:
        columns = [*(["max"] if rate else []), *OTHERS]
        lines += plots.table(("head", "mask", "S", "B", "TF/s", *columns, "bwd", *columns), dense, left=2)
    if cached:
        columns = [*(["max"] if bandwidth else []), "flash", "masked"]
        lines += plots.table(("one token", "keys", "B", "TB/s", *columns), cached)
    return [*lines, "max: of what was measured. Others: their time over ours."] if lines else []
