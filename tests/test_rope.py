"""apply_rope and rope_append_ against the rotation in float64: values, gradients, layouts, caches, errors."""

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import apply_rope, reference, rope_append_, tuning, use_backend

LONG = 131_072


def tables(positions, half, theta=10000.0):
    """cos and sin of the angles position * theta^(-i / half), computed in float64 and rounded once."""
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    return angle.cos().float(), angle.sin().float()


def heads(kind, B, H, S, D, dtype):
    """A random tensor [B, H, S, D] as models hand it over."""
    if kind == "contiguous":
        return torch.randn(B, H, S, D).to(dtype)
    if kind == "transposed":  # [B, S, H, D] in memory
        return torch.randn(B, S, H, D).to(dtype).transpose(1, 2)
    if kind == "packed":  # a slice of a projection of q, k and v
        return torch.randn(B, S, 3 * H, D).to(dtype)[:, :, H : 2 * H].transpose(1, 2)
    if kind == "columns":  # the head's elements are not neighbours in memory
        return torch.randn(B, D, H, S).to(dtype).permute(0, 2, 3, 1)
    return torch.randn(B, 1, S, D).to(dtype).expand(B, H, S, D)


def both(q, k, cos, sin, positions, interleaved):
    """The rotated q and k in float64."""
    B, _, S, _ = q.shape
    where = torch.arange(S) if positions is None else positions.long()
    where = where.expand(B, S)
    return tuple(oracle.rope(x.double(), cos.double(), sin.double(), where, interleaved) for x in (q, k))


def verify(device, q, k, cos, sin, positions=None, interleaved=False):
    on = [None if t is None else t.to(device) for t in (q, k, cos, sin, positions)]
    same = oracle.unchanged(*on)
    got = apply_rope(*on[:4], positions=on[4], interleaved=interleaved)
    same()
    exact = both(q, k, cos, sin, positions, interleaved)
    plain = reference.apply_rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
    for y, e, p in zip(got, exact, plain):
        oracle.check(y, e, p)
    return got


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D", [2, 6, 16, 40, 64, 80, 96, 100, 128, 256])
def test_head_sizes(triton, poisoned, device, dtype, D, interleaved):
    q, k = heads("transposed", 1, 2, 3, D, dtype), heads("transposed", 1, 1, 3, D, dtype)
    verify(device, q, k, *tables(16, D // 2), interleaved=interleaved)
    assert triton.names == ["_rope_kernel"]


@pytest.mark.parametrize(("HQ", "HK"), [(1, 1), (3, 1), (9, 3), (7, 1), (10, 2), (12, 12), (32, 8), (32, 1), (40, 8), (71, 1)])
def test_ratios_of_heads(triton, poisoned, device, dtype, HQ, HK):
    q, k = heads("transposed", 1, HQ, 2, 64, dtype), heads("transposed", 1, HK, 2, 64, dtype)
    verify(device, q, k, *tables(8, 32))
    assert triton.names == ["_rope_kernel"]


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("D", "R"), [(64, 32), (128, 96), (80, 20), (100, 2), (256, 64)])
def test_partial_rotation_passes_the_rest_through(triton, poisoned, device, dtype, D, R, interleaved):
    q, k = heads("packed", 2, 4, 3, D, dtype), heads("contiguous", 2, 2, 3, D, dtype)
    y, z = verify(device, q, k, *tables(8, R // 2), interleaved=interleaved)
    assert torch.equal(y[..., R:].cpu(), q[..., R:])
    assert torch.equal(z[..., R:].cpu(), k[..., R:])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "packed", "columns", "expanded"])
def test_views_are_read_in_place(triton, poisoned, device, dtype, kind, interleaved):
    q, k = heads(kind, 2, 4, 5, 48, dtype), heads("transposed", 2, 2, 5, 48, dtype)
    cos, sin = tables(20, 24)
    verify(device, q, k, torch.cat((cos, cos), 1)[:, :24], sin.t().contiguous().t(), interleaved=interleaved)
    assert triton.names == ["_rope_kernel"]


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "packed"])
def test_the_result_lies_in_memory_as_the_input_does(triton, device, dtype, kind):
    q, k = (heads(kind, 2, h, 5, 32, dtype).to(device) for h in (4, 2))
    for backend in ("triton", "reference"):
        with use_backend(backend):
            y, z = apply_rope(q, k, *(t.to(device) for t in tables(8, 16)))
        for out in (y, z):
            assert (out if kind == "contiguous" else out.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("batched", [False, True], ids=["S", "BS"])
def test_positions(triton, poisoned, device, dtype, batched, integer):
    B, S = 3, 3
    q, k = heads("transposed", B, 2, S, 64, dtype), heads("transposed", B, 1, S, 64, dtype)
    positions = torch.randint(0, 50, (B, S) if batched else (S,), dtype=integer)
    verify(device, q, k, *tables(50, 32), positions)
    strided = torch.randint(0, 50, (2 * S, B), dtype=integer)[::2].t()
    verify(device, q, k, *tables(50, 32), strided)


def test_long_contexts(triton, poisoned, device, dtype):
    """Positions and angles in lower precision are off by whole turns out here."""
    q, k = heads("transposed", 1, 2, 8, 128, dtype), heads("transposed", 1, 1, 8, 128, dtype)
    positions = torch.tensor([0, 1, 4095, 8192, 65_535, 65_537, 131_070, LONG - 1])
    verify(device, q, k, *tables(LONG, 64, 500_000.0), positions)


def test_float32_arithmetic_is_rounded_once(triton, device, dtype):
    if dtype == torch.float32:
        pytest.skip("about lower precision")
    q, k = heads("contiguous", 1, 2, 24, 64, dtype), heads("contiguous", 1, 2, 24, 64, dtype)
    cos, sin = tables(24, 32)
    y, _ = apply_rope(q.to(device), k.to(device), cos.to(device), sin.to(device))
    exact, _ = both(q, k, cos, sin, None, False)
    assert (y.cpu() != exact.to(dtype)).float().mean() < 0.002  # ties that float32 decides differently


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (1, 4, 1)], ids=str)
def test_empty_and_single(triton, poisoned, device, dtype, shape):
    B, H, S = shape
    q, k = heads("transposed", B, H, S, 64, dtype), heads("transposed", B, 1, S, 64, dtype)
    y, z = verify(device, q, k, *tables(4, 32)) if 0 not in shape else apply_rope(q, k, *tables(4, 32))
    assert y.shape == q.shape
    assert z.shape == k.shape
    assert len(triton.names) == (0 not in shape)


