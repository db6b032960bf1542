"""decode_linear against the formula in float64: sizes, what is fused with it, views, bits, launches, quantised weights, errors."""

import pytest
import torch
from trials import trials
from trillama.bench import oracle, proofs
from trillama.bench.proofs import BITS, FUSED, fused_name
from trillama.bench.proofs import multiply as run
from trillama.bench.proofs import product as arguments
from trillama.kernels import decode_linear, use_backend
from trillama.kernels.dispatch import INTERPRETED, observe
from trillama.kernels.quantized import quantize


@pytest.mark.few(40)
@pytest.mark.parametrize("name", trials("decode_linear"))
def test_decode_linear(triton, poisoned, device, dtype, name):
    proofs.run("decode_linear", name, dtype, device)
    assert ("_linear_kernel" in triton.names) == ("many rows" not in name)
    assert len(triton.names) == 1 or "many rows" in name


@pytest.mark.parametrize("lead", [(0,), (3, 0)], ids=str)
def test_empty(triton, poisoned, device, dtype, lead):
    y = run(device, *arguments(lead, 200, 24, dtype, norm=True, residual=True))
    assert y.shape == (*lead, 24)
    assert triton.names == []


def test_views_are_read_in_place(triton, poisoned, device, dtype):
    K, N = 160, 36
    x = torch.randn(4, 3, 3 * K).to(dtype)[:, 1, K : 2 * K]  # a slice of a packed projection
    weight = (torch.randn(N, 2 * K) * K**-0.5).to(dtype)[:, K:]
    columns = (torch.randn(K, N) * K**-0.5).to(dtype).T
    residual = torch.randn(N, 4).to(dtype).T
    options = {"norm": torch.rand(2 * K).to(dtype)[::2] + 0.5, "residual": residual, "bias": torch.randn(2 * N).to(dtype)[::2]}
    run(device, x, weight, options)
    run(device, x, columns, options)
    run(device, torch.randn(2, 2, 2, K).to(dtype).transpose(0, 2), weight, {})
    assert triton.names == ["_linear_kernel"] * 3


def test_norm_of_another_dtype(triton, poisoned, device, dtype):
    x, weight, _ = arguments(2, 96, 16, dtype)
    run(device, x, weight, {"norm": torch.rand(96) + 0.5})


@pytest.mark.parametrize("fused", FUSED, ids=fused_name)
def test_a_row_does_not_depend_on_its_neighbours(triton, poisoned, device, dtype, fused):
    if INTERPRETED:
        pytest.skip("the interpreter's products come from a BLAS, which sums one row and eight in different order")
    x, weight, options = (lambda a, w, o: (a.to(device), w.to(device), o))(*arguments(8, 1500, 40, dtype, **fused))
    options = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    together = decode_linear(x, weight, **options)
    for rows in (slice(0, 1), slice(2, 5), slice(7, 8), slice(3, 8)):
        some = {**options, "residual": options["residual"][rows]} if "residual" in options else options
        assert torch.equal(decode_linear(x[rows], weight, **some), together[rows])


def test_each_weight_is_read_once(triton, device):
    """Counted on the executed code where it can be: one pass over W, x in addition for every 16 columns."""
    if INTERPRETED or device == "cuda":
        pytest.skip("bytes are counted by the driver that executes compiled code")
    driver = pytest.importorskip("triton").runtime.driver.active
    for rows, swiglu in ((1, None), (8, None), (8, "swiglu")):
        x, weight, options = arguments(rows, 1024, 64, torch.float16, activation=swiglu)
        decode_linear(x, weight, **options)
        stats = driver.gpu.launches[-1].stats.summary()
        programs = 64 // (32 if swiglu else 16)
        assert stats["load"]["bytes"] == weight.nbytes + programs * x.nbytes


def test_a_decode_run_compiles_once(triton, device):
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from trillama.kernels import linear

    def compile_only(kernel, grid, arguments, options):
        kernel.warmup(*arguments, grid=grid, **options)
        return True

    def compiled():
        return sum(len(caches[0]) for caches in linear._linear_kernel.device_caches.values())

    before = compiled()
    with observe(compile_only):
        for _ in range(5):  # the buffers of a step lie where the allocator puts them
            x, weight, options = arguments((2, 1), 576, 64, torch.float16, norm=True)
            decode_linear(x.to(device), weight.to(device), norm=options["norm"].to(device))
    assert compiled() == before + 1


