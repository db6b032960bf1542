"""rms_norm and add_rms_norm against the formula in float64: values, gradients, strides, errors."""

import numpy as np
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
        (lambda x, w: rms_norm(x, w, casting="hf"), "rms_norm: casting is 'hf', expected one of llama, gemma, none"),
        (lambda x, w: rms_norm(x, w.to("meta")), "rms_norm: weight is on meta, expected cpu"),
        (lambda x, w: add_rms_norm(x, x[:1], w), r"add_rms_norm: residual has shape \(1, 64\), expected \(2, 64\)"),
        (lambda x, w: add_rms_norm(x, x.half(), w), "add_rms_norm: residual is torch.float16, expected torch.float32"),
        (lambda x, w: rms_norm(x, w, -1), "rms_norm: eps is -1.0, expected a finite number, at least 0"),
        (lambda x, w: add_rms_norm(x, x, w, float("nan")), "add_rms_norm: eps is nan, expected a finite number, at least 0"),
        (lambda x, w: rms_norm(x, w, "1e-6"), "rms_norm: eps is '1e-6', expected a number"),
        (lambda x, w: rms_norm(x, w, None), "rms_norm: eps is NoneType, expected a number"),
        (lambda x, w: rms_norm(x, w, offset=w), r"rms_norm: offset is a torch.float32 tensor of shape \(64,\), expected a number"),
        (lambda x, w: rms_norm(x, w, offset=torch.ones(()).requires_grad_()), "rms_norm: offset requires a gradient"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(torch.randn(2, 64), torch.randn(64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_numbers_of_other_libraries(backend, device):
    x, weight = torch.randn(4, 64, device=device), torch.randn(64, device=device)
    with use_backend(backend):
        expected = rms_norm(x, weight, 0.5, offset=1.0)
        for eps, offset in (
            (np.float32(0.5), np.int64(1)), (np.array(0.5), np.float64(1)), (torch.tensor(0.5), torch.tensor([1])), (0.5, True)
        ):  # fmt: skip
            assert torch.equal(rms_norm(x, weight, eps, offset=offset), expected)
            assert torch.equal(add_rms_norm(x, torch.zeros_like(x), weight, eps, offset=offset)[0], expected)
        zero = torch.tensor(0.5)
        assert torch.equal(rms_norm(x, weight, zero, offset=1), expected)
        zero.fill_(2.0)  # the number counts, not the tensor
        assert torch.equal(rms_norm(x, weight, zero, offset=1), rms_norm(x, weight, 2.0, offset=1))


def spelled(x, weight, eps, offset):
    """Liger's casting "none" in PyTorch, every step in the dtype of x; what autograd makes of it is the backward."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_casting_none(backend, device, dtype, offset, residual):
    """As near to the formula as PyTorch's own operations in that dtype; outputs and gradients."""
    x, weight = torch.randn(6, 256).to(dtype), torch.randn(256).to(dtype)
    dy, zero = torch.randn(6, 256).to(dtype), torch.zeros(6, 256, dtype=dtype)

    def run(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy.to(y))

    def ours(x, weight):
        if residual:
            return add_rms_norm(x, zero.to(x), weight, 1e-5, offset=offset, casting="none")[0]
        return rms_norm(x, weight, 1e-5, offset=offset, casting="none")

    with use_backend(backend):
        found = run(ours, x.to(device), weight.to(device))
    exact = run(lambda x, w: oracle.rms_norm(x, w, 1e-5, offset), x.double(), weight.double())
    plain = run(lambda x, w: spelled(x, w, 1e-5, offset), x, weight)
    for a, b, c in zip(found, exact, plain):
        oracle.check(a.cpu(), b, c, fp32=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_casting_none_sums_offset_and_weight_in_their_dtype(backend, device, dtype):
    """As in test_gemma_adds_its_offset_in_float32, where half of these weights would be lost."""
    x, weight = torch.randn(4, 256).to(dtype), torch.linspace(0, 2.0**-8, 256).to(dtype)
    with use_backend(backend):
        y = rms_norm(x.to(device), weight.to(device), offset=1.0, casting="none").cpu()
        wide = rms_norm(x.to(device), weight.float().to(device), offset=1.0, casting="none").cpu()
        gemma = rms_norm(x.to(device), weight.to(device), offset=1.0, casting="gemma").cpu()
        rounded = rms_norm(x.to(device), (1 + weight).to(device), casting="gemma").cpu()
    assert torch.equal(y, rounded)
    assert torch.equal(wide, gemma)
    assert torch.equal(y, gemma) == (dtype == torch.float32)


def test_casting_none_is_ligers(device, dtype):
    """Liger's own kernels, where they run: not in the interpreter."""
    ops = pytest.importorskip("liger_kernel.ops.rms_norm")
    x, weight, dy = torch.randn(4, 256).to(dtype), torch.randn(256).to(dtype), torch.randn(4, 256).to(dtype)
    x, weight, dy = (t.to(device) for t in (x, weight, dy))

    def run(function):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy.clone())

    try:
        theirs = run(lambda x, w: ops.LigerRMSNormFunction.apply(x, w, 1e-5, 1.0, "none", False))
    except Exception as error:  # the compiler's or the interpreter's, of no common kind
        pytest.skip(f"Liger's kernel does not run here: {str(error).strip().splitlines()[-1][:100]}")
    found = run(lambda x, w: rms_norm(x, w, 1e-5, offset=1.0, casting="none"))
    exact = run(lambda x, w: oracle.rms_norm(x, w, 1e-5, 1.0))
    for a, b, c in zip(found, exact, theirs):
        assert oracle.error(a, c.double()) <= 4 * torch.finfo(dtype).eps
        assert oracle.error(a, b.double()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", [(64,), (1,), (0,), (5, 0), (0, 1), (3, 1), (0, 64), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_few_axes_and_few_elements(backend, device, dtype, shape, residual):
    """One row without a row axis, rows of one element, rows of none, no rows: outputs and gradients."""
    x, r, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = torch.randn(shape[-1:]).to(dtype)

    def run(ours, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        x, r, w = leaves
        y, total = ours(x, r, w) if residual else (ours(x, r, w)[0], None)
        leaves = leaves if residual else [x, w]
        outputs = (y, total) if residual else (y,)
        return *outputs, *torch.autograd.grad(outputs, leaves, [dy.to(y)] * len(outputs))

    def ours(x, r, w):
        return add_rms_norm(x, r, w, 1e-5) if residual else (rms_norm(x, w, 1e-5), None)

    def formula(x, r, w):
        total = x + r if residual else x
        rounded = total + (total.to(dtype).to(total) - total).detach()  # with the gradient of the sum
        return oracle.rms_norm(rounded, w, 1e-5), total

    with use_backend(backend):
        found = run(ours, *(t.to(device) for t in (x, r, weight)))
    exact = run(formula, x.double(), r.double(), weight.double())
    total = (x + r if residual else x).double()
    terms = dy.double() * weight.double() * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)  # dx is what they leave
    for a, b in zip(found, exact):
        assert a.dtype == dtype
        assert a.shape == b.shape
        scale = max([1.0, *(t.abs().max().item() for t in (b, terms) if t.numel())])
        assert torch.allclose(a.cpu().double(), b, atol=8 * scale * torch.finfo(dtype).eps, rtol=0)


def test_float64_is_refused_by_the_kernels(triton, device):
    with pytest.raises(TypeError, match="not float64"):
        rms_norm(torch.randn(2, 8, dtype=torch.float64, device=device), None)
