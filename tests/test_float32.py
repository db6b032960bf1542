"""float32 means float32 in products too: on NVIDIA three products of tensor cores stand for one, in the interpreter scalars do."""

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import decode_attention, decode_linear, flash_attention, reference


@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 70), (128, 40)])
def test_attention(triton, device, head_dim, tokens):
    q, k, v = (torch.randn(1, heads, tokens, head_dim, device=device, requires_grad=True) for heads in (4, 2, 2))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected, y = reference.flash_attention(*exact), flash_attention(q, k, v)
    oracle.check(y, expected)
    dout = torch.randn_like(y)
    for found, gradient in zip(torch.autograd.grad(y, (q, k, v), dout), torch.autograd.grad(expected, exact, dout.double())):
        oracle.check(found, gradient)
    lengths = torch.tensor([tokens], dtype=torch.int32, device=device)
    with torch.no_grad():
        y = decode_attention(q[:, :, -1:], k, v, lengths)
    oracle.check(y, expected[:, :, -1:])


def test_decode_linear(triton, device):
    x, weight = torch.randn(3, 256, device=device), torch.randn(40, 256, device=device)
    oracle.check(decode_linear(x, weight), x.double() @ weight.double().T)
