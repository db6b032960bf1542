"""The shapes that the instruments look at, as data: ops on the tensors that named models hand them.

Tensors have the layout of the model: q, k, v are views of one packed projection, transposed; so are gate and up.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from ..model.later import later
from ..model.shapes import MODELS
from ..model.shapes import Model as Model

torch, kernels = later("torch"), later("..kernels", __package__)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # and what torch calls them


def torch_dtype(name):
    """The torch.dtype of a name in DTYPES."""
    return getattr(torch, DTYPES[name])


@dataclass(frozen=True)
class Case:
    """One op at one shape: `batch` sequences of `tokens` new tokens that see `context` keys; `engine`: whose (peers.ENGINES).
    model: a name in MODELS, "name/n" for one of n shares of it."""

    op: str
    model: str
    batch: int
    tokens: int
    context: int
    dtype: str = "bf16"
    backward: bool = False
    engine: str = "trillama"

    @property
    def m(self):
        name, _, shares = self.model.partition("/")
        return MODELS[name].share(int(shares or 1))

    @property
    def rows(self):
        return self.batch * self.tokens

    @property
    def itemsize(self):
        return torch_dtype(self.dtype).itemsize

    @property
    def name(self):
        return self.op + (" backward" if self.backward else "")

    @property
    def label(self):
        return form(self.op).label(self)

    @property
    def shape(self):
        keys = f", {self.context} keys" if self.op == "decode_attention" else ""
        return f"{self.batch} x {self.tokens}{keys}"

    def inputs(self, device="cpu", empty=False):
        """The op's arguments. empty: uninitialised memory, for launches that are only looked at."""

        def make(*shape):
            if empty:
                return torch.empty(shape, dtype=torch_dtype(self.dtype), device=device)
            return torch.randn(shape, device=device).to(torch_dtype(self.dtype))

        return form(self.op).inputs(self, make)

    def prepare(self, inputs):
        """What is looked at, as a function of no arguments: the call of the op, or with `backward` the gradients of its outputs,
        the forward done before."""
        from .peers import engine

        function = engine(self)
        if not self.backward:
            return torch.no_grad()(lambda: function(**inputs))
        leaves = {name: inputs[name].detach().requires_grad_() for name in form(self.op).differentiable}
        outputs = function(**{**inputs, **leaves})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [torch.ones_like(o) for o in outputs]
        return lambda: torch.autograd.grad(outputs, list(leaves.values()), gradients, retain_graph=True)

    @property
    def moved(self):
        """The least bytes through memory: every input read once, every output written once, as far as they are needed."""
        op = form(self.op)
        return (op.moved_backward if self.backward else op.moved)(self.inputs("meta", empty=True))

    @property
    def held(self):
        """Bytes that the arguments take, whole caches and tables included."""
        storages = {}
        for value in self.inputs("meta", empty=True).values():
            for t in (value.data, value.scale, value.minimum) if isinstance(value, kernels.QuantizedWeight) else (value,):
                if isinstance(t, torch.Tensor):
                    storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return sum(storages.values())

    @property
    def flops(self):
        """FLOP of the matrix products, 0 for ops that have none. The backward counts as two and a half forwards."""
        return round(form(self.op).flops(self.inputs("meta", empty=True)) * (2.5 if self.backward else 1))


@dataclass(frozen=True)
class Op:
    """inputs(case, make) -> arguments by name; label(case) -> what of the model matters here; moved(arguments) -> least bytes and
    flops(arguments), also of arguments on the meta device."""

    phase: str
    inputs: Callable
    label: Callable
    moved: Callable
    moved_backward: Callable | None = None
    differentiable: tuple = ()
    flops: Callable = lambda a: 0
    models: tuple = ("Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B/8")
    function: str = ""  # the name in trillama.kernels, where it is not the op's


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


def size(*tensors):
    """Bytes of the tensors; None is skipped."""
    return sum(t.nbytes for t in tensors if t is not None)


def _rows(a):
    """Bytes of the rows of cos and sin that the tokens need, each once."""
    return 2 * a["q"].shape[2] * a["cos"].shape[1] * 4


