"""What a call costs on the host: what was done once is not done again, and it is nevertheless the same call."""

import os
import random
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from trillama import kernels as k
from trillama.bench.cases import available, case
from trillama.kernels import dispatch, glu, use_backend
from trillama.kernels.compat import flash_attn
from trillama.kernels.dispatch import INTERPRETED, observe, remembered


def arguments(op, device, dtype="fp16", seed=0):
    torch.manual_seed(seed)
    return case(op, "SmolLM2-135M", tokens=3 if op == "flash_attention" else 1, context=40, dtype=dtype).inputs(device)


def run(op, given):
    """What a call returns and what it has written."""
    function = getattr(k, op.split(" ")[0])
    with torch.no_grad():
        result = function(**given)
    result = result if isinstance(result, tuple) else (result,)
    return [*result, *(t for t in given.values() if isinstance(t, torch.Tensor))]


@pytest.fixture
def checks(monkeypatch):
    """How often swiglu has checked its arguments."""
    made = []
    monkeypatch.setattr(glu, "check_same", lambda *a, **named: made.append(a) or dispatch.check_same(*a, **named))
    dispatch.forget()
    return made


@pytest.mark.few(8)
@pytest.mark.parametrize("op", [op for op in available() if "int" not in op])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_remembered_call_is_the_call(op, backend, device):
    """The same bits as in full, for other data and in other tensors."""
    dispatch.forget()
    with use_backend(backend):
        with observe(lambda *launch: None):
            expected = run(op, arguments(op, device, seed=1))
        run(op, arguments(op, device))
        kept = sum(map(len, dispatch._memories))
        assert kept
        found = run(op, arguments(op, device, seed=1))
        assert sum(map(len, dispatch._memories)) == kept
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a is b is None or (a.stride() == b.stride() and torch.equal(a, b))


def elsewhere(t, how):
    """The same numbers in memory of another kind."""
    if how == "parameter":
        return torch.nn.Parameter(t.clone())
    if how == "every other" and t.dim() > 1:
        return torch.stack((t, t), -1).flatten(-2)[..., ::2]
    if how == "8 bytes on":
        begin = 8 // t.element_size()
        return torch.cat((t.new_zeros(begin), t.flatten()))[begin:].view(t.shape)
    if how == "transposed" and t.dim() == 4:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t.clone()


