"""What a call costs on the host: `python -m trillama.bench.host [OP ...]`, for tensors so small that nothing else counts.

Two things stand between a user and a kernel: our Python and Triton's launcher, which hands the arguments to CUDA. The first is
timed with the second replaced by nothing, on CPU tensors and code compiled for sm_90, so on every machine; on a GPU both together
are timed too. On CPU tensors the reference runs: there it is the whole call. Beside them PyTorch's operators and, on a GPU, Liger.
"""

import contextlib
import gc
import os
import subprocess
import sys
import timeit

from ..model import cli
from ..model.later import later
from .cases import OPS, case
from .plots import table
from .xray import Compiler

torch, kernels, dispatch = later("torch"), later("..kernels", __package__), later("..kernels.dispatch", __package__)
HEADER = ("us a call on the host", "without Triton's launch", "with it", "eager", "liger", "CPU tensors", "eager")


class Idle(Compiler):
    """A driver whose launcher does nothing."""

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
        load_binary = staticmethod(lambda name, kernel, shared, device: (object(), 0, 32, 0, 1024))
        unload_module = staticmethod(lambda module: None)

    class launcher_cls:
        def __init__(self, source, metadata):
            self.global_scratch_size = metadata.global_scratch_size

        def __call__(self, *arguments):
            pass


@contextlib.contextmanager
def idle(arch="sm_90"):
    """Within the block the Triton backend is in force, compiles for `arch` and launches nothing."""
    triton = dispatch.triton
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Idle(arch))
    try:
        with kernels.use_backend("triton"):
            yield
    finally:
        triton.runtime.driver.set_active(before)


def seconds(run, number=10, repeat=300):
    """The least time of a call: whatever else the machine does only adds. A GPU is idle before, so that no launch has to queue."""
    run()
    run()
    collecting = gc.isenabled()
    gc.disable()
    try:
        ready = torch.cuda.synchronize if torch.cuda.is_available() else "pass"
        return min(timeit.repeat(run, ready, number=number, repeat=repeat)) / number
    finally:
        if collecting:
            gc.enable()


def cost(op, name, device, dtype):
    """Microseconds of a call on one token of the smallest model, by the engine of that name, as text."""
    from .peers import engine, why_not

    reason = why_not(op, name, device)
    if reason is not None:
        return reason or "-"
    c = case(op, "SmolLM2-135M", tokens=1, context=64, dtype=dtype, engine=name)
    inputs, function = c.inputs(device), engine(c)
    with torch.no_grad():
        return f"{seconds(lambda: function(**inputs)) * 1e6:.1f}"


def row(op, device):
    """The costs of one op, in the order of HEADER."""
    ours, on_gpu = "needs Triton", ["needs a GPU"] * 3
    if dispatch.triton is not None:
        with idle():
            ours = cost(op, "trillama", "cpu", "bf16")
    if device == "cuda":
        on_gpu = [cost(op, name, "cuda", "bf16") for name in ("trillama", "eager", "liger")]
    return (op, ours, *on_gpu, *(cost(op, name, "cpu", "fp32") for name in ("trillama", "eager")))


def report(ops):
    """The lines of the table, from a process of its own in which Triton compiles and torch has one thread."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")}
    command = [sys.executable, "-m", "trillama.bench.host", *ops]
    done = subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines()


def main(argv=None):
    parser = cli.Parser(prog="python -m trillama.bench.host", description="What a call costs on the host.")
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all that there are")
    options = parser.parse_args(argv)
    ops = cli.known("OP", options.ops, OPS) or [*OPS]
    if dispatch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, under which nothing is launched: unset it")
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with kernels.use_backend("auto"):
        print("\n".join(table(HEADER, [row(op, device) for op in ops])))
    return 0


if __name__ == "__main__":
    sys.exit(cli.status(main))