# --- weights in 8 and 4 bits -----------------------------------------------------------------------------------------

kinds = pytest.mark.parametrize(("bits", "group"), BITS, ids=["int8", "int4-32", "int4-64", "int4-128"])


@kinds
def test_quantised_weights_are_as_close_as_their_bits_allow(bits, group):
    weight = torch.randn(40, 384)
    weight[3], weight[5, :128], weight[6] = 0, 0.7, weight[6].abs()
    q = quantize(weight, bits, group)
    assert q.shape == weight.shape
    error = (q.dequantize() - weight).abs()
    if bits == 8:
        assert q.nbytes == weight.numel() + 2 * 40
        assert (error <= 0.505 * weight.abs().amax(1, keepdim=True) / 127).all()  # the scale is up to 2^-7 larger
    else:
        assert q.nbytes == weight.numel() // 2 + 4 * weight.numel() // group
        groups = weight.unflatten(1, (-1, group))
        step = ((groups.amax(-1) - groups.amin(-1)) / 15 + groups.abs().amax(-1) / 256).repeat_interleave(group, 1)
        assert (error <= 0.55 * step).all()
    assert torch.equal(q.dequantize(rows=slice(7, 9)), q.dequantize()[7:9])
    assert torch.equal(q.dequantize()[3], weight[3])


@kinds
@pytest.mark.parametrize("rows", [1, 9, 20])
def test_quantised_weights_in_plain_pytorch(bits, group, rows, monkeypatch):
    """PyTorch's own kernels where they apply, parts of the weight at a time elsewhere."""
    from trillama.kernels import quantized

    monkeypatch.setattr(quantized, "TILE", 384 * 10)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for N in (48, 37):
            x, weight, _ = arguments((rows, 1), 384, N, dtype)
            weight = quantize(weight, bits, group)
            with use_backend("reference"):
                run("cpu", x, weight, {})


def lying(how, t):
    """The numbers of t [M, N] in memory of another kind."""
    if how == "transposed":
        return t.T.contiguous().T
    if how == "every other row":
        return torch.stack((t, t), 1).flatten(0, 1)[::2]
    if how == "part of longer rows":
        return torch.cat((t, t[:, :1]), 1)[:, :-1]
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


@kinds
@pytest.mark.parametrize("how", ["transposed", "every other row", "part of longer rows", "one element on"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_quantised_weights_and_rows_lie_anywhere(request, bits, group, how, backend):
    """PyTorch's kernel for 8 bits crashes on rows that are not aligned, and refuses most views, as the one for 4 bits does."""
    device, dtype = (request.getfixturevalue("device"), torch.float16) if backend == "triton" else ("cpu", torch.bfloat16)
    x, weight, _ = arguments(6, 384, 48, dtype)
    x, weight = x.to(device), quantize(weight, bits, group).to(device)
    views = weight.apply(lambda t: lying(how, t))
    with use_backend(backend), torch.no_grad():
        expected = decode_linear(x, weight)
        assert torch.equal(decode_linear(lying(how, x), weight), expected)
        assert torch.equal(decode_linear(x, views), expected)


@kinds
def test_quantised_rows_do_not_depend_on_their_neighbours(triton, device, dtype, bits, group):
    if INTERPRETED:
        pytest.skip("the interpreter's products come from a BLAS, which sums one row and eight in different order")
    x, weight, _ = arguments(8, 1024, 32, dtype)
    x, weight = x.to(device), quantize(weight, bits, group).to(device)
    together = decode_linear(x, weight)
    assert all(torch.equal(decode_linear(x[rows], weight), together[rows]) for rows in (slice(0, 1), slice(2, 5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "quantize: bits is 3, expected 8 or 4"),
        ({"bits": 4, "group": 48}, "quantize: group is 48, expected 32, 64 or 128"),
        ({"bits": 4, "group": 128}, "and 96 columns a multiple of it"),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4,\) and dtype torch.float32, expected two axes"),
        ({"weight": torch.full((2, 32), float("nan"))}, "not finite"),
    ],
)
def test_quantize_errors(change, message):
    with pytest.raises(ValueError, match=message):
        quantize(**{"weight": torch.randn(4, 96), **change})


# --- on the CPU ------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_torch_compile():
    x, weight, options = arguments((2, 1), 64, 32, torch.float32, norm=True, activation="swiglu")
    with use_backend("reference"):
        compiled = torch.compile(lambda a, w: decode_linear(a, w, **options) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), decode_linear(x, weight, **options) * 2)
        small = quantize(weight, 4)
        compiled = torch.compile(lambda a: decode_linear(a, small, **options), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), decode_linear(x, small, **options))


