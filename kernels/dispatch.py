"""Which implementation runs and how a kernel is launched: what all ops share, once.

An op is one function `_op(...)` that asks `uses_triton` and either launches kernels or calls the reference. `register` makes a
`torch.library` custom op of it, so that torch.compile, autograd and FakeTensors see it; `call` takes the short way past the
dispatcher when none of them is watching. A public function is `remembered`: what it did for tensors of some shapes, strides and
dtypes it does again for others of the same, without checking, choosing and binding anew.
"""

import contextlib
import functools
import itertools
import math
import operator
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
    from triton.language import target_info
except ImportError:  # macOS, Windows: Triton has no wheels there, the reference path needs none
    triton = None

    class _Absent:
        """Stands for triton.language in kernel signatures, which are evaluated although nothing is ever compiled."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    tl = _Absent()

BACKENDS = ("auto", "triton", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
F = TypeVar("F", bound=Callable[..., Any])


def jit(fn=None, **options):
    """`triton.jit`, or the bare function where Triton is not installed."""
    if fn is None:
        return lambda f: jit(f, **options)
    return fn if triton is None else triton.jit(fn, **options)


@jit
def _probe(n):
    for _ in range(n):
        pass


_allocator = None if triton is None else triton.runtime._allocation._allocator
INTERPRETED = triton is not None and type(_probe).__name__ == "InterpretedFunction"
# The interpreter multiplies bfloat16 as raw bits: operands of tl.dot are widened there and nowhere else.
WIDEN = tl.constexpr(INTERPRETED)
_INTERPRETED = tl.constexpr(INTERPRETED)


# --- backend ---------------------------------------------------------------------------------------------------------

_chosen = None


class use_backend:
    """Choose the implementation: "auto" (Triton for GPU tensors, the reference for CPU tensors), "triton" or "reference".

    Takes effect at once and stays; used as `with use_backend(...):` it is undone at the end of the block.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        self.previous = _chosen
        _chosen = _known(name, "backend")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exception: object) -> None:
        global _chosen
        _chosen = self.previous


def _known(name, source):
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_ENCODED = {name: os.environ.encodekey(name) for name in ("TRILLAMA_BACKEND", "TRILLAMA_PDL")}


def environment(name):
    """os.environ.get(name), which takes two microseconds to say that there is nothing: first a look at the dict behind it."""
    variables = getattr(os.environ, "_data", None)
    if variables is not None and _ENCODED[name] not in variables:
        return None
    return os.environ.get(name)


def backend():
    """The backend in force: `use_backend`, else the environment's TRILLAMA_BACKEND, else "auto"."""
    return _chosen or _known(environment("TRILLAMA_BACKEND") or "auto", "TRILLAMA_BACKEND")


def uses_triton(x, dtypes=FLOATS):
    """Whether an op on the tensor `x` launches Triton kernels."""
    name = backend()
    if name == "reference":
        return False
    if name == "auto":
        return x.is_cuda and triton is not None and x.dtype in dtypes and not (INTERPRETED and interpreter_obstacle())
    if x.dtype not in dtypes:
        raise TypeError(f"the Triton kernels take {', '.join(str(d)[6:] for d in dtypes)}, not {str(x.dtype)[6:]}")
    if INTERPRETED or not x.is_cuda:
        reason = why_not_triton(x.device)
        if reason:
            raise RuntimeError(f"backend 'triton' was asked for, but {reason}")
    return True


def why_not_triton(device):
    """None where Triton kernels can run on tensors of `device`, else the reason, as half a sentence."""
    if triton is None:
        return "Triton is not installed"
    if INTERPRETED:
        return interpreter_obstacle()
    if device.type == "cuda":
        return None
    try:
        accepted = driver().get_active_torch_device().type
    except Exception:  # Triton reports a missing driver in a different way in each version
        accepted = None
    if accepted == device.type or device.type == "meta":
        return None
    return f"this is a {device.type} tensor, which Triton takes only under TRITON_INTERPRET=1"


