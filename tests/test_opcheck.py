"""`torch.library.opcheck` of every op over its features: schema, autograd registration, fake tensors, AOT with dynamic shapes.

Each feature is checked in one dtype, in turn; with `-m slow` each in all four.
"""

import pytest
import torch
from trillama import kernels as k
from trillama.kernels import quantize

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]

ops = torch.ops.trillama
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Make:
    """Tensors of one dtype; those that are differentiated require a gradient."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, *shape, grad=True, dtype=None):
        return torch.randn(shape).to(dtype or self.dtype).requires_grad_(grad)

    def turned(self, *shape, order, grad=True):
        """Of this shape in memory, its axes in another order."""
        return torch.randn(shape).to(self.dtype).permute(order).requires_grad_(grad)

    def sliced(self, *shape, grad=True):
        """Every second element of the last axis of something larger, from the second on."""
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(self.dtype)[..., 1::2].requires_grad_(grad)

    def tables(self, half=6):
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.randn(40, half).to(dtype), torch.randn(40, half).to(dtype)

    @property
    def wide(self):
        return torch.float64 if self.dtype == torch.float64 else torch.float32


# --- rows ------------------------------------------------------------------------------------------------------------

ROWS = {
    "rms_norm": (ops.rms_norm, lambda m: (m(3, 5, 16), m(16), 1e-6, 0.0, "llama")),
    "rms_norm bare": (ops.rms_norm, lambda m: (m(3, 16), None, 1e-6, 0.0, "llama")),
    "rms_norm gemma": (ops.rms_norm, lambda m: (m(3, 16), m(16, dtype=torch.float32), 1e-5, 1.0, "gemma")),
    "rms_norm none": (ops.rms_norm, lambda m: (m(3, 16), m(16), 1e-5, 1.0, "none")),
    "rms_norm one row": (ops.rms_norm, lambda m: (m(16), m(16), 1e-6, 0.0, "llama")),
    "rms_norm no rows": (ops.rms_norm, lambda m: (m(0, 16), m(16), 1e-6, 0.0, "llama")),
    "rms_norm turned": (
        ops.rms_norm, lambda m: (m.turned(2, 3, 4, 5, 8, order=(3, 1, 0, 2, 4)), m.sliced(8), 1e-6, 0.0, "llama")
    ),
    "rms_norm frozen weight": (ops.rms_norm, lambda m: (m(3, 16), m(16, grad=False), 1e-6, 0.0, "llama")),
    "rms_norm frozen x": (ops.rms_norm, lambda m: (m(3, 16, grad=False), m(16), 1e-6, 0.0, "llama")),
    "rms_norm_backward": (
        ops.rms_norm_backward,
        lambda m: (m(3, 16, grad=False), m(3, 16, grad=False), m(16, grad=False), None, 1e-6, 0.0, "llama", True),
    ),
    "rms_norm_backward all": (
        ops.rms_norm_backward,
        lambda m: (
            *(m.turned(5, 3, 16, order=(1, 0, 2), grad=False) for _ in range(2)), None, m(3, 5, 16, grad=False), 1e-6, 1.0, "none",
            False,
        ),
    ),
    "add_rms_norm": (ops.add_rms_norm, lambda m: (m(3, 16), m(3, 16), m(16), 1e-6, 0.0, "llama")),
    "add_rms_norm gemma": (
        ops.add_rms_norm, lambda m: (m.sliced(3, 5, 16), m.turned(5, 3, 16, order=(1, 0, 2)), None, 1e-6, 1.0, "gemma")
    ),
    "add_rms_norm one row": (ops.add_rms_norm, lambda m: (m(16), m(16), m(16), 1e-6, 0.5, "none")),
    "swiglu": (ops.swiglu, lambda m: (m(3, 5, 16), m(3, 5, 16))),
    "swiglu packed": (ops.swiglu, lambda m: tuple(t.detach().requires_grad_() for t in m(3, 32, grad=False).chunk(2, -1))),
    "swiglu turned": (ops.swiglu, lambda m: tuple(m.turned(2, 3, 4, 5, 8, order=(3, 1, 0, 2, 4)) for _ in range(2))),
    "swiglu no rows": (ops.swiglu, lambda m: (m(0, 16), m(0, 16))),
    "swiglu_backward": (ops.swiglu_backward, lambda m: (m.sliced(3, 16, grad=False), m(3, 16, grad=False), m(3, 16, grad=False))),
}  # fmt: skip

# --- rotary embedding ------------------------------------------------------------------------------------------------


def heads(m, S=5, transposed=True, grad=True):
    if transposed:
        return tuple(m.turned(2, S, h, 16, order=(0, 2, 1, 3), grad=grad) for h in (4, 2))
    return m(2, 4, S, 16, grad=grad), m(2, 2, S, 16, grad=grad)


def appended(m, positions, *cache, table=None, interleaved=False, S=5):
    q, key = heads(m, S, grad=False)
    caches = (m(*cache, grad=False) for _ in range(2))
    return q, key, m(2, 2, S, 16, grad=False), *m.tables(), *caches, positions, table, interleaved


PAGES = torch.tensor([[0, 2, 3], [5, 1, 4]], dtype=torch.int32)
ROPE = {
    "apply_rope": (ops.apply_rope, lambda m: (*heads(m), *m.tables(8), None, False, False)),
    "apply_rope inverse": (ops.apply_rope, lambda m: (*heads(m, transposed=False), *m.tables(8), None, False, True)),
    "apply_rope interleaved": (
        ops.apply_rope, lambda m: (*heads(m), *m.tables(), torch.randint(0, 40, (2, 5)), True, False)
    ),
    "apply_rope positions": (
        ops.apply_rope, lambda m: (*heads(m), *m.tables(), torch.arange(5, dtype=torch.int32), False, False)
    ),
    "apply_rope no tokens": (ops.apply_rope, lambda m: (*heads(m, 0), *m.tables(), None, False, False)),
    "rope_append_": (ops.rope_append_, lambda m: appended(m, torch.arange(3, 8), 2, 2, 12, 16)),
    "rope_append_ of each row": (
        ops.rope_append_, lambda m: appended(m, torch.tensor([[3], [7]]), 2, 2, 12, 16, interleaved=True, S=1)
    ),
    "rope_append_ paged": (ops.rope_append_, lambda m: appended(m, torch.arange(3, 8), 7, 2, 4, 16, table=PAGES)),
}  # fmt: skip

# --- attention -------------------------------------------------------------------------------------------------------


def cuts(q, key):
    """Two sequences each: what is packed along the tokens of q and k."""
    return tuple(torch.tensor([0, 2, t.shape[2]], dtype=torch.int32) for t in (q, key))


def attention(q, key, v, *, packed=False, scale=0.25, softcap=None, left=None, right=0, need_lse=True):
    starts = cuts(q, key) if packed else (None, None)
    return q, key, v, *starts, scale, softcap, left, right, need_lse


def backward(q, key, v, *, dlse=False, need=(True, True), **options):
    """The arguments of the op's own gradient."""
    arguments = attention(q, key, v, **options)
    with torch.no_grad():
        out, lse = ops.flash_attention(*arguments)
    dout = torch.randn(out.shape).to(out.dtype)
    return dout, torch.randn(lse.shape).to(lse) if dlse else None, *arguments[:3], out, lse, *arguments[3:-1], *need


