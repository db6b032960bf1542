"""Random configurations of attention against the formula in float64: reference and kernels, forward and backward.

A configuration is a number, TRILLAMA_SEED the first of them, as in test_properties.py. A failure names its own."""

import contextlib
import functools
import math
import random
from itertools import pairwise

import pytest
import torch
from test_properties import SEED
from trillama.bench import oracle, proofs
from trillama.kernels import decode_attention, flash_attention, flash_attention_varlen, use_backend
from trillama.kernels.dispatch import INTERPRETED

EPS = torch.finfo(torch.float32).eps
LAYOUTS = ["contiguous", "transposed", "packed", "odd", "columns", "expanded"]


class Case:
    """One random configuration: `options` of the call, and what all ops draw alike."""

    def __init__(self, seed, dtypes):
        self.seed, self.random = seed, random.Random(seed)
        torch.manual_seed(seed)
        pick = self.random.choice
        self.dtype, self.Hk = pick(dtypes), pick([1, 1, 2, 3])
        self.Hq, self.D = self.Hk * pick([1, 1, 2, 3, 5]), pick([1, 2, 7, 8, 16, 31, 32, 40, 64])
        self.size = pick([0.1, 1.0, 1.0, 1.0, 4.0])  # of the elements: scores of 0.01 to 100
        scale = pick([None, None, 0.0, self.random.uniform(-1, 1), self.random.uniform(-0.3, 0.3)])
        softcap = pick([None, None, None, self.random.uniform(0.5, 30)])
        self.options = {name: value for name, value in (("scale", scale), ("softcap", softcap)) if value is not None}
        if self.random.random() < 0.4:
            self.options["window"] = self.random.randint(1, 75)

    def heads(self, B, H, S):
        return (proofs.heads(self.random.choice(LAYOUTS), B, H, S, self.D, self.dtype) * self.size).to(self.dtype)

    def __str__(self):
        told = {n: v for n, v in vars(self).items() if n not in ("random", "seed")}
        return f"configuration {self.seed}: {told}"


def magnitudes(case, q, k, v, seen):
    """What float32 can be expected to keep, in float64: (error of the scores, the weights, |q|, |k|, |v|, |scale|), k and v once
    for each head of q. seen: [(B,) S, T]."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scale, softcap = case.options.get("scale", case.D**-0.5), case.options.get("softcap")
    products = abs(scale) * q.abs() @ k.abs().mT
    scores = scale * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(seen, scores, -math.inf).softmax(-1).nan_to_num(0.0)
    loss = EPS * (4 + torch.where(seen, products, 0).amax().item() if products.numel() else 4)
    return loss, weights, q.abs(), k.abs(), v.abs(), abs(scale)


def least(case, exact, loss, terms):
    """Half of what two roundings to the dtype, of the weights and of the result, and the error of the scores may make of it: of few
    numbers each may be as far off as it can be."""
    rounding = torch.finfo(case.dtype).eps / 4
    return rounding * exact.norm().item() + (rounding + loss) * terms.norm().item()


def close(what, got, exact, plain, floor):
    """got is at most twice as far from `exact` as `plain` or, where that is luckily near or overflows, as `floor`."""
    got, exact, plain = (t.detach().double() for t in (got, exact, plain))
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got[~finite], exact[~finite]), f"{what} is finite elsewhere"
    assert got[finite].isfinite().all(), f"{what} is not finite"
    error, other = ((t - exact)[finite].norm().item() for t in (got, plain))
    allowed = 2 * max(other if math.isfinite(other) else 0.0, floor)
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def compare(case, function, exactly, tensors, seen, backward, dlse):
    """function(*tensors, return_lse) gives out or (out, lse), exactly(*tensors) both; plain is that in the tensors' dtype."""
    dout = [torch.randn(tensors[0].shape).to(case.dtype), None]
    exact64, plain = exactly(*(t.double() for t in tensors)), exactly(*tensors)
    if dlse:
        dout[1] = torch.where(exact64[1].isfinite(), torch.randn(exact64[1].shape), 0.0)
    loss, weights, q_size, k_size, v_size, scale = magnitudes(case, *tensors, seen)
    rounding = torch.finfo(case.dtype).eps / 4
    same = oracle.unchanged(*tensors)
    (out, lse), bare = function(*tensors), function(*tensors, return_lse=False)  # the reference takes other ways without lse
    same()
    floor = least(case, exact64[0], loss, weights @ v_size)
    close("out", out, exact64[0], plain[0], floor)
    close("out without lse", bare, exact64[0], plain[0], floor)
    close("lse", lse, exact64[1], exact64[1], loss * math.sqrt(lse.numel()))
    if not backward:
        return
    _, ours = proofs.through(function, tensors, dout)
    same()
    _, want = proofs.through(exactly, [t.double() for t in tensors], dout)
    # In low precision the formula's lse is of low precision: what is plain is only the error of the rest.
    (_, other), (_, rest) = (proofs.through(exactly, t, [dout[0], None]) for t in (tensors, [t.double() for t in tensors]))
    d = dout[0].double().abs()
    terms = d @ v_size.mT + (d * (weights @ v_size)).sum(-1, keepdim=True)
    terms = weights * (terms if dout[1] is None else terms + dout[1].abs().unsqueeze(-1))
    sums = [scale * terms @ k_size, scale * terms.mT @ q_size, weights.mT @ d]
    sums[1:] = [t.unflatten(1, (case.Hk, -1)).sum(2) for t in sums[1:]]
    # dq and dk come of products of rounded numbers: what cancels in `terms` keeps their rounding
    low = 0 if case.dtype == torch.float32 else rounding
    for name, g, w, o, r, size in zip(("dq", "dk", "dv"), ours, want, other, rest, sums):
        close(name, g, w, w + o - r, rounding * w.norm().item() + (loss + low) * size.norm().item())