@functools.cache
def interpreter_obstacle():
    """None where Triton's interpreter runs kernels, else the reason, as half a sentence. Triton 3.6's makes no number of an array
    of one, which numpy 2.4 and later refuse to do for it: none of its kernels comes past a loop. Tried rather than read from
    version numbers."""
    try:
        _probe[(1,)](1)
    except Exception as error:  # Triton hands on the cause as text within an error of its own
        import numpy

        reason = str(error).strip().splitlines()[-1]
        return f"the interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__} ({reason}): numpy<2.4 will do"
    return None


def driver():
    """The driver that Triton compiles and launches with."""
    return asked(_driver)


def _driver():
    return triton.runtime.driver.active


def architecture(x):
    """Compute capability as an integer (80, 90, ...) of the device that `x` is on, or the one Triton compiles for."""
    if x.is_cuda:
        return _capability(x.device)
    if INTERPRETED or triton is None:
        return 80
    arch = driver().get_current_target().arch
    return arch if isinstance(arch, int) else 80  # AMD: "gfx942"


def nvidia(x):
    """Whether the device that `x` is on, or the one Triton compiles for, is NVIDIA's."""
    if x.is_cuda:
        return torch.version.hip is None
    return not INTERPRETED and triton is not None and driver().get_current_target().backend == "cuda"


def register_limit(tile, x):
    """The option of a launch that says how many registers a thread may have, where the tile says it; AMD's compiler has none."""
    return {"maxnreg": tile.registers} if tile.registers and nvidia(x) else {}


_capabilities = {}


def _capability(device):
    if device not in _capabilities:
        major, minor = torch.cuda.get_device_capability(device)
        _capabilities[device] = 10 * major + minor if torch.version.hip is None else 80
    return _capabilities[device]


# --- launching -------------------------------------------------------------------------------------------------------

_observers = []


@contextlib.contextmanager
def observe(callback):
    """Within the block `callback(kernel, grid, arguments, options)` is told of every launch; if it returns True the launch is
    left out. This is how launches are counted and how the compiled code of a call is examined."""
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


def launch(kernel, grid, *arguments, **options):
    """kernel[grid](*arguments, **options) on the device of the first tensor; an empty grid launches nothing."""
    if 0 in grid:
        return
    for callback in _observers:
        if callback(kernel, grid, arguments, options):
            return
    with scratch(arguments[0]), _current(arguments[0].device):
        compiled = kernel[grid](*arguments, **options)
    if _own.tape is not None:
        _own.tape.launch(compiled, kernel, grid, arguments, options)


def _knobs():
    """What of Triton's settings is part of the compiled code."""
    knobs = triton.knobs
    return knobs.runtime.debug, knobs.compilation.instrumentation_mode, knobs.runtime.add_stages_inspection_hook


_nothing = contextlib.nullcontext()