@pytest.mark.few(4)
@pytest.mark.parametrize("op", [op for op in available() if "int" not in op and "choose_" not in op])
def test_strides_and_addresses_at_random(op, device):
    """Calls that differ in how their tensors lie, and in whether one is passed twice, in any order: each as if the first."""
    dispatch.forget()
    pick = random.Random(op)
    ways = ("parameter", "every other", "8 bytes on", "transposed", "plain")
    for seed in range(8):
        given = arguments(op, device, "fp32", seed)
        names = [n for n, t in given.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
        hows = {n: pick.choice(ways[n in ("cos", "sin") :]) for n in names if not n.endswith("_cache")}
        twins = [n for n in names if n != names[0] and given[n].shape == given[names[0]].shape and not n.endswith("_cache")]
        twin = pick.choice(twins) if twins and pick.random() < 0.3 else None

        def made(given=given, hows=hows, twin=twin, first=names[0]):
            new = {n: elsewhere(t, hows.get(n)) if isinstance(t, torch.Tensor) else t for n, t in given.items()}
            return {**new, twin: new[first]} if twin else new

        with observe(lambda *launch: None):  # in full
            expected = run(op, made())
        for again in range(2):
            found = run(op, made())
            assert len(found) == len(expected)
            for a, b in zip(found, expected):
                assert a is b is None or (a.stride() == b.stride() and torch.equal(a, b)), (seed, again, hows, twin)
    assert sum(map(len, dispatch._memories))


host = pytest.mark.host


@host
def test_what_is_equal_is_checked_once(checks):
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    for _ in range(5):
        k.swiglu(torch.randn(3, 8), torch.randn(3, 8))
    assert len(checks) == 1
    for count, (x, y) in enumerate(
        [
            (a.double(), b.double()), (a.T, b.T), (a.T, b.view(8, 3)), (a[:2], b[:2]), (a.flatten(), b.flatten()),
            (torch.empty(33)[1:9], torch.empty(33)[1:9]), (a.to("meta"), b.to("meta")),
        ],
        2,
    ):  # fmt: skip
        k.swiglu(x, y)
        k.swiglu(x, y)
        assert len(checks) == count
    k.swiglu(gate=a, up=b)
    k.swiglu(up=b, gate=a)
    assert torch.equal(k.swiglu(up=b, gate=a), k.swiglu(a, b))


@host
def test_errors_are_never_remembered():
    x, w = torch.randn(2, 4), torch.randn(4)
    for _ in range(1000):
        k.rms_norm(x, w)
        with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(5,\), expected \(4,\) as the last axis of x"):
            k.rms_norm(x, torch.empty(5))
    with pytest.raises(ValueError, match="casting is 'hf'"):
        k.rms_norm(x, w, casting="hf")
    with pytest.raises(TypeError, match="swiglu: up is NoneType, expected a tensor"):
        k.swiglu(x, None)
    with pytest.raises(TypeError, match="swiglu: up is list, expected a tensor"):
        k.swiglu(x, [1])
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        k.swiglu(x)
    with pytest.raises(ValueError, match="expected cpu as x"):
        k.rms_norm(x, w.to("meta"))
    q, tables = torch.randn(1, 2, 3, 8), torch.randn(3, 4)
    with torch.no_grad():  # a table that requires a gradient is refused there too
        k.apply_rope(q, q.clone(), tables, tables.clone())
        with pytest.raises(ValueError, match="cos requires a gradient"):
            k.apply_rope(q, q.clone(), tables.clone().requires_grad_(), tables)


@host
def test_numbers_of_one_value_are_not_one_number():
    q, key, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    k.flash_attention(q, key, v, window=1)
    with pytest.raises(ValueError, match=r"window is 1\.0, expected a positive integer"):
        k.flash_attention(q, key, v, window=1.0)
    first = k.flash_attention(q, key, v, scale=torch.tensor(0.5))  # a number in a tensor: its value is no part of a shape
    assert torch.equal(first, k.flash_attention(q, key, v, scale=0.5))
    assert torch.equal(k.flash_attention(q, key, v, scale=torch.tensor(0.25)), k.flash_attention(q, key, v, scale=0.25))


@host
def test_one_tensor_in_two_places():
    dispatch.forget()
    a, b = torch.randn(2, 8), torch.randn(2, 8)
    k.swiglu(a, a)
    expected = torch.nn.functional.silu(a) * b
    assert torch.allclose(k.swiglu(a, b), expected)
    assert torch.allclose(k.swiglu(a, b), expected)
    assert torch.allclose(k.swiglu(b, b), torch.nn.functional.silu(b) * b)


@host
def test_memory_is_bounded_and_holds_no_tensor(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST", 8)
    dispatch.forget()
    for n in range(1, 30):
        x = torch.randn(n, 4)
        gone = weakref.ref(x)
        k.rms_norm(x, None)
        assert max(map(len, dispatch._memories)) <= 8
    del x
    assert gone() is None


@host
def test_whoever_watches_sees_it():
    """After the call has been remembered as after none."""
    x, w = torch.randn(2, 8), torch.randn(8, requires_grad=True)
    with torch.no_grad():
        plain = k.rms_norm(x, w)
        assert not plain.requires_grad
        plain = k.rms_norm(x, w)
    (gradient,) = torch.autograd.grad(k.rms_norm(x, w).sum(), w)
    assert gradient.shape == (8,)
    with torch.inference_mode():
        k.rms_norm(x, w)
        assert k.rms_norm(x, w).is_inference()
    assert not k.rms_norm(x, w.detach()).is_inference()

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        k.rms_norm(x, w)
    assert seen[0] == "trillama.rms_norm.default"

    class Own(torch.Tensor):
        pass

    assert type(k.rms_norm(x.as_subclass(Own), w.detach())) is Own
    with torch._subclasses.FakeTensorMode() as mode:
        assert k.rms_norm(mode.from_tensor(x), None).shape == (2, 8)
    with pytest.raises(NotImplementedError, match=r"rms_norm does not run under torch.func's vmap"):
        torch.vmap(lambda x: k.rms_norm(x, None))(x)
    compiled = torch.compile(lambda x: k.rms_norm(x, w), fullgraph=True, backend="eager", dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, 8)
        assert torch.equal(compiled(x), k.rms_norm(x, w))
    half = x.bfloat16()
    with pytest.raises(TypeError, match=r"up is torch.float32, expected torch.bfloat16"):
        k.swiglu(half, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert k.swiglu(half, x).dtype == torch.float32
    with pytest.raises(TypeError, match=r"up is torch.float32, expected torch.bfloat16"):
        k.swiglu(half, x)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_only_says_that_it_is_negated(backend, device):
    """The imaginary part of a conjugate: memory of the other sign, and strides and dtype as of any other tensor."""
    numbers, up = torch.randn(3, 16, dtype=torch.complex64, device=device), torch.randn(3, 16, device=device)
    plain, negated = numbers.imag, numbers.conj().imag
    assert negated.is_neg()
    with use_backend(backend), torch.no_grad():
        for gate in (negated, plain, plain, negated, negated):
            assert torch.allclose(k.swiglu(gate, up), torch.nn.functional.silu(gate) * up, atol=1e-5)


@host
def test_forward_mode_derivatives(monkeypatch):
    """The reference has them; the kernels say that they have none, as a dual tensor looks like any other."""
    x, tangent = torch.randn(2, 8), torch.randn(2, 8)
    k.swiglu(x, x.clone())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        out = forward_ad.unpack_dual(k.swiglu(dual, x)).tangent
        assert out is not None
        with use_backend("triton"), pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            k.swiglu(dual, x)


@host
def test_the_backend_may_change_between_calls(monkeypatch):
    launched = []
    monkeypatch.setattr(glu, "launch", lambda *launch, **options: launched.append(launch))
    a, b = torch.randn(2, 8), torch.randn(2, 8)
    for _ in range(3):
        with use_backend("reference"):
            k.swiglu(a, b)
        assert not launched
    if not INTERPRETED:
        return
    for _ in range(2):
        with use_backend("triton"):
            k.swiglu(a, b)
        assert len(launched) == 1
        launched.clear()
        monkeypatch.setenv("TRILLAMA_BACKEND", "triton")
        k.swiglu(a, b)
        assert len(launched) == 1
        launched.clear()
        monkeypatch.setenv("TRILLAMA_BACKEND", "reference")
        k.swiglu(a, b)
        assert not launched
    monkeypatch.setenv("TRILLAMA_BACKEND", "gpu")
    with pytest.raises(ValueError, match="TRILLAMA_BACKEND is 'gpu'"):
        k.swiglu(a, b)


@host
def test_threads_do_not_mix():
    failed = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(200):
            a, b = torch.randn(2, i % 9 + 1, 4, generator=generator)
            if not torch.allclose(k.swiglu(a, b), torch.nn.functional.silu(a) * b, atol=1e-6):
                failed.append((seed, i))

    dispatch.forget()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed


@host
def test_a_function_may_call_others_and_views():
    """What a remembered function makes on the way is made again; what nobody can tell is not remembered."""

    @remembered
    def turned(x, y):
        return dispatch.taped(torch.Tensor.transpose, dispatch.taped(torch.add, x, y), 0, 1)

    @remembered
    def careless(x, y):
        return (x + y).T

    for function, place, kept in ((turned, -2, 1), (careless, -1, 0)):
        for _ in range(3):
            x, y = torch.randn(2, 3), torch.randn(2, 3)
            assert torch.equal(function(x, y), (x + y).T)
        assert len(dispatch._memories[place]) == kept


def packed():
    q, key, v = (torch.randn(7, h, 16) for h in (4, 2, 2))
    cuts = torch.tensor([0, 3, 7], dtype=torch.int32)
    return {"q": q, "k": key, "v": v, "cu_seqlens_q": cuts, "cu_seqlens_k": cuts.clone(), "max_seqlen_q": 4, "max_seqlen_k": 4}


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_views_before_and_after_are_made_again(backend, device):
    """Packed sequences, and flash-attn's axes: [B, S, H, D]."""
    dispatch.forget()
    calls = (
        (k.flash_attention_varlen, packed, {"return_lse": True}),
        (flash_attn.flash_attn_varlen_func, packed, {"window_size": (2, 0)}),
        (flash_attn.flash_attn_func, lambda: dict(zip("qkv", torch.randn(3, 1, 5, 2, 16))), {"window_size": (2, 1)}),
    )
    for count, (function, given, options) in enumerate(calls, 1):
        for _ in range(3):
            inputs = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in given().items()}
            with use_backend(backend):
                found = function(**inputs, **options)
                assert sum(map(len, dispatch._memories)) == count
                expected = function.__wrapped__(**inputs, **options)
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected))):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()


