"""flash_attention_varlen: every packed sequence for itself, forward and backward."""

import math

import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.bench.proofs import cuts, formula_varlen, packed
from trillama.kernels import flash_attention, flash_attention_varlen

KERNELS = ["_forward_kernel", "_delta_kernel", "_dq_kernel", "_dkv_kernel"]


@pytest.mark.parametrize("name", trials("flash_attention_varlen"))
def test_sequences(triton, poisoned, device, dtype, name):
    proofs.run("flash_attention_varlen", name, dtype, device)
    assert triton.names == KERNELS


def test_int64_cuts_and_a_generous_maximum(triton, poisoned, device):
    q, k, v = (torch.randn(12, h, 32, device=device) for h in (4, 2, 2))
    where = cuts((5, 7), torch.int64).to(device)
    out = flash_attention_varlen(q, k, v, where, where, 300, 200)
    oracle.check(out, formula_varlen(*(t.cpu().double() for t in (q, k, v)), (5, 7), (5, 7))[0])


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