def qkv(m, B=2, S=5, T=9, grad=True):
    return m(B, 4, S, 16, grad=grad), m(B, 2, T, 16, grad=grad), m(B, 2, T, 16, grad=grad)


def views(m, S=5, grad=True):
    """q, k and v of a packed projection."""
    return tuple(m.turned(2, S, h, 16, order=(0, 2, 1, 3), grad=grad) for h in (4, 2, 2))


ATTENTION = {
    "flash_attention": (ops.flash_attention, lambda m: attention(*qkv(m))),
    "flash_attention inference": (ops.flash_attention, lambda m: attention(*qkv(m, grad=False), need_lse=False)),
    "flash_attention views": (ops.flash_attention, lambda m: attention(*views(m))),
    "flash_attention unmasked": (ops.flash_attention, lambda m: attention(*qkv(m), right=None)),
    "flash_attention window": (ops.flash_attention, lambda m: attention(*views(m), left=2)),
    "flash_attention softcap": (ops.flash_attention, lambda m: attention(*qkv(m), softcap=5.0, left=3)),
    "flash_attention negative scale": (ops.flash_attention, lambda m: attention(*qkv(m, S=9), scale=-0.5)),
    "flash_attention no keys": (ops.flash_attention, lambda m: attention(*qkv(m, T=0))),
    "flash_attention no queries": (ops.flash_attention, lambda m: attention(*qkv(m, S=0))),
    "flash_attention packed": (ops.flash_attention, lambda m: attention(*qkv(m, B=1), packed=True)),
    "flash_attention packed window": (
        ops.flash_attention, lambda m: attention(*qkv(m, B=1), packed=True, left=1, softcap=3.0)
    ),
    "flash_attention_backward": (ops.flash_attention_backward, lambda m: backward(*qkv(m, grad=False))),
    "flash_attention_backward lse": (
        ops.flash_attention_backward, lambda m: backward(*views(m, grad=False), dlse=True, left=2, softcap=4.0)
    ),
    "flash_attention_backward of q": (
        ops.flash_attention_backward, lambda m: backward(*qkv(m, grad=False), need=(True, False))
    ),
    "flash_attention_backward packed": (
        ops.flash_attention_backward, lambda m: backward(*qkv(m, B=1, grad=False), packed=True, need=(False, True))
    ),
}  # fmt: skip

