"""flash_attention_varlen: every packed sequence for itself, forward and backward."""

import math
from unittest import mock

import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.bench.proofs import cuts, formula_varlen, packed
from trillama.kernels import attention, flash_attention, flash_attention_varlen, reference, use_backend
from trillama.kernels.dispatch import INTERPRETED

KERNELS = ["_forward_kernel", "_delta_kernel", "_dq_kernel", "_dkv_kernel"]


@pytest.mark.few(8)
@pytest.mark.parametrize("name", trials("flash_attention_varlen", long=["more than 256 sequences"]))
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


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("longest", [1, 64, 10**6])
def test_any_longest_length_will_do(poisoned, device, dtype, longest, backend):
    q, k, v = (packed((5, 150), h, 32, dtype).to(device) for h in (2, 1, 1))
    where = cuts((5, 150)).to(device)
    with use_backend(backend):
        out = flash_attention_varlen(q, k, v, where, where, longest, longest)
        assert torch.equal(out, flash_attention_varlen(q, k, v, where, where, 150, 150))
    exact = formula_varlen(*(t.cpu().double() for t in (q, k, v)), (5, 150), (5, 150))[0]
    oracle.check(out, exact, reference.flash_attention_varlen(*(t.cpu() for t in (q, k, v, where, where)), 150, 150))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tokens_outside_of_all_sequences(poisoned, device, dtype, backend):
    """Zeros in out and in all gradients, -inf in lse; the tokens within are as if alone."""
    q, k, v = (torch.randn(20, h, 32, device=device).to(dtype).requires_grad_() for h in (2, 1, 1))
    starts = torch.tensor([3, 9, 15], dtype=torch.int32, device=device)
    with use_backend(backend):
        out, lse = flash_attention_varlen(q, k, v, starts, starts, 6, 6, return_lse=True)
        alone, alone_lse = flash_attention_varlen(*(t[3:15] for t in (q, k, v)), starts - 3, starts - 3, 6, 6, return_lse=True)
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        inside = torch.autograd.grad(alone, (q, k, v), dout[3:15])
    assert torch.equal(out[3:15], alone)
    assert torch.equal(lse[:, 3:15], alone_lse)
    assert not out[:3].any()
    assert not out[15:].any()
    assert (lse[:, :3] == -math.inf).all()
    assert (lse[:, 15:] == -math.inf).all()
    for gradient, expected in zip(gradients, inside):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("starts", "tokens", "message"),
    [
        ([0, 8, 5, 12], 12, r"cu_seqlens_q is \[0, 8, 5, 12\], expected cuts that rise from 0 to at most 12, the number of tokens"),
        ([0, 5, 13], 12, r"cu_seqlens_q is \[0, 5, 13\], expected cuts"),
        ([-1, 5, 12], 12, r"cu_seqlens_q is \[-1, 5, 12\], expected cuts"),
        ([5, 4, 3], 12, "cu_seqlens_q holds lengths, which add up to the 12 tokens"),
        ([3, 4, 5], 12, "cu_seqlens_q holds lengths, which add up to the 12 tokens"),
        (list(range(20))[::-1], 12, r"cu_seqlens_q is \[19, 18, .*, \.\.\]"),
    ],
)
@pytest.mark.host
def test_cuts_that_cannot_be(starts, tokens, message, backend):
    if backend == "triton" and not INTERPRETED:
        pytest.skip("needs the interpreter")
    q, starts = torch.zeros(tokens, 2, 16), torch.tensor(starts, dtype=torch.int32)
    whole = torch.linspace(0, tokens, len(starts)).int()
    with use_backend(backend):
        for _ in range(2):  # a remembered call too
            flash_attention_varlen(q, q, q, whole, whole, 5, 5)
            with pytest.raises(ValueError, match=message):
                flash_attention_varlen(q, q, q, starts, whole, 5, 5)
            with pytest.raises(ValueError, match=message.replace("_q", "_k")):
                flash_attention_varlen(q, q, q, whole, starts, 5, 5)


def test_cuts_that_cannot_be_where_nobody_looks(triton, poisoned, device):
    """As on a GPU: whatever they are, nothing is read outside the tensors and every row is written."""
    q, k, v = (torch.randn(40, h, 16, device=device) for h in (1, 1, 1))
    for _ in range(5):
        cuts_q, cuts_k = (torch.randint(-20, 70, (5,), dtype=torch.int32, device=device) for _ in range(2))
        dout = torch.randn_like(q)
        with proofs.poisoned(4096), mock.patch.object(attention, "host_sees", return_value=False):
            on = [proofs.move(t, device) for t in (q, k, v)]
            out, gradients = proofs.through(lambda *t: flash_attention_varlen(*t, cuts_q, cuts_k, 40, 40), on, [dout])  # noqa: B023
        assert out[0].isfinite().all()
        assert all(g.isfinite().all() for g in gradients)


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
