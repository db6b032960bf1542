"""flash_attn_with_kvcache over the features that flash-attention's own suite crosses, each combination against float64: what is
appended, rotary embedding, layout of the cache, padding on the left, mask, tokens, heads, lse; and the calls that it refuses."""

import functools
import itertools
import random

import numpy as np
import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import reference, use_backend
from trillama.kernels.compat import flash_attn
from trillama.kernels.compat.flash_attn import flash_attn_with_kvcache

B, T, D, PAGE = 2, 32, 32, 8
BEFORE, LEFTPAD = [17, 6], [0, 3]

FEATURES = {
    "append": ["none", "bare", "half", "pairs", "half of 12", "pairs of 12"],
    "layout": ["rows", "pages", "indexed"],
    "leftpad": [False, True],
    "mask": [(False, (-1, -1)), (True, (-1, -1)), (False, (5, 3)), (True, (4, -1)), (False, (-1, 2))],
    "tokens": [(1, 1), (3, 3), (4, 2), (2, 5)],  # of q; of k
    "lse": [False, True],
}
HEADS = [(2, 2), (6, 2), (3, 1)]  # each in turn
TABLE = [
    {**dict(zip(FEATURES, values)), "heads": HEADS[i % len(HEADS)]}
    for i, values in enumerate(itertools.product(*FEATURES.values()))
    if not (values[1] == "pages" and values[2]) and not (values[0] == "none" and values[4] in FEATURES["tokens"][2:])
]  # fmt: skip
SAMPLE = random.Random(3).sample(TABLE, 24)


@functools.cache
def every_three_together():
    """Of the table as few combinations as hold whatever values any three features can have together, found greedily."""
    left = [(features, {*itertools.combinations(((f, str(value)) for f, value in features.items()), 3)}) for features in TABLE]
    missing, chosen = set().union(*(threes for _, threes in left)), []
    while missing:
        features, threes = max(left, key=lambda one: len(one[1] & missing))
        chosen.append(features)
        missing -= threes
    return chosen