# --- decode ----------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([9, 5], dtype=torch.int32)


def decoded(m, S=1, cache=(2, 2, 12, 16), scale=0.25, window=None, softcap=None, table=None, splits=None):
    q = m(2, 4, S, 16, grad=False)
    return q, m(*cache, grad=False), m(*cache, grad=False), LENGTHS, scale, window, softcap, table, splits


def product(m, lead=(2,), bits=None, norm=None, activation=None, residual=False, bias=False):
    weight = m(24, 32, grad=False)
    parts = (weight, None, None)
    if bits:
        whole = quantize(weight.float(), bits)
        parts = whole.data, whole.scale, whole.minimum
    norm = None if norm is None else m(32, grad=False, dtype=norm)
    out = m(*lead, 12 if activation else 24, grad=False) if residual else None
    return m(*lead, 32, grad=False), *parts, norm, 1e-5, out, activation, m(24, grad=False) if bias else None


def chosen(m, temperature=0.0, top_k=None, top_p=None, min_p=None, penalty=None, lengths=False):
    ids, state = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    seen = torch.zeros(3, 40, dtype=torch.bool) if penalty else None
    ended = torch.zeros(3, dtype=torch.bool)
    count = torch.ones(3, dtype=torch.int32) if lengths else None
    step = m(3, 40, grad=False), ids, ended, ended.any(), torch.tensor([7]), state, seen, count
    return *step, temperature, top_k, top_p, min_p, penalty


DECODE = {
    "decode_attention": (ops.decode_attention, decoded),
    "decode_attention window": (ops.decode_attention, lambda m: decoded(m, S=3, window=2)),
    "decode_attention softcap": (ops.decode_attention, lambda m: decoded(m, softcap=5.0, splits=2)),
    "decode_attention paged": (ops.decode_attention, lambda m: decoded(m, cache=(7, 2, 4, 16), table=PAGES)),
    "decode_linear": (ops.decode_linear, lambda m: product(m, norm=m.dtype)),
    "decode_linear swiglu": (ops.decode_linear, lambda m: product(m, norm=torch.float32, activation="swiglu", residual=True)),
    "decode_linear rows": (ops.decode_linear, lambda m: product(m, (3, 4), residual=True, bias=True)),
    "decode_linear no rows": (ops.decode_linear, lambda m: product(m, (0,))),
    "decode_linear int8": (ops.decode_linear, lambda m: product(m, bits=8, bias=True)),
    "decode_linear int4": (ops.decode_linear, lambda m: product(m, (3,), bits=4, activation="swiglu")),
    "embed_next_": (
        ops.embed_next_, lambda m: (torch.tensor([3, 1]), m(9, 8, grad=False), torch.tensor([0, 4], dtype=torch.int32))
    ),
    "choose_": (ops.choose_, chosen),
    "choose_ drawn": (ops.choose_, lambda m: chosen(m, 0.8, 3, 0.9, 0.1, 1.2, True)),
}  # fmt: skip