def test_many_tokens(triton, poisoned, monkeypatch, device, dtype):
    """Where a program takes all heads of its tokens; with few tokens each takes some of the heads."""
    monkeypatch.setattr(tuning, "programs", lambda arch: 2)
    q, k, v = (heads("packed", 1, h, 45, 16, dtype) for h in (6, 3, 3))
    verify(device, q, k, *tables(45, 8))
    verify(device, q, k, *tables(45, 8), interleaved=True)
    k_cache, v_cache = (torch.zeros(1, 3, 50, 16, dtype=dtype, device=device) for _ in range(2))
    on = [t.to(device) for t in (q, k, v, *tables(45, 8))]
    y = rope_append_(*on, k_cache, v_cache, torch.arange(45, device=device))
    expected = reference.apply_rope(q, k, *tables(45, 8))
    for got, want in ((y, expected[0]), (k_cache[:, :, :45], expected[1]), (v_cache[:, :, :45], v)):
        assert oracle.error(got, want.double()) <= torch.finfo(dtype).eps


def test_positions_outside_the_tables(triton, device, dtype):
    q, k = heads("transposed", 1, 2, 4, 64, dtype).to(device), heads("transposed", 1, 1, 4, 64, dtype).to(device)
    cos, sin = (t.to(device) for t in tables(10, 32))
    y, z = apply_rope(q, k, cos, sin, positions=torch.tensor([-1, 9, 10, 2**40], device=device))
    for out in (y, z):
        assert out[:, :, [0, 2, 3]].isnan().all()
        assert out[:, :, 1].isfinite().all()
    for bad in (-1, 10):
        with pytest.raises(IndexError):
            reference.apply_rope(q.cpu(), k.cpu(), cos.cpu(), sin.cpu(), positions=torch.tensor([0, 1, 2, bad]))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    ("D", "R", "kind"),
    [(64, 64, "contiguous"), (80, 40, "packed"), (128, 128, "transposed"), (96, 72, "columns"), (6, 4, "packed")],
)
def test_gradients(triton, poisoned, device, dtype, kind, D, R, interleaved):
    B, S = 2, 2
    q, k = heads(kind, B, 4, S, D, dtype), heads(kind, B, 2, S, D, dtype)
    dq, dk = heads("transposed", B, 4, S, D, dtype), heads("expanded", B, 2, S, D, dtype)
    positions = torch.randint(0, 30, (B, S))
    cos, sin = tables(30, R // 2)

    def gradients(rotate, leaves, *grads):
        return torch.autograd.grad(rotate(*leaves), leaves, grads)

    exact = gradients(lambda q, k: both(q, k, cos, sin, positions, interleaved), oracle.exact(q, k), dq.double(), dk.double())
    plain = gradients(
        lambda q, k: reference.apply_rope(q, k, cos, sin, positions=positions, interleaved=interleaved),
        [t.detach().clone().requires_grad_() for t in (q, k)], dq, dk,
    )  # fmt: skip
    on = [t.to(device) for t in (cos, sin, positions, dq, dk)]
    same = oracle.unchanged(*on)
    got = gradients(
        lambda q, k: apply_rope(q, k, *on[:2], positions=on[2], interleaved=interleaved),
        [t.detach().to(device).requires_grad_() for t in (q, k)], *on[3:],
    )  # fmt: skip
    same()
    for y, e, p in zip(got, exact, plain):
        oracle.check(y, e, p)
    assert triton.names == ["_rope_kernel"] * 2


def test_gradient_of_one_of_the_two(triton, device):
    q, k = torch.randn(1, 4, 3, 32, device=device), torch.randn(1, 2, 3, 32, device=device, requires_grad=True)
    y, z = apply_rope(q, k, *(t.to(device) for t in tables(4, 16)))
    first = torch.autograd.grad(z.square().sum(), k, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(z.square().sum(), k)[0])
    oracle.check(first.cpu(), 2 * k.cpu().double())  # a rotation keeps the length
    assert q.grad is None
    assert not y.isnan().any()


def test_gradcheck_of_the_reference():
    q, k = (torch.randn(1, h, 3, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    cos, sin = tables(3, 2)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, cos, sin, interleaved=True), (q, k))
        assert torch.autograd.gradgradcheck(lambda q, k: apply_rope(q, k, cos, sin), (q, k))  # linear: its gradient is a rotation


# --- rope_append_ ----------------------------------------------------------------------------------------------------


def caches(B, HK, T, D, dtype, page=None, kind="contiguous"):
    """(k_cache, v_cache, block_table or None, a function that gives a cache back as [B, HK, T, D])"""
    if page is None:
        k, v = (torch.randn(2, B, HK, T, D) if kind == "layers" else torch.randn(2, B, T, HK, D).transpose(2, 3)).to(dtype)
        return k, v, None, lambda cache, table: cache
    n = -(-T // page)
    table = torch.randperm(B * n + 3)[: B * n].view(B, n).int()
    k, v = (torch.randn(B * n + 3, HK, page, D).to(dtype) for _ in range(2))
    return k, v, table, lambda cache, table: cache[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :T]


@pytest.mark.parametrize("page", [None, 1, 24], ids=lambda p: "contiguous" if p is None else f"page{p}")
@pytest.mark.parametrize(
    ("HQ", "HK", "D", "R", "interleaved"),
    [
        (9, 3, 64, 64, False), (3, 1, 96, 72, False), (4, 4, 80, 20, True), (8, 2, 128, 128, False), (2, 1, 256, 256, True),
        (5, 1, 16, 16, False), (1, 1, 100, 50, False), (4, 2, 48, 48, True),
    ],
)  # fmt: skip
def test_append(triton, poisoned, device, dtype, HQ, HK, D, R, interleaved, page):
    B, S, T = 2, 2, 40
    q, k, v = (x.transpose(1, 2) for x in torch.randn(B, S, HQ + 2 * HK, D).to(dtype).split((HQ, HK, HK), 2))
    cos, sin = tables(64, R // 2)
    positions = torch.stack([torch.randperm(T)[:S] for _ in range(B)]).to(torch.int32 if HQ == 9 else torch.int64)
    k_cache, v_cache, table, seen = caches(B, HK, T, D, dtype, page, "layers" if HQ == 9 else "tokens")
    exact = both(q, k, cos, sin, positions, interleaved)
    plain = reference.apply_rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
    on = [None if t is None else t.to(device) for t in (q, k, v, cos, sin, positions, table)]
    written = [t.to(device) for t in (k_cache.clone(), v_cache.clone())]
    same = oracle.unchanged(*on)
    y = rope_append_(*on[:5], *written, on[5], block_table=on[6], interleaved=interleaved)
    same()
    oracle.check(y, exact[0], plain[0])
    rows = torch.arange(B)[:, None]
    for cache, before, value, rounded in zip(written, (k_cache, v_cache), (exact[1], v.double()), (plain[1], v)):
        after = seen(cache.cpu(), table)
        new = after[rows, :, positions.long()].transpose(1, 2)
        oracle.check(new, value, rounded)
        untouched = torch.ones(B, T, dtype=torch.bool)
        untouched[rows, positions.long()] = False
        assert torch.equal(after.transpose(1, 2)[untouched], seen(before, table).transpose(1, 2)[untouched])
        if page is not None:
            spare = torch.ones(cache.shape[0], dtype=torch.bool)
            spare[table.long().flatten()] = False
            assert torch.equal(cache.cpu()[spare], before[spare])
    assert triton.names == ["_rope_kernel"]


@pytest.mark.parametrize("page", [None, 8])
def test_append_of_shared_positions(triton, poisoned, device, dtype, page):
    q, k, v = (heads("transposed", 3, h, 4, 32, dtype) for h in (6, 2, 2))
    cos, sin = tables(32, 16)
    positions = torch.arange(9, 13)
    k_cache, v_cache, table, seen = caches(3, 2, 16, 32, dtype, page)
    on = [None if t is None else t.to(device) for t in (q, k, v, cos, sin, k_cache, v_cache, positions, table)]
    y = rope_append_(*on[:8], block_table=on[8])
    expected = reference.apply_rope(q, k, cos, sin, positions=positions)
    k_new, v_new = (seen(cache.cpu(), table)[:, :, 9:13] for cache in on[5:7])
    for got, want in ((y, expected[0]), (k_new, expected[1]), (v_new, v)):
        assert oracle.error(got, want.double()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("page", [None, 8])
def test_nothing_is_written_outside_the_cache(triton, device, dtype, page):
    q, k, v = (heads("transposed", 2, h, 3, 32, dtype) for h in (4, 2, 2))
    cos, sin = tables(100, 16)
    k_cache, v_cache, table, seen = caches(2, 2, 16, 32, dtype, page)
    if page is not None:
        table[1, 1] = k_cache.shape[0]  # no such page
    positions = torch.tensor([[-1, 16, 5], [99, 2**33, 12]])
    on = [None if t is None else t.to(device) for t in (q, k, v, cos, sin, k_cache.clone(), v_cache.clone(), positions, table)]
    y = rope_append_(*on[:8], block_table=on[8])
    assert y[0, :, 1:].isfinite().all()
    assert y[0, :, 0].isnan().all()
    for cache, old, x in ((on[5], k_cache, None), (on[6], v_cache, v)):
        changed = (cache.cpu() != old).any(-1).any(1)
        assert int(changed.sum()) == (2 if page is None else 1)
        if x is not None:
            assert torch.equal(seen(cache.cpu(), table[:1] if page else None)[0, :, 5], x[0, :, 2])


def test_append_compiles_no_further_as_lengths_and_positions_change(triton, device):
    """What a decode loop changes from step to step is not part of a kernel's identity."""
    from trillama.kernels.dispatch import INTERPRETED
    from trillama.kernels.rope import _rope_kernel

    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    cos, sin = (t.to(device) for t in tables(64, 32))
    k_cache, v_cache = (torch.zeros(4, 2, 64, 64, dtype=torch.float16, device=device) for _ in range(2))
    compiled = []
    for step, B in enumerate([2, 1, 3, 4, 2, 1, 1]):
        qkv = torch.randn(B, 1, 8 * 64, dtype=torch.float16, device=device)
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in qkv.split((256, 128, 128), -1))
        positions = torch.arange(70, device=device)[step + 16 : step + 17]
        rope_append_(q, k, v, cos, sin, k_cache[:B], v_cache[:B], positions)
        compiled.append(sum(len(entry[0]) for entry in _rope_kernel.device_caches.values()))
    assert compiled[1:] == compiled[1:2] * 6, compiled


# --- arguments that do not fit -------------------------------------------------------------------------------------------


def arguments(**changes):
    a = dict(
        q=torch.randn(2, 4, 3, 64), k=torch.randn(2, 2, 3, 64), v=torch.randn(2, 2, 3, 64),
        cos=torch.randn(8, 32), sin=torch.randn(8, 32),
        k_cache=torch.zeros(2, 2, 8, 64), v_cache=torch.zeros(2, 2, 8, 64), positions=torch.arange(3), block_table=None,
    )  # fmt: skip
    a.update(changes)
    return a


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=torch.randn(4, 3, 64)), r"q has shape \(4, 3, 64\), expected \[batch, heads, tokens, head size\]"),
        (dict(k=torch.randn(2, 2, 4, 64)), r"k has shape \(2, 2, 4, 64\), expected \(2, key heads, 3, 64\)"),
        (dict(k=torch.randn(2, 2, 3, 64).half()), "k is torch.float16, expected torch.float32 as q"),
        (dict(q=torch.randn(2, 4, 3, 63), k=torch.randn(2, 2, 3, 63)), "q has head size 63, expected an even number from 2 to 256"),
        (dict(q=torch.randn(2, 4, 3, 258), k=torch.randn(2, 2, 3, 258)), "q has head size 258"),
        (dict(cos=torch.randn(8, 32).bfloat16()), "cos is torch.bfloat16, expected torch.float32"),
        (dict(cos=torch.randn(8, 64)), r"cos has shape \(8, 64\), expected \[positions, R / 2\] with R at most 64"),
        (dict(sin=torch.randn(7, 32)), r"sin has shape \(7, 32\), expected \(8, 32\) as cos"),
        (dict(cos=torch.randn(8, 32, requires_grad=True)), "cos requires a gradient, but the tables are constants"),
        (dict(positions=torch.arange(4)), r"positions has shape \(4,\), expected \(3,\) or \(2, 3\)"),
        (dict(positions=torch.randn(3)), "positions is torch.float32, expected an int32 or int64 tensor"),
        (dict(positions=[0, 1, 2]), "positions is list, expected an int32 or int64 tensor"),
        (dict(positions=torch.arange(3, device="meta")), "positions is on meta, expected cpu"),
    ],
)
def test_errors_name_the_argument(changes, message):
    a = arguments(**changes)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        apply_rope(a["q"], a["k"], a["cos"], a["sin"], positions=a["positions"])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("apply_rope: ")