def one(seed, dtypes, backend):
    case = Case(seed, dtypes)
    B, S, T = case.random.choice([0, 1, 1, 2, 2]), case.random.randint(0, 70), case.random.randint(0, 70)
    if case.random.random() < 0.3:
        S = T
    if case.random.random() < 0.3:
        case.options["causal"] = False
    backward, dlse = case.random.random() < 0.5, case.random.random() < 0.3
    case.B, case.S, case.T, case.backward, case.dlse = B, S, T, backward, dlse
    tensors = case.heads(B, case.Hq, S), case.heads(B, case.Hk, T), case.heads(B, case.Hk, T)
    distance = torch.arange(T) - torch.arange(T - S, T)[:, None]
    seen = distance <= 0 if case.options.get("causal", True) else torch.ones_like(distance, dtype=torch.bool)
    seen &= distance > -case.options.get("window", S + T + 1)
    with told(case), use_backend(backend):
        function = functools.partial(flash_attention, return_lse=True, **case.options)
        compare(case, function, lambda *t: proofs.formula(*t, **case.options), tensors, seen, backward, dlse)


def one_packed(seed, dtypes, backend):
    """Each sequence has the bits that it has alone; the tokens outside have 0, and gradients of 0."""
    case = Case(seed, dtypes)
    draw = functools.partial(case.random.randint, 0)
    sequences = range(draw(4))
    case.lengths_q, case.lengths_k = ([case.random.choice([0, 1, draw(70)]) for _ in sequences] for _ in "qk")
    case.outside = [case.random.choice([0, 0, draw(70)]) for _ in range(4)]
    case.options["causal"] = case.random.random() < 0.7
    (a, b), (c, d) = case.outside[:2], case.outside[2:]
    starts_q, starts_k = (proofs.cuts(n) + first for n, first in ((case.lengths_q, a), (case.lengths_k, c)))
    shapes = [(case.Hq, a + sum(case.lengths_q) + b)] + [(case.Hk, c + sum(case.lengths_k) + d)] * 2
    q, k, v = (case.heads(1, *shape).requires_grad_() for shape in shapes)
    dout = torch.randn(q.shape).to(case.dtype)
    with told(case), use_backend(backend):
        packed = [t.squeeze(0).transpose(0, 1) for t in (q, k, v)]
        out, lse = flash_attention_varlen(*packed, starts_q, starts_k, 1000, 1000, return_lse=True, **case.options)
        got = [out.transpose(0, 1)[None], lse[None], *torch.autograd.grad(out, (q, k, v), dout[0].transpose(0, 1))]
        want = [torch.zeros_like(q), torch.full_like(lse[None], -math.inf), *(torch.zeros_like(t) for t in (q, k, v))]
        for rows, keys in zip(*([slice(*ends) for ends in pairwise(starts.tolist())] for starts in (starts_q, starts_k))):
            alone = [t[:, :, where] for t, where in ((q, rows), (k, keys), (v, keys))]
            out, lse = flash_attention(*alone, return_lse=True, **case.options)
            gradients = torch.autograd.grad(out, alone, dout[:, :, rows])
            for whole, where, part in zip(want, (rows, rows, rows, keys, keys), (out, lse, *gradients)):
                whole[:, :, where] = part.detach()
        for what, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want):
            assert torch.equal(g, w), f"{what} of packed sequences has other bits than alone"