def _current(device):
    """Within the block `device` is the current one: Triton launches there, not where the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" and device.index != torch.cuda.current_device() else _nothing


# --- programmatic dependent launch -----------------------------------------------------------------------------------

_dependent = None


class dependent_launch:
    """Whether the kernels of a decode step may be started while their predecessors still run (sm_90 and later; elsewhere nothing
    changes): they ask for what does not depend on these, then wait until they have ended. The environment's TRILLAMA_PDL=1 does
    the same.

    Takes effect at once and stays; used as `with dependent_launch(True):` it is undone at the end of the block.
    """

    def __init__(self, on):
        global _dependent
        self.previous = _dependent
        _dependent = on

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        global _dependent
        _dependent = self.previous


def dependence(x):
    """The launch options of a kernel that takes a flag PDL."""
    if not INTERPRETED and architecture(x) >= 90 and asked(_on):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def _on():
    return environment("TRILLAMA_PDL") == "1" if _dependent is None else bool(_dependent)


@jit
def release_dependents(PDL: tl.constexpr):
    """The first line of such a kernel. The next one may start as soon as all programs of this one have: it waits as well."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def await_inputs(PDL: tl.constexpr):
    """Until the kernel before has ended, and with it all that it waited for. Before this nothing may be written, and nothing read
    that any kernel of the step writes; every program comes by here, so that whoever waits for it waits for its predecessors too."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def prefetch(pointers):
    """Brings the 128 bytes around each address into the second-level cache."""
    tl.inline_asm_elementwise(
        "mov.u32 $0, 0; prefetch.global.L2 [$1];", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def uniform(x):
    """x, an int32 that all threads have alike, so that it shows: what follows from it then needs no register in each thread."""
    if _INTERPRETED:
        return x
    elif target_info.is_cuda():
        return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return x


class scratch:
    """Kernels that build tensor descriptors need memory for them: within the block Triton gets it from torch, on the device of x.
    An allocator that the user has set stays in force."""

    def __init__(self, x):
        self.device, self.token = x.device, None

    def __enter__(self):
        if isinstance(_allocator.get(), triton.runtime._allocation.NullAllocator):
            self.token = _allocator.set(self.allocate)

    def __exit__(self, *exception):
        if self.token is not None:
            _allocator.reset(self.token)

    def allocate(self, size, alignment, stream):
        return torch.empty(size, dtype=torch.int8, device=self.device)


def cdiv(a, b):
    return -(-a // b)


def next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


@jit
def row_offset(row, middle, inner, strides):
    """Element offset of flat row number `row` (int64) of a tensor whose leading axes `row_strides` gave."""
    if inner is None:
        offset = row * strides[0]
    elif middle is None:
        offset = row // inner * strides[0] + row % inner * strides[1]
    else:
        offset = row // inner // middle * strides[0] + row // inner % middle * strides[1] + row % inner * strides[2]
    return offset


def row_strides(*tensors):
    """(tensors, middle, inner, [strides of each tensor]): the leading axes of tensors of one shape [..., N] as at most three row
    axes.

    Neighbouring axes are merged where every tensor allows it, so that a contiguous tensor has one row axis and needs no division.
    Where more than three would be left, the fewest tensors that will do come back as contiguous copies, the others as they are.
    middle and inner are the sizes of the second last and the last of three axes; the last of two is inner, and what is missing
    is None. Kernels take both without specialisation: they change from step to step.
    """
    shape, steps = tensors[0].shape, [t.stride() for t in tensors]
    sizes, strides = _row_axes(shape, steps)
    if len(sizes) > 3:
        dense, places = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))], range(len(tensors))
        for copied in itertools.chain.from_iterable(itertools.combinations(places, n + 1) for n in places):
            sizes, strides = _row_axes(shape, [dense if place in copied else step for place, step in enumerate(steps)])
            if len(sizes) <= 3:
                break
        tensors = tuple(taped(torch.Tensor.contiguous, t) if place in copied else t for place, t in enumerate(tensors))
    middle, inner = ([None, None] + sizes[1:])[-2:]
    strides += [[0] * len(tensors)] * (3 - len(strides))
    return tensors, middle, inner, list(zip(*strides))


def _row_axes(shape, steps):
    """(sizes, strides) of the row axes of tensors of this shape with these strides, the strides a list for each axis."""
    sizes, strides, last = [], [], len(shape) - 2
    for axis in range(last + 1):
        size, step = shape[axis], [s[axis] for s in steps]
        if size == 1 and (sizes or axis < last):
            continue
        if sizes and all(before == s * size for before, s in zip(strides[-1], step)):
            sizes[-1] *= size
            strides[-1] = step
        else:
            sizes.append(size)
            strides.append(step)
    return sizes, strides


# --- torch.library ---------------------------------------------------------------------------------------------------


def register(name, function, fake, *, mutates=(), backward=None, setup_context=None, node=None):
    """A `torch.library` custom op trillama::name around `function`, which is annotated and works on every device.

    fake: shapes and dtypes of the result. backward(ctx, *gradients) and setup_context(ctx, inputs, output) as in
    `torch.library.register_autograd`. node: the autograd.Function for calls that only autograd watches, if not one of these two.
    """
    if not __name__.startswith("trillama."):
        # Where the repository's root is on sys.path, transformers takes this folder for Hugging Face's package `kernels` and
        # imports it. Registering a second time would make torch free the ops in use.
        return None

    @functools.wraps(function)
    def without_tangents(*arguments):
        if _dual(arguments) is not None:  # autograd has not followed the call: the tangents would end here
            raise _no_forward_mode(name)
        return function(*arguments)

    op = torch.library.custom_op(f"trillama::{name}", without_tangents, mutates_args=mutates)
    op.register_fake(fake)
    if backward is None and not mutates:
        backward = _refuse_derivative(name)
    op.node = node or (setup_context and _node(name, function, backward, setup_context))
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return op


def _node(name, function, backward, setup_context):
    """What `register_autograd` makes of the op, for calls that only autograd watches: the dispatcher costs more than a small op."""
    methods = {"forward": function, "setup_context": setup_context, "backward": backward}
    return type(name, (torch.autograd.Function,), {n: staticmethod(method) for n, method in methods.items()})


def _refuse_derivative(name):
    def backward(ctx, *gradients):
        forward = name.removesuffix("_backward")
        what = f"{forward} has no derivative" if forward == name else f"{forward} has no second derivative"
        raise NotImplementedError(f"{what}: only what the public functions call differentiable is")

    return backward


def _dual(arguments):
    """The first of the arguments that carries a tangent of forward-mode AD, else None."""
    if forward_ad._current_level >= 0:
        for a in arguments:
            if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
                return a
    return None


def _no_forward_mode(name):
    return NotImplementedError(f"{name} has no forward-mode derivatives here: call trillama.kernels.reference or use a backward")


def call(op, function, *arguments):
    """`op(*arguments)` if torch.compile, a tensor subclass or a dispatch mode has to see it, its node if only autograd has, else
    `function` directly: the dispatcher costs several microseconds a call, with gradients some hundred. Forward-mode AD follows the
    reference's own operations and no op."""
    if torch.compiler.is_compiling():  # first and alone: what follows cannot be traced
        return op(*arguments)
    if torch._C._functorch.maybe_current_level() is not None:
        transforms = {i.key().name for i in torch._C._functorch.get_interpreter_stack()} & {"Vmap", "Grad", "Jvp"}
        if transforms:  # torch would run a loop over the batch, or fail without saying why
            raise NotImplementedError(
                f"{op._name} does not run under torch.func's {'/'.join(sorted(transforms)).lower()}: "
                "pass the batch as leading axes and differentiate with torch.autograd"
            )
        return op(*arguments)
    dual = _dual(arguments)
    if dual is not None:
        if uses_triton(dual):
            raise _no_forward_mode(op._name)
        return function(*arguments)
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return op(*arguments)
    grad, differentiated = torch.is_grad_enabled(), False
    for a in arguments:
        if isinstance(a, torch.Tensor):
            if type(a) not in _PLAIN or a.is_neg():
                return op(*arguments)  # the dispatcher also negates what only says that it is to be: x.conj().imag
            differentiated = differentiated or (grad and a.requires_grad)
    if differentiated:
        return op(*arguments) if op.node is None else op.node.apply(*arguments)
    return function(*arguments) if _own.tape is None else _own.tape.call(function, arguments)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def call_back(op, function, *arguments):
    """`call` within a backward: a tangent that comes back along the graph is refused, by the op."""
    if torch.compiler.is_compiling() or _dual(arguments) is not None:
        return op(*arguments)
    return call(op, function, *arguments)


