"""decode_linear against the formula in float64: sizes, what is fused with it, views, bits, launches, quantised weights, errors."""

import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import decode_linear, reference, use_backend
from trillama.kernels.dispatch import INTERPRETED, observe
from trillama.kernels.quantized import QuantizedWeight, quantize

SIZES = [
    (1, 1), (16, 3), (63, 17), (96, 16), (100, 33), (256, 64), (576, 40), (1000, 31), (1536, 48), (2048, 20), (4096, 16), (5000, 9)
]  # fmt: skip
FUSED = [
    {}, {"norm": True}, {"activation": "swiglu"}, {"residual": True}, {"bias": True}, {"norm": True, "activation": "swiglu"},
    {"norm": True, "bias": True}, {"residual": True, "bias": True},
    {"norm": True, "activation": "swiglu", "residual": True, "bias": True},
]  # fmt: skip


FEW = not (INTERPRETED or torch.cuda.is_available())


def name(fused):
    return "-".join(fused) or "bare"


def arguments(lead, K, N, dtype, norm=False, activation=None, residual=False, bias=False):
    """x, weight and options; the outputs have variance one, as a model's have."""
    lead = (lead,) if isinstance(lead, int) else lead
    options = {"eps": 1e-5}
    if norm:
        options["norm"] = torch.rand(K).to(dtype) + 0.5
    if activation:
        options["activation"] = activation
    if bias:
        options["bias"] = torch.randn(N).to(dtype)
    if residual:
        options["residual"] = torch.randn(*lead, N // 2 if activation else N).to(dtype)
    return torch.randn(*lead, K).to(dtype), (torch.randn(N, K) * K**-0.5).to(dtype), options


def plain(weight, dtype):
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


def exactly(x, weight, norm=None, eps=1e-6, residual=None, activation=None, bias=None):
    x, norm, residual, bias = (t if t is None else t.double() for t in (x, norm, residual, bias))
    y = torch.einsum("...k,nk->...n", x if norm is None else oracle.rms_norm(x, norm, eps), plain(weight, torch.float64))
    if bias is not None:
        y = y + bias
    if activation:
        y = oracle.swiglu(*y.chunk(2, -1))
    return y if residual is None else y + residual


def run(device, x, weight, options):
    def move(t):
        return t.to(device) if isinstance(t, (torch.Tensor, QuantizedWeight)) else t

    xd, wd, moved = move(x), move(weight), {n: move(t) for n, t in options.items()}
    inside = (wd.data, wd.scale) if isinstance(wd, QuantizedWeight) else (wd,)
    same = oracle.unchanged(xd, *inside, *(t for t in moved.values() if isinstance(t, torch.Tensor)))
    y = decode_linear(xd, wd, **moved)
    same()
    oracle.check(y, exactly(x, weight, **options), reference.decode_linear(x, plain(weight, x.dtype), **options), fp32=2e-6)
    return y.cpu()


@pytest.mark.parametrize(("K", "N"), SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_sizes(triton, poisoned, device, dtype, K, N, rows):
    run(device, *arguments(rows, K, N, dtype))
    assert triton.names == ["_linear_kernel"]


@pytest.mark.parametrize("fused", FUSED, ids=name)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_what_is_fused(triton, poisoned, device, dtype, fused, rows):
    y = run(device, *arguments(rows, 320, 2 * 27, dtype, **fused))
    assert y.is_contiguous()
    assert triton.names == ["_linear_kernel"]


@pytest.mark.parametrize("K", [1, 40, 1024, 1500, 4096])
def test_norm_of_any_size(triton, poisoned, device, dtype, K):
    x, weight, options = arguments(3, K, 18, dtype, norm=True)
    run(device, 30 * x, weight, options)


@pytest.mark.parametrize("N", [2, 6, 32, 34, 66])
def test_swiglu_of_any_size(triton, poisoned, device, dtype, N):
    run(device, *arguments(2, 192, N, dtype, activation="swiglu"))


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (2, 1), (2, 3), (2, 2, 2), (0,), (3, 0)], ids=str)
def test_leading_axes(triton, poisoned, device, dtype, lead):
    y = run(device, *arguments(lead, 200, 24, dtype, norm=True, residual=True))
    assert y.shape == (*lead, 24)
    assert len(triton.names) == (0 if 0 in lead else 1)


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


@pytest.mark.parametrize("size", [2.0**-9, 300.0])
def test_large_and_small_values(triton, poisoned, device, dtype, size):
    x, weight, options = arguments(4, 512, 32, dtype, norm=True)
    run(device, (size * x).to(dtype), weight, {**options, "eps": 1e-12})


@pytest.mark.parametrize("fused", FUSED, ids=name)
def test_many_rows_take_the_library(triton, poisoned, device, dtype, fused):
    run(device, *arguments((3, 4), 128, 64, dtype, **fused))
    assert "_linear_kernel" not in triton.names


@pytest.mark.parametrize("fused", FUSED, ids=name)
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

KINDS = [(8, 32), (4, 32), (4, 64), (4, 128)]
kinds = pytest.mark.parametrize(("bits", "group"), KINDS, ids=["int8", "int4-32", "int4-64", "int4-128"])


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
@pytest.mark.parametrize("fused", FUSED, ids=name)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_quantised_products(triton, poisoned, device, dtype, bits, group, fused, rows):
    if FEW and (group == 64 or rows == 3 or len(fused) == 1 or (len(fused) == 2 and rows == 1)):
        pytest.skip("compiled and emulated: seconds each")
    x, weight, options = arguments(rows, 640, 34 if FEW else 130, dtype, **fused)  # one outlier among few would decide
    run(device, x, quantize(weight, bits, group), options)
    assert triton.names == ["_linear_kernel"]


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


@kinds
def test_quantised_rows_do_not_depend_on_their_neighbours(triton, device, dtype, bits, group):
    if INTERPRETED:
        pytest.skip("the interpreter's products come from a BLAS, which sums one row and eight in different order")
    x, weight, _ = arguments(8, 1024, 32, dtype)
    x, weight = x.to(device), quantize(weight, bits, group).to(device)
    together = decode_linear(x, weight)
    assert all(torch.equal(decode_linear(x[rows], weight), together[rows]) for rows in (slice(0, 1), slice(2, 5)))


def test_many_rows_dequantise_in_parts(triton, poisoned, device, dtype):
    x, weight, options = arguments((3, 4), 128, 64, dtype, norm=True, bias=True)
    run(device, x, quantize(weight, 4, 64), options)
    assert "_linear_kernel" not in triton.names


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
def test_torch_compile_and_opcheck():
    from trillama.kernels.linear import _op

    x, weight, options = arguments((2, 1), 64, 32, torch.float32, norm=True, activation="swiglu")
    with use_backend("reference"):
        compiled = torch.compile(lambda a, w: decode_linear(a, w, **options) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), decode_linear(x, weight, **options) * 2)
        torch.library.opcheck(_op, (x, weight, None, None, options["norm"], 1e-5, None, "swiglu", None))
        small = quantize(weight, 4)
        compiled = torch.compile(lambda a: decode_linear(a, small, **options), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), decode_linear(x, small, **options))
        torch.library.opcheck(_op, (x, small.data, small.scale, small.minimum, options["norm"], 1e-5, None, "swiglu", None))


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
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        decode_linear(**{"x": torch.randn(2, 64), "weight": torch.randn(4, 64), **change})
    assert "\n" not in str(caught.value)
