"""What the formulas say, in float64 and without a line of the project's code; and how a result is compared with them.

The functions take and return float64 tensors and are differentiable, so that gradients have an oracle too.
"""

import contextlib
import math

import torch


def rms_norm(x, weight, eps=1e-6, offset=0.0):
    y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * (offset + weight)


def rope(x, cos, sin, positions, interleaved=False):
    """x [B, H, S, D]; cos, sin [P, R/2]; positions [B, S]: the pair (a, b) becomes (a cos - b sin, a sin + b cos)."""
    half = cos.shape[-1]
    first = torch.arange(half, device=x.device) * (2 if interleaved else 1)
    second = first + (1 if interleaved else half)
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    a, b = x[..., first], x[..., second]
    y = x.clone()
    y[..., first] = a * c - b * s
    y[..., second] = a * s + b * c
    return y


def swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def attention(q, k, v, *, left=None, right=0, scale=None, softcap=None, lengths=None):
    """(out, lse): one head, one query at a time is what this means, written with masks.

    The query i of row b stands at position n_b - S + i, n_b = lengths[b] or T, and sees the keys j < n_b with
    position - left <= j <= position + right (None: no limit).
    """
    B, Hq, S, D = q.shape
    T = k.shape[2]
    k, v = (t.repeat_interleave(Hq // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) * (1 / math.sqrt(D) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    n = (torch.full((B,), T) if lengths is None else lengths.long()).to(q.device)
    position = n.view(B, 1, 1, 1) - S + torch.arange(S, device=q.device).view(1, 1, S, 1)
    key = torch.arange(T, device=q.device).view(1, 1, 1, T)
    seen = (key < n.view(B, 1, 1, 1)).expand(B, 1, S, T)
    if right is not None:
        seen = seen & (key <= position + right)
    if left is not None:
        seen = seen & (key >= position - left)
    scores = torch.where(seen, scores, -math.inf)
    some = seen.any(-1, keepdim=True)
    shift = torch.where(some, scores.amax(-1, keepdim=True) if T else scores.sum(-1, keepdim=True), 0.0).detach()
    weights = torch.where(seen, torch.exp(torch.where(seen, scores, shift) - shift), 0.0)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhst,bhtd->bhsd", weights, torch.nan_to_num(v)) / torch.where(some, total, 1.0)
    lse = torch.where(some, shift + torch.log(torch.where(some, total, 1.0)), -math.inf)
    return out, lse.squeeze(-1)


def error(actual, exact):
    """Relative error in the 2-norm; infinite where `actual` has NaN or misses an infinity."""
    actual, exact = actual.detach().double().cpu().flatten(), exact.detach().double().cpu().flatten()
    finite = exact.isfinite()
    if actual.shape != exact.shape or not torch.equal(actual[~finite], exact[~finite]) or not actual[finite].isfinite().all():
        return math.inf
    norm = exact[finite].norm()
    return ((actual[finite] - exact[finite]).norm() / (norm if norm > 0 else 1)).item()


_watching = []


@contextlib.contextmanager
def measured():
    """Within the block every comparison by `check` adds a pair (error, allowed) to the list that this gives."""
    found = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.remove(found)


def check(actual, exact, plain=None, fp32=1e-6, eager=None):
    """Results are at most twice as far from `exact` as `plain`, which is what PyTorch's own operations give in the same dtype on
    the same machine; float32 results that agree with it to `fp32` will do. Half a unit in the last place is granted to both.
    eager: where `plain` has float32 inside, what the formula gives in the same dtype throughout; who is at least as near to
    `exact` will do too."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    got, allowed, rule = error(actual, exact), fp32, ""
    if actual.dtype == torch.float32 and plain is not None and got > fp32:
        allowed, rule = max(fp32, 2 * error(plain, exact)), ": twice that of plain PyTorch"
    elif actual.dtype != torch.float32:
        assert plain.dtype == actual.dtype
        allowed, rule = 2 * max(error(plain, exact), torch.finfo(actual.dtype).eps / 4), ": twice that of plain PyTorch"
        formula = 0 if eager is None else error(eager, exact)
        allowed = max(allowed, formula) if formula < 0.1 else allowed
    for found in _watching:
        found.append((got, allowed))
    assert got <= allowed < math.inf, f"relative error {got:.2e}, allowed {allowed:.2e}{rule}"


def conditioning(function, *tensors):
    """How far half a unit in the last place of the tensors' elements, up or down at random, moves function(*tensors), a function
    in float64: the relative error that rounding its arguments once makes. A sound algorithm in their dtype rounds more than once,
    and is off by a small multiple of this, on whatever machine and in whatever order it adds."""
    generator = torch.Generator().manual_seed(0)

    def moved(t):
        half = torch.finfo(t.dtype).eps / 2
        return t.double() * (1 + half * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1))

    return error(function(*map(moved, tensors)), function(*(t.double() for t in tensors)))


def exact(*tensors):
    """Leaf copies in float64 that require gradients (None is passed on)."""
    copies = [None if t is None else t.detach().double().cpu().requires_grad_(t.is_floating_point()) for t in tensors]
    return copies[0] if len(copies) == 1 else copies


def unchanged(*tensors):
    """A function that asserts that the tensors still hold what they hold now, bit for bit and by version counter."""
    before = [(t, t.detach().clone(), t._version) for t in tensors if t is not None]

    def verify():
        for t, copy, version in before:
            assert t._version == version, "an argument has been written to"
            now, then = (x.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (t, copy))
            assert torch.equal(now, then), "an argument has changed"

    return verify