def _products(a):
    """FLOP of the two products of attention, causal, aligned bottom-right."""
    (B, H, S, D), T = a["q"].shape, a.get("k_cache", a.get("k")).shape[2]
    return 4 * B * H * D * (S * T - S * (S - 1) // 2)


def _embed(c, make):
    table = make(c.m.vocab, c.m.hidden)
    ids = torch.full((c.batch,), c.m.vocab - 1, dtype=torch.int64, device=table.device)
    return {"ids": ids, "table": table, "lengths": torch.zeros(c.batch, dtype=torch.int32, device=table.device)}


def _choice(**options):
    def inputs(c, make):
        logits = make(c.batch, c.m.vocab)

        def zeros(dtype, *shape):
            return torch.zeros(shape, dtype=dtype, device=logits.device)

        ids, ends, state = (zeros(torch.int64, size) for size in (c.batch, 1, c.batch))
        flags = {"ended": zeros(torch.bool, c.batch), "finished": zeros(torch.bool)}
        return {"logits": logits, "ids": ids, **flags, "ends": ends, "state": state, **options}

    return inputs


def _vocabulary(c):
    return f"vocabulary {c.m.vocab}"


def _down(c, make):
    return {
        "x": make(c.batch, c.tokens, c.m.ffn), "weight": make(c.m.hidden, c.m.ffn), "residual": make(c.batch, c.tokens, c.m.hidden)
    }  # fmt: skip


def _down_quantised(bits):
    def inputs(c, make):
        a, (N, K) = _down(c, make), (c.m.hidden, c.m.ffn)
        data = make(N, K if bits == 8 else K // 2).to(torch.int8 if bits == 8 else torch.uint8)
        scales = [make(N, 1)] if bits == 8 else [make(N, K // 32), make(N, K // 32)]
        return {**a, "weight": kernels.QuantizedWeight(data, *(scale.to(torch.bfloat16) for scale in scales))}

    return inputs


def _norm_gate_up(c, make):
    x, weight, norm = make(c.batch, c.tokens, c.m.hidden), make(2 * c.m.ffn, c.m.hidden), make(c.m.hidden)
    return {"x": x, "weight": weight, "norm": norm, "activation": "swiglu"}


def _linear_bytes(a):
    rows, N, e = a["x"].shape[:-1].numel(), a["weight"].shape[0], a["x"].element_size()
    out = N // 2 if a.get("activation") else N
    return size(a["x"], a["weight"], a.get("norm"), a.get("bias"), a.get("residual")) + rows * out * e


def _linear_flops(a):
    return 2 * a["x"].shape[:-1].numel() * a["weight"].shape.numel()


def _hidden(c):
    return f"hidden {c.m.hidden}"


def _heads(c):
    return f"head {c.m.head_dim}, {c.m.heads}/{c.m.kv_heads}"


WIDTHS = ("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B/8", "Llama-3.1-405B/8")
HEADS = ("Llama-3.2-1B", "Phi-3-mini", "Llama-3.1-8B", "Gemma-2-9B")

OPS = {
    "rms_norm": Op(
        "both", lambda c, make: {"x": make(c.batch, c.tokens, c.m.hidden), "weight": make(c.m.hidden)}, _hidden,
        lambda a: 2 * size(a["x"]) + size(a["weight"]), lambda a: 3 * size(a["x"]) + 2 * size(a["weight"]), ("x", "weight"),
        models=WIDTHS,
    ),
    "add_rms_norm": Op(
        "both",
        lambda c, make: {
            "x": make(c.batch, c.tokens, c.m.hidden), "residual": make(c.batch, c.tokens, c.m.hidden), "weight": make(c.m.hidden)
        },
        _hidden, lambda a: 4 * size(a["x"]) + size(a["weight"]), lambda a: 4 * size(a["x"]) + 2 * size(a["weight"]),
        ("x", "residual", "weight"), models=WIDTHS,
    ),
    "apply_rope": Op(
        "prefill", _rope, _heads, lambda a: 2 * size(a["q"], a["k"]) + _rows(a), lambda a: 2 * size(a["q"], a["k"]) + _rows(a),
        ("q", "k"), models=HEADS,
    ),
    "rope_append_": Op(
        "decode", _rope_append, _heads,
        lambda a: 2 * size(a["q"], a["k"], a["v"]) + _rows(a) + size(a["positions"]), models=HEADS,
    ),
    "swiglu": Op(
        "both", _gate_up, lambda c: f"ffn {c.m.ffn}", lambda a: 3 * size(a["gate"]), lambda a: 5 * size(a["gate"]), ("gate", "up"),
        models=WIDTHS,
    ),
    "flash_attention": Op(
        "prefill", _attention, _heads, lambda a: size(a["q"], a["q"], a["k"], a["v"]),
        lambda a: 4 * size(a["q"]) + 4 * size(a["k"]) + 4 * a["q"].shape[:3].numel(), ("q", "k", "v"), _products, HEADS,
    ),
    "embed_next_": Op(
        "decode", _embed, _hidden, lambda a: size(a["ids"], a["lengths"], a["lengths"]) + 2 * a["table"][0].nbytes * len(a["ids"]),
        models=WIDTHS[:-1],
    ),
    **{
        name: Op(
            "decode", _choice(**options), _vocabulary, lambda a: size(*(t for t in a.values() if isinstance(t, torch.Tensor))),
            models=("SmolLM2-135M", "Llama-3.1-8B", "Qwen3-0.6B"), function="choose_",
        )
        for name, options in (("choose_", {}), ("choose_ cut", {"temperature": 0.8, "top_k": 50, "top_p": 0.95}))
    },
    "decode_attention": Op(
        "decode", _decode, _heads, lambda a: size(a["q"], a["q"], a["k_cache"], a["v_cache"], a["lengths"]), flops=_products,
        models=HEADS,
    ),
    "decode_linear": Op(
        "decode", _down, lambda c: f"{c.m.hidden} x {c.m.ffn}", _linear_bytes, flops=_linear_flops, models=WIDTHS[:-1],
    ),
    "decode_linear swiglu": Op(
        "decode", _norm_gate_up, lambda c: f"{2 * c.m.ffn} x {c.m.hidden}", _linear_bytes, flops=_linear_flops,
        models=WIDTHS[:-1], function="decode_linear",
    ),
    **{
        f"decode_linear int{bits}": Op(
            "decode", _down_quantised(bits), lambda c: f"{c.m.hidden} x {c.m.ffn}", _linear_bytes, flops=_linear_flops,
            models=WIDTHS[:-1], function="decode_linear",
        )
        for bits in (8, 4)
    },
}  # fmt: skip


def _optional(options, packed=False):
    """flash_attention with some of its options, on the same tensors; packed: as sequences of 512 tokens one behind the other."""

    def inputs(c, make):
        a = _attention(c, make)
        if packed:
            longest = min(512, c.tokens)
            starts = torch.arange(0, c.tokens + 1, longest, dtype=torch.int32, device=a["q"].device)
            a = {name: t[0].transpose(0, 1) for name, t in a.items()}
            a |= {f"{what}_{x}": value for what, value in (("cu_seqlens", starts), ("max_seqlen", longest)) for x in "qk"}
        return {**a, **options}

    def products(a):
        S, D, window = a.get("max_seqlen_q", a["q"].shape[-2]), a["q"].shape[-1], options.get("window")
        seen = S * S if options.get("causal") is False else sum(min(i + 1, window or S) for i in range(S))
        return 4 * a["q"].numel() // (S * D) * seen * D

    return dataclasses.replace(
        OPS["flash_attention"], inputs=inputs, flops=products, function="flash_attention" + "_varlen" * packed,
        moved_backward=lambda a: 4 * size(a["q"], a["k"]) + 4 * a["q"].shape[:-1].numel(),
    )  # fmt: skip


_WINDOW, _SOFTCAP = {"window": 1024}, {"softcap": 50.0}
# What of an op no table or benchmark lists and whose code is looked at all the same.
FURTHER = {
    f"flash_attention {name}": _optional(*options)
    for name, options in {
        "unmasked": ({"causal": False},), "lse": ({"return_lse": True},), "window": (_WINDOW,), "softcap": (_SOFTCAP,),
        "window softcap": (_WINDOW | _SOFTCAP,), "packed": ({}, True), "packed lse": ({"return_lse": True}, True),
        "packed window": (_WINDOW, True), "packed window softcap": (_WINDOW | _SOFTCAP, True),
    }.items()
}  # fmt: skip


def form(op):
    """The Op of that name."""
    return OPS[op] if op in OPS else FURTHER[op]


def available():
    """The ops that this version of trillama.kernels has."""
    return [name for name, op in OPS.items() if hasattr(kernels, op.function or name)]


def case(op, model, *, batch=1, tokens=None, context=None, dtype="bf16", backward=False, engine="trillama"):
    """A case with the phase's usual shape: 4096 tokens of prefill, or one token after 8192."""
    decode = form(op).phase == "decode"
    tokens = tokens or (1 if decode else 4096)
    return Case(op, model, batch, tokens, context or (8192 if decode else tokens), dtype, backward, engine)
