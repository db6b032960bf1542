"""decode_attention against the formula in float64: lengths, splits, pages, groups, windows; its bits, launches, compilations."""

import numpy as np
import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.bench.proofs import attend, cache, paged
from trillama.kernels import decode_attention, reference, use_backend
from trillama.kernels.decode import counters
from trillama.kernels.dispatch import INTERPRETED


@pytest.fixture
def crosses_splits(request):
    if request.config.getoption("--gpuless-races", False):
        pytest.skip("partial results pass between programs in the order of an atomic counter: no race, but it looks like one")


@pytest.mark.few(26)
@pytest.mark.usefixtures("crosses_splits")
@pytest.mark.parametrize("name", trials("decode_attention"))
def test_decode_attention(triton, poisoned, device, dtype, name):
    proofs.run("decode_attention", name, dtype, device)
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
                attend("cpu", q, k, v, lengths, **options)


@pytest.mark.few(3)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", [torch.tensor, np.asarray, np.float64, np.float32], ids=["tensor", "array", "double", "single"])
def test_a_number_may_come_in_a_tensor_or_from_numpy(device, backend, kind):
    q, k, v = torch.randn(1, 2, 1, 32).half(), torch.randn(1, 1, 700, 32).half(), torch.randn(1, 1, 700, 32).half()
    given = [t.to(device) for t in (q, k, v, torch.tensor([600], dtype=torch.int32))]
    integer = np.int64 if kind in (np.float64, np.float32) else kind
    with use_backend(backend):
        for numbers in ({"scale": 0.5}, {"softcap": 2.0}, {"window": 550}, {"splits": 2}):
            there = {name: (kind if isinstance(x, float) else integer)(x) for name, x in numbers.items()}
            for _ in range(2):  # whether it is remembered or not
                assert torch.equal(decode_attention(*given, **there), decode_attention(*given, **numbers))


def test_a_scale_that_requires_a_gradient_is_refused(triton, device):
    q, k, lengths = (t.to(device) for t in (torch.randn(1, 2, 1, 32), torch.randn(1, 1, 20, 32), torch.tensor([13])))
    for name in ("scale", "softcap"):
        with pytest.raises(ValueError, match=f"decode_attention: {name} requires a gradient"):
            decode_attention(q, k, k, lengths.int(), **{name: torch.tensor(0.5, requires_grad=True)})


# --- what lies outside the cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_lengths_are_those_of_the_cache(triton, monkeypatch, poisoned, device, dtype, integer):
    """The kernel cannot raise: it attends to nothing, or to all that there is. So does the reference where it is not on a CPU."""
    q = torch.randn(4, 4, 1, 32).to(dtype)
    k, v = (cache(4, 2, 40, 32, dtype) for _ in range(2))
    big = 2**31 - 1 if integer == torch.int32 else 2**40 + 7
    wrong, right = torch.tensor([-1, 41, big, -big - 1]).to(integer), torch.tensor([0, 40, 40, 0]).to(integer)
    given = [t.to(device) for t in (q, k, v)]
    for options in ({}, {"window": 9}):
        got = decode_attention(*given, wrong.to(device), **options)
        assert torch.equal(got, decode_attention(*given, right.to(device), **options))
    if device == "cpu":
        for n in (-1, 41):
            for lengths in ([n, 3, 3, 3], [n] * 4):
                with use_backend("reference"), pytest.raises(ValueError, match=rf"attention: lengths has {n}, expected 0 to 40"):
                    decode_attention(*given, torch.tensor(lengths).to(integer))
    monkeypatch.setattr(reference, "raises", lambda x: False)  # as on a GPU
    assert torch.equal(reference.decode_attention(q, k, v, wrong), reference.decode_attention(q, k, v, right))


@pytest.mark.few(1)
@pytest.mark.usefixtures("crosses_splits")
@pytest.mark.parametrize("splits", [1, None])
def test_a_page_that_is_not_there(triton, monkeypatch, poisoned, device, dtype, splits):
    """NaN where it is needed, and only there; the reference raises on a CPU."""
    q = torch.randn(3, 4, 1, 32).to(dtype)
    k, v = (torch.randn(12, 2, 256, 32).to(dtype) for _ in range(2))
    table = torch.randperm(12).view(3, 4).int()
    lengths = torch.tensor([1000, 600, 256], dtype=torch.int32)
    want = decode_attention(*(t.to(device) for t in (q, k, v, lengths)), block_table=table.to(device), splits=splits)
    for absent in (-1, 12, 2**31 - 1):
        table[1, 2], table[2, 1:] = absent, -1
        given = [t.to(device) for t in (q, k, v, lengths)]
        got = decode_attention(*given, block_table=table.to(device), splits=splits)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], want[[0, 2]])
        if device == "cpu":
            message = "decode_attention: block_table names the pages .* where it is needed, expected 0 to 11, those of k_cache"
            with use_backend("reference"), pytest.raises(IndexError, match=message):
                decode_attention(*given, block_table=table)
            with use_backend("reference"):
                assert not decode_attention(given[0], k, v, lengths.clamp(max=512), block_table=table).isnan().any()
    monkeypatch.setattr(reference, "raises", lambda x: False)  # as on a GPU
    there = reference.decode_attention(q, k, v, lengths, block_table=table)
    assert there[1].isnan().all()
    assert there[[0, 2]].isfinite().all()


@pytest.mark.host
def test_torch_compile():
    q, k = torch.randn(2, 6, 1, 32), torch.randn(2, 2, 50, 32)
    lengths = torch.tensor([50, 7], dtype=torch.int32)
    with use_backend("reference"):
        compiled = torch.compile(lambda *a: decode_attention(*a, window=9) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, k, lengths), decode_attention(q, k, k, lengths, window=9) * 2)


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
        ({"window": 2.5}, "window is 2.5, expected an integer"),
        ({"window": torch.tensor(2.0)}, r"window is a torch.float32 tensor of shape \(\), expected an integer"),
        ({"scale": float("nan")}, "scale is nan, expected a finite number"),
        ({"scale": torch.tensor(-float("inf"))}, "scale is -inf, expected a finite number"),
        ({"scale": "1"}, "scale is '1', expected a number"),
        ({"scale": torch.ones(2)}, r"scale is a torch.float32 tensor of shape \(2,\), expected a number"),
        ({"softcap": 0.0}, "softcap is 0.0, expected a positive number or None"),
        ({"softcap": float("inf")}, "softcap is inf, expected a finite number"),
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
