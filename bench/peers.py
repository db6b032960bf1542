"""The same ops by others, with the arguments of ours: what the kernels are compared with.

`engine(case)` gives a function; `why_not(op, name, device)` says why there is none.
"""

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from .. import kernels
from ..kernels import QuantizedWeight, rope_tables
from ..model.llama import unpacked
from .cases import OPS, form

# --- plain PyTorch, as transformers writes it ----------------------------------------------------------------------------


class eager:
    @staticmethod
    def rms_norm(x, weight, eps=1e-6):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return weight * h.to(x.dtype)

    @staticmethod
    def add_rms_norm(x, residual, weight, eps=1e-6):
        total = x + residual
        return eager.rms_norm(total, weight, eps), total

    @staticmethod
    def apply_rope(q, k, cos, sin):
        cos, sin = (torch.cat((t, t), -1)[: q.shape[2]].to(q.dtype) for t in (cos, sin))

        def rotate(x):
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat((-b, a), -1) * sin

        return rotate(q), rotate(k)

    @staticmethod
    def rope_append_(q, k, v, cos, sin, k_cache, v_cache, positions):
        q, k = eager.apply_rope(q, k, cos[positions], sin[positions])
        k_cache.index_copy_(2, positions.long(), k)
        v_cache.index_copy_(2, positions.long(), v)
        return q

    @staticmethod
    def swiglu(gate, up):
        return F.silu(gate) * up

    @staticmethod
    def flash_attention(q, k, v):
        group, S = q.shape[1] // k.shape[1], q.shape[2]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mask = torch.full((S, S), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    @staticmethod
    def decode_attention(q, k_cache, v_cache, lengths):
        group = q.shape[1] // k_cache.shape[1]
        k, v = k_cache.repeat_interleave(group, 1), v_cache.repeat_interleave(group, 1)
        unseen = torch.arange(k.shape[2], device=q.device) >= lengths.view(-1, 1, 1, 1)
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(unseen, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    @staticmethod
    def embed_next_(ids, table, lengths):
        lengths += 1
        return F.embedding(ids[:, None], table), (lengths - 1)[:, None]

    @staticmethod
    def choose_(logits, ids, ended, finished, ends, state, temperature=0.0, top_k=None, top_p=None):
        logits = logits.float()
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            logits = logits / temperature
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
            ascending, order = logits.sort(-1)
            last = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
            unlikely = last.scatter(1, order, last)
            new = logits.masked_fill(unlikely, float("-inf")).softmax(-1).multinomial(1)[:, 0]
        ids.copy_(torch.where(ended, ids, new))
        ended |= (ids[:, None] == ends).any(-1)
        finished.copy_(ended.all())

    @staticmethod
    def decode_linear(x, weight, norm=None, residual=None, activation=None):
        weight = weight.dequantize(x.dtype) if isinstance(weight, QuantizedWeight) else weight
        y = F.linear(x if norm is None else eager.rms_norm(x, norm), weight)
        if activation:
            y = eager.swiglu(*y.chunk(2, -1))
        return y if residual is None else y + residual


class sdpa:
    @staticmethod
    def flash_attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @staticmethod
    def decode_attention(q, k_cache, v_cache, lengths):
        mask = torch.arange(k_cache.shape[2], device=q.device) < lengths.view(-1, 1, 1, 1)
        return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, enable_gqa=True)


# --- other packages ------------------------------------------------------------------------------------------------------


class liger:
    """Liger-Kernel 0.8: https://github.com/linkedin/Liger-Kernel. Its rope writes over its inputs, as it always does."""

    @staticmethod
    def rms_norm(x, weight, eps=1e-6):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    @staticmethod
    def add_rms_norm(x, residual, weight, eps=1e-6):
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

    @staticmethod
    def apply_rope(q, k, cos, sin):
        from liger_kernel.ops.rope import LigerRopeFunction

        cos, sin = (torch.cat((t, t), -1)[None, : q.shape[2]].to(q.dtype) for t in (cos, sin))
        return LigerRopeFunction.apply(q, k, cos, sin)

    @staticmethod
    def swiglu(gate, up):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)


class flash_attn:
    """flash-attention 2: https://github.com/Dao-AILab/flash-attention."""

    @staticmethod
    def flash_attention(q, k, v):
        from flash_attn import flash_attn_func

        return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True).transpose(1, 2)

    @staticmethod
    def decode_attention(q, k_cache, v_cache, lengths):
        from flash_attn import flash_attn_with_kvcache

        q, k_cache, v_cache = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, causal=True).transpose(1, 2)


# --- whole decode steps on the weights of one of our models -------------------------------------------------------------------


