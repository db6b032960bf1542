"""The shapes that the instruments look at, as data: ops on the tensors that named models hand them.

Tensors have the layout of the model: q, k, v are views of one packed projection, transposed; so are gate and up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama-style model, or of one GPU's share of it."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


MODELS = {  # from the config.json of each checkpoint; "/8": one of eight tensor-parallel shares
    "SmolLM2-135M": Model(576, 9, 3, 64, 1536),
    "Qwen3-0.6B": Model(1024, 16, 8, 128, 3072),
    "Llama-3.2-1B": Model(2048, 32, 8, 64, 8192),
    "Phi-3-mini": Model(3072, 32, 32, 96, 8192),
    "Qwen2.5-7B": Model(3584, 28, 4, 128, 18944),
    "Gemma-2-9B": Model(3584, 16, 8, 256, 14336),
    "Llama-3.1-8B": Model(4096, 32, 8, 128, 14336),
    "Llama-3.1-70B/8": Model(8192, 8, 1, 128, 3584),
    "Llama-3.1-405B/8": Model(16384, 16, 1, 128, 6656),
}


@dataclass(frozen=True)
class Case:
    """One op at one shape: `batch` sequences of `tokens` new tokens that see `context` keys."""

    op: str
    model: str
    batch: int
    tokens: int
    context: int
    dtype: str = "bf16"
    backward: bool = False

    @property
    def m(self):
        return MODELS[self.model]

    @property
    def rows(self):
        return self.batch * self.tokens

    @property
    def itemsize(self):
        return DTYPES[self.dtype].itemsize

    @property
    def name(self):
        return self.op + (" backward" if self.backward else "")

    @property
    def label(self):
        return OPS[self.op].label(self)

    @property
    def shape(self):
        keys = f", {self.context} keys" if OPS[self.op].phase == "decode" and "attention" in self.op else ""
        return f"{self.batch} x {self.tokens}{keys}"

    def inputs(self, device="cpu", empty=False):
        """The op's arguments. empty: uninitialised memory, for launches that are only looked at."""

        def make(*shape):
            if empty:
                return torch.empty(shape, dtype=DTYPES[self.dtype], device=device)
            return torch.randn(shape, device=device).to(DTYPES[self.dtype])

        return OPS[self.op].inputs(self, make)

    def prepare(self, inputs, function=None):
        """What is looked at, as a function of no arguments: the call of the op (or of `function`, which takes the same arguments),
        or with `backward` the gradients of its outputs, the forward done before."""
        function = function or getattr(kernels, self.op)
        if not self.backward:
            return torch.no_grad()(lambda: function(**inputs))
        leaves = {name: inputs[name].detach().requires_grad_() for name in OPS[self.op].differentiable}
        outputs = function(**{**inputs, **leaves})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [torch.ones_like(o) for o in outputs]
        return lambda: torch.autograd.grad(outputs, list(leaves.values()), gradients, retain_graph=True)

    @property
    def moved(self):
        """The least bytes through memory: every input read once, every output written once, as far as they are needed."""
        op = OPS[self.op]
        return (op.moved_backward if self.backward else op.moved)(self)

    @property
    def flops(self):
        """FLOP of the matrix products, 0 for ops that have none. The backward counts as two and a half forwards."""
        return round(OPS[self.op].flops(self) * (2.5 if self.backward else 1))


@dataclass(frozen=True)
class Op:
    """inputs(case, make) -> arguments; moved(case) -> least bytes; label(case) -> what of the model matters here."""

    phase: str
    inputs: Callable
    label: Callable
    moved: Callable
    moved_backward: Callable | None = None
    differentiable: tuple = ()
    flops: Callable = lambda c: 0
    models: tuple = ("Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B/8")


def _qkv(c, make):
    """q, k, v [B, H, S, D] as views of the packed projection [B, S, (Hq + 2 Hk) D]."""
    packed = make(c.batch, c.tokens, c.m.heads + 2 * c.m.kv_heads, c.m.head_dim).transpose(1, 2)
    return packed.split([c.m.heads, c.m.kv_heads, c.m.kv_heads], 1)


def _tables(c, make):
    half = c.m.head_dim // 2
    return {name: make(c.context, half).to(torch.float32) for name in ("cos", "sin")}


def _rope(c, make):
    q, k, _ = _qkv(c, make)
    return {"q": q, "k": k, **_tables(c, make)}


def _caches(c, make):
    return {name: make(c.batch, c.m.kv_heads, c.context, c.m.head_dim) for name in ("k_cache", "v_cache")}


