"""swiglu against the formula in float64: values, gradients, strides, errors."""

import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.kernels import swiglu, use_backend


@pytest.mark.parametrize("name", trials("swiglu"))
def test_swiglu(triton, poisoned, device, dtype, name):
    proofs.run("swiglu", name, dtype, device)
    assert triton.names == ["_swiglu_kernel", "_swiglu_backward_kernel"][: 1 + ("backward" in name)]


@pytest.mark.parametrize("lead", [(0,), (4, 0, 2)], ids=str)
def test_empty(triton, device, dtype, lead):
    gate, up = (torch.randn(*lead, 96, device=device).to(dtype).requires_grad_() for _ in range(2))
    y = swiglu(gate, up)
    assert y.shape == gate.shape
    y.sum().backward()
    assert gate.grad.shape == gate.shape
    assert triton.names == []


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's numpy reports what the test provokes
def test_all_magnitudes(triton, poisoned, device, dtype):
    """exp overflows on one side and vanishes on the other; the result must do neither."""
    edge = torch.tensor([0.0, 1e-4, 1.0, 10.0, 20.0, 60.0, 87.0, 89.0, 100.0, 103.9, 105.0, 1000.0, 60000.0])
    gate = torch.cat((edge, -edge)).to(dtype)
    proofs.swiglu(device, dtype, tensors=(gate, (2 * torch.rand(gate.shape) - 1).to(dtype)))  # float16 holds the products
    y = swiglu(gate.to(device), torch.ones_like(gate).to(device)).cpu()
    assert torch.equal(y[5 : len(edge)], gate[5 : len(edge)])  # silu(x) = x
    assert (y[len(edge) + 5 :].abs() <= 1e-24).all()


def test_infinities_and_nan(triton, device, dtype):
    gate = torch.tensor([float("inf"), float("nan"), 1.0, 1.0], dtype=dtype)
    up = torch.tensor([2.0, 1.0, float("inf"), float("nan")], dtype=dtype)
    y = swiglu(gate.to(device), up.to(device)).cpu()
    assert y[0] == float("inf")
    assert y[1].isnan()
    assert y[2] == float("inf")
    assert y[3].isnan()


def test_gradients_through_a_packed_projection(triton, device):
    x = torch.randn(4, 6, 2 * 48, device=device, requires_grad=True)
    dy = torch.randn(4, 6, 48, device=device)
    swiglu(*x.chunk(2, -1)).backward(dy)
    exact = oracle.exact(x)
    oracle.swiglu(*exact.chunk(2, -1)).backward(dy.cpu().double())
    oracle.check(x.grad, exact.grad, fp32=1e-5)


def test_frozen_inputs(triton, device):
    gate, up = torch.randn(4, 96, device=device), torch.randn(4, 96, device=device, requires_grad=True)
    swiglu(gate, up).sum().backward()
    assert gate.grad is None
    assert up.grad is not None


def test_a_second_backward_gives_the_same(triton, device):
    """A kernel that writes gradients over what was saved gives garbage here."""
    gate, up = (torch.randn(4, 96, device=device, requires_grad=True) for _ in range(2))
    y = swiglu(gate, up)
    first = torch.autograd.grad(y.square().sum(), (gate, up), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_gradcheck_of_the_reference():
    gate, up = (torch.randn(3, 11, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_compiles_once_for_all_numbers_of_rows(triton, device):
    from trillama.kernels.dispatch import INTERPRETED
    from trillama.kernels.glu import _swiglu_kernel

    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    compiled = []
    for shape in [(2, 3), (1, 1), (16, 1), (1, 16), (5, 16), (17, 1)]:
        swiglu(*proofs.pair("packed", *shape, 256, dtype=torch.float16))
        compiled.append(sum(len(entry[0]) for entry in _swiglu_kernel.device_caches.values()))
    assert compiled == compiled[:1] * 6, compiled


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, u: swiglu(g, u[:, :3]), r"swiglu: up has shape \(2, 3\), expected \(2, 64\) as gate"),
        (lambda g, u: swiglu(g, u.half()), "swiglu: up is torch.float16, expected torch.float32 as gate"),
        (lambda g, u: swiglu(g.int(), u), "swiglu: gate is torch.int32, expected a floating-point dtype"),
        (lambda g, u: swiglu(g, None), "swiglu: up is NoneType, expected a tensor"),
        (lambda g, u: swiglu(g.sum(), u.sum()), "swiglu: gate is a scalar"),
        (lambda g, u: swiglu(g, u.to("meta")), "swiglu: up is on meta, expected cpu as gate"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(torch.randn(2, 64), torch.randn(2, 64))
    assert "\n" not in str(caught.value)