# --- what is launched, in a process in which Triton compiles ---------------------------------------------------------------

BEGIN = """
import torch, triton, weakref
from triton.runtime.jit import JITFunction
from trillama import kernels as k
from trillama.bench import host, tune
from trillama.bench.cases import available, case
from trillama.kernels import dispatch, tuning, use_backend

entered, launched, run = [], [], JITFunction.run
JITFunction.run = lambda self, *a, **named: entered.append(self.__name__) or run(self, *a, **named)

class Launcher(host.Idle.launcher_cls):
    def __init__(self, source, metadata):
        super().__init__(source, metadata)
        self.name = metadata.name, metadata.num_warps, metadata.launch_pdl

    def __call__(self, *arguments):
        launched.append((self.name, arguments))

host.Idle.launcher_cls = Launcher

def made(function):
    "(kernels that Triton bound, what was launched) by the call"
    entered.clear(), launched.clear()
    function()
    return list(entered), [(name, [a for a in arguments]) for name, arguments in launched]

def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return type(a) is type(b) and (a == b or type(a).__name__ == "LazyDict")  # what hooks are told

torch.set_grad_enabled(False)
"""


def compiling(code):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND", "TRILLAMA_PDL")}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@host
def test_a_remembered_launch_is_the_launch():
    """Of every op: Triton binds no arguments anew, and its launcher gets what it got before, but for the tensors."""
    pytest.importorskip("triton")
    compiling("""
with host.idle():
    for op in available():
        function = getattr(k, op.split(" ")[0])
        inputs = [case(op, "SmolLM2-135M", tokens=1, context=600, dtype="bf16").inputs() for _ in range(2)]
        if "int" in op:
            inputs = inputs[:1] * 2
        first, before = made(lambda: function(**inputs[0]))
        second, after = made(lambda: function(**inputs[1]))
        assert len(first) == 1 and not second, (op, first, second)
        ((kernel, before),), ((again, after),) = before, after
        assert kernel == again and len(before) == len(after), op
        assert all(map(same, before, after)), (op, before, after)
        given = {t.data_ptr() for t in inputs[1].values() if isinstance(t, torch.Tensor)}
        got = {t.data_ptr() for t in after if isinstance(t, torch.Tensor)}
        if "int" not in op:
            assert given - got <= {inputs[1]["state"].data_ptr()} if "state" in inputs[1] else given <= got, op
    with_descriptors = case("flash_attention", "SmolLM2-135M", tokens=64).inputs()
    for _ in range(2):
        k.flash_attention(**with_descriptors)
    assert launched[-1][0][0] == "_forward_kernel"
""")


