"""apply_rope and rope_append_ against the rotation in float64: values, gradients, layouts, caches, errors."""

from pathlib import Path

import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.bench.proofs import caches, heads, tables
from trillama.bench.proofs import rope as verify
from trillama.kernels import apply_rope, reference, rope_append_, tuning, use_backend


@pytest.mark.few(26)
@pytest.mark.parametrize("name", trials("apply_rope"))
def test_apply_rope(triton, poisoned, device, dtype, name):
    proofs.run("apply_rope", name, dtype, device)
    assert triton.names == ["_rope_kernel"] * (1 + ("backward" in name))


@pytest.mark.parametrize("name", trials("rope_append_"))
def test_rope_append(triton, poisoned, device, dtype, name):
    proofs.run("rope_append_", name, dtype, device)
    assert triton.names == ["_rope_kernel"]


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("D", "R"), [(64, 32), (128, 96), (80, 20), (100, 2), (256, 64), (67, 66), (33, 8), (129, 128), (3, 2)])
def test_partial_rotation_passes_the_rest_through(triton, poisoned, device, dtype, D, R, interleaved):
    q, k = heads("packed", 2, 4, 3, D, dtype), heads("contiguous", 2, 2, 3, D, dtype)
    y, z = verify(device, dtype, q, k, *tables(8, R // 2), interleaved=interleaved)
    assert torch.equal(y[..., R:].cpu(), q[..., R:])
    assert torch.equal(z[..., R:].cpu(), k[..., R:])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_odd_head_sizes_have_gradients_and_caches(triton, poisoned, device, dtype, interleaved):
    proofs.apply_rope(device, dtype, HQ=4, HK=2, D=67, R=66, kind="packed", interleaved=interleaved, backward=True)
    proofs.apply_rope(device, dtype, HQ=3, D=33, R=8, positions="int32", interleaved=interleaved, backward=True)
    for page in (None, 8):
        proofs.rope_append_(device, dtype, HQ=6, HK=2, D=67, R=32, page=page, interleaved=interleaved)
    assert set(triton.names) == {"_rope_kernel"}


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_tables_are_read_in_place(triton, poisoned, device, dtype, interleaved):
    q, k = heads("packed", 2, 4, 5, 48, dtype), heads("transposed", 2, 2, 5, 48, dtype)
    cos, sin = tables(20, 24)
    verify(device, dtype, q, k, torch.cat((cos, cos), 1)[:, :24], sin.t().contiguous().t(), interleaved=interleaved)
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
def test_positions_are_read_in_place(triton, poisoned, device, dtype, integer):
    q, k = heads("transposed", 3, 2, 3, 64, dtype), heads("transposed", 3, 1, 3, 64, dtype)
    verify(device, dtype, q, k, *tables(50, 32), torch.randint(0, 50, (6, 3), dtype=integer)[::2].t())


def test_float32_arithmetic_is_rounded_once(triton, device, dtype):
    if dtype == torch.float32:
        pytest.skip("about lower precision")
    q, k = heads("contiguous", 1, 2, 24, 64, dtype), heads("contiguous", 1, 2, 24, 64, dtype)
    cos, sin = tables(24, 32)
    y, _ = apply_rope(q.to(device), k.to(device), cos.to(device), sin.to(device))
    exact, _ = proofs.rotated(q, k, cos, sin, None, False)
    assert (y.cpu() != exact.to(dtype)).float().mean() < 0.002  # ties that float32 decides differently


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (1, 4, 1)], ids=str)
def test_empty_and_single(triton, poisoned, device, dtype, shape):
    B, H, S = shape
    q, k = heads("transposed", B, H, S, 64, dtype), heads("transposed", B, 1, S, 64, dtype)
    y, z = verify(device, dtype, q, k, *tables(4, 32)) if 0 not in shape else apply_rope(q, k, *tables(4, 32))
    assert y.shape == q.shape
    assert z.shape == k.shape
    assert len(triton.names) == (0 not in shape)