def one_decode(seed, dtypes, backend):
    case = Case(seed, dtypes)
    B, S, T = case.random.choice([0, 1, 2, 3]), case.random.choice([1, 1, 2, 4]), case.random.randint(1, 70)
    case.lengths, case.S, case.T = [case.random.choice([0, T, case.random.randint(0, T)]) for _ in range(B)], S, T
    case.page, case.splits = case.random.choice([None, None, 1, 7, 16]), case.random.choice([None, 1, 3])
    q, k, v = case.heads(B, case.Hq, S), case.heads(B, case.Hk, T), case.heads(B, case.Hk, T)
    lengths = torch.tensor(case.lengths, dtype=case.random.choice([torch.int32, torch.int64]))
    left = case.options.get("window", T + S + 1) - 1
    told_to_oracle = {n: o for n, o in case.options.items() if n != "window"}

    def exactly(q, k, v):
        return oracle.attention(q, k, v, left=left, lengths=lengths, **told_to_oracle)[0]

    position = lengths[:, None] - S + torch.arange(S)
    distance = torch.arange(T) - position[..., None]
    seen = ((distance <= 0) & (distance >= -left))[:, None]
    loss, weights, _, _, v_size, _ = magnitudes(case, q, k, v, seen)
    exact, plain = exactly(*(t.double() for t in (q, k, v))), exactly(q, k, v)
    hidden = torch.arange(T) >= lengths[:, None]
    caches = [t.clone().masked_fill(hidden[:, None, :, None], math.nan) for t in (k, v)]
    table = None
    if case.page is not None:
        torch.manual_seed(seed)
        caches[0], table = proofs.paged(caches[0], case.page)
        torch.manual_seed(seed)
        caches[1], _ = proofs.paged(caches[1], case.page)
    with told(case), use_backend(backend):
        same = oracle.unchanged(q, lengths)
        out = decode_attention(q, *caches, lengths, block_table=table, splits=case.splits, **case.options)
        same()
        close("out", out, exact, plain, least(case, exact, loss, weights @ v_size))


@contextlib.contextmanager
def told(case):
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error


OPS = {"whole": one, "packed": one_packed, "decode": one_decode}


def counts(few, many):
    """Parameters (op, how many configurations): few by default, many among the slow tests."""
    slow = [pytest.param(op, many if op == "whole" else many // 4, marks=pytest.mark.slow) for op in OPS]
    return pytest.mark.parametrize(("op", "count"), [(op, few) for op in OPS] + slow)


@pytest.mark.host
@counts(20, 2000)
def test_the_reference(op, count):
    for seed in range(SEED, SEED + count):
        OPS[op](seed, (torch.float32, torch.float16, torch.bfloat16), "reference")


@pytest.mark.filterwarnings("ignore:.* encountered in")  # what a masked lane computes
@counts(2, 100)
def test_the_kernels(op, count):
    if not INTERPRETED:
        pytest.skip("a shape is compiled in seconds: random ones are for the interpreter")
    for seed in range(SEED, SEED + count):
        OPS[op](seed, (torch.float32, torch.float16), "triton")
