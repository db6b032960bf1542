"""Leading axes that the kernels of the row ops cannot walk: the fewest tensors that will do are copied, nothing else changes."""

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import add_rms_norm, decode_linear, rms_norm, swiglu
from trillama.kernels.dispatch import row_strides

ORDERS = {  # how the axes of a dense tensor are turned
    "four": ((2, 3, 4, 5, 16), (3, 1, 0, 2, 4)),
    "four reversed": ((5, 2, 3, 2, 16), (3, 2, 1, 0, 4)),
    "five": ((2, 3, 2, 3, 2, 16), (4, 2, 0, 3, 1, 5)),
    "columns too": ((16, 2, 3, 4, 3), (4, 2, 1, 3, 0)),
    "one of one": ((2, 3, 1, 4, 5, 16), (4, 1, 2, 0, 3, 5)),
    "none": ((2, 3, 0, 4, 5, 16), (4, 1, 2, 0, 3, 5)),
}


def turned(name, device, dtype):
    shape, order = ORDERS[name]
    return torch.randn(shape).to(dtype).to(device).permute(order)


def compare(function, formula, *tensors, dy):
    """Outputs and gradients, twice with other values: the second call may be a remembered one."""
    for _ in range(2):
        with torch.no_grad():
            plain = function(*tensors)
        leaves = [t.detach().requires_grad_() for t in tensors]  # with the strides that they have
        y = function(*leaves)
        assert torch.equal(y, plain)
        found = torch.autograd.grad(y, leaves, dy)
        exact = [t.detach().cpu().double().requires_grad_() for t in tensors]
        out = formula(*exact)
        eps = torch.finfo(y.dtype).eps
        for a, b in zip((y, *found), (out, *torch.autograd.grad(out, exact, dy.cpu().double()))):
            assert a.shape == b.shape
            assert oracle.error(a, b) <= 4 * eps
        tensors = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t + 1) for t in tensors]


@pytest.mark.parametrize("name", ORDERS)
def test_rms_norm(triton, poisoned, device, dtype, name):
    x = turned(name, device, dtype)
    weight = torch.randn(16).to(dtype).to(device)
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: oracle.rms_norm(x, w, 1e-5), x, weight, dy=turned(name, device, dtype))


@pytest.mark.parametrize("name", ORDERS)
def test_strides_of_the_gradient_alone(triton, poisoned, device, dtype, name):
    """The forward needs no copy, the backward does."""
    dy = turned(name, device, dtype)
    x, weight = torch.randn(dy.shape).to(dtype).to(device), torch.randn(16).to(dtype).to(device)
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: oracle.rms_norm(x, w, 1e-5), x, weight, dy=dy)
    compare(swiglu, oracle.swiglu, x, x.clone(), dy=dy)


@pytest.mark.parametrize("name", ORDERS)
def test_add_rms_norm(triton, poisoned, device, dtype, name):
    x = turned(name, device, torch.float32).round().to(dtype)  # sums that are exact
    residual, weight = torch.randn(x.shape).round().to(dtype).to(device), torch.randn(16).to(dtype).to(device)
    compare(
        lambda *t: add_rms_norm(*t, 1e-5)[0], lambda x, r, w: oracle.rms_norm(x + r, w, 1e-5), x, residual, weight,
        dy=turned(name, device, dtype),
    )  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_swiglu(triton, poisoned, device, dtype, name):
    gate, up = turned(name, device, dtype), turned(name, device, dtype)
    compare(swiglu, oracle.swiglu, gate, up, dy=turned(name, device, dtype))


@pytest.mark.parametrize("rows", [(1, 2, 2, 2, 1), (2, 2, 2, 2)], ids=str)
def test_decode_linear(triton, poisoned, device, dtype, rows):
    x = torch.randn(*rows[::-1], 16).to(dtype).to(device).permute(*reversed(range(len(rows))), len(rows))
    residual = torch.randn(*rows[::-1], 24).to(dtype).to(device).permute(*reversed(range(len(rows))), len(rows))
    weight = torch.randn(24, 16).to(dtype).to(device)
    for _ in range(2):
        y = decode_linear(x, weight, residual=residual)
        exact = x.cpu().double() @ weight.cpu().double().T + residual.cpu().double()
        assert oracle.error(y, exact) <= 4 * torch.finfo(dtype).eps
        x, residual = (torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=device).copy_(t + 1) for t in (x, residual))


def strides(*shape, order=None):
    t = torch.empty(shape, device="meta")
    return t if order is None else t.permute(order)


@pytest.mark.host
def test_only_what_has_to_be_is_copied():
    good = strides(5, 3, 2, 4, 8)
    bad = strides(2, 3, 4, 5, 8, order=(3, 1, 0, 2, 4))
    assert bad.shape == good.shape
    (first, second), middle, inner, steps = row_strides(good, good)
    assert first is second is good
    assert (middle, inner) == (None, None)
    for place in (0, 1):
        given = [good, good]
        given[place] = bad
        found, _, inner, steps = row_strides(*given)
        assert found[1 - place] is good
        assert found[place].is_contiguous()
        assert inner is None
        assert steps[0] == steps[1]
    found, *_ = row_strides(bad, bad)
    assert all(t.is_contiguous() for t in found)


@pytest.mark.host
def test_axes_that_three_can_walk_are_not_copied():
    """Each alone has three axes or fewer, and so may both together: cuts of one are cuts of both."""
    three = strides(4, 3, 2, 2, 8, order=(1, 0, 2, 3, 4))  # cut after the first and the second axis
    found, middle, inner, _ = row_strides(three, three)
    assert all(a is three for a in found)
    assert (middle, inner) == (4, 4)
    other = strides(3, 4, 2, 2, 8, order=(0, 1, 3, 2, 4))  # cut after the second and the third
    found, *_ = row_strides(three, other)
    assert sum(a.is_contiguous() for a in found) == 1
    one = strides(2, 3, 4, 1, 8, order=(2, 1, 0, 3, 4))  # an axis of one element is none
    found, middle, inner, _ = row_strides(one)
    assert found[0] is one
    assert (middle, inner) == (3, 2)