def test_many_tokens(triton, poisoned, monkeypatch, device, dtype):
    """Where a program takes all heads of its tokens; with few tokens each takes some of the heads."""
    monkeypatch.setattr(tuning, "programs", lambda arch: 2)
    q, k, v = (heads("packed", 1, h, 45, 16, dtype) for h in (6, 3, 3))
    verify(device, dtype, q, k, *tables(45, 8))
    verify(device, dtype, q, k, *tables(45, 8), interleaved=True)
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


LIGER = "LigerRopeFunction.apply(q, k, cos, sin)"


@pytest.mark.host
@pytest.mark.parametrize("patched", [False, True], ids=["as it is", "patched"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_tables_of_a_hugging_face_model(precision, patched):
    """What the README says to write in place of Liger's call: right for the tables of a model in any dtype. In bfloat16 they are
    rounded by up to 2^-9, and more once their frequencies are; those of a patched model and of rope_tables are exact."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from trillama.kernels import rope_tables
    from trillama.kernels.compat.transformers import patch

    readme = Path(__file__).parents[1] / "README.md"
    (row,) = (line for line in readme.read_text(encoding="utf-8").splitlines() if LIGER in line)
    instead = row.split("`")[3]
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=99,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=precision)
    if patched:
        patch(model)
    D, x = 32, torch.zeros(1, 40, 64, dtype=precision)
    cos, sin = model.model.rotary_emb(x, torch.arange(40)[None])
    assert cos.dtype == (torch.float32 if patched else precision)
    q, k = heads("transposed", 1, 2, 40, D, precision), heads("transposed", 1, 1, 40, D, precision)
    got = eval(instead, {"apply_rope": apply_rope, "q": q, "k": k, "cos": cos, "sin": sin, "D": D})
    theirs = apply_rotary_pos_emb(*(t.double() for t in (q, k, cos, sin)))
    for y, want in zip(got, theirs):
        assert oracle.error(y, want) <= torch.finfo(precision).eps
    exact = rope_tables(10_000.0, D, 40)
    for table, ours in zip((cos, sin), exact):
        off = (table[0, :, : D // 2].double() - ours.double()).abs().max()
        rounding = torch.finfo(cos.dtype).eps / 4
        assert rounding / 2 < off <= 1.01 * rounding or (cos.dtype == torch.float32 and off < 1e-5)
    if patched:
        return
    rounded = model.to(torch.bfloat16).model.rotary_emb(x.bfloat16(), torch.arange(40)[None])[0]
    assert 2**-9 < (rounded[0, :, : D // 2].double() - exact[0].double()).abs().max() < 39 * 2**-8


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
        (dict(q=torch.randn(2, 4, 3, 63), k=torch.randn(2, 2, 3, 63)), r"cos has shape \(8, 32\), expected .* with R at most 62"),
        (dict(q=torch.randn(2, 4, 3, 258), k=torch.randn(2, 2, 3, 258)), "q has head size 258, expected 2 to 256"),
        (dict(q=torch.randn(2, 4, 3, 1), k=torch.randn(2, 2, 3, 1)), "q has head size 1, expected 2 to 256"),
        (
            dict(cos=torch.randn(8, 32).bfloat16()),
            r"cos is torch.bfloat16, expected torch.float32: cos.float\(\) will do, but what was rounded stays off by up to 2\^-9",
        ),
        (dict(sin=torch.randn(8, 32).half()), r"sin is torch.float16, .*: sin.float\(\) will do, but .* up to 2\^-12"),
        (
            dict(cos=torch.randn(8, 32).double()),
            r"cos is torch.float64, expected torch.float32: q, float32, is turned in float32, so that cos.float\(\) costs nothing",
        ),
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


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_block_table_of_any_strides(device, backend):
    q, k, v = (torch.randn(2, h, 3, 32) for h in (4, 2, 2))
    positions, table = torch.tensor([3, 8, 21]), torch.randperm(8, device=device).view(4, 2).int().t()
    results = []
    for t in (table, table.contiguous()):
        k_cache, v_cache = (torch.zeros(8, 2, 8, 32, device=device) for _ in range(2))
        on = [x.to(device) for x in (q, k, v, *tables(32, 16))]
        with use_backend(backend):
            y = rope_append_(*on, k_cache, v_cache, positions.to(device), block_table=t)
        results.append((y, k_cache, v_cache))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(positions=[0, 1, 8]), "positions are 0 to 8, expected 0 to 7, those of the cache"),
        (dict(positions=[0, 1, 20]), "positions are 0 to 20, expected 0 to 19, the rows of cos"),
        (dict(positions=[-1, 1, 2]), "positions are -1 to 2, expected 0 to 19, the rows of cos"),
        (dict(positions=[0, 1, 16], table=[5, 0]), "positions are 0 to 16, expected 0 to 15, those of the cache"),
        (dict(positions=[0, 1, 9], table=[5, 6]), "block_table names the pages 5 to 6 where it is needed, expected 0 to 5"),
        (dict(positions=[0, 1, 9], table=[5, -1]), "block_table names the pages -1 to 5 where it is needed, expected 0 to 5"),
    ],
)
def test_append_outside_the_cache_is_an_index_error_of_the_reference(changes, message, rows):
    a = arguments(cos=torch.randn(20, 32), sin=torch.randn(20, 32))
    a.update({name: a[name][:rows] for name in ("q", "k", "v", "k_cache", "v_cache")}, positions=torch.tensor(changes["positions"]))
    if "table" in changes:
        a.update(k_cache=torch.zeros(6, 2, 8, 64), v_cache=torch.zeros(6, 2, 8, 64))
        a.update(block_table=torch.tensor([changes["table"]] * rows))
    with use_backend("reference"), pytest.raises(IndexError, match=f"^rope_append_: {message}") as caught:
        rope_append_(**a)
    assert "\n" not in str(caught.value)
    a["positions"] = torch.tensor([0, 1, 7])  # what lies outside and is not needed does not matter
    with use_backend("reference"):
        assert rope_append_(**a).isfinite().all()


@pytest.mark.parametrize("page", [None, 8])
def test_where_it_cannot_raise_the_reference_writes_nothing_outside_the_cache(monkeypatch, page):
    """As the kernel: what it does on a GPU, in the memory of the CPU."""
    monkeypatch.setattr(reference, "raises", lambda x: False)
    positions = torch.tensor([[-1, 16, 5], [99, 2**33, 12], [17, 18, 19]])
    k, v = (torch.randn(3, 2, 3, 32) for _ in range(2))
    k_cache, v_cache, table, seen = caches(3, 2, 16, 32, torch.float32, page)
    if page is not None:
        table[1, 1], table[2] = k_cache.shape[0], -1
    for part in (slice(0, 3), slice(2, 3)):  # in the second there is nothing to write
        new, old = [k_cache.clone(), v_cache.clone()], [k_cache, v_cache]
        if page is None:
            new, old = ([cache[part] for cache in pair] for pair in (new, old))
        reference.append_("op", k[part], v[part], *new, positions[part], None if table is None else table[part])
        for cache, before, x in zip(new, old, (k, v)):
            changed = (cache != before).any(-1).any(1)
            assert int(changed.sum()) == (0 if part.start else 2 if page is None else 1)
            if not part.start:
                assert torch.equal(seen(cache, table[:1] if page else None)[0, :, 5], x[0, :, 2])


def test_where_it_cannot_raise_the_reference_gives_nan_outside_the_tables(monkeypatch):
    monkeypatch.setattr(reference, "raises", lambda x: False)
    a = arguments()
    for x in reference.apply_rope(a["q"], a["k"], a["cos"], a["sin"], positions=torch.tensor([-1, 7, 8])):
        assert x[:, :, [0, 2]].isnan().all()
        assert x[:, :, 1].isfinite().all()


def test_a_position_outside_the_tables_is_named():
    a = arguments()
    for positions, found in ([0, 1, 8], "0 to 8"), ([-3, 1, 2], "-3 to 2"):
        message = f"^apply_rope: positions are {found}, expected 0 to 7, the rows of cos$"
        with use_backend("reference"), pytest.raises(IndexError, match=message):
            apply_rope(a["q"], a["k"], a["cos"], a["sin"], positions=torch.tensor(positions))


def test_tables_in_float64_turn_float64_alone():
    a = arguments(cos=torch.randn(8, 32).double(), sin=torch.randn(8, 32).double())
    with use_backend("reference"):
        assert apply_rope(a["q"].double(), a["k"].double(), a["cos"], a["sin"])[0].dtype == torch.float64
