"""decode_attention against the formula in float64: lengths, splits, pages, groups, windows; its bits, launches, compilations."""

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import decode_attention, reference, use_backend
from trillama.kernels.decode import counters
from trillama.kernels.dispatch import INTERPRETED


@pytest.fixture
def crosses_splits(request):
    if request.config.getoption("--gpuless-races", False):
        pytest.skip("partial results pass between programs in the order of an atomic counter: no race, but it looks like one")


def cache(batch, heads, size, head_dim, dtype, kind="contiguous"):
    """A random cache [B, Hk, T, D] in one of the layouts in circulation."""
    if kind == "transposed":  # [B, T, Hk, D], as flash-attn keeps it
        return torch.randn(batch, size, heads, head_dim).to(dtype).transpose(1, 2)
    if kind == "layers":  # one layer of a cache of all layers, k and v side by side
        return torch.randn(batch, heads, size, 2, 3, head_dim).to(dtype)[:, :, :, 1, 2]
    if kind == "columns":
        return torch.randn(batch, heads, head_dim, size).to(dtype).transpose(2, 3)
    return torch.randn(batch, heads, size, head_dim).to(dtype)


def paged(t, page, spare=3):
    """The same cache in shuffled pages of `page` keys, and the table that leads to them; unused pages are NaN."""
    B, H, T, D = t.shape
    n = -(-T // page)
    order = torch.randperm(B * n + spare)[: B * n]
    pages = torch.full((B * n + spare, H, page, D), float("nan"), dtype=t.dtype)
    full = torch.full((B, H, n * page, D), float("nan"), dtype=t.dtype)
    full[:, :, :T] = t
    pages[order] = full.view(B, H, n, page, D).transpose(1, 2).flatten(0, 1)
    return pages, order.view(B, n).int()


def run(device, q, k, v, lengths, *, page=None, exact=True, **options):
    """The result on `device`, the cache beyond each length filled with NaN, checked against the formula."""
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    exact_k, exact_v = k.double(), v.double()
    for t in (k, v):
        for b, n in enumerate(lengths.tolist()):
            t[b, :, n:] = float("nan")
    window, softcap = options.get("window"), options.get("softcap")
    plain = reference.decode_attention(q, k, v, lengths, **{n: o for n, o in options.items() if n != "splits"})
    ck, cv, table = k, v, None
    if page is not None:
        (ck, table), (cv, _) = paged(k, page), (None, None)
        cv = torch.full_like(ck, float("nan"))
        whole = torch.full((*v.shape[:2], table.shape[1] * page, v.shape[3]), float("nan"), dtype=v.dtype)
        whole[:, :, : v.shape[2]] = v
        cv[table.long()] = whole.view(*v.shape[:2], -1, page, v.shape[3]).transpose(1, 2)
        options["block_table"] = table.to(device)
    arguments = [t.to(device) for t in (q, ck, cv, lengths)]
    same = oracle.unchanged(arguments[0], arguments[3])
    out = decode_attention(*arguments, **options)
    same()
    for after, before in zip(arguments[1:3], (ck, cv)):
        assert torch.equal(after.cpu().nan_to_num(), before.nan_to_num())
    if exact:
        want, _ = oracle.attention(
            q.double(), exact_k, exact_v, left=None if window is None else window - 1, scale=options.get("scale"),
            softcap=softcap, lengths=lengths,
        )  # fmt: skip
        oracle.check(out, want, plain)
    return out


HEADS = [(8, 8), (6, 2), (5, 1), (14, 2), (32, 1), (4, 4), (9, 3)]
HEAD_SIZES = [16, 40, 64, 80, 96, 128, 256]


@pytest.mark.parametrize(("query_heads", "heads"), HEADS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_groups(triton, poisoned, device, dtype, query_heads, heads, tokens):
    q = torch.randn(2, query_heads, tokens, 64).to(dtype)
    k, v = (cache(2, heads, 150, 64, dtype) for _ in range(2))
    run(device, q, k, v, [150, 67])
    assert triton.names == ["_decode_kernel"]


@pytest.mark.usefixtures("crosses_splits")
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "paged"])
def test_head_sizes(triton, poisoned, device, dtype, head_dim, page):
    q = torch.randn(2, 6, 1, head_dim).to(dtype)
    k, v = (cache(2, 2, 200, head_dim, dtype) for _ in range(2))
    run(device, q, k, v, [190, 33], page=page, splits=3)
    assert triton.names == ["_decode_kernel"]


