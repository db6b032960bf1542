"""Random configurations of every op against its formula in float64, element by element: shapes with 0 and 1, strides, dtypes,
options, the sign and size of values, and gradients.

Each run takes fresh seeds from the clock, or those from the environment's TRILLAMA_SEED on. A failure names the seed that repeats
it: `TRILLAMA_SEED=n pytest tests/test_properties.py -k OP` begins with it. A new op adds one function `one(seed, triton)` to OPS.

A result may differ from the exact one by half a unit in the last place for each rounding to its dtype, and by a few roundings of
float32 (of float64 in float64) of the terms it is a sum of: where these cancel, the terms count, not their sum.
"""

import math
import os
import random
import time

import pytest
import torch
from trillama import kernels as k
from trillama.bench import oracle
from trillama.kernels import reference

SEED = int(os.environ.get("TRILLAMA_SEED") or time.time_ns() // 1000 % 10**9)


class Draw(random.Random):
    """What a configuration is made of; the tensors follow from the same seed."""

    def __init__(self, seed, triton):
        super().__init__(seed)
        self.generator, self.triton = torch.Generator().manual_seed(seed), triton
        half = (torch.float16, torch.float32)
        self.dtype = self.choice(half if triton else (*half, torch.bfloat16, torch.float64))

    def size(self, most):
        """Now and then 0 or 1, else a small or a larger number."""
        kind = self.randrange(24)
        return kind and (1 if kind < 4 else self.randint(1, min(9, most) if kind < 14 else most))

    def lead(self, most=5, rows=40):
        """Leading axes of at most so many rows together."""
        while True:
            shape = [self.size(7) for _ in range(self.randint(0, most))]
            if torch.Size(shape).numel() <= rows:
                return shape

    def values(self, shape, dtype, size=None):
        """Dense: of both signs or of one, all of about one size, some of them 0."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if not self.randrange(4):
            x = x.abs()
        if not self.randrange(6):
            x = torch.where(torch.rand(shape, generator=self.generator) < 0.3, 0.0, x)
        return (x * (2.0 ** self.randint(-8, 6) if size is None else size)).to(dtype)

    def laid(self, x):
        """x in memory in another order of its axes, with gaps, or as it is."""
        kind = self.randrange(4)
        if kind == 0 or not x.dim():
            return x
        order = self.sample(range(x.dim()), x.dim()) if kind != 1 else list(range(x.dim()))
        inverse = [order.index(axis) for axis in range(x.dim())]
        if kind == 3:  # every second, third, .. element of something larger, from some offset on
            steps, skip = [self.randint(1, 3) for _ in order], self.randrange(3)
            larger = torch.zeros([n * step + skip for n, step in zip((x.shape[a] for a in order), steps)], dtype=x.dtype)
            view = larger[tuple(slice(skip, skip + x.shape[a] * step, step) for a, step in zip(order, steps))].permute(inverse)
        else:
            view = torch.empty([x.shape[a] for a in order], dtype=x.dtype).permute(inverse)
        return view.copy_(x)

    def tensor(self, shape, dtype=None, size=None):
        """Random, of random strides; sometimes one slice of it expanded along an axis."""
        dtype = dtype or self.dtype
        if shape and not self.randrange(8):
            axis = self.randrange(len(shape))
            return self.laid(self.values([1 if a == axis else n for a, n in enumerate(shape)], dtype, size)).expand(shape)
        return self.laid(self.values(shape, dtype, size))

    def factor(self, n):
        """A weight [n] in the dtype or in float32, or None."""
        kind = self.randrange(4)
        return None if kind == 0 else self.tensor([n], torch.float32 if kind == 1 and self.dtype != torch.float64 else None)


def near(name, actual, exact, terms, roundings, count=16, least=0.0):
    """terms: the sum of the absolute values that the result is a sum of; roundings: to its dtype; count: of float32. least: what
    is allowed besides."""
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual, exact, terms = actual.detach().double(), exact.detach(), terms.detach()
    info, inner = torch.finfo(near.dtype), torch.finfo(reference.wide(near.dtype))
    allowed = (0.51 * info.eps * roundings + count * inner.eps) * terms + least
    allowed = allowed + 2 * info.tiny * info.eps + inner.tiny * count
    wrong = ~((actual - exact).abs() <= allowed) & (terms < info.max / 4)  # what overflows is another matter
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at {at}: {actual[at]}, "
            f"expected {exact[at]} +- {allowed[at]}"
        )


def exactly(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def gradients(outputs, inputs, given):
    """Of those inputs that are there."""
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(outputs, wanted, given))
    return [None if t is None else next(found) for t in inputs]


# --- the ops ---------------------------------------------------------------------------------------------------------


def norm(seed, triton, fused):
    draw = Draw(seed, triton)
    near.dtype = dtype = draw.dtype
    shape = [*draw.lead(), draw.size(300)]
    x, residual, weight = draw.tensor(shape), draw.tensor(shape) if fused else None, draw.factor(shape[-1])
    eps, offset = draw.choice((1e-6, 1e-5, 1e-3, 0.5)), draw.choice((0.0, 1.0, -0.75))
    casting = draw.choice(("llama", "gemma", "none"))
    dy, dtotal = draw.tensor(shape), draw.tensor(shape) if fused else None
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, residual, weight)]
    options = {"offset": offset, "casting": casting}
    if fused:
        y, total = k.add_rms_norm(*leaves, eps, **options)
        assert torch.equal(total, x + residual)
        found = gradients((y, total), leaves, (dy, dtotal))
    else:
        y = k.rms_norm(leaves[0], leaves[2], eps, **options)
        total, found = x, gradients(y, leaves, dy)
    # "none" sums offset and weight in their dtype where it is one
    factor = None if weight is None else weight.double()
    if factor is not None and offset:
        factor = offset + factor
        factor = factor.to(dtype).double() if casting == "none" and weight.dtype == dtype else factor
    n = oracle.rms_norm(total.double(), None, eps)
    rstd = (total.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    # float32 holds offset + weight no better than the larger of the two
    scale = torch.ones(()) if weight is None else weight.double().abs() + abs(offset)
    lost = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * (casting == "llama")  # of small numbers, rounded in between
    near("y", y, n if factor is None else n * factor, n.abs() * scale, 2 if casting == "llama" else 1, least=lost * scale)
    g = dy.double() if factor is None else dy.double() * factor
    largest = (dy.double() * scale).abs()
    dx = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    terms = rstd * (largest + n.abs() * (largest * n.abs()).mean(-1, keepdim=True))
    if fused:
        dx, terms = dx + dtotal.double(), terms + dtotal.double().abs()
    for name, gradient in zip(("dx", "dresidual"), found[: 1 + fused]):
        near(name, gradient, dx, terms, 1)
    if weight is not None:
        parts = dy.double() * n
        near(
            "dweight", found[2], parts.sum_to_size(weight.shape), parts.abs().sum_to_size(weight.shape), 2, 64,
            lost * dy.double().abs().sum_to_size(weight.shape),
        )  # fmt: skip


def rms_norm(seed, triton):
    norm(seed, triton, False)


def add_rms_norm(seed, triton):
    norm(seed, triton, True)


def swiglu(seed, triton):
    draw = Draw(seed, triton)
    near.dtype = draw.dtype
    shape = [*draw.lead(), draw.size(300)]
    gate, up, dy = draw.tensor(shape), draw.tensor(shape), draw.tensor(shape)
    leaves = [t.detach().requires_grad_() for t in (gate, up)]
    y = k.swiglu(*leaves)
    found = torch.autograd.grad(y, leaves, dy)
    g, u, d = (t.double() for t in (gate, up, dy))
    s, terms = torch.sigmoid(g), g.abs() * torch.sigmoid(g)
    inside, lost = 8 + g.abs(), 1e-38  # the exponential is of a rounded number, and 0 or infinite beyond 88
    near("y", y, g * s * u, terms * u.abs(), 1, inside, lost * (g * u).abs())
    near("dup", found[1], d * g * s, terms * d.abs(), 1, inside, lost * (g * d).abs())
    exact = d * u * s * (1 + g * (1 - s))
    near("dgate", found[0], exact, (d * u).abs() * s * (1 + g.abs()), 1, inside, lost * (d * u).abs() * (1 + g.abs()))


def apply_rope(seed, triton):
    draw = Draw(seed, triton)
    near.dtype = dtype = draw.dtype
    sizes = (2, 3, 2, 5, 20) if triton else (4, 9, 4, 20, 40)  # the interpreter takes its time
    B, HQ, HK, S, D = *map(draw.size, sizes[:4]), 2 * draw.randint(1, sizes[4])
    half = draw.choice((D // 2, draw.randint(1, D // 2)))
    P = S + draw.randint(1, 20)
    angle = torch.rand(P, half, generator=draw.generator, dtype=torch.float64) * 100
    cos, sin = (draw.laid(t.to(torch.float64 if dtype == torch.float64 else torch.float32)) for t in (angle.cos(), angle.sin()))
    shape = draw.choice((None, (S,), (B, S)))
    positions = None if shape is None else torch.randint(0, P, shape, generator=draw.generator).to(
        draw.choice((torch.int32, torch.int64))
    )  # fmt: skip
    interleaved = draw.choice((False, True))
    inputs, back = ([draw.tensor([B, H, S, D]) for H in (HQ, HK)] for _ in range(2))
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = k.apply_rope(*leaves, cos, sin, positions=positions, interleaved=interleaved)
    found = torch.autograd.grad(outputs, leaves, back)
    where = (torch.arange(S) if positions is None else positions.long()).expand(B, S)

    def turned(x, inverse):
        c, s = cos.double(), -sin.double() if inverse else sin.double()
        sizes = oracle.rope(x.double().abs(), c.abs(), s.abs(), where, interleaved)  # |b| |s| comes with a minus: both together
        other = oracle.rope(x.double().abs(), c.abs(), -s.abs(), where, interleaved)
        return oracle.rope(x.double(), c, s, where, interleaved), torch.maximum(sizes.abs(), other.abs())

    for name, x, y in zip(("q", "k", "dq", "dk"), (*inputs, *back), (*outputs, *found)):
        near(name, y, *turned(x, name[0] == "d"), 1)


def decode_linear(seed, triton):
    draw = Draw(seed, triton)
    near.dtype = dtype = draw.dtype
    bits = draw.choice((None, None, 8, 4))
    group = draw.choice((32, 64)) if bits == 4 else 1
    K, N = group * draw.randint(1, 4) if bits == 4 else draw.randint(1, 200), draw.randint(1, 70)
    activation = draw.choice((None, "swiglu"))
    N = 2 * N if activation else N
    lead = draw.lead(rows=12)
    x, weight = draw.tensor([*lead, K]), draw.tensor([N, K])
    if bits:
        weight = k.quantize(weight.float(), bits, group)
    eps = draw.choice((1e-6, 1e-3))
    given = {
        "norm": draw.factor(K), "bias": draw.choice((None, draw.tensor([N]))),
        "residual": draw.choice((None, draw.tensor([*lead, N // 2 if activation else N]))), "activation": activation, "eps": eps,
    }  # fmt: skip
    y = k.decode_linear(x, weight, **given)
    w = weight.dequantize(torch.float64) if bits else weight.double()
    ulp = 0.51 * torch.finfo(dtype).eps
    count = (16 + K) * torch.finfo(reference.wide(dtype)).eps
    xs = x.double()
    if given["norm"] is not None:
        xs = oracle.rms_norm(xs, given["norm"].double(), eps)
    exact, terms = xs @ w.T, xs.abs() @ w.abs().T
    # roundings: of what is normalised two, of a weight that is made of integers up to two, of the product and of the sum one each
    off = terms * (2 * ulp * (given["norm"] is not None) + 2 * ulp * bool(bits) + count) + ulp * terms
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # what a rounding may lose of numbers that are too small
    off = off + least * (2 + 2 * xs.abs().sum(-1, keepdim=True) * bool(bits) + 2 * w.abs().sum(-1) * (given["norm"] is not None))
    if given["bias"] is not None:
        exact, off = exact + given["bias"].double(), off + ulp * (terms + given["bias"].double().abs())
    if activation:
        off = off.masked_fill(terms >= torch.finfo(dtype).max / 4, math.inf)  # a product that overflows before it is multiplied on
        (g, u), (off_g, off_u) = exact.chunk(2, -1), off.chunk(2, -1)
        silu = g * torch.sigmoid(g)
        exact = silu * u
        off = 1.1 * off_g * (u.abs() + off_u) + silu.abs() * off_u + (ulp + count) * exact.abs()
    if given["residual"] is not None:
        r = given["residual"].double()
        exact, off = exact + r, off + 2 * ulp * (exact.abs() + r.abs())
    off = off + 2 * ulp * exact.abs()
    # `near` allows one rounding of what it is given as terms
    near("y", y, exact, off / ulp, 1)


OPS = {f.__name__: f for f in (rms_norm, add_rms_norm, swiglu, apply_rope, decode_linear)}


def run(name, triton, count):
    with k.use_backend("triton" if triton else "reference"):
        for seed in range(SEED, SEED + count):
            try:
                OPS[name](seed, triton)
            except Exception as error:
                raise AssertionError(f"TRILLAMA_SEED={seed} repeats it: {type(error).__name__}: {error}") from error


def counts(few, many):
    """How many configurations: few by default, many among the slow tests."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.mark.host
@counts(60, 2000)
@pytest.mark.parametrize("name", OPS)
def test_the_reference(name, count, record_property):
    record_property("TRILLAMA_SEED", SEED)
    run(name, False, count)


@pytest.mark.host
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy reports what overflows where it may
@counts(12, 300)
@pytest.mark.parametrize("name", OPS)
def test_the_kernels(name, count, record_property):
    record_property("TRILLAMA_SEED", SEED)
    run(name, True, count)