def unwatched(x):
    """Whether an op on x is a call of the reference and neither autograd nor torch.compile nor a dispatch mode would see more."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0 or type(x) not in _PLAIN:
        return False
    return not uses_triton(x) and not torch._C._len_torch_dispatch_stack()


def promoted(*tensors):
    """The tensors (None is passed on) in their widest dtype where autocast is on, which mixes dtypes; else as they are."""
    dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor)}
    if len(dtypes) < 2 or not torch.is_autocast_enabled(next(t for t in tensors if t is not None).device.type):
        return tensors
    widest = functools.reduce(torch.promote_types, dtypes)
    return tuple(None if t is None else t.to(widest) for t in tensors)


# --- the caller's settings -------------------------------------------------------------------------------------------


_precision, _autocast = torch._C._get_float32_matmul_precision, torch._C._is_any_autocast_enabled


def steady(function: F) -> F:
    """The function, whose matrix products are those of its tensors' dtypes whatever the caller has set: under autocast torch
    multiplies float32 in bfloat16, with `torch.set_float32_matmul_precision` or `fp32_precision` in TF32 or bfloat16."""

    @functools.wraps(function)
    def wrapper(*arguments, **named):
        if torch.compiler.is_dynamo_compiling():  # the graph's own products follow the precision that is set where it runs
            x = next(a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor))
            with torch.autocast(x.device.type, enabled=False):
                return function(*arguments, **named)
        try:
            usual = _precision() == "highest"
        except RuntimeError:  # torch 2.9's settings are in use
            usual = False
        if usual and not _Exact.inside and not _autocast():
            return function(*arguments, **named)
        with torch._C._DisableAutocast(), _Exact():
            return function(*arguments, **named)

    return wrapper


class _Exact:
    """Within the block float32 products are float32. The setting is the process's: the first thread that comes keeps what the
    user has set, the last that leaves puts it back."""

    lock, inside, kept = threading.Lock(), 0, None

    def __enter__(self):
        cls = type(self)
        with cls.lock:
            cls.inside += 1  # before: who finds the precision high looks whether it is so for now
            if cls.inside == 1:
                cls.kept = self.exchange("highest" if _set_precision is None else {"mkldnn": "ieee", "cuda": "ieee"})

    def __exit__(self, *exception):
        cls = type(self)
        with cls.lock:
            if cls.inside == 1:
                self.exchange(cls.kept)
            cls.inside -= 1

    @staticmethod
    def exchange(new):
        """Sets the precision of products; what was set before."""
        if _set_precision is None:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(new)
            return before
        before = {backend: _own_precision(backend) for backend in new}
        for backend, precision in new.items():
            _set_precision(backend, "matmul", precision)
        return before


# torch 2.9 and later has a precision for products, else for all of a backend, else for all. The older switch, which knows one, may
# then no longer be read if they differ, and says "highest" only where none of them is lower.
_set_precision = getattr(torch._C, "_set_fp32_precision_setter", None)
_get_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def _own_precision(backend):
    """What is set for the products of a backend themselves, "none" where they follow what is set for more. torch tells what is in
    force and not whose it is: that shows where the other changes."""

    def followers(wider):
        """Whether another precision for all of `wider` changes (the products', the backend's)."""
        before, kept = (_get_precision(backend, "matmul"), _get_precision(backend, "all")), _get_precision(wider, "all")
        _set_precision(wider, "all", "tf32" if kept == "ieee" else "ieee")
        after = _get_precision(backend, "matmul"), _get_precision(backend, "all")
        _set_precision(wider, "all", kept)
        return [now != then for now, then in zip(after, before)]

    products, whole = followers("generic")
    if not whole and not products:
        products, _ = followers(backend)
    return "none" if products else _get_precision(backend, "matmul")


# --- remembered calls ------------------------------------------------------------------------------------------------

MOST = 1024  # calls that a function remembers; then it begins anew
_NUMBERS = (int, float, bool, str, type(None))
_memories = []


class _Own(threading.local):
    tape = None  # what the call under way notes


_own = _Own()


def remembered(function: F) -> F:
    """The public function, which does again what it did for arguments that differ in the tensors' data alone, and only that.

    What `function` does is noted: `call`, `launch`, and `fresh` or `taped` for what else makes, views or writes a tensor. All of it
    must follow from shapes, strides, dtypes, devices, 16-byte alignment and numbers, and from what `asked` was asked. Nothing is
    noted, and all is done in full, where somebody watches: autograd, torch.compile, a tensor subclass, a dispatch mode, `observe`.
    """
    place = len(_memories)
    _memories.append({})

    @functools.wraps(function)
    def wrapper(*arguments, **named):
        if torch.compiler.is_compiling():
            return function(*arguments, **named)
        given = (*arguments, *named.values()) if named else arguments
        key, calls = _key(given, named), _memories[place]
        known = calls.get(key)
        if known is not None:
            answers, kept, steps, result = known
            for question, answer in answers:
                if question() != answer:
                    break
            else:
                values = [*given, *kept]
                for step in steps:
                    step(values)
                return result(values)
        if key is None:
            return function(*arguments, **named)
        outer, tape = _own.tape, _Tape(given)
        _own.tape = tape
        try:
            result = function(*arguments, **named)
        finally:
            _own.tape = outer
        give = tape.finder(result)
        if give is not None and tape.all_used():
            if len(calls) >= MOST:
                calls.clear()
            calls[key] = [*tape.answers.items()], tape.kept(), tape.steps, give
        return result

    return wrapper


def unseen(*arguments):
    """Whether nobody watches what is done with the arguments of a call: autograd, torch.compile, a mode, a subclass, `observe`."""
    return not torch.compiler.is_compiling() and _key(arguments, ()) is not None


def forget():
    """What was remembered of all calls: the tables that they followed have changed. What a call under way in another thread has
    followed is forgotten with them: it is noted in the memory that was there when it began."""
    for place in range(len(_memories)):
        _memories[place] = {}


def _key(given, names):
    """What a call does follows from this; None: it must be done in full."""
    if _observers or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return None
    if torch._C._functorch.maybe_current_level() is not None:
        return None
    grad = torch.is_grad_enabled()
    key = [backend(), *names]
    try:
        for a in given:
            kind = type(a)
            if kind in _PLAIN:
                key += (a.shape, a.dtype, a.device)
                if not a.is_contiguous():
                    key.append(a.stride())
                if a.requires_grad:
                    if grad:
                        return None
                    key.append("requires grad")
                if a.is_neg():
                    return None
                if a.data_ptr() % 16:
                    key.append("unaligned")
            elif kind in _NUMBERS:
                key += (kind, a)
            elif kind is tuple and all(type(n) in _NUMBERS for n in a):
                key += (kind, a, *map(type, a))
            else:
                return None
    except RuntimeError:  # a tensor without strides or memory
        return None
    return tuple(key)


def asked(question):
    """question(), on which what a remembered call does depends: it is asked again before."""
    answer = question()
    if _own.tape is not None:
        _own.tape.answers[question] = answer
    return answer


def taped(function, *arguments, **options):
    """function(*arguments, **options), which a remembered call does again, with its own tensors in the place of these."""
    if torch.compiler.is_compiling():
        return function(*arguments, **options)
    tape, _own.tape = _own.tape, None
    try:
        result = function(*arguments, **options)
    finally:
        _own.tape = tape
    if tape is not None:
        tape.step(function, arguments, options, result)
    return result


def unread(tensor):
    """Says that nothing is done with a tensor that was given: else a remembered call leaves none out."""
    if _own.tape is not None:
        _own.tape.used.add(_own.tape.places.get(id(tensor)))


def written(*tensors):
    """Counts a version of the tensors (None is passed over), as torch does of what it writes itself: autograd sees no kernel."""
    taped(_count, *(t for t in tensors if t is not None))


def _count(*tensors):
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def fresh(tensor):
    """The tensor, uninitialised, in whose place a remembered call makes another one."""
    if _own.tape is not None:
        _own.tape.fresh(tensor)
    return tensor


class _Tape:
    """What a call did, as steps on a list of values: those given, the constants, and places for what the steps make."""

    def __init__(self, given):
        self.answers, self.steps = {}, []
        self.values = [*given]  # tensors are kept for as long as they are known by their ids
        self.places = {id(t): place for place, t in enumerate(given) if isinstance(t, torch.Tensor)}
        self.clear = len(self.places) == sum(isinstance(t, torch.Tensor) for t in given)  # where every tensor comes from
        self.given, self.used, self.own = len(given), set(), set()  # own: places of what torch allocates for the call

    def kept(self):
        """What stands behind the values given, before the steps: no tensor is held."""
        return [None if isinstance(value, torch.Tensor) else value for value in self.values[self.given :]]

    def _add(self, value):
        """The place of a constant, or of what a step makes."""
        if isinstance(value, torch.Tensor):
            self.places[id(value)] = len(self.values)
        self.values.append(value)
        return len(self.values) - 1

    def _gatherer(self, arguments):
        """(what picks these arguments from the values, their places)"""
        places = []
        for a in arguments:
            if not isinstance(a, torch.Tensor):
                places.append(self._add(a))
            elif id(a) in self.places:
                places.append(self.places[id(a)])
            else:
                self.clear = False
                places.append(self._add(None))
        self.used.update(places)
        if len(places) == 1:
            return lambda values: (values[places[0]],), places
        return operator.itemgetter(*places) if places else lambda values: (), places

    def step(self, function, arguments, options, result):
        gather, _ = self._gatherer(arguments)
        if isinstance(result, tuple):
            made = slice(len(self.values), len(self.values) + len(result))
            for t in result:
                self._add(t)
        else:
            made = self._add(result)

        def step(values):
            values[made] = function(*gather(values), **options)

        self.steps.append(step)

    def fresh(self, tensor):
        place, shape, strides = self._add(tensor), tensor.shape, tensor.stride()
        with torch.inference_mode(False):  # a method of a tensor takes a third less time than torch.empty_strided
            make = torch.empty(0, dtype=tensor.dtype, device=tensor.device).new_empty_strided

        def step(values):
            values[place] = make(shape, strides)

        self.steps.append(step)
        self.own.add(place)

    def call(self, function, arguments):
        """function(*arguments), noted as the launches it makes, or as one step where they are not all there is to it."""
        before, steps, values = (dict(self.places), self.used.copy(), self.clear), len(self.steps), len(self.values)
        self.launched = False
        result = function(*arguments)
        if not self.launched or self.finder(result) is None:
            self.places, self.used, self.clear = before
            del self.steps[steps:], self.values[values:]
            self.step(function, arguments, {}, result)
        return result

    def launch(self, compiled, kernel, grid, arguments, options):
        """The launch of the compiled kernel, as `kernel[grid]` gave it: all parameters by position, constants too."""
        if torch.version.hip is not None or not isinstance(compiled, triton.compiler.CompiledKernel):
            self.clear = False  # AMD's code also depends on how large storages are; the interpreter has none
            return
        asked(_driver)
        asked(_knobs)
        gather, places = self._gatherer([*arguments, *(options[name] for name in kernel.arg_names[len(arguments) :])])
        # Of what was given the key says how it is aligned, and what torch allocates is; a view made on the way need not be.
        views = [p for p in places if p >= self.given and p not in self.own and isinstance(self.values[p], torch.Tensor)]
        aligned = [(p, self.values[p].data_ptr() % 16 == 0) for p in views]
        run = compiled[(*grid, 1, 1)[:3]]
        anew = functools.partial(kernel[grid], **{n: o for n, o in options.items() if n not in kernel.arg_names})
        needs_scratch = compiled.metadata.global_scratch_size
        index = arguments[0].device.index if arguments[0].is_cuda else None

        def step(values):
            now = anew if kernel.pre_run_hooks else run
            for place, answer in aligned:
                if (values[place].data_ptr() % 16 == 0) != answer:
                    now = anew
            filled = gather(values)
            if needs_scratch or (index is not None and index != torch.cuda.current_device()):
                with scratch(filled[0]), _current(filled[0].device):
                    now(*filled)
            else:
                now(*filled)

        self.steps.append(step)
        self.launched = True

    def all_used(self):
        """Whether the steps take every tensor given: of others, as of a number in a tensor, the value may have mattered."""
        return all(p in self.used for p, t in enumerate(self.values[: self.given]) if isinstance(t, torch.Tensor))

    def finder(self, result):
        """What finds the result among the values, or None where the steps do not lead there."""
        if result is None:
            return _nowhere if self.clear else None
        places = [self.places.get(id(t)) for t in (result if isinstance(result, tuple) else (result,))]
        return operator.itemgetter(*places) if self.clear and None not in places else None


def _nowhere(values):
    return None


# --- argument checks -------------------------------------------------------------------------------------------------


def check(condition, message):
    """ValueError with `message` (a function of no arguments, so that the text costs nothing when all is well)."""
    if not condition:
        raise ValueError(message())


def number(op, name, x):
    """x as a float: a number of Python or numpy, or a tensor of one element that no gradient is asked of."""
    if type(x) is float or isinstance(x, (torch.SymFloat, torch.SymInt)):
        return x
    if isinstance(x, torch.Tensor) and ((x.requires_grad and torch.is_grad_enabled()) or _dual([x]) is not None):
        raise ValueError(f"{op}: {name} requires a gradient, which this op does not give: expected a number or a detached tensor")
    try:
        return float(None if isinstance(x, str) else x)  # "1.0" is no number
    except (TypeError, ValueError, RuntimeError):  # no number, or more than one
        raise TypeError(f"{op}: {name} is {_described(x)}, expected a number") from None


def finite(op, name, x):
    """`number`, which is neither infinite nor NaN."""
    x = number(op, name, x)
    check(-math.inf < x < math.inf, lambda: f"{op}: {name} is {x}, expected a finite number")
    return x


def whole(op, name, x, expected="an integer"):
    """x as an int: an integer of Python or numpy, or an integer tensor of one element."""
    if type(x) is int or isinstance(x, torch.SymInt):
        return x
    try:
        return operator.index(x)
    except (TypeError, ValueError, RuntimeError):
        kind = ValueError if isinstance(x, float) else TypeError
        raise kind(f"{op}: {name} is {_described(x)}, expected {expected}") from None


def _described(x):
    if isinstance(x, torch.Tensor):
        return f"a {x.dtype} tensor of shape {tuple(x.shape)}"
    return f"{x!r}" if isinstance(x, (int, float, str)) else type(x).__name__


def host_sees(*tensors):
    """Whether the values of the tensors (None is passed over) can be looked at without a wait for a GPU, and mean something."""
    return all(t is None or (t.device.type == "cpu" and type(t) in _PLAIN) for t in tensors) and not torch.compiler.is_compiling()


def check_same(op, same_dtype=True, optional=(), **tensors):
    """All tensors (None is skipped where it is optional) are floating-point and share device and, unless told otherwise, dtype with
    the first."""
    (name, x), *others = ((n, t) for n, t in tensors.items() if t is not None or n not in optional)
    for n, t in ((name, x), *others):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {n} is {type(t).__name__}, expected a tensor")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{op}: {n} is {t.dtype}, expected a floating-point dtype")
        if same_dtype and t.dtype != x.dtype:
            raise TypeError(f"{op}: {n} is {t.dtype}, expected {x.dtype} as {name}")
        if t.device != x.device:
            raise ValueError(f"{op}: {n} is on {t.device}, expected {x.device} as {name}")
