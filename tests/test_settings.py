"""An op computes what its arguments say, whatever the caller has set: autocast, precisions, defaults, grad mode."""

import contextlib
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from trillama import kernels as k
from trillama.bench import oracle
from trillama.kernels import dispatch, reference

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]


@contextlib.contextmanager
def during(setter, getter, value):
    before = getter()
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def fp32_precision(value, *places):
    """torch 2.9's settings; what stands there before is given back."""
    if dispatch._set_precision is None:
        pytest.skip("this torch has no fp32_precision")
    products = (("mkldnn", "matmul"), ("cuda", "matmul")) if places[0] == ("generic", "all") else ()  # which follow
    before = {place: dispatch._get_precision(*place) for place in (*places, *products)}
    for place in before:
        dispatch._set_precision(*place, value if place in places else "none")
    try:
        yield
    finally:
        for place, kept in before.items():
            dispatch._set_precision(*place, kept)


@contextlib.contextmanager
def default_device(name):
    with torch.device(name):  # what torch.set_default_device enters
        yield


def legacy(value):
    return during(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, value)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "matmul precision": lambda: legacy("medium"),
    "fp32_precision": lambda: fp32_precision("bf16", ("generic", "all")),
    "fp32_precision of products": lambda: fp32_precision("tf32", ("mkldnn", "matmul"), ("cuda", "matmul")),
    "deterministic": lambda: during(
        torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True
    ),
    "default float64": lambda: during(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "default bfloat16": lambda: during(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "no mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
}  # fmt: skip
UNGRADED = ("no_grad", "inference_mode")


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def attention_inputs(dtype=torch.float32):
    return randn(2, 4, 7, 16, dtype=dtype), randn(2, 2, 9, 16, dtype=dtype), randn(2, 2, 9, 16, seed=1, dtype=dtype)


def packed_inputs():
    return randn(11, 4, 16), randn(11, 2, 16), randn(11, 2, 16, seed=1)


STARTS = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
ANGLES = torch.outer(torch.arange(40.0), 0.5 ** torch.arange(6))
COS, SIN = ANGLES.cos(), ANGLES.sin()
LOGITS = randn(3, 40)


def appended(ops, q, key, v):
    caches = torch.zeros(2, 2, 2, 12, 16, device="cpu", dtype=torch.float32)
    return ops.rope_append_(q, key, v, COS, SIN, *caches, torch.arange(3, 8, device="cpu")), caches


def chosen(temperature):
    ids = torch.zeros(3, dtype=torch.int64, device="cpu")
    ended, finished = (torch.zeros(n, dtype=torch.bool, device="cpu") for n in (3, ()))
    state = torch.arange(3, dtype=torch.int64, device="cpu")
    ends = torch.tensor([7], device="cpu")
    k.choose_(LOGITS, ids, ended, finished, ends=ends, state=state, temperature=temperature, top_k=30, top_p=0.9)
    return ids, ended, finished, state


def embedded():
    lengths = torch.arange(3, dtype=torch.int32, device="cpu")
    return *k.embed_next_(torch.tensor([1, 5, 3], device="cpu"), randn(9, 8), lengths), lengths


# name: (function(ops, *inputs), inputs that get gradients); ops is trillama.kernels or its reference
CALLS = {
    "rms_norm": (lambda ops, x, w: ops.rms_norm(x, w), lambda: (randn(3, 5, 16), randn(16))),
    "rms_norm half": (
        lambda ops, x, w: ops.rms_norm(x, w, offset=1.0, casting="gemma"), lambda: (randn(3, 5, 16, dtype=torch.half), randn(16))
    ),
    "add_rms_norm": (lambda ops, x, r, w: ops.add_rms_norm(x, r, w), lambda: (randn(3, 16), randn(3, 16, seed=1), randn(16))),
    "swiglu": (lambda ops, g, u: ops.swiglu(g, u), lambda: (randn(3, 32), randn(3, 32, seed=1))),
    "swiglu half": (
        lambda ops, g, u: ops.swiglu(g, u), lambda: (randn(3, 32, dtype=torch.half), randn(3, 32, seed=1, dtype=torch.half))
    ),
    "apply_rope": (lambda ops, q, key: ops.apply_rope(q, key, COS, SIN), lambda: (randn(2, 4, 5, 16), randn(2, 2, 5, 16))),
    "flash_attention": (lambda ops, *t: ops.flash_attention(*t), attention_inputs),
    "flash_attention float64": (lambda ops, *t: ops.flash_attention(*t), lambda: attention_inputs(torch.float64)),
    "flash_attention half": (lambda ops, *t: ops.flash_attention(*t), lambda: attention_inputs(torch.half)),
    "flash_attention softcap": (
        lambda ops, *t: ops.flash_attention(*t, window=4, softcap=5.0, return_lse=True), attention_inputs
    ),
    "flash_attention_varlen": (
        lambda ops, *t: ops.flash_attention_varlen(*t, STARTS, STARTS, 7, 7, return_lse=True), packed_inputs
    ),
}  # fmt: skip
STEPS = {
    "rope_append_": lambda ops: appended(ops, randn(2, 4, 5, 16), randn(2, 2, 5, 16), randn(2, 2, 5, 16, seed=1)),
    "decode_attention": lambda ops: ops.decode_attention(
        randn(2, 4, 1, 16), randn(2, 2, 9, 16), randn(2, 2, 9, 16, seed=1), LENGTHS
    ),
    "decode_attention softcap": lambda ops: ops.decode_attention(
        randn(2, 4, 2, 16), randn(2, 2, 9, 16), randn(2, 2, 9, 16, seed=1), LENGTHS, softcap=4.0
    ),
    "decode_linear": lambda ops: ops.decode_linear(
        randn(2, 32), randn(24, 32), norm=randn(32), bias=randn(24), activation="swiglu", residual=randn(2, 12)
    ),
    "decode_linear rows": lambda ops: ops.decode_linear(randn(9, 32), randn(24, 32), norm=randn(32), residual=randn(9, 24)),
    "decode_linear int8": lambda ops: ops.decode_linear(randn(9, 32), QUANTISED[8], bias=randn(16)),
    "decode_linear int4": lambda ops: ops.decode_linear(randn(2, 32), QUANTISED[4]),
    "QuantizedWeight.linear": lambda ops: QUANTISED[8].linear(randn(9, 32)),
    "choose_": lambda ops: chosen(0.0),
    "choose_ drawn": lambda ops: chosen(0.8),
    "embed_next_": lambda ops: embedded(),
    "rope_tables": lambda ops: ops.rope_tables(10000.0, 16, 50, device="cpu"),
}  # fmt: skip
LENGTHS = torch.tensor([9, 5], dtype=torch.int32)
QUANTISED = {bits: k.quantize(randn(16, 32), bits) for bits in (8, 4)}


def flat(outputs):
    return [t.detach().clone() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]


def graded(ops, name, setting):
    """The outputs of a call and, as far as there are any, the gradients, both computed under the setting."""
    function, inputs = CALLS[name]
    leaves = [t.requires_grad_() for t in inputs()]
    with SETTINGS[setting]() if setting else contextlib.nullcontext():
        outputs = function(ops, *leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = flat(outputs)
        if setting not in UNGRADED:
            found += flat(torch.autograd.grad(outputs, leaves, [torch.ones_like(o, device="cpu") for o in outputs]))
    return found


def same(found, expected):
    for a, b in zip(found, expected, strict=False):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert torch.equal(a, b)


@pytest.mark.few(72)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CALLS)
def test_ops_and_their_gradients(name, setting):
    with k.use_backend("reference"):
        found, expected = graded(k, name, setting), graded(k, name, None)
    if setting in UNGRADED and "attention" in name:  # with no gradient to come the reference is torch's own function
        assert oracle.error(found[0], expected[0]) <= 2 * torch.finfo(found[0].dtype).eps
    else:
        same(found, expected)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", [name for name in CALLS if "float64" not in name])
def test_kernels_and_their_gradients(name):
    """But for TF32, which they use where the user has allowed it."""
    with k.use_backend("triton"):
        expected = graded(k, name, None)
        for setting in ("autocast", "deterministic", "default bfloat16", "default device"):
            same(graded(k, name, setting), expected)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CALLS)