@pytest.mark.usefixtures("crosses_splits")
@pytest.mark.parametrize("lengths", [[0, 1], [1, 64], [65, 63], [128, 129], [400, 3], [7, 0]], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_lengths(triton, poisoned, device, dtype, lengths, tokens):
    """Lengths shorter than the new tokens too: those queries stand before the first key and see nothing."""
    q = torch.randn(2, 3, tokens, 32).to(dtype)
    k, v = (cache(2, 1, 400, 32, dtype) for _ in range(2))
    out = run(device, q, k, v, lengths, splits=4)
    for b, n in enumerate(lengths):
        assert not out[b, :, : max(0, tokens - n)].any()


@pytest.mark.usefixtures("crosses_splits")
@pytest.mark.parametrize("lengths", [[512, 513, 1100], [1024, 1025, 0]], ids=str)
def test_the_architectures_own_splits(triton, poisoned, device, dtype, lengths):
    q = torch.randn(3, 6, 1, 64).to(dtype)
    k, v = (cache(3, 2, 1100, 64, dtype) for _ in range(2))
    run(device, q, k, v, lengths)
    assert triton.names == ["_decode_kernel"]


@pytest.mark.usefixtures("crosses_splits")
@pytest.mark.parametrize("page", [1, 7, 16, 64, 100, 256])
@pytest.mark.parametrize("window", [None, 50])
def test_pages_of_any_size(triton, poisoned, device, dtype, page, window):
    q = torch.randn(2, 4, 2, 64).to(dtype)
    k, v = (cache(2, 2, 230, 64, dtype) for _ in range(2))
    run(device, q, k, v, [230, 101], page=page, window=window, splits=3)


@pytest.mark.usefixtures("crosses_splits")
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("tokens", [1, 4])
def test_window(triton, poisoned, device, dtype, window, tokens):
    q = torch.randn(2, 3, tokens, 32).to(dtype)
    k, v = (cache(2, 1, 300, 32, dtype) for _ in range(2))
    run(device, q, k, v, [290, 20], window=window, splits=3)


@pytest.mark.parametrize("softcap", [0.5, 20.0, 50.0])
@pytest.mark.parametrize("scale", [None, 0.03, 1.0])
def test_softcap_and_scale(triton, poisoned, device, dtype, softcap, scale):
    q = torch.randn(2, 4, 1, 64).to(dtype)
    k, v = (cache(2, 2, 100, 64, dtype) for _ in range(2))
    run(device, q, k, v, [100, 31], softcap=softcap, scale=scale)


@pytest.mark.parametrize("kind", ["transposed", "layers", "columns"])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_views_are_read_in_place(triton, poisoned, device, dtype, kind, head_dim):
    packed = torch.randn(2, 1, (6 + 2 + 2) * head_dim).to(dtype)
    q = packed[..., : 6 * head_dim].view(2, 1, 6, head_dim).transpose(1, 2)
    k, v = cache(2, 2, 90, head_dim, dtype, kind), cache(2, 2, 90, head_dim, dtype)
    run(device, q, k, v, [90, 41])


@pytest.mark.usefixtures("crosses_splits")
def test_many_rows_take_several_tiles(triton, poisoned, device, dtype):
    q = torch.randn(1, 16, 9, 64).to(dtype)  # 72 rows of one key/value head twice
    k, v = (cache(1, 2, 130, 64, dtype) for _ in range(2))
    run(device, q, k, v, [130], splits=2)
    assert triton.names == ["_decode_kernel"]


def test_very_negative_and_very_large_scores(triton, poisoned, device, dtype):
    """No finite stand-in for minus infinity could tell these from masked scores."""
    q = torch.randn(2, 2, 1, 32).to(dtype)
    for size in (100.0, -1.0):
        k, v = (cache(2, 1, 80, 32, dtype) for _ in range(2))
        k = size * k if size > 0 else -(q[:, :1].expand_as(k)) * 40
        lengths = torch.tensor([80, 11], dtype=torch.int32)
        out = decode_attention(*(t.to(device) for t in (q, k, v, lengths)))
        want, _ = oracle.attention(q.double(), k.double(), v.double(), lengths=lengths)
        oracle.check(out, want, reference.decode_attention(q, k, v, lengths), fp32=2e-5)  # scores of a thousand: 1e-4 absolute


@pytest.mark.parametrize("shape", [(0, 4, 1, 64, 10), (2, 4, 0, 64, 10), (2, 4, 1, 64, 0)], ids=str)
def test_empty(triton, poisoned, device, dtype, shape):
    B, H, S, D, T = shape
    q, k = torch.randn(B, H, S, D, device=device).to(dtype), torch.randn(B, 2, T, D, device=device).to(dtype)
    out = decode_attention(q, k, k, torch.zeros(B, dtype=torch.int32, device=device))
    assert out.shape == q.shape
    assert not out.any()


def rows(device, q, k, v, lengths, **options):
    return decode_attention(*(t.to(device) for t in (q, k, v, torch.tensor(lengths, dtype=torch.int32))), **options).cpu()


@pytest.mark.usefixtures("crosses_splits")
def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_capacity(triton, poisoned, device, dtype):
    q, lengths = torch.randn(4, 6, 1, 64).to(dtype), [700, 1300, 5, 512]
    k, v = (cache(4, 2, 1300, 64, dtype) for _ in range(2))
    together = rows(device, q, k, v, lengths)
    for b, n in enumerate(lengths):
        alone = rows(device, *(t[b : b + 1] for t in (q, k, v)), [n])
        exactly = rows(device, *(t[b : b + 1] for t in (q, k[:, :, :n], v[:, :, :n])), [n])
        assert torch.equal(alone, together[b : b + 1])
        assert torch.equal(exactly, alone)
    assert torch.equal(rows(device, q, k, v, lengths), together)


@pytest.mark.usefixtures("crosses_splits")
def test_pages_do_not_change_the_bits(triton, poisoned, device, dtype):
    q = torch.randn(2, 4, 1, 64).to(dtype)
    k, v = (cache(2, 2, 160, 64, dtype) for _ in range(2))
    pages, table = paged(torch.cat((k, v), -1), 16)
    got = rows(device, q, pages[..., :64], pages[..., 64:], [160, 90], block_table=table.to(device), splits=2)
    assert torch.equal(got, rows(device, q, k, v, [160, 90], splits=2))


@pytest.mark.usefixtures("crosses_splits")
def test_shared_counters_are_left_as_they_were_found(triton, poisoned, device, dtype):
    q = torch.randn(3, 6, 1, 64).to(dtype)
    k, v = (cache(3, 2, 600, 64, dtype) for _ in range(2))
    plain = rows(device, q, k, v, [600, 130, 513])
    with counters(torch.device(device)) as shared:
        shared = shared if shared.device.type == "cpu" else shared.cpu
        for _ in range(2):
            assert torch.equal(rows(device, q, k, v, [600, 130, 513]), plain)
    assert not (shared if isinstance(shared, torch.Tensor) else shared()).any()


def test_a_decode_run_compiles_once(triton, device, monkeypatch):
    """Two hundred steps across three split boundaries: nothing about a step is a constant of the compiled code."""
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from trillama.kernels import decode
    from trillama.kernels.dispatch import observe

    seen = set()

    def compile_only(kernel, grid, arguments, options):
        kernel.warmup(*arguments, grid=grid, **options)
        seen.add(grid)
        return True

    q, k = torch.randn(1, 6, 1, 64, device=device).half(), torch.randn(1, 2, 2000, 64, device=device).half()
    with observe(compile_only):
        for n in range(1, 2000, 10):
            decode_attention(q, k, k, torch.tensor([n], dtype=torch.int32, device=device))
    compiled = sum(len(caches[0]) for caches in decode._decode_kernel.device_caches.values())
    with observe(compile_only):
        for n in range(1, 2000, 10):
            decode_attention(q, k, k, torch.tensor([n], dtype=torch.int32, device=device))
    assert sum(len(caches[0]) for caches in decode._decode_kernel.device_caches.values()) == compiled
    assert len(seen) == 1


def test_the_reference_is_the_formula(device):
    for options in ({}, {"window": 17}, {"softcap": 15.0}, {"scale": 0.2}, {"page": 16}):
        for tokens, lengths in ((1, [90, 0, 33]), (4, [90, 2, 33])):
            q = torch.randn(3, 6, tokens, 32)
            k, v = (cache(3, 2, 90, 32, torch.float32) for _ in range(2))
            with use_backend("reference"):
                run("cpu", q, k, v, lengths, **options)


@pytest.mark.host
def test_torch_compile_and_opcheck():
    from trillama.kernels.decode import _op

    q, k = torch.randn(2, 6, 1, 32), torch.randn(2, 2, 50, 32)
    lengths = torch.tensor([50, 7], dtype=torch.int32)
    with use_backend("reference"):
        compiled = torch.compile(lambda *a: decode_attention(*a, window=9) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, k, lengths), decode_attention(q, k, k, lengths, window=9) * 2)
        torch.library.opcheck(_op, (q, k, k, lengths, 0.2, 9, None, None, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 4, 64)}, r"decode_attention: q has shape \(2, 4, 64\), expected four axes"),
        ({"q": torch.randn(2, 5, 1, 64)}, "q has 5 heads, expected a multiple of the 2 of k_cache"),
        ({"q": torch.randn(2, 4, 1, 32)}, "k_cache has head size 64 and q 32"),
        ({"q": torch.randn(3, 4, 1, 64), "lengths": torch.zeros(3).int()}, "k_cache holds 2 sequences, expected 3 as q"),
        ({"k_cache": torch.randn(2, 2, 10, 64).half()}, "k_cache is torch.float16, expected torch.float32 as q"),
        ({"v_cache": torch.randn(2, 2, 9, 64)}, r"v_cache has shape \(2, 2, 9, 64\), expected \(2, 2, 10, 64\) as k_cache"),
        ({"lengths": torch.zeros(2)}, "lengths is torch.float32, expected int32"),
        ({"lengths": 7}, "lengths is int, expected int32"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"lengths has shape \(3,\), expected \[B\] with B = 2"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, r"block_table has shape \(3, 1\), expected \[B, n\] with B = 2"),
        ({"window": 0}, "window is 0, expected at least 1 or None"),
        ({"splits": 0}, "splits is 0, expected at least 1 or None"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {
        "q": torch.randn(2, 4, 1, 64), "k_cache": torch.randn(2, 2, 10, 64), "v_cache": torch.randn(2, 2, 10, 64),
        "lengths": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        decode_attention(**{**arguments, **change})
    assert "\n" not in str(caught.value)