def cell(device, dtype, append, layout, leftpad, mask, tokens, heads, lse):
    """One combination: what is returned, what is written, and that nothing else of the cache is."""
    (causal, window), (S, new), (Hq, Hk) = mask, tokens, heads
    new = 0 if append == "none" else new
    q, k, v = (torch.randn(B, n, h, D).to(dtype) for n, h in ((S, Hq), (new, Hk), (new, Hk)))
    before, first = torch.tensor(BEFORE).int(), torch.tensor(LEFTPAD).int() if leftpad else None
    # In memory: pages anywhere in a pool, rows among others.
    rows = {"rows": B, "pages": 3 * B * T // PAGE, "indexed": B + 2}[layout]
    memory = [torch.randn(rows, PAGE if layout == "pages" else T, Hk, D).to(dtype) for _ in range(2)]
    place = torch.randperm(rows)[: B * T // PAGE].view(B, -1) if layout == "pages" else torch.randperm(rows)[:B].view(B, 1)
    place = torch.arange(B).view(B, 1) if layout == "rows" else place
    angle = torch.arange(T)[:, None] * 0.7 ** torch.arange(6.0 if append.endswith("12") else D / 2)
    on = [t.clone().to(device) for t in memory]

    options = {"causal": causal, "window_size": window, "softmax_scale": 0.3, "cache_seqlens": before.to(device)}
    if new:
        options |= {"k": k.to(device), "v": v.to(device)}
    if append not in ("none", "bare"):
        options |= {"rotary_cos": angle.cos().to(device), "rotary_sin": angle.sin().to(device)}
        options["rotary_interleaved"] = append.startswith("pairs")
    if layout != "rows":
        options["block_table" if layout == "pages" else "cache_batch_idx"] = place.squeeze(1).int().to(device)
    if leftpad:
        options["cache_leftpad"] = first.to(device)
    out = flash_attn_with_kvcache(q.to(device), *on, return_softmax_lse=lse, **options)

    at = before.long()[:, None] + torch.arange(new)
    q, k, v, *now = (t.double() for t in (q, k, v, *(t.cpu() for t in on)))
    if append not in ("none", "bare"):  # q stands where k does, unless all of it sees all keys
        moving = causal or window != (-1, -1)
        here = before.long()[:, None] + torch.arange(S) * moving
        tables = angle.cos().double(), angle.sin().double()
        q, k = (
            oracle.rope(x.transpose(1, 2), *tables, p.expand(B, -1), append.startswith("pairs")).transpose(1, 2)
            for x, p in ((q, here), (k, at))
        )
    page, slot = place.gather(1, at // memory[0].shape[1]), at % memory[0].shape[1]
    for after, old, x in zip(now, memory, (k, v)):
        assert oracle.error(after[page, slot], x) <= torch.finfo(dtype).eps
        old = old.double()
        old[page, slot] = after[page, slot]
        assert torch.equal(after, old)

    left, right = (None if w < 0 else w for w in window)
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    out, found = out if lse else (out, None)
    assert out.is_contiguous()
    assert not lse or (found.is_contiguous() and found.dtype == torch.float32)
    for b in range(B):
        keys = slice(LEFTPAD[b] if leftpad else 0, BEFORE[b] + new)
        seen = (t[place[b]].flatten(0, 1)[keys].transpose(0, 1)[None] for t in now)
        want, lse64 = oracle.attention(
            q[b : b + 1].transpose(1, 2), *seen, left=left, right=0 if causal else right, scale=0.3
        )  # fmt: skip
        assert oracle.error(out[b], want[0].transpose(0, 1)) < allowed
        assert not lse or oracle.error(found[b], lse64[0]) < allowed


def named(features):
    return ", ".join(f"{name} {value}" for name, value in features.items() if value is not False).replace("'", "")


@pytest.mark.few(12)
@pytest.mark.parametrize("features", SAMPLE, ids=named)
def test_a_sample_of_the_table(triton, device, dtype, features):
    torch.manual_seed(TABLE.index(features))
    cell(device, dtype, **features)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("append", FEATURES["append"])
def test_every_three_features_together(device, dtype, append, backend):
    with use_backend(backend):
        for features in every_three_together():
            if features["append"] == append:
                torch.manual_seed(TABLE.index(features))
                try:
                    cell(device, dtype, **features)
                except Exception as error:
                    raise AssertionError(f"{named(features)}: {error}") from error


# --- what does not fit -----------------------------------------------------------------------------------------------


def integers(*n):
    return torch.tensor(n, dtype=torch.int32)


def given(S=1, new=1, **changes):
    arguments = {
        "q": torch.randn(2, S, 4, 16), "k_cache": torch.randn(2, 12, 2, 16), "v_cache": torch.randn(2, 12, 2, 16),
        "k": torch.randn(2, new, 2, 16), "v": torch.randn(2, new, 2, 16), "cache_seqlens": integers(3, 7), "causal": True,
    }  # fmt: skip
    return {**arguments, **changes}


TABLES = {"rotary_cos": torch.ones(12, 4), "rotary_sin": torch.zeros(12, 4)}
BAD = [
    (dict(k=None), "k is None, expected both of k and v, or neither"),
    (dict(v=None), "v is None, expected both of k and v, or neither"),
    (dict(k=None, v=None, **TABLES), "rotary_cos is given without k, expected new tokens to rotate"),
    (dict(rotary_cos=torch.ones(12, 4)), "expected both of rotary_cos and rotary_sin, or neither"),
    (dict(cache_seqlens=None), "cache_seqlens is None, expected where to write k"),
    (dict(block_table=torch.zeros(2, 1).int(), cache_batch_idx=integers(0, 1)), "expected one of cache_batch_idx and block_table"),
    (dict(block_table=torch.zeros(2, 1).int(), cache_leftpad=integers(0, 1)), "expected one of cache_leftpad and block_table"),
    (dict(cache_leftpad=integers(1)), r"cache_leftpad has shape \(1,\), expected \[B\] with B = 2"),
    (dict(cache_leftpad=[1, 1]), "cache_leftpad is list, expected int32"),
    (dict(cache_leftpad=integers(1, 9)), "cache_leftpad is 1 to 9, expected from 0 to the length of the row"),
    (dict(cache_leftpad=integers(-1, 0)), "cache_leftpad is -1 to 0, expected from 0 to the length of the row"),
    (dict(cache_batch_idx=torch.zeros(2)), "cache_batch_idx is torch.float32, expected int32"),
    (dict(cache_batch_idx=integers(0, 2)), "the rows or pages of the cache that are needed are 0 to 2, expected 0 to 1"),
    (dict(block_table=integers([0], [-1])), "the rows or pages of the cache that are needed are -1 to 0, expected 0 to 1"),
    (dict(q=torch.randn(3, 1, 4, 16)), r"k has shape \(2, 1, 2, 16\), expected batch size 3 as q"),
    (dict(q=torch.randn(2, 1, 5, 16)), "q has 5 heads, expected a multiple of the 2 of k_cache"),
    (dict(k=torch.randn(2, 1, 4, 16), v=torch.randn(2, 1, 4, 16)), "k has 4 heads, expected 2 as k_cache"),
    (dict(k_cache=torch.randn(3, 12, 2, 16), v_cache=torch.randn(3, 12, 2, 16)), "k_cache has 3 rows, expected 2 as q, or cache_"),
    (dict(v_cache=torch.randn(2, 11, 2, 16)), r"v_cache has shape \(2, 11, 2, 16\), expected \(2, 12, 2, 16\) as k_cache"),
    (dict(cache_seqlens=12), "cache_seqlens is 12, expected at most 11: 1 new tokens in 12"),
    (dict(cache_seqlens=-1), "cache_seqlens is -1, expected at most 11"),
    (dict(cache_seqlens=2.5), "cache_seqlens is 2.5, expected an integer"),
    (dict(cache_seqlens=integers(3, 12)), "cache_seqlens is 3 to 12, expected 0 to 11: 1 new tokens in 12"),
    (dict(cache_seqlens=integers(-1, 3)), "cache_seqlens is -1 to 3, expected 0 to 11: 1 new tokens in 12"),
    (dict(cache_seqlens=integers(3, 12), **TABLES), "cache_seqlens is 3 to 12, expected 0 to 11: 1 new tokens in 12"),
    (dict(cache_seqlens=integers(3, 12), return_softmax_lse=True), "cache_seqlens is 3 to 12, expected 0 to 11"),
    (dict(k=None, v=None, cache_seqlens=integers(3, 13)), "cache_seqlens is 3 to 13, expected 0 to 12: 0 new tokens in 12"),
    (dict(softmax_scale=float("nan")), "softmax_scale is nan, expected a finite number"),
    (dict(softmax_scale=torch.tensor(1.0, requires_grad=True)), "softmax_scale requires a gradient"),
    (dict(softcap=float("inf")), "softcap is inf, expected a finite number"),
    (dict(window_size=3), r"window_size is 3, expected \(left, right\)"),
    (dict(window_size=(1.5, 0)), "window_size is 1.5, expected an integer"),
    (dict(num_splits=-1), "num_splits is -1, expected at least 0"),
    (dict(alibi_slopes=torch.ones(4)), "alibi_slopes is given, expected None"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda x: x[:40] if isinstance(x, str) else None)
def test_what_does_not_fit_is_refused_before_anything_is_written(device, changes, message, backend):
    """On a CPU, where the host sees the values: the same line on both paths."""
    arguments = given(**changes)
    before = [arguments[name].clone() for name in ("k_cache", "v_cache")]
    if device != "cpu" and any(isinstance(x, torch.Tensor) and not x.is_floating_point() for x in changes.values()):
        pytest.skip("not seen on a GPU")
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    errors, message = (ValueError, TypeError, IndexError), f"^flash_attn_with_kvcache: {message}"
    with use_backend(backend), pytest.raises(errors, match=message) as caught:
        flash_attn_with_kvcache(**arguments)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(arguments[name].cpu(), old) for name, old in zip(("k_cache", "v_cache"), before))


@pytest.mark.few(8)
@pytest.mark.parametrize("rotary", [False, True], ids=["bare", "rotary"])
@pytest.mark.parametrize("layout", ["rows", "pages", "leftpad", "lse"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_no_host_sees_stays_within_the_cache(monkeypatch, device, rotary, layout, backend):
    """As on a GPU, on both paths: what fits is written and nothing else, and no more is attended to than there is."""
    monkeypatch.setattr(flash_attn, "host_sees", lambda *tensors: False)
    monkeypatch.setattr(reference, "raises", lambda x: False)
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 1, 4, 16), torch.randn(4, 3, 2, 16), torch.randn(4, 3, 2, 16)
    room = torch.randn(2, 6, 12, 2, 16)  # a row in front of the cache and one behind it
    before = integers(-2, 10, 2**31 - 4, 7)
    options = {"causal": True, "cache_seqlens": before, "return_softmax_lse": layout == "lse"}
    if rotary:
        angle = torch.arange(99)[:, None] * 0.5 ** torch.arange(4.0)
        options |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    if layout == "pages":
        pages, table = room.unflatten(2, (3, 4)).flatten(1, 2), torch.arange(12).view(4, 3).int()
        table[3, 2] = -1  # where the last row's tokens would go
        options["block_table"] = table
        memory = pages.clone().to(device)
        caches = memory[:, 3:15]
    else:
        memory = room.clone().to(device)
        caches = memory[:, 1:5]
        if layout == "leftpad":
            options["cache_leftpad"] = integers(-1, 2, 99, 0)
    on = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with use_backend(backend):
        got = flash_attn_with_kvcache(q.to(device), *caches, k.to(device), v.to(device), **on)
    got = got[0] if layout == "lse" else got

    after = memory.cpu().view_as(room)
    changed = (after != room).any(-1).any(-1)
    want = torch.zeros(2, 6, 12, dtype=torch.bool)
    want[:, 1, 0] = want[:, 2, 10:] = True
    want[:, 4, 7:10] = True
    if layout == "pages":
        want[:, 4, 8:10] = False
    assert torch.equal(changed, want)
    for b, slots, tokens in ((0, [0], [2]), (1, [10, 11], [0, 1]), (3, [7], [0])):
        assert torch.equal(after[1, b + 1, slots], v[b, tokens])

    if layout == "pages":
        assert got[3].isnan().all()
    if not rotary:
        for b, n in enumerate([1, 12, 12, 10][: 3 if layout == "pages" else 4]):
            first = [0, 2, 99, 0][b] if layout == "leftpad" else 0
            seen = [t[None, b + 1, min(first, n) : n].double().transpose(1, 2) for t in after]
            right, _ = oracle.attention(q[b : b + 1].double().transpose(1, 2), *seen)
            assert oracle.error(got[b], right[0].transpose(0, 1)) < 1e-5


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", [torch.tensor, np.asarray, np.int64], ids=["tensor", "array", "numpy"])
def test_numbers_of_any_kind(device, backend, kind):
    real = np.float64 if kind is np.int64 else kind
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given().items()}
    plain = {"softmax_scale": 0.5, "softcap": 3.0, "window_size": (4, 0), "num_splits": 2, "cache_seqlens": 5}
    other = {name: (real if isinstance(x, float) else kind)(x) for name, x in plain.items() if name != "window_size"}
    other["window_size"] = (kind(4), kind(0))
    with use_backend(backend):
        for causal in (False, True):
            arguments["causal"] = causal
            want = flash_attn_with_kvcache(**{**arguments, **plain})
            assert torch.equal(flash_attn_with_kvcache(**{**arguments, **other}), want)
