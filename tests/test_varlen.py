"""flash_attention_varlen: every packed sequence for itself, forward and backward."""

import math
from itertools import pairwise

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import flash_attention, flash_attention_varlen, reference
from trillama.kernels.dispatch import INTERPRETED

FEW = not (INTERPRETED or torch.cuda.is_available())  # compiled and emulated: seconds for each new shape


def cases(*rows):
    """Test cases; where each costs a compilation only those that begin with "*" run without `-m slow`."""
    return [pytest.param(*row, id=name.strip("* "), marks=[pytest.mark.slow] * (FEW and name[0] != "*")) for name, *row in rows]


def cuts(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(lengths, H, D, dtype):
    """A slice of a projection of q, k and v: [tokens, H, D]."""
    return torch.randn(sum(lengths), 3 * H, D).to(dtype)[:, H : 2 * H]


def exactly(q, k, v, lengths_q, lengths_k, *, causal=True, window=None, **options):
    """Sequence by sequence: (out [tokens, H, D], lse [H, tokens])"""
    outs, lses = [], []
    for (a, b), (c, d) in zip(*(pairwise(cuts(n).tolist()) for n in (lengths_q, lengths_k))):
        one = (t.transpose(0, 1).unsqueeze(0) for t in (q[a:b], k[c:d], v[c:d]))
        left, right = None if window is None else window - 1, 0 if causal else None
        out, lse = oracle.attention(*one, left=left, right=right, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


SEQUENCES = cases(
    # name, lengths of queries, lengths of keys (None: the same), Hq, Hk, D, options
    ("* prompts", (70, 1, 0, 130, 5), None, 2, 1, 32, {}),
    ("  128 wide", (20, 80), None, 2, 1, 128, {}),
    ("  80 wide", (3, 33), None, 3, 1, 80, {}),
    ("* longer keys, an empty sequence of each", (5, 0, 40, 3), (9, 20, 130, 0), 2, 1, 32, {}),
    ("  longer queries", (100, 20), (40, 5), 2, 2, 32, {}),
    ("  window", (20, 150), None, 1, 1, 64, {"window": 33}),
    ("  not causal", (20, 75), (100, 3), 2, 1, 64, {"causal": False}),
    ("  softcap", (30, 40), None, 2, 2, 32, {"softcap": 3.0, "scale": 0.5}),
    ("  one sequence", (33,), None, 7, 1, 32, {}),
    ("  many of one token", (1,) * 5, None, 2, 1, 32, {}),
)


@pytest.mark.parametrize(("lengths_q", "lengths_k", "Hq", "Hk", "D", "options"), SEQUENCES)
def test_sequences(triton, poisoned, device, dtype, lengths_q, lengths_k, Hq, Hk, D, options):
    lengths_k = lengths_k or lengths_q
    tensors = packed(lengths_q, Hq, D, dtype), packed(lengths_k, Hk, D, dtype), packed(lengths_k, Hk, D, dtype)
    where = cuts(lengths_q), cuts(lengths_k)
    dout = torch.randn(sum(lengths_q), Hq, D).to(dtype)

    def run(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, lse = function(*leaves)
        return out, lse, *torch.autograd.grad(out, leaves, dout.to(out))

    def varlen(function, device):
        moved = [t.to(device) for t in where]
        return lambda *t: function(*t, *moved, max(lengths_q), max(lengths_k), return_lse=True, **options)

    on = [t.to(device) for t in tensors]
    same = oracle.unchanged(*on)
    got = run(varlen(flash_attention_varlen, device), *on)
    same()
    assert triton.names == ["_forward_kernel", "_delta_kernel", "_dq_kernel", "_dkv_kernel"]
    exact = run(lambda *t: exactly(*t, lengths_q, lengths_k, **options), *(t.double() for t in tensors))
    plain = run(varlen(reference.flash_attention_varlen, "cpu"), *tensors) if dtype != torch.float32 else exact
    eager = run(lambda *t: exactly(*t, lengths_q, lengths_k, **options), *tensors) if dtype != torch.float32 else exact
    for g, e, p, formula in zip(got, exact, plain, eager):
        oracle.check(g, e, p, fp32=1e-5, eager=formula)
    assert got[0].is_contiguous()


def test_int64_cuts_and_a_generous_maximum(triton, poisoned, device):
    q, k, v = (torch.randn(12, h, 32, device=device) for h in (4, 2, 2))
    where = cuts((5, 7), torch.int64).to(device)
    out = flash_attention_varlen(q, k, v, where, where, 300, 200)
    oracle.check(out, exactly(*(t.cpu().double() for t in (q, k, v)), (5, 7), (5, 7))[0])


def test_same_bits_as_alone(triton, device, dtype):
    lengths = (40, 90)
    q, k, v = (packed(lengths, h, 64, dtype).to(device) for h in (2, 1, 1))
    where = cuts(lengths).to(device)
    out, lse = flash_attention_varlen(q, k, v, where, where, 90, 90, return_lse=True)
    alone, alone_lse = flash_attention(*(t[40:].transpose(0, 1).unsqueeze(0) for t in (q, k, v)), return_lse=True)
    assert torch.equal(out[40:], alone[0].transpose(0, 1))
    assert torch.equal(lse[:, 40:], alone_lse[0])


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [((), ()), ((0, 0), (0, 0)), ((0, 0), (3, 4)), ((3, 4), (0, 0))])
def test_empty(triton, poisoned, device, lengths_q, lengths_k):
    sizes = (sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2)
    q, k, v = (torch.randn(*size, 16, device=device).requires_grad_() for size in sizes)
    where = [cuts(n).to(device) for n in (lengths_q, lengths_k)]
    longest = (max(n, default=0) for n in (lengths_q, lengths_k))
    out, lse = flash_attention_varlen(q, k, v, *where, *longest, return_lse=True)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert all(not t.grad.any() for t in (q, k, v))


@pytest.mark.host
def test_gradcheck_of_the_reference():
    q, k, v = (torch.randn(*size, 5, dtype=torch.float64, requires_grad=True) for size in ((5, 4), (7, 2), (7, 2)))
    where = cuts((2, 3)), cuts((4, 3))
    assert torch.autograd.gradcheck(lambda *t: flash_attention_varlen(*t, *where, 3, 4, window=3), (q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 5, 4, 8)}, r"flash_attention_varlen: q has shape .*, expected \[tokens, H, D\]"),
        ({"cu_seqlens_q": [0, 5]}, "flash_attention_varlen: cu_seqlens_q is list, expected an int32 or int64 tensor"),
        ({"cu_seqlens_k": torch.zeros(2)}, "flash_attention_varlen: cu_seqlens_k is torch.float32, expected an int32 or int64"),
        ({"cu_seqlens_k": cuts((2, 3))}, "flash_attention_varlen: cu_seqlens_k has 3 entries, expected 2 as cu_seqlens_q"),
        ({"cu_seqlens_q": cuts((5,)).to("meta")}, "flash_attention_varlen: cu_seqlens_q is on meta, expected cpu as q"),
        ({"cu_seqlens_q": torch.zeros(1, 2, dtype=torch.int32)}, r"flash_attention_varlen: cu_seqlens_q has shape \(1, 2\)"),
        ({"window": -1}, "flash_attention_varlen: window is -1, expected a positive integer or None"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"q": torch.zeros(5, 4, 8), "k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)}
    arguments |= {"cu_seqlens_q": cuts((5,)), "cu_seqlens_k": cuts((5,)), "max_seqlen_q": 5, "max_seqlen_k": 5, **change}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        flash_attention_varlen(**arguments)
    assert "\n" not in str(caught.value)