def _rope_append(c, make):
    q, k, v = _qkv(c, make)
    positions = torch.arange(c.context - c.tokens, c.context, dtype=torch.int32, device=q.device)
    return {"q": q, "k": k, "v": v, **_tables(c, make), **_caches(c, make), "positions": positions}


def _gate_up(c, make):
    gate, up = make(c.batch, c.tokens, 2 * c.m.ffn).chunk(2, -1)
    return {"gate": gate, "up": up}


def _attention(c, make):
    q, k, v = _qkv(c, make)
    return {"q": q, "k": k, "v": v}


def _decode(c, make):
    q, _, _ = _qkv(c, make)
    lengths = torch.full((c.batch,), c.context, dtype=torch.int32, device=q.device)
    return {"q": q, **_caches(c, make), "lengths": lengths}


def _elements(c, q=0, kv=0, tokens=None):
    return c.batch * (c.tokens if tokens is None else tokens) * c.m.head_dim * (q * c.m.heads + kv * c.m.kv_heads)


def _table_bytes(c):
    return c.tokens * c.m.head_dim * 4  # a row of cos and a row of sin, of half a head each, in float32


def _pairs(c):
    """Query-key pairs under a causal mask aligned bottom-right."""
    return c.tokens * c.context - c.tokens * (c.tokens - 1) // 2


def _hidden(c):
    return f"hidden {c.m.hidden}"


def _heads(c):
    return f"head {c.m.head_dim}, {c.m.heads}/{c.m.kv_heads}"


OPS = {
    "rms_norm": Op(
        "both", lambda c, make: {"x": make(c.batch, c.tokens, c.m.hidden), "weight": make(c.m.hidden)}, _hidden,
        lambda c: (2 * c.rows + 1) * c.m.hidden * c.itemsize, lambda c: (3 * c.rows + 2) * c.m.hidden * c.itemsize, ("x", "weight"),
        models=("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B/8", "Llama-3.1-405B/8"),
    ),
    "add_rms_norm": Op(
        "both",
        lambda c, make: {
            "x": make(c.batch, c.tokens, c.m.hidden), "residual": make(c.batch, c.tokens, c.m.hidden), "weight": make(c.m.hidden)
        },
        _hidden, lambda c: (4 * c.rows + 1) * c.m.hidden * c.itemsize, lambda c: (4 * c.rows + 2) * c.m.hidden * c.itemsize,
        ("x", "residual", "weight"),
        models=("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B/8", "Llama-3.1-405B/8"),
    ),
    "apply_rope": Op(
        "prefill", _rope, _heads, lambda c: _elements(c, 2, 2) * c.itemsize + _table_bytes(c),
        lambda c: _elements(c, 2, 2) * c.itemsize + _table_bytes(c), ("q", "k"),
    ),
    "rope_append_": Op(
        "decode", _rope_append, _heads, lambda c: _elements(c, 2, 4) * c.itemsize + _table_bytes(c) + 4 * c.tokens,
    ),
    "swiglu": Op(
        "both", _gate_up, lambda c: f"ffn {c.m.ffn}", lambda c: 3 * c.rows * c.m.ffn * c.itemsize,
        lambda c: 5 * c.rows * c.m.ffn * c.itemsize, ("gate", "up"),
    ),
    "flash_attention": Op(
        "prefill", _attention, _heads, lambda c: (_elements(c, 2) + _elements(c, 0, 2, c.context)) * c.itemsize,
        lambda c: _elements(c, 4, 4) * c.itemsize + 4 * c.rows * c.m.heads, ("q", "k", "v"),
        flops=lambda c: 4 * c.batch * c.m.heads * c.m.head_dim * _pairs(c), models=("Llama-3.2-1B", "Llama-3.1-8B", "Gemma-2-9B"),
    ),
    "decode_attention": Op(
        "decode", _decode, _heads,
        lambda c: (_elements(c, 2) + _elements(c, 0, 2, c.context)) * c.itemsize + 4 * c.batch,
        flops=lambda c: 4 * c.batch * c.m.heads * c.m.head_dim * _pairs(c), models=("Llama-3.2-1B", "Llama-3.1-8B", "Gemma-2-9B"),
    ),
}  # fmt: skip


def available():
    """The ops that this version of trillama.kernels has."""
    return [name for name in OPS if hasattr(kernels, name)]


def case(op, model, *, batch=1, tokens=None, context=None, dtype="bf16", backward=False):
    """A case with the phase's usual shape: 4096 tokens of prefill, or one token after 8192."""
    decode = OPS[op].phase == "decode"
    tokens = tokens or (1 if decode else 4096)
    return Case(op, model, batch, tokens, context or (8192 if decode else tokens), dtype, backward)


def differentiable(op):
    """Whether the op has a backward in this version."""
    return bool(OPS[op].differentiable)
