"""Every op held against its formula in float64: the cases as data, and for each op a function that makes tensors as models hand
them over, runs it and compares. An AssertionError says what is wrong.

    proofs.rms_norm(device, dtype, shape=(3, 576))          one case
    proofs.run("rms_norm", "576", dtype, device)            one of the list

Users are the tests, on whatever device there is, and `bench.hardware`, on a GPU. Formulas and rules are `oracle`'s.
"""

import contextlib
import math
import sys
from itertools import pairwise
from unittest import mock

import torch

from .. import kernels
from ..kernels import QuantizedWeight, quantize, reference, use_backend
from ..kernels.linear import ROWS
from ..kernels.sampling import choose_, embed_next_, start
from . import oracle

# --- memory ----------------------------------------------------------------------------------------------------------

_empty = torch.empty
_guarded = []  # (border in bytes, [(memory, elements before, elements of the tensor)]), the innermost block last


@contextlib.contextmanager
def poisoned(border=0):
    """Within the block torch.empty and its relatives return NaN, so that an element nobody writes is seen. border: so many bytes
    (a multiple of 512) of NaN, or 77 in integers, lie on either side of these tensors and of those that `move` brings. Who reads
    them has NaN, and AssertionError is raised at the end of the block if they have changed."""

    def poison(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            if type(t) is not torch.Tensor or t.is_meta or not t.numel():
                return t
            if border:
                return _inside(t.numel(), t.dtype, t.device)(t.shape, t.stride())
            return t.fill_(math.nan) if t.is_floating_point() else t

        return made

    makers = (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")
    _guarded.append((border, []))
    try:
        with contextlib.ExitStack() as stack:
            for owner, name in makers:
                stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
            yield
        for memory, before, size in _guarded[-1][1]:
            for side, part in (("before", memory[:before]), ("behind", memory[before + size :])):
                same = part.isnan() if part.is_floating_point() else part == 77 if part.dtype != torch.bool else part
                assert same.all(), f"written outside: {side} a tensor of {size} elements of {memory.dtype}"
    finally:
        _guarded.pop()


def _inside(elements, dtype, device):
    """A function (shape, strides, offset=0) -> tensor on new memory of so many elements, poisoned, within its borders."""
    border = _guarded[-1][0] if _guarded else 0
    before = border // dtype.itemsize
    memory = _empty(elements + 2 * before, dtype=dtype, device=device)
    memory.fill_(math.nan if dtype.is_floating_point else 77)
    if border:
        _guarded[-1][1].append((memory, before, elements))
    # Not a view of `memory`: autograd knows what is a view, and no op returns one.
    return lambda shape, strides, offset=0: _empty(0, dtype=dtype, device=device).set_(
        memory.untyped_storage(), before + offset, shape, strides
    )


def move(t, device):
    """The tensor or QuantizedWeight on the device, with its strides: `Tensor.to` closes the gaps of a view. None is passed on."""
    if t is None:
        return None
    if isinstance(t, QuantizedWeight):
        return t.apply(lambda part: move(part, device))
    guarded = bool(_guarded) and _guarded[-1][0] > 0
    if not guarded and t.device.type == torch.device(device).type:
        return t
    elements = t.untyped_storage().nbytes() // t.element_size()
    if not elements:
        return t.detach().to(device)
    inside = _inside(elements, t.dtype, device)
    inside((elements,), (1,)).copy_(t.detach().as_strided((elements,), (1,), 0))
    return inside(t.shape, t.stride(), t.storage_offset())


def through(function, leaves, dout):
    """(outputs, gradients) of function(*leaves); dout: of each output, None where it has none."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ends, starts = zip(*((o, d.to(o)) for o, d in zip(outputs, dout) if d is not None))
    return outputs, torch.autograd.grad(ends, [t for t in leaves if t is not None], starts)


def dense(t):
    """t with a memory of its own and the strides that autograd would give its gradient."""
    return t.detach().clone()


# --- rms_norm, add_rms_norm ------------------------------------------------------------------------------------------


def rows(kind, *shape, dtype):
    """A random tensor of a shape [..., N] as models hand it over."""
    *lead, n = shape
    if kind == "contiguous":
        return torch.randn(shape).to(dtype)
    if kind == "packed":  # a slice of a wider projection
        return torch.randn(*lead, 3 * n).to(dtype)[..., n : 2 * n]
    if kind == "transposed":  # [B, S, H, D] seen as [B, H, S, D]
        return torch.randn(*lead[:-2], lead[-1], lead[-2], n).to(dtype).transpose(-2, -3)
    if kind == "columns":  # the last axis is not the fastest one
        return torch.randn(n, *lead).to(dtype).movedim(0, -1)
    return torch.randn(n).to(dtype).expand(shape)


def _weight(kind, n, dtype):
    if kind is None:
        return None
    if kind == "float32":
        return torch.randn(n)
    return torch.randn(2 * n).to(dtype)[::2] if kind == "strided" else torch.randn(n).to(dtype)


def rms_norm(
    device, dtype, *, shape, kind="contiguous", weight="dense", size=1.0, eps=1e-6, offset=0.0, casting="llama", backward=False
):  # fmt: skip
    x, w = (size * rows(kind, *shape, dtype=dtype)).to(dtype) if size != 1 else rows(kind, *shape, dtype=dtype), None
    w = _weight(weight, shape[-1], dtype)
    options = {"offset": offset, "casting": casting}
    xd, wd = move(x, device), move(w, device)
    same = oracle.unchanged(xd, wd)
    if not backward:
        y = kernels.rms_norm(xd, wd, eps, **options)
        same()
        w64 = None if w is None else w.double()
        oracle.check(y, oracle.rms_norm(x.double(), w64, eps, offset), reference.rms_norm(x, w, eps, **options))
        return y
    dy = torch.randn(shape).to(dtype)
    _, exact = through(lambda x, w: oracle.rms_norm(x, w, eps, offset), (x.double(), w.double()), [dy])
    _, ours = through(lambda x, w: kernels.rms_norm(x, w, eps, **options), (xd, wd), [move(dy, device)])
    same()
    _, plain = through(lambda x, w: reference.rms_norm(x, w, eps, **options), (dense(x), dense(w)), [dy])
    for got, want, other in zip(ours, exact, plain):
        oracle.check(got, want, other, fp32=1e-5)
    return ours


def add_rms_norm(device, dtype, *, shape, kind="contiguous", weight="dense", backward=False):
    x, residual = rows(kind, *shape, dtype=dtype), rows("contiguous", *shape, dtype=dtype)
    w = _weight(weight, shape[-1], dtype)
    on = [move(t, device) for t in (residual, x, w)]
    same = oracle.unchanged(*on)
    if not backward:
        y, total = kernels.add_rms_norm(*on)
        same()
        added = residual + x
        assert torch.equal(total.cpu(), added), "the sum is not that of PyTorch"  # one addition and one rounding
        oracle.check(y, oracle.rms_norm(added.double(), w.double()), reference.rms_norm(added, w))
        return y, total
    dout = rows(kind, *shape, dtype=dtype), torch.randn(shape).to(dtype)
    ours = through(kernels.add_rms_norm, on, [move(t, device) for t in dout])[1]
    same()
    plain = through(reference.add_rms_norm, [dense(t) for t in (residual, x, w)], dout)[1]
    dtotal, dw = through(lambda t, w: (oracle.rms_norm(t, w), t * 1), ((x + residual).double(), w.double()), dout)[1]
    for got, want, other in zip(ours, (dtotal, dtotal, dw), plain):
        oracle.check(got, want, other, fp32=1e-5)
    return ours


# --- swiglu ----------------------------------------------------------------------------------------------------------


def pair(kind, *shape, dtype):
    """gate and up of a shape [..., F] as models hand them over."""
    *lead, n = shape
    if kind == "contiguous":
        return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if kind == "packed":
        return torch.randn(*lead, 2 * n).to(dtype).chunk(2, -1)
    if kind == "interleaved":  # gate and up alternate, as some checkpoints store them
        return torch.randn(*lead, n, 2).to(dtype).unbind(-1)
    if kind == "transposed":
        return tuple(torch.randn(lead[1], lead[0], *lead[2:], n).to(dtype).transpose(0, 1) for _ in range(2))
    if kind == "columns":  # the last axis is not the fastest one
        return torch.randn(2, n, *lead).to(dtype).movedim(1, -1).unbind(0)
    return torch.randn(n).to(dtype).expand(shape), torch.randn(shape).to(dtype)


def swiglu(device, dtype, *, shape=None, kind="packed", tensors=None, backward=False):
    """tensors: gate and up in place of random ones."""
    gate, up = tensors or pair(kind, *shape, dtype=dtype)
    on = [move(t, device) for t in (gate, up)]
    same = oracle.unchanged(*on)
    if not backward:
        y = kernels.swiglu(*on)
        same()
        oracle.check(y, oracle.swiglu(gate.double(), up.double()), reference.swiglu(gate, up))
        assert y.is_contiguous()
        return y
    dy = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    ours = through(kernels.swiglu, on, [move(dy, device)])[1]
    same()
    exact = through(oracle.swiglu, (gate.double(), up.double()), [dy])[1]
    for got, want, other in zip(ours, exact, through(reference.swiglu, (dense(gate), dense(up)), [dy])[1]):
        oracle.check(got, want, other, fp32=1e-5)
    return ours


# --- apply_rope, rope_append_ ----------------------------------------------------------------------------------------

LONG = 131_072


def tables(positions, half, theta=10000.0):
    """cos and sin of the angles position * theta^(-i / half), computed in float64 and rounded once."""
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    return angle.cos().float(), angle.sin().float()


def heads(kind, B, H, S, D, dtype):
    """A random tensor [B, H, S, D] as models hand it over."""
    if kind == "contiguous":
        return torch.randn(B, H, S, D).to(dtype)
    if kind == "transposed":  # [B, S, H, D] in memory
        return torch.randn(B, S, H, D).to(dtype).transpose(1, 2)
    if kind == "packed":  # a slice of a projection of q, k and v
        return torch.randn(B, S, 3 * H, D).to(dtype)[:, :, H : 2 * H].transpose(1, 2)
    if kind == "odd":  # a slice that begins and strides at no multiple of 16 bytes
        return torch.randn(B, H, S, D + 3).to(dtype)[..., 1 : D + 1]
    if kind == "columns":  # the head's elements are not neighbours in memory
        return torch.randn(B, D, H, S).to(dtype).permute(0, 2, 3, 1)
    return torch.randn(B, 1, S, D).to(dtype).expand(B, H, S, D)


def rotated(q, k, cos, sin, positions, interleaved):
    """The rotated q and k in float64."""
    B, _, S, _ = q.shape
    where = torch.arange(S) if positions is None else positions.long()
    where = where.expand(B, S)
    return tuple(oracle.rope(x.double(), cos.double(), sin.double(), where, interleaved) for x in (q, k))


def rope(device, dtype, q, k, cos, sin, positions=None, interleaved=False):
    """apply_rope of these tensors."""
    on = [move(t, device) for t in (q, k, cos, sin, positions)]
    same = oracle.unchanged(*on)
    got = kernels.apply_rope(*on[:4], positions=on[4], interleaved=interleaved)
    same()
    plain = reference.apply_rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
    for y, e, p in zip(got, rotated(q, k, cos, sin, positions, interleaved), plain):
        oracle.check(y, e, p)
    return got


def apply_rope(
    device, dtype, *, B=1, HQ=2, HK=1, S=3, D=64, R=None, kind="transposed", k_kind="transposed", interleaved=False, positions=None,
    batched=False, length=50, theta=10000.0, backward=False,
):  # fmt: skip
    """R: elements that are turned, None: all. positions: None, "int32", "int64", or a list; batched: of each row its own."""
    q, k = heads(kind, B, HQ, S, D, dtype), heads(k_kind, B, HK, S, D, dtype)
    cos, sin = tables(length, (R or D) // 2, theta)
    if isinstance(positions, str):
        positions = torch.randint(0, length, (B, S) if batched else (S,), dtype=getattr(torch, positions))
    elif positions is not None:
        positions = torch.tensor(positions)
    if not backward:
        return rope(device, dtype, q, k, cos, sin, positions, interleaved)
    dout = heads("transposed", B, HQ, S, D, dtype), heads("expanded", B, HK, S, D, dtype)
    options = {"positions": positions, "interleaved": interleaved}
    exact = through(lambda q, k: rotated(q, k, cos, sin, positions, interleaved), (q.double(), k.double()), dout)[1]
    plain = through(lambda q, k: reference.apply_rope(q, k, cos, sin, **options), (dense(q), dense(k)), dout)[1]
    on = [move(t, device) for t in (q, k, cos, sin, positions, *dout)]
    same = oracle.unchanged(*on)
    ours = through(
        lambda q, k: kernels.apply_rope(q, k, on[2], on[3], positions=on[4], interleaved=interleaved), on[:2], on[5:]
    )[1]  # fmt: skip
    same()
    for got, want, other in zip(ours, exact, plain):
        oracle.check(got, want, other)
    return ours


def caches(B, HK, T, D, dtype, page=None, kind="contiguous"):
    """(k_cache, v_cache, block_table or None, a function that gives a cache back as [B, HK, T, D])"""
    if page is None:
        k, v = (torch.randn(2, B, HK, T, D) if kind == "layers" else torch.randn(2, B, T, HK, D).transpose(2, 3)).to(dtype)
        return k, v, None, lambda cache, table: cache
    n = -(-T // page)
    table = torch.randperm(B * n + 3)[: B * n].view(B, n).int()
    k, v = (torch.randn(B * n + 3, HK, page, D).to(dtype) for _ in range(2))
    return k, v, table, lambda cache, table: cache[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :T]


def rope_append_(device, dtype, *, HQ, HK, D, R, interleaved=False, page=None, integer="int64", kind="tokens", B=2, S=2, T=40):
    """What is returned, what is written into the caches, and that nothing else of them is."""
    q, k, v = (x.transpose(1, 2) for x in torch.randn(B, S, HQ + 2 * HK, D).to(dtype).split((HQ, HK, HK), 2))
    cos, sin = tables(64, R // 2)
    positions = torch.stack([torch.randperm(T)[:S] for _ in range(B)]).to(getattr(torch, integer))
    k_cache, v_cache, table, seen = caches(B, HK, T, D, dtype, page, kind)
    exact = rotated(q, k, cos, sin, positions, interleaved)
    plain = reference.apply_rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
    on = [move(t, device) for t in (q, k, v, cos, sin, positions, table)]
    written = [move(t.clone(), device) for t in (k_cache, v_cache)]
    same = oracle.unchanged(*on)
    y = kernels.rope_append_(*on[:5], *written, on[5], block_table=on[6], interleaved=interleaved)
    same()
    oracle.check(y, exact[0], plain[0])
    sequence = torch.arange(B)[:, None]
    for cache, before, value, rounded in zip(written, (k_cache, v_cache), (exact[1], v.double()), (plain[1], v)):
        after = seen(cache.cpu(), table)
        oracle.check(after[sequence, :, positions.long()].transpose(1, 2), value, rounded)
        untouched = torch.ones(B, T, dtype=torch.bool)
        untouched[sequence, positions.long()] = False
        old = seen(before, table).transpose(1, 2)[untouched]
        assert torch.equal(after.transpose(1, 2)[untouched], old), "other tokens of the cache have changed"
        if page is not None:
            spare = torch.ones(cache.shape[0], dtype=torch.bool)
            spare[table.long().flatten()] = False
            assert torch.equal(cache.cpu()[spare], before[spare]), "pages of nobody have changed"
    return y


# --- flash_attention, flash_attention_varlen -------------------------------------------------------------------------


def formula(q, k, v, *, causal=True, window=None, **options):
    """(out, lse) by `oracle.attention`, of the options that flash_attention takes."""
    return oracle.attention(q, k, v, left=None if window is None else window - 1, right=0 if causal else None, **options)


def attention(device, dtype, q, k, v, fp32=1e-6, **options):
    """flash_attention of these tensors: (out, lse)."""
    on = [move(t, device) for t in (q, k, v)]
    same = oracle.unchanged(*on)
    out, lse = kernels.flash_attention(*on, return_lse=True, **options)
    same()
    exact, exact_lse = formula(q.double(), k.double(), v.double(), **options)
    oracle.check(out, exact, reference.flash_attention(q, k, v, **options), fp32)
    seen = exact_lse > -math.inf
    assert torch.equal(lse.cpu() > -math.inf, seen), "lse is infinite elsewhere"
    # A sum of products may come near zero and keep the error of its terms.
    wrong = (lse.double().cpu() - exact_lse)[seen].norm() / exact_lse[seen].abs().clamp(min=1).norm()
    assert not wrong > 1e-6, f"lse: relative error {wrong:.2e}, allowed 1e-6"
    return out, lse


def flash_attention(device, dtype, *, B, Hq, Hk, S, T, D, kind="transposed", options=(), backward=False, dlse=False):
    """dlse: lse has a gradient too."""
    q, k, v = (heads(kind, B, h, n, D, dtype) for h, n in ((Hq, S), (Hk, T), (Hk, T)))
    options = dict(options)
    if not backward:
        return attention(device, dtype, q, k, v, **options)
    dout = [torch.randn(B, Hq, S, D).to(dtype), None]
    if dlse:
        seen = formula(q.double(), k.double(), v.double(), **options)[1].isfinite()
        dout[1] = torch.where(seen, torch.randn(B, Hq, S), 0.0)
    return _with_gradients(
        device, (q, k, v), dout, lambda *t: kernels.flash_attention(*t, return_lse=True, **options),
        lambda *t: formula(*t, **options), lambda *t: reference.flash_attention(*t, return_lse=True, **options), lse=False,
    )  # fmt: skip


def _with_gradients(device, tensors, dout, ours, exact, plain, lse):
    """Compares out, lse if asked for, dq, dk, dv of three functions."""
    on = [move(t, device) for t in tensors]
    same = oracle.unchanged(*on)
    (*got,), gradients = through(ours, on, [move(t, device) for t in dout])
    same()

    def all_of(function, tensors):
        outputs, gradients = through(function, tensors, dout)
        return *outputs[: 1 + lse], *gradients

    want = all_of(exact, [t.double() for t in tensors])
    low = tensors[0].dtype != torch.float32
    other = all_of(plain, tensors) if low else want
    throughout = all_of(exact, tensors) if low else want  # the formula in the same dtype
    for g, w, p, f in zip((*got[: 1 + lse], *gradients), want, other, throughout):
        oracle.check(g, w, p, fp32=1e-5, eager=f)
    return got, gradients


def cuts(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(lengths, H, D, dtype):
    """A slice of a projection of q, k and v: [tokens, H, D]."""
    return torch.randn(sum(lengths), 3 * H, D).to(dtype)[:, H : 2 * H]


def formula_varlen(q, k, v, lengths_q, lengths_k, **options):
    """Sequence by sequence: (out [tokens, H, D], lse [H, tokens])"""
    outs, lses = [], []
    for (a, b), (c, d) in zip(*(pairwise(cuts(n).tolist()) for n in (lengths_q, lengths_k))):
        out, lse = formula(*(t.transpose(0, 1).unsqueeze(0) for t in (q[a:b], k[c:d], v[c:d])), **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def flash_attention_varlen(device, dtype, *, lengths_q, lengths_k=None, Hq=2, Hk=1, D=64, options=(), outside=(0, 0)):
    """Forward and backward. lengths_k: None, those of the queries. outside: so many tokens of NaN in front of the first sequence
    and behind the last."""
    lengths_k, options = lengths_k or lengths_q, dict(options)
    before, behind = outside
    tensors = [packed((before, *n, behind), h, D, dtype) for n, h in ((lengths_q, Hq), (lengths_k, Hk), (lengths_k, Hk))]
    for t in tensors:
        t[:before], t[len(t) - behind :] = math.nan, math.nan
    where, longest = [cuts(n) + before for n in (lengths_q, lengths_k)], (max(lengths_q), max(lengths_k))
    on = [move(t, device) for t in where]

    def exact(q, k, v):
        out, lse = formula_varlen(*(t[before : len(t) - behind] for t in (q, k, v)), lengths_q, lengths_k, **options)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, *outside)), torch.nn.functional.pad(lse, outside, value=-math.inf)

    got, _ = _with_gradients(
        device, tensors, [torch.randn(len(tensors[0]), Hq, D).to(dtype), None],
        lambda *t: kernels.flash_attention_varlen(*t, *on, *longest, return_lse=True, **options), exact,
        lambda *t: reference.flash_attention_varlen(*t, *where, *longest, return_lse=True, **options), lse=True,
    )  # fmt: skip
    assert got[0].is_contiguous()


# --- decode_attention ------------------------------------------------------------------------------------------------


def cache(batch, heads, size, head_dim, dtype, kind="contiguous"):
    """A random cache [B, Hk, T, D] in one of the layouts in circulation."""
    if kind == "transposed":  # [B, T, Hk, D], as flash-attn keeps it
        return torch.randn(batch, size, heads, head_dim).to(dtype).transpose(1, 2)
    if kind == "layers":  # one layer of a cache of all layers, k and v side by side
        return torch.randn(batch, heads, size, 2, 3, head_dim).to(dtype)[:, :, :, 1, 2]
    if kind == "columns":
        return torch.randn(batch, heads, head_dim, size).to(dtype).transpose(2, 3)
    return torch.randn(batch, heads, size, head_dim).to(dtype)


def paged(t, page, spare=3):
    """The same cache in shuffled pages of `page` keys, and the table that leads to them; unused pages are NaN."""
    B, H, T, D = t.shape
    n = -(-T // page)
    order = torch.randperm(B * n + spare)[: B * n]
    pages = torch.full((B * n + spare, H, page, D), math.nan, dtype=t.dtype)
    full = torch.full((B, H, n * page, D), math.nan, dtype=t.dtype)
    full[:, :, :T] = t
    pages[order] = full.view(B, H, n, page, D).transpose(1, 2).flatten(0, 1)
    return pages, order.view(B, n).int()


def attend(device, q, k, v, lengths, *, page=None, **options):
    """decode_attention of these tensors, the cache beyond each length filled with NaN."""
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    exact_k, exact_v = k.double(), v.double()
    for t in (k, v):
        for b, n in enumerate(lengths.tolist()):
            t[b, :, n:] = math.nan
    window = options.get("window")
    plain = reference.decode_attention(q, k, v, lengths, **{n: o for n, o in options.items() if n != "splits"})
    ck, cv, table = k, v, None
    if page is not None:
        ck, table = paged(k, page)
        cv = torch.full_like(ck, math.nan)
        whole = torch.full((*v.shape[:2], table.shape[1] * page, v.shape[3]), math.nan, dtype=v.dtype)
        whole[:, :, : v.shape[2]] = v
        cv[table.long()] = whole.view(*v.shape[:2], -1, page, v.shape[3]).transpose(1, 2)
        options["block_table"] = move(table, device)
    on = [move(t, device) for t in (q, ck, cv, lengths)]
    same = oracle.unchanged(on[0], on[3])
    out = kernels.decode_attention(*on, **options)
    same()
    for after, before in zip(on[1:3], (ck, cv)):
        assert torch.equal(after.cpu().nan_to_num(), before.nan_to_num()), "the cache has changed"
    want, _ = oracle.attention(
        q.double(), exact_k, exact_v, left=None if window is None else window - 1, scale=options.get("scale"),
        softcap=options.get("softcap"), lengths=lengths,
    )  # fmt: skip
    oracle.check(out, want, plain)
    return out


def decode_attention(
    device, dtype, *, B=2, Hq, Hk, S=1, T, D=64, lengths, kind="contiguous", page=None, splits=None, packed=False, options=()
):  # fmt: skip
    """packed: q is a view of the projection of q, k and v; its cache of keys has the layout `kind`."""
    q = torch.randn(B, Hq, S, D).to(dtype)
    if packed:
        q = torch.randn(B, S, Hq + 2 * Hk, D).to(dtype)[:, :, :Hq].transpose(1, 2)
    k, v = cache(B, Hk, T, D, dtype, kind), cache(B, Hk, T, D, dtype)
    options = dict(options) | ({} if splits is None else {"splits": splits})
    out = attend(device, q, k, v, lengths, page=page, **options)
    for b, n in enumerate(lengths):
        assert not out[b, :, : max(0, S - n)].any(), "a query before the first key does not give 0"
    return out


# --- decode_linear ---------------------------------------------------------------------------------------------------


def product(lead, K, N, dtype, norm=False, activation=None, residual=False, bias=False):
    """x, weight and options; the outputs have variance one, as a model's have."""
    lead = (lead,) if isinstance(lead, int) else tuple(lead)
    options = {"eps": 1e-5}
    if norm:
        options["norm"] = torch.rand(K).to(dtype) + 0.5
    if activation:
        options["activation"] = activation
    if bias:
        options["bias"] = torch.randn(N).to(dtype)
    if residual:
        options["residual"] = torch.randn(*lead, N // 2 if activation else N).to(dtype)
    return torch.randn(*lead, K).to(dtype), (torch.randn(N, K) * K**-0.5).to(dtype), options


def plain_weight(weight, dtype):
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


def formula_linear(x, weight, norm=None, eps=1e-6, residual=None, activation=None, bias=None):
    x, norm, residual, bias = (t if t is None else t.double() for t in (x, norm, residual, bias))
    y = torch.einsum("...k,nk->...n", x if norm is None else oracle.rms_norm(x, norm, eps), plain_weight(weight, torch.float64))
    if bias is not None:
        y = y + bias
    if activation:
        y = oracle.swiglu(*y.chunk(2, -1))
    return y if residual is None else y + residual


def multiply(device, x, weight, options):
    """decode_linear of these tensors, on the CPU."""

    def moved(t):
        return move(t, device) if isinstance(t, (torch.Tensor, QuantizedWeight)) else t

    xd, wd, on = moved(x), moved(weight), {n: moved(t) for n, t in options.items()}
    inside = (wd.data, wd.scale) if isinstance(wd, QuantizedWeight) else (wd,)
    same = oracle.unchanged(xd, *inside, *(t for t in on.values() if isinstance(t, torch.Tensor)))
    y = kernels.decode_linear(xd, wd, **on)
    same()
    plain = reference.decode_linear(x, plain_weight(weight, x.dtype), **options)
    if x.shape[:-1].numel() > ROWS:  # these are products of the library, each device's own
        plain = reference.decode_linear(xd, plain_weight(wd, x.dtype), **on)
    oracle.check(y, formula_linear(x, weight, **options), plain, fp32=2e-6)
    assert y.is_contiguous()
    return y.cpu()


def decode_linear(device, dtype, *, lead, K, N, bits=None, group=32, size=1.0, fused=()):
    x, weight, options = product(lead, K, N, dtype, **dict(fused))
    x = (size * x).to(dtype) if size != 1 else x
    return multiply(device, x, weight if bits is None else quantize(weight, bits, group), options)


# --- choose_, embed_next_ --------------------------------------------------------------------------------------------


class Rows:
    """The tensors of a step that `choose_` writes, and the step."""

    def __init__(self, rows, vocabulary, device, ends=(), seed=11, seen=None):
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.finished = torch.zeros((), dtype=torch.bool, device=device)
        self.lengths = torch.arange(7, 7 + rows, dtype=torch.int32, device=device)
        self.state = start(seed, rows, device)
        self.seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device) if seen is None else seen.clone()
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)

    def __call__(self, logits, **options):
        written = {"state": self.state, "seen": self.seen, "lengths": self.lengths}
        choose_(logits, self.ids, self.ended, self.finished, ends=self.ends, **written, **options)
        return self.ids.tolist()

    def all(self):
        return [t.tolist() for t in (self.ids, self.ended, self.finished, self.lengths, self.state, self.seen)]


def choose(device, dtype, *, vocabulary, rows=3, steps=3, options=(), after=lambda: None):
    """Ids, ends, states, lengths and what has been seen are those of the reference, step by step. after: called after each."""
    options = dict(options)
    given = [(torch.randn(rows, vocabulary, device=device) * 4).to(dtype) for _ in range(steps)]
    seen = torch.rand(rows, vocabulary, device=device) < 0.3
    with use_backend("reference"):  # which gives the ids to end with
        ends = Rows(rows, vocabulary, device, seen=seen)(given[0], **options)[1:2]
    ours, theirs = (Rows(rows, vocabulary, device, ends, seen=seen) for _ in range(2))
    names = "ids", "ended", "finished", "lengths", "state", "seen"
    for logits in given:
        ours(logits, **options)
        with use_backend("reference"):
            theirs(logits, **options)
        for name, got, want in zip(names, ours.all(), theirs.all()):
            assert got == want, f"{name} is {str(got)[:40]}, expected {str(want)[:40]} as of the reference"
        assert ours.ended[1]
        after()


def embed(device, dtype, *, columns):
    table = torch.randn(50, 2 * columns, device=device).to(dtype)[:, ::2]
    ids, lengths = torch.tensor([3, 49, 0, 3], device=device), torch.tensor([0, 5, 9, 1], dtype=torch.int32, device=device)
    x, positions = embed_next_(ids, table, lengths)
    assert torch.equal(x, table[ids][:, None]), "not the rows of the table"
    assert positions.tolist() == [[0], [5], [9], [1]]
    assert lengths.tolist() == [1, 6, 10, 2]
    return x


# --- the cases -------------------------------------------------------------------------------------------------------
# The tests have all of them in every dtype. Where time is short, as on a GPU for minutes, those that begin with "*" are of all
# dtypes, those that begin with "-" are left out, the others of bfloat16, in which models run. Where a case is not about heads,
# sizes or layouts it takes the usual ones, so that it shares its compiled kernel with others.

SIZES = [1, 2, 63, 64, 100, 127, 576, 1000, 1024, 1536, 2048, 3072, 4096, 5120, 8192, 14336, 40000, 100_000]
COMMON, SPARED = (100, 40000), (2, 63, 1024, 1536, 2048, 3072, 5120, 14336)
KINDS = ("packed", "transposed", "columns", "expanded")
PAIRS = ("contiguous", "packed", "interleaved", "transposed", "columns", "expanded")


def _mark(common, spared=False):
    return "* " if common else "- " if spared else ""


RMS_NORM = {
    **{f"{_mark(n in COMMON, n in SPARED)}{n}": dict(shape=(3, n), eps=1e-5) for n in SIZES},
    **{f"leading {lead}": dict(shape=(*lead, 64), eps=1e-5) for lead in ((1,), (2, 5), (2, 3, 4))},
    **{
        f"{_mark(kind == 'packed' and shape[-1] == 100)}{kind} {shape}": dict(shape=shape, kind=kind, weight="strided")
        for kind in KINDS for shape in ((2, 3, 5, 64), (3, 4, 7, 100))
    },
    **{
        f"{_mark(casting == 'gemma' and offset and weight)}{casting}, offset {offset}, {weight or 'no'} weight": dict(
            shape=(6, 576), casting=casting, offset=offset, weight=weight
        )
        for casting in ("llama", "gemma", "none") for offset in (0.0, 1.0) for weight in ("dense", None)
    },
    "weight of float32": dict(shape=(4, 64), weight="float32"),
    "small values": dict(shape=(8, 1024), size=2.0**-10, eps=1e-12),
    "large values": dict(shape=(8, 1024), size=200.0, eps=1e-12),
    **{
        f"{_mark(casting == 'llama' and shape[-1] in (64, 100))}backward {shape} {casting}": dict(
            shape=shape, eps=1e-5, offset=0.5, casting=casting, backward=True
        )
        for shape in ((5, 64), (3, 7, 100), (700, 96), (2, 576), (3, 4096), (4, 20000), (3, 70000))
        for casting in (("llama", "gemma", "none") if shape[-1] in (64, 70000) else ("llama",))
    },
}  # fmt: skip
ADD_RMS_NORM = {
    **{f"{_mark(n in (100, 40000))}{n}": dict(shape=(5, n)) for n in (1, 100, 576, 4096, 40000)},
    **{f"{kind} {shape}": dict(shape=shape, kind=kind) for kind in KINDS for shape in ((2, 3, 5, 64),)},
    **{
        f"{_mark(kind == 'packed')}backward {kind}": dict(shape=(2, 9, 160), kind=kind, backward=True)
        for kind in ("contiguous", "packed", "columns")
    },
}  # fmt: skip
SWIGLU = {
    **{
        f"{_mark(n in (100, 1536), n in (2, 63, 576, 1024, 2048, 5632, 14336))}{n}": dict(shape=(3, n))
        for n in (1, 2, 7, 63, 64, 100, 127, 576, 1000, 1024, 1536, 2048, 5632, 8192, 11008, 14336, 20000, 70_000)
    },
    **{f"leading {lead}": dict(shape=(*lead, 64)) for lead in ((), (33,), (2, 5), (2, 3, 4))},
    **{
        f"{_mark(kind == 'columns' and shape[-1] == 100, shape[-1] == 64)}{kind} {shape}": dict(shape=shape, kind=kind)
        for kind in PAIRS for shape in ((2, 3, 64), (3, 7, 100))
    },
    **{
        f"{_mark(kind == 'packed' and shape[-1] in (100, 1536))}backward {kind} {shape}": dict(
            shape=shape, kind=kind, backward=True
        )
        for shape, kinds in (
            ((5, 64), ("packed",)), ((3, 7, 100), ("contiguous", "packed", "interleaved", "columns", "expanded")),
            ((2, 1536), ("packed",)), ((70, 33), ("contiguous",)), ((2, 20000), ("packed",)),
        )
        for kind in kinds
    },
}  # fmt: skip
APPLY_ROPE = {
    **{
        f"{_mark(D == 64 and not interleaved, D in (2, 16, 40, 80))}{D} wide{', interleaved' * interleaved}": dict(
            D=D, interleaved=interleaved
        )
        for D in (2, 6, 16, 40, 64, 80, 96, 100, 128, 256)
        for interleaved in ((False, True) if D in (6, 64, 100, 256) else (False,))
    },
    **{
        f"{_mark(False, HQ in (1, 7, 10, 12, 40) or HK == 1)}{HQ} to {HK} heads": dict(HQ=HQ, HK=HK)
        for HQ, HK in ((1, 1), (3, 1), (9, 3), (7, 1), (10, 2), (12, 12), (32, 8), (32, 1), (40, 8), (71, 1))
    },
    **{
        f"{_mark(D == 128 and not interleaved, D in (64, 100, 256))}{R} of {D}{', interleaved' * interleaved}": dict(
            B=2, HQ=4, HK=2, D=D, R=R, kind="packed", k_kind="contiguous", interleaved=interleaved
        )
        for D, R in ((64, 32), (128, 96), (80, 20), (100, 2), (256, 64), (41, 40))
        for interleaved in ((False, True) if D == 128 else (False,))
    },
    **{
        f"{kind}": dict(B=2, HQ=4, HK=2, S=5, D=48, kind=kind)
        for kind in ("contiguous", "transposed", "packed", "columns", "expanded")
    },
    **{
        f"positions {integer}{' of each row' * batched}": dict(B=3, positions=integer, batched=batched)
        for integer in ("int32", "int64") for batched in (False, True)
    },
    "* long contexts": dict(
        S=8, D=128, length=LONG, theta=500_000.0, positions=[0, 1, 4095, 8192, 65_535, 65_537, 131_070, LONG - 1]
    ),
    **{
        f"{_mark(D == 128)}backward {kind} {R} of {D}": dict(
            B=2, HQ=4, HK=2, S=2, D=D, R=R, kind=kind, k_kind=kind, positions="int64", batched=True, backward=True
        )
        for D, R, kind in ((64, 64, "contiguous"), (80, 40, "packed"), (128, 128, "transposed"), (96, 72, "columns"))
    },
    "backward interleaved": dict(D=64, interleaved=True, backward=True),
}  # fmt: skip
ROPE_APPEND = {
    f"{_mark(HQ == 9)}{HQ} to {HK} heads, {R} of {D}{', pages of ' + str(page) if page else ''}": dict(
        HQ=HQ, HK=HK, D=D, R=R, interleaved=interleaved, page=page, integer="int32" if HQ == 9 else "int64",
        kind="layers" if HQ == 9 else "tokens",
    )
    for HQ, HK, D, R, interleaved in (
        (9, 3, 64, 64, False), (3, 1, 96, 72, False), (4, 4, 80, 20, True), (8, 2, 128, 128, False), (2, 1, 256, 256, True),
        (5, 1, 16, 16, False), (1, 1, 100, 50, False), (4, 2, 48, 48, True), (2, 2, 41, 32, False),
    )
    for page in ((None, 1, 24) if HQ in (9, 8) else (24,) if HQ == 4 else (None,))
}  # fmt: skip
ATTENTION = [
    # name, B, Hq, Hk, S, T, D, layout, options
    ("* plain", 2, 2, 1, 150, 150, 64, "transposed", {}),
    ("  128 wide", 1, 2, 2, 130, 130, 128, "contiguous", {}),
    ("* 128 wide, longer keys", 1, 2, 1, 100, 230, 128, "transposed", {}),
    ("* 80 wide", 1, 3, 1, 70, 90, 80, "packed", {}),
    ("  96 wide", 1, 2, 2, 65, 65, 96, "packed", {}),
    ("* 256 wide", 1, 2, 1, 66, 100, 256, "contiguous", {}),
    ("- 1 wide", 1, 2, 2, 20, 20, 1, "contiguous", {}),
    ("- 2 wide", 1, 1, 1, 17, 33, 2, "contiguous", {}),
    ("  7 wide", 1, 2, 1, 40, 40, 7, "transposed", {}),
    ("- 33 wide", 2, 1, 1, 30, 64, 33, "contiguous", {}),
    ("  100 wide", 1, 2, 2, 50, 50, 100, "transposed", {}),
    ("  192 wide", 1, 1, 1, 64, 64, 192, "contiguous", {}),
    ("- 255 wide", 1, 1, 1, 31, 31, 255, "contiguous", {}),
    ("  one query", 2, 2, 1, 1, 100, 64, "transposed", {}),
    ("  one key", 1, 2, 1, 50, 1, 64, "transposed", {}),
    ("  one of each", 1, 2, 1, 1, 1, 64, "transposed", {}),
    ("  a tile exactly", 1, 2, 1, 128, 128, 64, "transposed", {}),
    ("  a tile and one", 1, 2, 1, 129, 129, 64, "transposed", {}),
    ("  a tile less one", 1, 2, 1, 127, 127, 64, "transposed", {}),
    ("  longer queries", 1, 2, 1, 200, 90, 64, "transposed", {}),
    ("  much longer queries", 1, 2, 1, 300, 5, 64, "transposed", {}),
    ("- MHA", 1, 5, 5, 40, 40, 32, "transposed", {}),
    ("  ratio 3", 1, 9, 3, 40, 40, 64, "packed", {}),
    ("- ratio 5", 1, 10, 2, 33, 50, 32, "packed", {}),
    ("  ratio 7", 2, 7, 1, 33, 33, 32, "packed", {}),
    ("  ratio 32", 1, 32, 1, 20, 20, 16, "transposed", {}),
    ("  not causal", 1, 2, 1, 100, 70, 64, "transposed", {"causal": False}),
    ("* not causal, ragged", 1, 2, 1, 33, 190, 64, "packed", {"causal": False}),
    ("* window", 1, 2, 1, 150, 200, 64, "transposed", {"window": 70}),
    ("  window of one", 1, 2, 1, 100, 100, 64, "transposed", {"window": 1}),
    ("  window of 64", 1, 2, 1, 260, 260, 64, "transposed", {"window": 64}),
    ("  wide window", 1, 2, 1, 60, 60, 64, "transposed", {"window": 1000}),
    ("  window, longer queries", 1, 2, 1, 150, 60, 64, "transposed", {"window": 33}),
    ("  negative scale, square", 1, 2, 1, 90, 90, 64, "transposed", {"scale": -0.2}),
    ("  window, not causal", 1, 2, 1, 140, 100, 64, "transposed", {"window": 20, "causal": False}),
    ("* softcap", 1, 2, 1, 90, 120, 64, "transposed", {"softcap": 3.0}),
    ("  large softcap", 1, 2, 1, 70, 70, 64, "transposed", {"softcap": 50.0, "scale": 1.0}),
    ("  softcap, window", 1, 2, 1, 150, 150, 64, "transposed", {"softcap": 2.0, "window": 50, "scale": -0.5}),
    ("  scale", 1, 2, 1, 70, 70, 64, "transposed", {"scale": 0.3}),
    ("  negative scale", 1, 2, 1, 70, 130, 64, "packed", {"scale": -0.2}),
    ("  zero scale", 1, 2, 1, 70, 130, 64, "transposed", {"scale": 0.0}),
    ("  odd views", 1, 2, 1, 70, 80, 64, "odd", {}),
    ("* columns", 1, 2, 1, 70, 80, 64, "columns", {}),
    ("  expanded", 2, 4, 2, 60, 60, 64, "expanded", {}),
    ("  everything", 2, 6, 2, 75, 140, 80, "columns", {"window": 40, "softcap": 4.0, "scale": 0.2}),
]  # fmt: skip
ATTENTION_BACKWARD = [
    # name, B, Hq, Hk, S, T, D, options, with a gradient of lse
    ("* plain", 2, 2, 1, 70, 70, 64, {}, False),
    ("* 128 wide, longer keys", 1, 2, 1, 70, 140, 128, {}, True),
    ("  80 wide", 1, 3, 1, 70, 90, 80, {}, False),
    ("- 96 wide", 1, 2, 2, 40, 40, 96, {}, False),
    ("  256 wide", 1, 2, 1, 40, 70, 256, {}, False),
    ("- 7 wide", 1, 2, 1, 40, 40, 7, {}, True),
    ("  one query", 1, 2, 1, 1, 50, 64, {}, False),
    ("  longer queries", 1, 2, 1, 150, 70, 64, {}, True),
    ("  ratio 7", 1, 7, 1, 33, 40, 32, {}, False),
    ("  not causal", 1, 2, 1, 70, 150, 64, {"causal": False}, True),
    ("* window", 1, 2, 1, 150, 200, 64, {"window": 70}, False),
    ("  window, longer queries", 1, 2, 1, 150, 60, 64, {"window": 33}, True),
    ("  window, not causal", 1, 2, 1, 140, 100, 64, {"window": 20, "causal": False}, True),
    ("* softcap", 1, 2, 1, 90, 100, 64, {"softcap": 3.0}, True),
    ("  softcap, window, scale", 1, 2, 1, 70, 70, 64, {"softcap": 2.0, "window": 20, "scale": 0.7}, True),
    ("  negative scale", 1, 2, 1, 70, 70, 64, {"scale": -0.2}, True),
    ("- scale of 0", 1, 2, 1, 70, 90, 64, {"scale": 0.0}, False),
    ("  negative scale", 1, 2, 1, 70, 70, 64, {"scale": -0.2}, True),
    ("  zero scale", 1, 2, 1, 40, 40, 64, {"scale": 0.0}, True),
]  # fmt: skip
VARLEN = [
    # name, lengths of queries, lengths of keys (None: the same), Hq, Hk, D, options
    ("  prompts", (70, 1, 0, 130, 5), None, 2, 1, 64, {}),
    ("  128 wide", (20, 80), None, 2, 1, 128, {}),
    ("- 80 wide", (3, 33), None, 3, 1, 80, {}),
    ("* longer keys, an empty sequence of each", (5, 0, 40, 3), (9, 20, 130, 0), 2, 1, 64, {}),
    ("  longer queries", (100, 20), (40, 5), 2, 1, 64, {}),
    ("  window", (20, 150), None, 2, 1, 64, {"window": 33}),
    ("  not causal", (20, 75), (100, 3), 2, 1, 64, {"causal": False}),
    ("  softcap", (30, 40), None, 2, 1, 64, {"softcap": 3.0, "scale": 0.5}),
    ("- one sequence", (33,), None, 7, 1, 32, {}),
    ("  many of one token", (1,) * 5, None, 2, 1, 64, {}),
    ("- more than 256 sequences", (0, 3, *[0] * 256, 5), (2, 0, *[0] * 256, 9), 1, 1, 16, {}),
    ("* tokens outside", (40, 3), (30, 80), 2, 1, 64, {}, (70, 33)),
    ("  tokens outside, window, softcap", (40, 3), None, 2, 1, 64, {"window": 9, "softcap": 3.0}, (1, 2)),
]  # fmt: skip
_FORWARD = ["B", "Hq", "Hk", "S", "T", "D", "kind", "options"]
_BACKWARD = ["B", "Hq", "Hk", "S", "T", "D", "options", "dlse"]
FLASH_ATTENTION = {
    **{name: dict(zip(_FORWARD, row)) for name, *row in ATTENTION},
    **{f"{name[:2]}backward, {name[2:]}": dict(zip(_BACKWARD, row), backward=True) for name, *row in ATTENTION_BACKWARD},
}
_PACKED = ["lengths_q", "lengths_k", "Hq", "Hk", "D", "options", "outside"]
FLASH_ATTENTION_VARLEN = {name: dict(zip(_PACKED, row)) for name, *row in VARLEN}


def _cached(Hq, Hk, T, lengths, **more):
    return dict(B=len(lengths), Hq=Hq, Hk=Hk, T=T, lengths=lengths, **more)


DECODE_ATTENTION = {
    **{
        f"{_mark((Hq, S) == (6, 1))}{Hq} to {Hk} heads, {S} new": _cached(Hq, Hk, 150, (150, 67), S=S)
        for Hq, Hk in ((8, 8), (6, 2), (5, 1), (14, 2), (32, 1), (9, 3))
        for S in ((1, 3) if Hq in (6, 32) else (1,))
    },
    **{
        f"{_mark(D in (64, 128) and page)}{D} wide{', paged' * bool(page)}": _cached(6, 2, 200, (190, 33), D=D, page=page, splits=3)
        for D in (16, 40, 64, 80, 96, 128, 256)
        for page in ((None, 16) if D in (64, 128) else (16,) if D == 80 else (None,))
    },
    **{
        f"{S} new, lengths {lengths}": _cached(3, 1, 400, lengths, S=S, splits=4)
        for lengths in ((0, 1), (1, 64), (65, 63), (128, 129), (400, 3), (7, 0))
        for S in (1, 2, 5)
    },
    **{f"own splits, lengths {n}": _cached(6, 2, 1100, n) for n in ((512, 513, 1100), (1024, 1025, 0))},
    **{
        f"{_mark(False, page in (1, 100))}pages of {page}{', window' * bool(window)}": _cached(
            4, 2, 230, (230, 101), S=2, page=page, splits=3, options={"window": window} if window else {}
        )
        for page in (1, 7, 16, 64, 100, 256)
        for window in ((None, 50) if page in (7, 64) else (None,))
    },
    **{
        f"window of {window}, {S} new": _cached(3, 1, 300, (290, 20), S=S, splits=4, options={"window": window})
        for window in (1, 2, 63, 64, 65, 200, 1000)
        for S in ((1, 5) if window in (1, 64, 65) else (1,))
    },
    **{
        f"softcap {softcap}, scale {scale}": _cached(4, 2, 100, (100, 31), options={"softcap": softcap, "scale": scale})
        for softcap in (0.5, 50.0) for scale in (None, 0.03, 1.0)
    },
    **{
        f"{_mark(kind == 'layers')}{kind}, {D} wide": _cached(6, 2, 90, (90, 41), D=D, kind=kind, packed=True)
        for kind, D in (("transposed", 64), ("layers", 64), ("columns", 64), ("transposed", 96))
    },
    "many rows take several tiles": _cached(16, 2, 130, (130,), S=9, splits=2),
}  # fmt: skip
FUSED = [
    {}, {"norm": True}, {"activation": "swiglu"}, {"residual": True}, {"bias": True}, {"norm": True, "activation": "swiglu"},
    {"norm": True, "bias": True}, {"residual": True, "bias": True},
    {"norm": True, "activation": "swiglu", "residual": True, "bias": True},
]  # fmt: skip
BITS = [(8, 32), (4, 32), (4, 64), (4, 128)]


def fused_name(fused):
    return "-".join(fused) or "bare"


def bits_name(bits, group):
    return "int8" if bits == 8 else f"int4-{group}"


DECODE_LINEAR = {
    **{
        f"{_mark(K == 576)}{N} x {K}, {rows} rows": dict(lead=rows, K=K, N=N)
        for K, N in (
            (1, 1), (16, 3), (63, 17), (96, 16), (100, 33), (256, 64), (576, 40), (1000, 31), (1536, 48), (2048, 20), (4096, 16),
            (5000, 9),
        )
        for rows in ((1, 5) if K in (63, 576) else (1,))
    },
    **{
        f"{_mark(rows in (1, 8) and len(fused) == 4)}{fused_name(fused)}, {rows} rows": dict(lead=rows, K=320, N=54, fused=fused)
        for fused in FUSED
        for rows in ((1, 2, 3, 8) if len(fused) in (0, 4) else (1,))
    },
    **{f"norm of {K}": dict(lead=3, K=K, N=18, size=30.0, fused={"norm": True}) for K in (1, 40, 1024, 1500, 4096)},
    **{f"swiglu of {N}": dict(lead=2, K=192, N=N, fused={"activation": "swiglu"}) for N in (2, 6, 32, 34, 66)},
    **{
        f"leading {lead}": dict(lead=lead, K=200, N=24, fused={"norm": True, "residual": True})
        for lead in ((), (1, 1), (2, 1), (2, 2, 2))
    },
    "small values": dict(lead=4, K=512, N=32, size=2.0**-9, fused={"norm": True}),
    "large values": dict(lead=4, K=512, N=32, size=300.0, fused={"norm": True}),
    **{f"many rows, {fused_name(fused)}": dict(lead=(3, 4), K=128, N=64, fused=fused) for fused in FUSED},
    **{
        f"{_mark((rows, group, len(fused)) == (1, 32, 0), group == 64 or rows * len(fused) == 4 or rows == 3)}"
        f"{bits_name(bits, group)}, {fused_name(fused)}, {rows} rows": dict(
            lead=rows, K=640, N=130, bits=bits, group=group, fused=fused
        )
        for bits, group in BITS
        for rows, fused in ((1, {}), (3, {}), (8, {}), (1, FUSED[-1]), (8, FUSED[-1]))
    },
    **{
        f"many rows, {bits_name(bits, group)}": dict(lead=(3, 4), K=128, N=64, bits=bits, group=group, fused={"norm": True})
        for bits, group in BITS
    },
}  # fmt: skip
OPTIONS = [
    {}, {"repetition_penalty": 1.3}, {"temperature": 0.8}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.05}, {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8},
]  # fmt: skip
CHOOSE = {
    f"{_mark(vocabulary == 4099 and len(options) in (0, 5))}{vocabulary}, {options or 'greedy'}": dict(
        vocabulary=vocabulary, options=options
    )
    for vocabulary, several in ((97, (OPTIONS[0], OPTIONS[-1])), (4099, OPTIONS), (49152, (OPTIONS[0], OPTIONS[-1])))
    for options in several
}
EMBED = {f"{_mark(columns == 576)}{columns}": dict(columns=columns) for columns in (96, 576, 2000)}

TRIALS = {
    "rms_norm": RMS_NORM, "add_rms_norm": ADD_RMS_NORM, "swiglu": SWIGLU, "apply_rope": APPLY_ROPE, "rope_append_": ROPE_APPEND,
    "flash_attention": FLASH_ATTENTION, "flash_attention_varlen": FLASH_ATTENTION_VARLEN, "decode_attention": DECODE_ATTENTION,
    "decode_linear": DECODE_LINEAR, "choose": CHOOSE, "embed": EMBED,
}  # fmt: skip


def trials(op, dtype=torch.bfloat16):
    """The names of the cases of an op in the dtype, where time is short."""
    return [bare(n) for n in TRIALS[op] if n[0] == "*" or (dtype == torch.bfloat16 and n[0] != "-")]


def bare(name):
    return name.lstrip("*- ")


def run(op, name, dtype, device):
    """Runs one case, always on the same numbers."""
    arguments = next(a for n, a in TRIALS[op].items() if bare(n) == name)
    torch.manual_seed(sum(name.encode()))
    getattr(sys.modules[__name__], op)(device, dtype, **arguments)