def test_tables_shorter_than_the_sequence():
    a = arguments(cos=torch.randn(2, 32), sin=torch.randn(2, 32))
    with pytest.raises(ValueError, match="apply_rope: q has 3 tokens, but cos ends after 2 positions"):
        apply_rope(a["q"], a["k"], a["cos"], a["sin"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(v=torch.randn(2, 2, 3, 32)), r"v has shape \(2, 2, 3, 32\), expected \(2, 2, 3, 64\) as k"),
        (dict(k_cache=torch.zeros(3, 2, 8, 64)), r"k_cache has shape \(3, 2, 8, 64\), expected \(2, 2, tokens, 64\)"),
        (dict(v_cache=torch.zeros(2, 2, 9, 64)), r"v_cache has shape \(2, 2, 9, 64\), expected \(2, 2, 8, 64\) as k_cache"),
        (dict(k_cache=torch.zeros(2, 2, 8, 64).half()), "k_cache is torch.float16, expected torch.float32 as q"),
        (dict(positions=None), "positions is None, expected an int32 or int64 tensor"),
        (dict(block_table=torch.zeros(3, 2).int()), r"block_table has shape \(3, 2\), expected \(2, pages\)"),
        (dict(block_table=torch.zeros(2, 2)), "block_table is torch.float32, expected an int32 or int64 tensor"),
    ],
)
def test_append_errors_name_the_argument(changes, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        rope_append_(**arguments(**changes))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("rope_append_: ")


def test_append_outside_the_cache_is_an_index_error_of_the_reference():
    with use_backend("reference"), pytest.raises(IndexError):
        rope_append_(**arguments(positions=torch.tensor([0, 1, 8]), cos=torch.randn(20, 32), sin=torch.randn(20, 32)))
