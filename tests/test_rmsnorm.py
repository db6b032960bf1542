"""rms_norm and add_rms_norm against the formula in float64: values, gradients, strides, errors."""

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import add_rms_norm, reference, rms_norm, use_backend

SIZES = [1, 2, 63, 64, 100, 127, 576, 1000, 1024, 1536, 2048, 3072, 4096, 5120, 8192, 14336, 40000, 100_000]
LEADING = [(1,), (3,), (2, 5), (2, 3, 4), (0,), (4, 0, 2)]


def layout(kind, *shape, dtype):
    """A random tensor of a shape [..., N] as models hand it over."""
    *lead, n = shape
    if kind == "contiguous":
        return torch.randn(shape).to(dtype)
    if kind == "packed":  # a slice of a wider projection
        return torch.randn(*lead, 3 * n).to(dtype)[..., n : 2 * n]
    if kind == "transposed":  # [B, S, H, D] seen as [B, H, S, D]
        return torch.randn(*lead[:-2], lead[-1], lead[-2], n).to(dtype).transpose(-2, -3)
    if kind == "columns":  # the last axis is not the fastest one
        return torch.randn(n, *lead).to(dtype).movedim(0, -1)
    return torch.randn(n).to(dtype).expand(shape)


def run(device, x, weight, residual=None, **options):
    moved = [None if t is None else t.to(device) for t in (x, residual, weight)]
    same = oracle.unchanged(*moved)
    x, residual, weight = moved
    out = rms_norm(x, weight, **options) if residual is None else add_rms_norm(x, residual, weight, **options)
    same()
    return out


@pytest.mark.parametrize("n", SIZES)
def test_sizes(triton, poisoned, device, dtype, n):
    x, weight = torch.randn(3, n).to(dtype), torch.randn(n).to(dtype)
    y = run(device, x, weight, eps=1e-5)
    oracle.check(y, oracle.rms_norm(x.double(), weight.double(), 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert len(triton.names) == 1


@pytest.mark.parametrize("n", [1, 100, 576, 4096, 40000])
def test_sizes_with_residual(triton, poisoned, device, dtype, n):
    x, residual, weight = torch.randn(5, n).to(dtype), torch.randn(5, n).to(dtype), torch.randn(n).to(dtype)
    y, total = run(device, x, weight, residual)
    plain, added = reference.add_rms_norm(x, residual, weight)
    assert torch.equal(total.cpu(), added)  # one addition and one rounding: nothing to differ in
    oracle.check(y, oracle.rms_norm(added.double(), weight.double()), plain)


@pytest.mark.parametrize("lead", LEADING, ids=str)
@pytest.mark.parametrize("n", [96, 640])
def test_leading_axes(triton, poisoned, device, dtype, lead, n):
    x, weight = torch.randn(*lead, n).to(dtype), torch.randn(n).to(dtype)
    y = run(device, x, weight)
    assert y.shape == x.shape
    oracle.check(y, oracle.rms_norm(x.double(), weight.double()), reference.rms_norm(x, weight))
    assert len(triton.names) == (0 if 0 in lead else 1)


@pytest.mark.parametrize("kind", ["packed", "transposed", "columns", "expanded"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (3, 4, 7, 100), (1, 1, 6, 1000)], ids=str)
def test_views_are_read_in_place(triton, poisoned, device, dtype, kind, shape):
    x, residual = layout(kind, *shape, dtype=dtype), layout("contiguous", *shape, dtype=dtype)
    weight = torch.randn(2 * shape[-1]).to(dtype)[::2]
    y = run(device, x, weight)
    oracle.check(y, oracle.rms_norm(x.double(), weight.double()), reference.rms_norm(x, weight))
    y, total = run(device, residual, weight, x)
    assert torch.equal(total.cpu(), x + residual)
    oracle.check(y, oracle.rms_norm(total.cpu().double(), weight.double()), reference.rms_norm(x + residual, weight))
    assert len(triton.names) == 2


@pytest.mark.parametrize("casting", ["llama", "gemma"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "bare"])
def test_casting_offset_weight(triton, poisoned, device, dtype, casting, offset, weighted):
    x, weight = torch.randn(6, 320).to(dtype), torch.randn(320).to(dtype) if weighted else None
    y = run(device, x, weight, offset=offset, casting=casting)
    plain = reference.rms_norm(x, weight, offset=offset, casting=casting)
    oracle.check(y, oracle.rms_norm(x.double(), weight.double() if weighted else None, offset=offset), plain)


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


def test_weight_of_another_dtype(triton, poisoned, device, dtype):
    x, weight = torch.randn(4, 256).to(dtype), torch.randn(256)
    y = run(device, x, weight)
    assert y.dtype == dtype
    oracle.check(y, oracle.rms_norm(x.double(), weight.double()), reference.rms_norm(x, weight))


def test_large_and_small_values(triton, device, dtype):
    for size in (2.0**-10, 200.0):
        x, weight = size * torch.randn(8, 1024).to(dtype), torch.randn(1024).to(dtype)
        x = x.to(dtype)
        y = run(device, x, weight, eps=1e-12)
        oracle.check(y, oracle.rms_norm(x.double(), weight.double(), 1e-12), reference.rms_norm(x, weight, 1e-12))


GRADIENTS = [(5, 64), (3, 7, 100), (700, 96), (2, 576), (3, 4096), (4, 20000), (3, 70000), (0, 64)]


@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_gradients(triton, poisoned, device, dtype, shape, casting):
    x, dy, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    x64, w64 = oracle.exact(x, weight)
    oracle.rms_norm(x64, w64, 1e-5, 0.5).backward(dy.double())
    xd, wd = (t.detach().clone().to(device).requires_grad_() for t in (x, weight))
    rms_norm(xd, wd, 1e-5, offset=0.5, casting=casting).backward(dy.to(device))
    xp, wp = (t.detach().clone().requires_grad_() for t in (x, weight))
    reference.rms_norm(xp, wp, 1e-5, offset=0.5, casting=casting).backward(dy)
    oracle.check(xd.grad, x64.grad, xp.grad, fp32=1e-5)
    oracle.check(wd.grad, w64.grad, wp.grad, fp32=1e-5)
    assert xd.grad.isfinite().all()
    if 0 not in shape:
        assert len(triton.names) == 2


@pytest.mark.parametrize("kind", ["contiguous", "packed", "columns"])
def test_gradients_with_residual(triton, poisoned, device, dtype, kind):
    shape = (2, 9, 160)
    x, residual = layout(kind, *shape, dtype=dtype), layout("contiguous", *shape, dtype=dtype)
    weight, dy, dtotal = torch.randn(160).to(dtype), layout(kind, *shape, dtype=dtype), torch.randn(shape).to(dtype)

    def gradients(function, *leaves):
        y, total = function(*leaves)
        return torch.autograd.grad((y, total), leaves, (dy.to(y), dtotal.to(y)))

    ours = gradients(add_rms_norm, *(t.detach().clone().to(device).requires_grad_() for t in (x, residual, weight)))
    plain = gradients(reference.add_rms_norm, *(t.detach().clone().requires_grad_() for t in (x, residual, weight)))
    total64 = oracle.exact(x + residual)
    w64 = oracle.exact(weight)
    exact = torch.autograd.grad((oracle.rms_norm(total64, w64), total64 * 1), (total64, w64), (dy.double(), dtotal.double()))
    for got, want, other in zip(ours, (exact[0], exact[0], exact[1]), plain):
        oracle.check(got, want, other, fp32=1e-5)


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