@pytest.mark.slow
@host
def test_what_a_launch_depends_on():
    pytest.importorskip("triton")
    compiling("""
x, w = torch.randn(2, 64), torch.randn(64)
unaligned = torch.randn(2 * 64 + 1)[1:].view(2, 64)
q, kv = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 600, 64)
lengths = torch.tensor([3], dtype=torch.int32)

def norm(x=x):
    return made(lambda: k.rms_norm(x, w))

def decode():
    return made(lambda: k.decode_attention(q, kv, kv.clone(), lengths))

def last():
    return launched[-1][0]

with host.idle():
    assert norm()[0] and not norm()[0]
    assert norm(unaligned)[0] and not norm(unaligned)[0] and not norm()[0]
    # tables
    tile = tuning.rows(64, 4)
    with tune.entries({("rows", (64, 4)): {"warps": 2 * tile.warps}}):
        assert norm()[0] and last()[1] == 2 * tile.warps and not norm()[0]
    assert norm()[0] and last()[1] == tile.warps
    # hooks and settings of Triton's
    entered_hook = []
    enter = lambda metadata: entered_hook.append(metadata.get()["name"])
    triton.knobs.runtime.launch_enter_hook.add(enter)
    made(lambda: k.rms_norm(x, w))
    assert launched[-1][1][7] is triton.knobs.runtime.launch_enter_hook and launched[-1][1][6].get()["name"] == "_rms_norm_kernel"
    triton.knobs.runtime.launch_enter_hook.remove(enter)
    from trillama.kernels.rmsnorm import _rms_norm_kernel
    before = []
    _rms_norm_kernel.add_pre_run_hook(lambda *a, **named: before.append(named["num_warps"]))
    norm()
    assert before == [tile.warps], before
    _rms_norm_kernel.pre_run_hooks.clear()
    assert not norm()[0]
    triton.knobs.runtime.debug = True
    assert norm()[0]
    triton.knobs.runtime.debug = False
    assert norm()[0] and not norm()[0]
    # switches
    assert decode()[0] and not decode()[0] and not last()[2]
    with dispatch.dependent_launch(True):
        assert decode()[0] and last()[2] and not decode()[0] and last()[2]
    assert decode()[0] and not last()[2]
    torch.backends.cuda.matmul.allow_tf32 = True
    assert decode()[0]
    assert "tf32" in launched[-1][1][-9:], launched[-1][1][-9:]
    torch.backends.cuda.matmul.allow_tf32 = False
    assert decode()[0] and "tf32x3" in launched[-1][1][-9:]
    # somebody looks on
    with dispatch.observe(lambda *launch: True):
        assert norm() == ([], [])
    with dispatch.observe(lambda *launch: False):
        assert norm()[0] and launched
    assert not norm()[0]
    # counters of a step
    from trillama.kernels.decode import counters
    with counters("cpu") as shared:
        decode()
        assert any(a is shared for a in launched[-1][1])
    decode()
    assert not any(a is shared for a in launched[-1][1])
with host.idle("sm_80"):
    assert norm()[0] and decode()[0]
    assert not norm()[0] and not decode()[0]
""")