# --- the adapters ----------------------------------------------------------------------------------------------------


def with_kvcache(m, append=False, rotary=False, table=None, leftpad=None, left=None, right=0, softcap=None, need_lse=False):
    cache = (7, 4, 2, 16) if table is not None else (2, 12, 2, 16)
    q, k_cache, v_cache = (m(*shape, grad=False).transpose(1, 2) for shape in ((2, 2, 4, 16), cache, cache))
    new = [m(2, 2, 2, 16, grad=False).transpose(1, 2) for _ in range(2)] if append else [None, None]
    tables = m.tables(8) if rotary else (None, None)
    return q, k_cache, v_cache, *new, *tables, LENGTHS - 3, table, leftpad, 0.25, left, right, softcap, False, None, need_lse


def packed(m, grad=True, left=None, softcap=None):
    q, key, v = qkv(m, B=1, S=9, grad=grad)
    starts = torch.tensor([0, 4, 9, 9, 9], dtype=torch.int32)
    return q, key, v, starts, torch.tensor(2, dtype=torch.int32), left, 0, 0.25, softcap


def packed_backward(m):
    q, key, v, *rest = packed(m, False, 2, 3.0)
    out, lse = ops.packed_attention(q, key, v, *rest, True)
    return torch.randn(out.shape).to(out.dtype), q, key, v, out, lse, *rest


ADAPTERS = {
    "flash_attn_with_kvcache": (with_kvcache,),
    "flash_attn_with_kvcache append": (lambda m: with_kvcache(m, True, True, softcap=3.0),),
    "flash_attn_with_kvcache paged": (lambda m: with_kvcache(m, True, table=PAGES, left=2, need_lse=True),),
    "flash_attn_with_kvcache left-padded": (lambda m: with_kvcache(m, True, leftpad=torch.tensor([1, 0], dtype=torch.int32)),),
    "flash_attn_with_kvcache both sides": (lambda m: with_kvcache(m, left=2, right=1, need_lse=True),),
    "packed_attention": (lambda m: (*packed(m), True),),
    "packed_attention window": (lambda m: (*packed(m, True, 2, 3.0), True),),
    "packed_attention_backward": (packed_backward,),
}  # fmt: skip
ALL = {**ROWS, **ROPE, **ATTENTION, **DECODE, **ADAPTERS}


def check(name, dtype, backend="reference"):
    *op, sample = ALL[name]
    if op:
        op = op[0]
    else:  # of an adapter, which has to be imported
        adapter = "flash_attn" if "kvcache" in name else "transformers"
        if adapter == "transformers":
            pytest.importorskip("transformers")
        pytest.importorskip(f"trillama.kernels.compat.{adapter}")
        op = getattr(ops, name.split(" ")[0])
    with k.use_backend(backend):
        found = torch.library.opcheck(op.default, sample(Make(dtype)))
    assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.few(24)
@pytest.mark.parametrize("name", ALL)
def test_each_feature(name):
    torch.manual_seed(0)
    check(name, DTYPES[list(ALL).index(name) % 4])


@pytest.mark.slow
@pytest.mark.parametrize("kind", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ALL)
def test_all_dtypes(name, kind):
    torch.manual_seed(0)
    check(name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_kernels(name):
    """What they return has the strides and dtypes that the fake tensors promise."""
    torch.manual_seed(0)
    check(name, torch.float32, "triton")


def test_every_op_is_checked():
    pytest.importorskip("transformers")
    pytest.importorskip("trillama.kernels.compat.transformers")
    pytest.importorskip("trillama.kernels.compat.flash_attn")
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("trillama::")}
    assert registered == {f"trillama::{name.split(' ')[0]}" for name in ALL}
