"""Gradients of flash_attention against float64 autograd of the formula."""

import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.kernels import flash_attention

KERNELS = ["_forward_kernel", "_delta_kernel", "_dq_kernel", "_dkv_kernel"]


@pytest.mark.few(10)
@pytest.mark.parametrize("name", trials("flash_attention", "backward"))
def test_gradients(triton, poisoned, device, dtype, name):
    proofs.run("flash_attention", name, dtype, device)
    assert triton.names == KERNELS


def exactly(*tensors, return_lse=True):
    return proofs.formula(*tensors)


def test_of_lse_alone(triton, poisoned, device):
    tensors = [torch.randn(1, h, 40, 32) for h in (2, 1, 1)]
    dlse = torch.randn(1, 2, 40)

    def of_lse(function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        lse = function(*leaves, return_lse=True)[1]
        return torch.autograd.grad(lse, leaves, dlse.to(lse), allow_unused=True)

    got, exact = of_lse(flash_attention, [t.to(device) for t in tensors]), of_lse(exactly, [t.double() for t in tensors])
    oracle.check(got[0], exact[0], fp32=1e-5)
    oracle.check(got[1], exact[1], fp32=1e-5)
    assert got[2] is None or not got[2].any()


def test_views_of_a_packed_projection(triton, poisoned, device):
    """The gradient of qkv [B, S, (Hq + 2 Hk) D] through views, with a gradient of out that has no memory of its own."""
    B, S, Hq, Hk, D = 2, 50, 4, 2, 32
    packed = torch.randn(B, S, Hq + 2 * Hk, D)

    def through(function, leaf):
        q, k, v = (t.transpose(1, 2) for t in leaf.split((Hq, Hk, Hk), 2))
        return torch.autograd.grad(function(q, k, v)[0].sum(), leaf)[0]

    got = through(lambda *t: flash_attention(*t, return_lse=True), packed.to(device).requires_grad_())
    oracle.check(got, through(exactly, packed.double().requires_grad_()), fp32=1e-5)


@pytest.mark.parametrize(("frozen", "kernels"), [((1, 2), KERNELS[:3]), ((0,), [*KERNELS[:2], KERNELS[3]]), ((0, 1), None)])
def test_frozen_inputs(triton, poisoned, device, frozen, kernels):
    tensors = [torch.randn(1, h, 30, 16, device=device).requires_grad_(i not in frozen) for i, h in enumerate((2, 1, 1))]
    flash_attention(*tensors).square().sum().backward()
    assert kernels is None or triton.names == kernels
    for i, t in enumerate(tensors):
        assert (t.grad is None) == (i in frozen)
        assert t.grad is None or t.grad.isfinite().all()


def test_a_second_backward_gives_the_same_bits(triton, device, dtype):
    tensors = [torch.randn(1, h, 70, 32).to(dtype).to(device).requires_grad_() for h in (2, 1, 1)]
    out = flash_attention(*tensors)
    first = torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(("B", "S", "T"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (1, 0, 0)])
def test_empty(triton, poisoned, device, B, S, T):
    tensors = [torch.randn(B, h, n, 16, device=device).requires_grad_() for h, n in ((4, S), (2, T), (2, T))]
    flash_attention(*tensors).sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in tensors)


@pytest.mark.host
def test_gradcheck_of_the_reference():
    q, k, v = (torch.randn(1, h, n, 5, dtype=torch.float64, requires_grad=True) for h, n in ((4, 6), (2, 9), (2, 9)))
    for options in ({}, {"window": 4}, {"softcap": 2.0, "scale": 0.7}, {"causal": False, "window": 3}):
        assert torch.autograd.gradcheck(lambda *t, o=options: flash_attention(*t, return_lse=True, **o), (q, k, v))


@pytest.mark.host
def test_a_second_derivative_is_refused():
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(flash_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


@pytest.mark.host
def test_training_compiles_without_a_break():
    q, k, v = (torch.randn(1, h, 9, 16, requires_grad=True) for h in (4, 2, 2))
    step = torch.compile(lambda *t: flash_attention(*t).square().sum(), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(flash_attention(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(step(q, k, v), (q, k, v)), eager):
        assert torch.equal(a, b)