class Decoder(nn.Module):
    """A decode step as gpt-fast writes it (https://github.com/meta-pytorch/gpt-fast): PyTorch alone, packed projections, caches of
    a fixed length whose masks follow from the position on the device. To be compiled as a whole; it shares the model's weights.

    layers: how many, the model's own over and over, which is enough to compile for a deeper one. All rows are equally long.
    """

    def __init__(self, model, batch, max_length, layers=None):
        super().__init__()
        c, own = model.config, model.model.layers
        self.embedding, self.norm, self.head = (_same(w) for w in _ends(model))
        self.layers = nn.ModuleList(_Layer(own[i % len(own)], c, batch, max_length, self.norm) for i in range(layers or len(own)))
        for name, table in zip(("cos", "sin"), rope_tables(c, c.head_dim, max_length, device=self.norm.device)):
            self.register_buffer(name, table)
        self.register_buffer("places", torch.arange(max_length, device=self.norm.device))
        self.eps = c.rms_norm_eps

    def forward(self, ids, position):
        """(next ids [B], logits [B, V]) after ids int64 [B] at position int64 [1]."""
        x = F.embedding(ids[:, None], self.embedding)
        cos, sin, seen = self.cos[position], self.sin[position], (self.places <= position)[None]
        for layer in self.layers:
            x = layer(x, cos, sin, seen, position)
        logits = F.linear(eager.rms_norm(x, self.norm, self.eps), self.head)[:, 0]
        return logits.argmax(-1), logits


class _Layer(nn.Module):
    def __init__(self, block, config, batch, max_length, like):
        super().__init__()
        self.qkv, self.out, self.gate_up, self.down = (_same(linear.weight) for linear in block.linears)
        self.before, self.after = _same(block.input_layernorm.weight), _same(block.post_attention_layernorm.weight)
        self.heads, self.head_dim, self.eps = block.self_attn.heads, config.head_dim, config.rms_norm_eps
        for name in ("keys", "values"):
            self.register_buffer(name, like.new_zeros(batch, self.heads[1], max_length, self.head_dim))

    def forward(self, x, cos, sin, seen, position):
        B, group = x.shape[0], self.heads[0] // self.heads[1]
        qkv = F.linear(eager.rms_norm(x, self.before, self.eps), self.qkv)
        q, k, v = qkv.view(B, 1, -1, self.head_dim).transpose(1, 2).split(self.heads, 1)
        q, k = eager.apply_rope(q, k, cos, sin)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        k, v = (t.repeat_interleave(group, 1) for t in (self.keys, self.values))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + F.linear(attended.transpose(1, 2).reshape(B, 1, -1), self.out)
        gate, up = F.linear(eager.rms_norm(x, self.after, self.eps), self.gate_up).chunk(2, -1)
        return x + F.linear(eager.swiglu(gate, up), self.down)


def _same(weight):
    """A parameter of its own on the same memory."""
    return nn.Parameter(weight.detach(), requires_grad=False)


def _ends(model):
    return model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight


def twin(model, config, layers=None):
    """transformers' model on views of the weights of ours, whose config.json's fields are `config`. layers: as in `Decoder`."""
    import transformers

    own = len(model.model.layers)
    config = transformers.AutoConfig.for_model(**{**config, "num_hidden_layers": layers or own})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    weights = {}
    for name, parameter in model.named_parameters():
        parts = unpacked(name, model.config) or [(name, len(parameter))]
        for (part, _), rows in zip(parts, parameter.detach().split([n for _, n in parts])):
            head, dot, rest = part.partition(".layers.")
            number, _, rest = rest.partition(".")
            copies = range(int(number), config.num_hidden_layers, own) if dot else [None]
            weights |= {f"{head}.layers.{i}.{rest}" if dot else part: rows.view_as(rows) for i in copies}
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    # Buffers (the rotary frequencies) are computed, not stored: a fresh module on the right device has them.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.lm_head.weight.device)
    return theirs.requires_grad_(False).eval()


def compiled(function, fullgraph=True, **options):
    """torch.compile in a fresh state, on this process's one thread: as many compile at a time as there are processes."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    torch.compiler.reset()
    return torch.compile(function, fullgraph=fullgraph, dynamic=False, **options)


# --- which of them there are ---------------------------------------------------------------------------------------------

ENGINES = ("trillama", "eager", "compile", "sdpa", "liger", "flash_attn")
PACKAGES = {"liger": "liger_kernel", "flash_attn": "flash_attn"}


def engine(c):
    """The function with which the case's engine computes its op."""
    function = form(c.op).function or c.op
    if c.engine == "trillama":
        return getattr(kernels, function)
    if c.engine == "compile":
        return _compiled(c)
    return getattr(globals()[c.engine], function)


@functools.lru_cache(maxsize=1)
def _compiled(c):
    """A fresh state of the compiler for each case: with fullgraph=True the ninth shape of a function would be an error."""
    return compiled(getattr(eager, OPS[c.op].function or c.op))


def why_not(op, name, device):
    """None if the engine can run the op on a device of that type, "" if it has no such op, else the reason why it cannot."""
    if name in ("sdpa", *PACKAGES) and not hasattr(globals()[name], OPS[op].function or op):
        return ""
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        return "not installed"
    if name in PACKAGES and device == "cpu":
        return "needs a GPU"
    return None