@host
def test_a_second_call_is_cheaper():
    """Than one in full, in the same process: by more than twice, where four times and more are measured (bench/LOG.md)."""
    pytest.importorskip("triton")
    compiling("""
a, b = torch.randn(1, 64), torch.randn(1, 64)
norm = torch.randn(64)
with host.idle():
    for function, given in ((k.swiglu, (a, b)), (k.add_rms_norm, (a, b, norm))):
        again, full = (host.seconds(lambda: f(*given)) for f in (function, function.__wrapped__))
        assert 2 * again < full, (function, again, full)
""")


@host
def test_a_stride_that_means_nothing_is_no_reason_to_refuse():
    """Of an axis of size 1: contiguous tensors are one to a remembered call, whichever was first."""
    q, logits = torch.randn(0, 2, 16), (torch.randn(2, 1), torch.as_strided(torch.randn(8), (2, 1), (1, 3)))
    for first in (0, 1):
        dispatch.forget()
        for turn in (first, 1 - first):
            nothing = (torch.zeros(2, dtype=torch.int32)[1:], torch.zeros(4, dtype=torch.int32)[::4])[turn]
            assert nothing.is_contiguous()
            out = k.flash_attention_varlen(q, q, q, nothing, nothing, 1, 1)
            assert out.shape == (0, 2, 16)
            ids, ended, finished = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), torch.tensor(False)
            k.choose_(logits[turn], ids, ended, finished, ends=torch.tensor([5]))
            assert ids.tolist() == [0, 0]


@pytest.mark.few(1)
@host
@pytest.mark.parametrize("variable", ["TRITON_INTERPRET", "TRILLAMA_BACKEND"])
def test_the_cost_is_not_of_the_interpreter(variable):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")}
    environment[variable] = {"TRITON_INTERPRET": "1", "TRILLAMA_BACKEND": "triton"}[variable]
    command = [sys.executable, "-m", "trillama.bench.host", "swiglu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if variable == "TRILLAMA_BACKEND":
        assert done.returncode == 0, done.stderr[-2000:]
        assert "swiglu" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr == "trillama: error: TRITON_INTERPRET is set, under which nothing is launched: unset it\n"


def test_a_call_under_way_is_forgotten_too():
    """Other tables have taken the place of those that it follows: what it did is not done again."""
    asked = []

    @dispatch.remembered
    def double(x):
        asked.append(x)
        if len(asked) == 1:
            dispatch.forget()  # as another thread does meanwhile
        return dispatch.taped(torch.mul, x, 2)

    try:
        for _ in range(3):
            assert double(torch.ones(3)).tolist() == [2, 2, 2]
        assert len(asked) == 2
    finally:
        dispatch._memories.pop()
