"""rms_norm and add_rms_norm against the formula in float64: values, gradients, strides, errors."""

import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.kernels import add_rms_norm, rms_norm, use_backend


@pytest.mark.parametrize("name", trials("rms_norm"))
def test_rms_norm(triton, poisoned, device, dtype, name):
    proofs.run("rms_norm", name, dtype, device)
    assert len(triton.names) == 1 + ("backward" in name)


@pytest.mark.parametrize("name", trials("add_rms_norm"))
def test_add_rms_norm(triton, poisoned, device, dtype, name):
    proofs.run("add_rms_norm", name, dtype, device)
    assert len(triton.names) == 1 + ("backward" in name)


@pytest.mark.parametrize("lead", [(0,), (4, 0, 2)], ids=str)
def test_empty(triton, device, dtype, lead):
    x = torch.randn(*lead, 96, device=device).to(dtype).requires_grad_()
    weight = torch.randn(96, device=device).to(dtype).requires_grad_()
    y = rms_norm(x, weight)
    assert y.shape == x.shape
    y.sum().backward()
    assert not weight.grad.any()
    assert triton.names == []


def test_llama_casting_has_hugging_faces_bits(triton, device, dtype):
    """Rounded before the weight: kernels that are not are 0.125 off in bfloat16 logits."""
    x, weight = 8 * torch.randn(64, 512).to(dtype), torch.randn(512).to(dtype)
    x32 = x.float()
    hugging_face = weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    different = (rms_norm(x.to(device), weight.to(device)).cpu() != hugging_face).float().mean()
    assert different <= (1.0 if dtype == torch.float32 else 0.002)  # a float32 sum in another order moves a few roundings


def test_gemma_adds_its_offset_in_float32(triton, device, dtype):
    x, weight = torch.randn(4, 256).to(dtype), torch.full((256,), 2.0**-9).to(dtype)
    y = rms_norm(x.to(device), weight.to(device), offset=1.0, casting="gemma")
    exact = oracle.rms_norm(x.double(), weight.double(), offset=1.0)
    oracle.check(y, exact, exact.to(dtype))


def test_frozen_weight_and_frozen_input(triton, device):
    x, weight = torch.randn(4, 96, device=device), torch.randn(96, device=device)
    y = rms_norm(x.requires_grad_(), weight)
    y.sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    y = rms_norm(x.detach(), weight.requires_grad_())
    y.sum().backward()
    assert weight.grad is not None


def test_a_second_backward_gives_the_same(triton, device):
    x = torch.randn(4, 96, device=device, requires_grad=True)
    weight = torch.randn(96, device=device, requires_grad=True)
    y = rms_norm(x, weight)
    first = torch.autograd.grad(y.square().sum(), (x, weight), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_same_bits_for_the_same_input(triton, device, dtype):
    x, weight, dy = torch.randn(300, 256).to(dtype), torch.randn(256).to(dtype), torch.randn(300, 256).to(dtype)

    def once():
        xd, wd = (t.detach().clone().to(device).requires_grad_() for t in (x, weight))
        y = rms_norm(xd, wd)
        y.backward(dy.to(device))
        return y, xd.grad, wd.grad

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))
    alone = rms_norm(x[7:8].to(device), weight.to(device))
    assert torch.equal(alone, once()[0][7:8])


def test_gradcheck_of_the_reference():
    x, residual, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 33), (3, 33), (33,)))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda a, b, c: add_rms_norm(a, b, c, 1e-5), (x, residual, weight))
        assert torch.autograd.gradcheck(lambda a, c: rms_norm(a, c, offset=1.0, casting="gemma"), (x, weight))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: rms_norm(x, w[:3]), r"rms_norm: weight has shape \(3,\), expected \(64,\)"),
        (lambda x, w: rms_norm(x.int(), w), "rms_norm: x is torch.int32, expected a floating-point dtype"),
        (lambda x, w: rms_norm([1.0], w), "rms_norm: x is list, expected a tensor"),
        (lambda x, w: rms_norm(x.sum(), w), "rms_norm: x is a scalar"),
        (lambda x, w: rms_norm(x, w, casting="hf"), "rms_norm: casting is 'hf', expected one of llama, gemma"),
        (lambda x, w: rms_norm(x, w.to("meta")), "rms_norm: weight is on meta, expected cpu"),
        (lambda x, w: add_rms_norm(x, x[:1], w), r"add_rms_norm: residual has shape \(1, 64\), expected \(2, 64\)"),
        (lambda x, w: add_rms_norm(x, x.half(), w), "add_rms_norm: residual is torch.float16, expected torch.float32"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(torch.randn(2, 64), torch.randn(64))
    assert "\n" not in str(caught.value)


def test_float64_is_refused_by_the_kernels(triton, device):
    with pytest.raises(TypeError, match="not float64"):
        rms_norm(torch.randn(2, 8, dtype=torch.float64, device=device), None)
