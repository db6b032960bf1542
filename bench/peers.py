"""The same ops by others, with the arguments of ours: what the kernels are compared with.

`engine(case)` gives a function; `why_not(op, name, device)` says why there is none.
"""

import functools
import importlib.util

import torch
import torch.nn.functional as F

from .. import kernels
from ..kernels import QuantizedWeight
from .cases import OPS

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


# --- which of them there are ---------------------------------------------------------------------------------------------

ENGINES = ("trillama", "eager", "compile", "sdpa", "liger", "flash_attn")
PACKAGES = {"liger": "liger_kernel", "flash_attn": "flash_attn"}


def engine(c):
    """The function with which the case's engine computes its op."""
    function = OPS[c.op].function or c.op
    if c.engine == "trillama":
        return getattr(kernels, function)
    if c.engine == "compile":
        return _compiled(c)
    return getattr(globals()[c.engine], function)


@functools.lru_cache(maxsize=1)
def _compiled(c):
    """A fresh state of the compiler for each case: with fullgraph=True the ninth shape of a function would be an error."""
    torch.compiler.reset()
    return torch.compile(getattr(eager, OPS[c.op].function or c.op), fullgraph=True, dynamic=False)


def why_not(op, name, device):
    """None if the engine can run the op on a device of that type, "" if it has no such op, else the reason why it cannot."""
    if name in ("sdpa", *PACKAGES) and not hasattr(globals()[name], OPS[op].function or op):
        return ""
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        return "not installed"
    if name in PACKAGES and device == "cpu":
        return "needs a GPU"
    return None
