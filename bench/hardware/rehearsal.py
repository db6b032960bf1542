"""A GPU that is only pretended, so that every line written for one can run where there is none.

Within `pretend()` tensors lie in host memory and say that they are on "cuda:0", whatever is asked for "cuda" comes from there, and
torch.cuda is what stands here: a clock that goes on by 50 ms at every look at it, streams that do at once what they are given, and
graphs that record what is dispatched and do it again at every replay, on the same tensors, as CUDA's do. Triton's kernels run in
its interpreter, or the reference in their place where there is no Triton. Values are therefore real; times mean nothing.
"""

import contextlib
import importlib.util
import itertools
import os
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from . import PRETENDED

HERE = torch.device("cuda", 0)
_ticks = itertools.count(1)


def environment():
    """What the processes that rehearse need in their environment: Triton decides at import whether it interprets."""
    os.environ.update({"TRITON_INTERPRET": "1"} if importlib.util.find_spec("triton") else {"TRILLAMA_BACKEND": "reference"})
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@contextlib.contextmanager
def pretend():
    """Within the block torch has one GPU, an H100 of little memory and a tiny cache, in host memory."""
    import torch._dynamo

    if os.environ.get("TRITON_INTERPRET") == "1":
        from ..traffic import quicken

        quicken()
        _mend()
    with contextlib.ExitStack() as stack:
        others = (
            (torch, "compile", _uncompiled), (torch.nn.attention, "sdpa_kernel", _any), (torch.profiler, "profile", _Profile),
            (torch.accelerator, "current_stream", _Stream),
        )  # fmt: skip
        for owner, name, value in (*((torch.cuda, *stand_in) for stand_in in STAND_INS.items()), *others):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Device())
        yield


def _mend():
    """Triton 3.6's interpreter asks int() for the number in an array of one, which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = mended


class _Device(TorchFunctionMode):
    """Tensors in host memory are on "cuda:0", and what is asked for "cuda" is made in host memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in PROPERTIES:
            value, pretended = function(*args), PROPERTIES[function]
            return pretended if function(*args) == ORDINARY[function] else value
        if function is torch.Tensor.cuda or function is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        for name in ("device", "other"):
            if name in kwargs:
                kwargs[name] = _host(kwargs[name])
        return function(*map(_host, args), **kwargs)


def _host(value):
    if (isinstance(value, str) and value.partition(":")[0] == "cuda") or (isinstance(value, torch.device) and value.type == "cuda"):
        return torch.device("cpu")
    return value


PROPERTIES = {torch.Tensor.device.__get__: HERE, torch.Tensor.is_cuda.__get__: True, torch.Tensor.is_cpu.__get__: False}
ORDINARY = {
    torch.Tensor.device.__get__: torch.device("cpu"), torch.Tensor.is_cuda.__get__: False, torch.Tensor.is_cpu.__get__: True,
}  # fmt: skip


class _Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self, *_, **__):
        self.tape = []

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self.tape:
            again = function(*args, **kwargs)
            for kept, new in zip(tree_leaves(results), tree_leaves(again)):
                if isinstance(kept, torch.Tensor) and kept is not new and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)

    def reset(self):
        self.tape.clear()

    def pool(self):
        return (0, 0)


class _Recording(TorchDispatchMode):
    """Stands for torch.cuda.graph: what is dispatched within goes onto the graph's tape, and its effects are undone."""

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        super().__init__()
        self.tape, self.before, self.stream = cuda_graph.tape, {}, stream or _Stream()

    def __enter__(self):
        _streams.append(self.stream)
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: the host reads a value")
        for parameter, value in itertools.zip_longest(function._schema.arguments, args):
            written = kwargs.get(parameter.name, value)
            if parameter.alias_info is not None and parameter.alias_info.is_write and isinstance(written, torch.Tensor):
                self.before.setdefault(id(written), (written, written.clone()))
        results = function(*args, **kwargs)
        self.tape.append((function, args, kwargs, results))
        return results

    def __exit__(self, *exception):
        result = super().__exit__(*exception)
        _streams.pop()
        with _disable_current_modes():
            for tensor, value in reversed(self.before.values()):
                tensor.copy_(value)
        return result


class _Event:
    def __init__(self, *_, **__):
        self.at = None

    def record(self, stream=None):
        self.at = next(_ticks)

    def elapsed_time(self, end):
        return 50.0 * (end.at - self.at)  # slow enough that nothing is repeated more often than it must be

    def query(self):
        return True

    def synchronize(self):
        pass

    wait = synchronize


class _Stream:
    cuda_stream, device, device_index = 0, HERE, 0

    def __init__(self, *_, **__):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def is_capturing(self):
        return STAND_INS["is_current_stream_capturing"]()

    def wait_stream(self, stream):
        pass

    wait_event = wait_stream

    def record_event(self, event=None):
        event = event or _Event()
        event.record()
        return event


_streams = [_Stream()]


@contextlib.contextmanager
def _on(stream):
    _streams.append(stream)
    yield
    _streams.pop()


class _Profile(contextlib.nullcontext):
    """Stands for torch.profiler.profile, which takes 20 s to find that there is no GPU."""

    def __init__(self, *_, **__):
        super().__init__(self)

    def events(self):
        moment = SimpleNamespace(start=0.0, elapsed_us=lambda: 1.0)
        return [SimpleNamespace(name="something", device_type=torch.autograd.DeviceType.CUDA, time_range=moment)]


def _nothing(*_, **__):
    pass


@contextlib.contextmanager
def _any(*_, **__):
    yield


def _uncompiled(function=None, **_):
    return function if function is not None else (lambda f: f)


MEMORY = 256 << 20
CARD = SimpleNamespace(
    name=PRETENDED, major=9, minor=0, total_memory=MEMORY, L2_cache_size=1 << 16, multi_processor_count=132,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448, warp_size=32,
    uuid="none", gcnArchName="",
)  # fmt: skip
STAND_INS = {
    "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
    "get_device_name": lambda *_: CARD.name, "get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: CARD,
    "mem_get_info": lambda *_: (MEMORY, MEMORY), "max_memory_allocated": lambda *_: MEMORY // 2, "memory_allocated": lambda *_: 0,
    "max_memory_reserved": lambda *_: MEMORY // 2, "is_bf16_supported": lambda *_, **__: True,
    "is_current_stream_capturing": lambda: any(isinstance(m, _Recording) for m in _modes()),
    "graph_pool_handle": lambda: (0, 0), "current_stream": lambda *_: _streams[-1], "default_stream": lambda *_: _streams[0],
    "CUDAGraph": _Graph, "graph": _Recording, "Event": _Event, "Stream": _Stream, "stream": _on, "device": _any,
    **dict.fromkeys(
        ("set_stream", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "init", "_lazy_init", "manual_seed",
         "manual_seed_all"), _nothing,
    ),
}  # fmt: skip


def _modes():
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return _get_current_dispatch_mode_stack()
