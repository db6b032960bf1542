"""swiglu against the formula in float64: values, gradients, strides, errors."""

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import reference, swiglu, use_backend

SIZES = [1, 2, 7, 63, 64, 100, 127, 576, 1000, 1024, 1536, 2048, 5632, 8192, 11008, 14336, 20000, 70_000]


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


def verify(device, gate, up):
    on = gate.to(device), up.to(device)
    same = oracle.unchanged(*on)
    y = swiglu(*on)
    same()
    oracle.check(y, oracle.swiglu(gate.double(), up.double()), reference.swiglu(gate, up))
    assert y.is_contiguous()


@pytest.mark.parametrize("n", SIZES)
def test_sizes(triton, poisoned, device, dtype, n):
    verify(device, *pair("packed", 3, n, dtype=dtype))
    assert triton.names == ["_swiglu_kernel"]


@pytest.mark.parametrize("lead", [(), (1,), (3,), (33,), (2, 5), (2, 3, 4), (0,), (4, 0, 2)], ids=str)
@pytest.mark.parametrize("n", [96, 640])
def test_leading_axes(triton, poisoned, device, dtype, lead, n):
    verify(device, *pair("packed", *lead, n, dtype=dtype)) if 0 not in lead else swiglu(*pair("packed", *lead, n, dtype=dtype))
    assert len(triton.names) == (0 not in lead)


@pytest.mark.parametrize("kind", ["contiguous", "packed", "interleaved", "transposed", "columns", "expanded"])
@pytest.mark.parametrize("shape", [(2, 3, 64), (3, 7, 100), (5, 2, 3, 40), (1, 6, 1000)], ids=str)
def test_views_are_read_in_place(triton, poisoned, device, dtype, kind, shape):
    verify(device, *pair(kind, *shape, dtype=dtype))
    assert triton.names == ["_swiglu_kernel"]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's numpy reports what the test provokes
def test_all_magnitudes(triton, poisoned, device, dtype):
    """exp overflows on one side and vanishes on the other; the result must do neither."""
    edge = torch.tensor([0.0, 1e-4, 1.0, 10.0, 20.0, 60.0, 87.0, 89.0, 100.0, 103.9, 105.0, 1000.0, 60000.0])
    gate = torch.cat((edge, -edge)).to(dtype)
    verify(device, gate, torch.randn(gate.shape).to(dtype))
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


@pytest.mark.parametrize("kind", ["contiguous", "packed", "interleaved", "columns", "expanded"])
@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 100), (2, 1536), (70, 33), (2, 20000), (0, 64)], ids=str)
def test_gradients(triton, poisoned, device, dtype, kind, shape):
    gate, up = pair(kind, *shape, dtype=dtype)
    dy = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    exact = oracle.exact(gate, up)
    oracle.swiglu(*exact).backward(dy.double())
    ours = [t.detach().to(device).requires_grad_() for t in (gate, up)]
    plain = [t.detach().clone().requires_grad_() for t in (gate, up)]
    same = oracle.unchanged(*ours)
    swiglu(*ours).backward(dy.to(device))
    same()
    reference.swiglu(*plain).backward(dy)
    for got, want, other in zip(ours, exact, plain):
        oracle.check(got.grad, want.grad, other.grad, fp32=1e-5)
    assert triton.names == (["_swiglu_kernel", "_swiglu_backward_kernel"] if 0 not in shape else [])


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
        swiglu(*pair("packed", *shape, 256, dtype=torch.float16))
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