def test_the_reference_called_directly(name, setting):
    """Its gradients are autograd's, which torch wants to be asked for outside autocast."""
    function, inputs = CALLS[name]
    expected = flat(function(reference, *inputs()))
    given = inputs()
    with SETTINGS[setting]():
        found = flat(function(reference, *given))
    same(found, expected)


@pytest.mark.parametrize("direct", [False, True], ids=["op", "reference"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", STEPS)
def test_decode_steps(name, setting, direct):
    ops = reference if direct else k
    with k.use_backend("reference"):
        expected = flat(STEPS[name](ops))
        with SETTINGS[setting]():
            found = flat(STEPS[name](ops))
    same(found, expected)


@pytest.mark.parametrize("setting", ["autocast", "default bfloat16", "default device", "deterministic"])
@pytest.mark.parametrize("name", ["decode_linear", "decode_linear rows", "decode_linear int8", "decode_attention", "rope_append_"])
def test_decode_steps_of_the_kernels(name, setting):
    with k.use_backend("triton"):
        expected = flat(STEPS[name](k))
        with SETTINGS[setting]():
            found = flat(STEPS[name](k))
    same(found, expected)


@pytest.mark.parametrize("direct", [False, True], ids=["op", "reference"])
@pytest.mark.parametrize("name", ["add_rms_norm", "flash_attention", "flash_attention softcap"])
def test_compiled_under_autocast(name, direct):
    """torch takes the gradients of a graph's own products as it takes the others' there: of the reference called directly too."""
    function, inputs = CALLS[name]
    ops = reference if direct else k
    with k.use_backend("reference"):
        compiled = torch.compile(lambda *t: function(ops, *t), fullgraph=True, dynamic=False, backend="aot_eager")
        expected, given = flat(function(ops, *inputs())), [t.requires_grad_() for t in inputs()]
        with SETTINGS["autocast"]():
            outputs = compiled(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = () if direct else torch.autograd.grad(outputs, given, [torch.ones_like(o) for o in outputs])
        for a, b in zip([*flat(outputs), *flat(gradients)], [*expected, *graded(k, name, None)[len(expected) :]]):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)


def precision_in_force(backend="mkldnn"):
    return dispatch._get_precision(backend, "matmul") if dispatch._get_precision else torch.get_float32_matmul_precision()


class Products(TorchFunctionMode):
    """Notes under which settings products are computed: this machine's may know no others."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        fused = getattr(function, "__name__", "").startswith("_scaled_dot_product_flash_attention_for_cpu")
        if fused or function in (torch.matmul, F.linear, F.scaled_dot_product_attention):
            self.found.append((torch.is_autocast_enabled("cpu"), precision_in_force()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", ["autocast", "matmul precision", "fp32_precision", "fp32_precision of products"])
@pytest.mark.parametrize("name", ["flash_attention", "flash_attention softcap", "decode_attention", "decode_linear int8"])
def test_products_are_float32(name, setting):
    with k.use_backend("reference"), SETTINGS[setting](), Products() as products:
        CALLS[name][0](k, *CALLS[name][1]()) if name in CALLS else STEPS[name](k)
        if name in CALLS:
            q, key, v = attention_inputs()
            for softcap in (None, 3.0):  # torch's fused kernels, and products
                out, lse = reference.attention(q, key, v, None, None, 0, softcap, True)
                reference.attention_backward(out, None, q, key, v, out, lse, 0.25, None, 0, softcap)
    assert len(products.found) >= (10 if name in CALLS else 1)
    assert set(products.found) <= {(False, "none"), (False, "ieee"), (False, "highest")}


def test_the_older_switch_tells_of_the_newer_ones():
    """It says "highest", without an error, only where products are float32: one look is enough."""
    if dispatch._set_precision is None:
        pytest.skip("this torch has no fp32_precision")
    values, places = ("none", "ieee", "tf32"), (("generic", "all"), ("mkldnn", "matmul"), ("cuda", "matmul"))
    said = set()
    for switch, *chosen in itertools.product(("highest", "high"), values, values, values):
        with legacy(switch), contextlib.ExitStack() as stack:
            for place, value in zip(places, chosen):
                stack.enter_context(fp32_precision(value, place))
            try:
                highest = torch._C._get_float32_matmul_precision() == "highest"
            except RuntimeError:
                highest = False
            low = any(precision_in_force(backend) == "tf32" for backend in ("mkldnn", "cuda"))
            said.add((highest, low))
    assert (True, False) in said
    assert (True, True) not in said


PLACES = ("generic", "all"), ("mkldnn", "all"), ("mkldnn", "matmul")


def in_force(own):
    """What torch says of the PLACES where these settings are their own: "none" follows the one before."""
    found = []
    for value in own:
        found.append(found[-1] if value == "none" and found else value)
    return found


@pytest.mark.parametrize("products", ["none", "ieee", "tf32", "bf16"])
@pytest.mark.parametrize("whole", ["none", "ieee", "bf16"])
@pytest.mark.parametrize("every", ["none", "ieee", "tf32"])
def test_precisions_are_put_back(every, whole, products):
    """Also whose they are: what followed another setting follows it afterwards."""
    if dispatch._set_precision is None:
        pytest.skip("this torch has no fp32_precision")

    def found():
        return [dispatch._get_precision(*place) for place in PLACES]

    def put(values):
        for place, value in zip(PLACES, values):
            dispatch._set_precision(*place, value)

    before = found()
    try:
        put((every, whole, products))
        with dispatch._Exact():
            assert found()[2] == "ieee"
        assert found() == in_force((every, whole, products))
        for changed in ("ieee", "tf32"):
            dispatch._set_precision(*PLACES[0], changed)
            assert found() == in_force((changed, whole, products))
        for changed in ("ieee", "tf32"):
            dispatch._set_precision(*PLACES[1], changed)
            assert found() == in_force(("tf32", changed, products))
    finally:
        put(before)


def test_the_older_switch_is_put_back():
    with legacy("high"):
        reference.flash_attention(*attention_inputs())
        assert torch.get_float32_matmul_precision() == "high"


def test_threads_share_the_setting():
    """The first that comes keeps what the user has set, the last that leaves puts it back."""
    inside, leave = threading.Event(), threading.Event()

    def other():
        with dispatch._Exact():
            inside.set()
            leave.wait(10)

    with legacy("medium"):
        assert precision_in_force() in ("bf16", "medium")
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
        reference.flash_attention(*attention_inputs())
        assert dispatch._Exact.inside == 1
        leave.set()
        thread.join()
        assert dispatch._Exact.inside == 0
        assert torch.get_float32_matmul_precision() == "medium"