@pytest.mark.host
@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_that_a_mode_has_made_stays_with_a_weight(bits):
    x, weight = torch.randn(2, 64, dtype=torch.bfloat16), quantize(torch.randn(32, 64), bits)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert decode_linear(mode.from_tensor(x), weight).shape == (2, 32)
    assert type(decode_linear(x, weight)) is torch.Tensor


@pytest.mark.host
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_watched_like_plain_ones(bits):
    x, weight = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True), torch.randn(32, 64)
    for w in (weight.bfloat16(), quantize(weight, bits)):
        with pytest.raises(NotImplementedError, match="decode_linear has no derivative"):
            decode_linear(x, w).sum().backward()
        with pytest.raises(NotImplementedError, match=r"decode_linear does not run under torch.func's vmap"):
            torch.vmap(lambda x, w=w: decode_linear(x, w))(x.detach())


@pytest.mark.host
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_weight_may_be_written_to(bits):
    x, weight = torch.randn(2, 64, dtype=torch.bfloat16), quantize(torch.randn(32, 64), bits)
    before = decode_linear(x, weight)
    for t in (weight.scale, weight.minimum):
        if t is not None:
            t.mul_(2)
    assert torch.equal(decode_linear(x, weight), 2 * before)


@pytest.mark.skipif(not INTERPRETED, reason="looks at the interpreter")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_of_bfloat16_in_the_interpreter(bits):
    x, weight = torch.randn(2, 64, dtype=torch.bfloat16), quantize(torch.randn(32, 64), bits)
    with use_backend("triton"):
        found = decode_linear(x, weight)
    exact = weight.dequantize(torch.float64)
    oracle.check(found, x.double() @ exact.T, torch.nn.functional.linear(x, exact.bfloat16()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 63)}, "decode_linear: x has 63 columns, expected 64 as weight"),
        ({"x": torch.randn(2, 64).half()}, "weight is torch.float32, expected torch.float16 as x"),
        ({"x": torch.tensor(1.0)}, "x is a scalar"),
        ({"weight": torch.randn(4, 64, 1)}, r"weight has shape \(4, 64, 1\), expected two axes"),
        ({"weight": torch.randn(5, 64), "activation": "swiglu"}, "weight has 5 rows, expected an even number for SwiGLU"),
        ({"activation": "gelu"}, "activation is 'gelu', expected None or 'swiglu'"),
        ({"norm": torch.randn(63)}, r"norm has shape \(63,\), expected \(64,\)"),
        ({"bias": torch.randn(3)}, r"bias has shape \(3,\), expected \(4,\)"),
        ({"residual": torch.randn(2, 5)}, r"residual has shape \(2, 5\), expected \(2, 4\)"),
        ({"residual": torch.randn(2, 4).to("meta")}, "residual is on meta, expected cpu as x"),
        ({"eps": -1.0}, "eps is -1.0, expected a finite number, at least 0"),
        ({"eps": float("nan")}, "eps is nan, expected a finite number, at least 0"),
        ({"eps": None}, "eps is NoneType, expected a number"),
        ({"eps": torch.tensor(1e-6, requires_grad=True)}, "eps requires a gradient"),
        ({"weight": quantize(torch.randn(4, 64), 8), "eps": -1.0}, "eps is -1.0, expected a finite number, at least 0"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        decode_linear(**{"x": torch.randn(2, 64), "weight": torch.randn(4, 64), **change})
    assert "\n" not in str(caught.value)
