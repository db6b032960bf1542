"""When the machine code of `cpu` is used: nobody waits for a compiler.

Code that is on disk is loaded, in half a second. What is missing is compiled by a process beside this one, which keeps it on disk,
and until a sequence begins with all of it there PyTorch computes the step. So a sequence is computed one way from its beginning to
its end, and only the first ones on a new machine may differ from later ones, in the last bits of their logits.

A need names a function of `cpu` and the dtypes it is compiled for: ("_layers" or "_product_at", activations, weights, scales) or
("_copied",). Nothing here imports Numba before its code is there.
"""

import contextlib
import faulthandler
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from . import beside
from .quantized import QuantizedWeight

WORTH = 2**24  # bytes: smaller weights are read in a millisecond, which never pays for seconds of compiling
FOUR, EIGHT, UPPER = range(3)  # scale q + minimum, q in 4 bits (Q4_0, Q4_1); scale q in 8 (Q8_0); bfloat16
GROUP = 32

loaded = set()  # the needs whose code is in this process


# --- what a model needs ------------------------------------------------------------------------------------------------


def worth(blocks):
    return len(blocks) * blocks[0].mlp.gate_up_proj.weight.nbytes >= WORTH


def needs(dtype, blocks, head):
    """What the steps of a model in this dtype need: of its blocks, if there are any, and of its head's weight."""
    found = set()
    if dtype not in (torch.float32, torch.bfloat16):
        return found
    layers = [linear.weight for block in blocks for linear in block.linears]
    for name, weights, pays in (("_layers", layers, blocks and worth(blocks)), ("_product_at", [head], head.nbytes >= WORTH)):
        if not pays:
            continue
        form = form_of(weights)
        formats = {_format(weight) for weight in weights} if form is None else {_FORMATS[form]}
        if len(formats) == 1:
            found.add((name, *(str(t).removeprefix("torch.") for t in (dtype, *formats.pop()))))
            if form is not None:
                found.add(("_copied",))
    return found


def _format(weight):
    quantized = isinstance(weight, QuantizedWeight)
    return (weight.data.dtype, weight.scale.dtype) if quantized else (weight.dtype, torch.bfloat16)


_FORMATS = {FOUR: (torch.uint8, torch.float32), EIGHT: (torch.int8, torch.float32), UPPER: (torch.bfloat16, torch.bfloat16)}


def form_of(weights):
    """The form in which copies in fewer bytes have the values of all weights' first rows; None if there is none, or too little to
    gain."""
    plain = all(isinstance(w, torch.Tensor) and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
    if not plain or sum(w.nbytes for w in weights) < WORTH:
        return None
    with torch.no_grad():
        rows = [w[0] for w in weights]
        if all(len(row) % GROUP == 0 for row in rows):
            groups = torch.cat(rows).view(-1, GROUP)
            for form in (FOUR, EIGHT):
                if _fits(groups, form):
                    return form
        return UPPER if not any((row.view(torch.int32) & 0xFFFF).any() for row in rows) else None


def _fits(groups, form):
    """Whether scale q + minimum are the weights [n, GROUP], as `cpu._copy_row` finds scales and minima."""
    low, high = (edge[:, None] for edge in groups.aminmax(dim=1))
    top = torch.where(high > -low, high, low)
    if form == EIGHT:
        step = _fp16_step(top.abs() / 127)
        tries, last = [(step, -127 * step)], 254
    else:
        tries, last = [(_fp16_step((high - low) / 15), low), (top / -8, top)], 15
    fits = torch.zeros(len(groups), dtype=torch.bool)
    for scale, minimum in tries:
        q = ((groups - minimum) / scale + 0.5).nan_to_num(0, 0, 0).clamp(0, last).floor()
        fits |= (scale * q + minimum == groups).all(1)
    return bool(fits.all())


def _fp16_step(step):
    bits = step.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


# --- getting it ----------------------------------------------------------------------------------------------------------

_asked = set()  # notes of what this process has asked for
_folder = None  # where notes are


def ready(wanted, folder, wait=False):
    """Whether the code of the needs `wanted` is in this process, after it has been loaded if it is on disk.

    What is not there is compiled by a process that is started here and may outlive this one, at most once for all processes that
    share `folder`, a Path, and says there how it went. wait: it is compiled at once, here or wherever that has begun, and kept if
    there is a place for it. Never raises for want of Numba, of a compiler, or of a folder that can be written.
    """
    global _folder
    _folder = Path(folder) / "cpu"
    return _have(frozenset(wanted), wait)


def has(need):
    """The same of one need that shows itself in the course of a sequence."""
    return need in loaded or (_folder is not None and _have(frozenset([need])))


def _have(wanted, wait=False):
    if not wanted:
        return False
    if loaded.issuperset(wanted):
        return True
    if importlib.util.find_spec("numba") is None:
        return False
    for process in _processes:
        process.poll()  # nothing is left of one that has ended
    note = _folder / _key(wanted)
    if wait:
        return _compiled(wanted, note)
    known = beside.read(note)
    if known == beside.DONE and _load(wanted):
        return True
    try:
        with beside.lock(note) as free:
            if known == beside.DONE and free:  # Numba's own folder was emptied, or another kind of CPU shares this one
                note.unlink(missing_ok=True)
    except OSError:
        return _load(wanted) or _tell(f"{_folder} cannot be written, TRILLAMA_CACHE names another folder")
    if known not in ("", beside.DONE):
        return _tell(f"{known} ({note})")
    if free and note not in _asked and beside.interpreter():
        _asked.add(note)
        arguments = json.dumps([[os.path.abspath(folder) for folder in sys.path], __file__, sorted(wanted)])
        try:
            _processes.append(beside.start(note, [sys.executable, "-c", _PROGRAM, arguments]))
        except OSError as error:
            return _tell(f"no process can be started: {error}")
        _log.warning("compiling the decode step for this CPU in the background, once: until that is done answers are slower")
    return False


_PROGRAM = f"""import json, sys
path, file, needs = json.loads(sys.argv[1])
sys.path[:] = path
from {__package__} import cpu_code
cpu_code.work(file, needs)"""

_processes = []
_log = logging.getLogger(__name__)


def work(file, needs):
    """The process beside: compiles, and leaves the code where Numba keeps it. file: what the process that wants it has imported."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(beside.LIMIT, exit=True, file=nowhere)  # whoever watches may be gone
        if file != __file__:
            raise SystemExit(f"{__file__} is imported in place of {file}")
        cpu = importlib.import_module(".cpu", __package__)
        if not cpu.kept():
            raise SystemExit("Numba finds no folder to keep code in: NUMBA_CACHE_DIR names one")
        for need in needs:
            cpu.compile(tuple(need))
        faulthandler.cancel_dump_traceback_later()


def _load(wanted):
    """Loads what is on disk; whether that was all."""
    try:
        cpu = importlib.import_module(".cpu", __package__)
    except ImportError:  # Numba does not fit the rest
        return False
    loaded.update(need for need in wanted if need not in loaded and cpu.load(need))
    return loaded.issuperset(wanted)


def _compiled(wanted, note):
    """The same, after compiling what was not there, one process at a time."""
    if _load(wanted):
        return True
    try:
        cpu = importlib.import_module(".cpu", __package__)
    except ImportError:
        return False
    _log.warning("compiling the decode step for this CPU, once: up to half a minute")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no place for a lock
            stack.enter_context(beside.lock(note, beside.LIMIT))
        if _load(wanted):  # another process has done it meanwhile
            return True
        for need in wanted - loaded:
            cpu.compile(need)
            loaded.add(need)
        if cpu.kept():
            with contextlib.suppress(OSError):
                beside.write(note, beside.DONE)
    return True


def _key(wanted):
    """Of everything on which it depends whether code can be compiled and found again, but for the CPU, for which Numba looks."""
    source = Path(__file__).with_name("cpu.py")
    variables = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    facts = sorted(wanted), str(source), _digest(source), sys.version, platform.machine(), _numba(), variables
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@functools.cache
def _digest(source):
    return hashlib.sha256(source.read_bytes()).hexdigest()


@functools.cache
def _numba():
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("numba")


@functools.cache
def _tell(reason):
    _log.warning("the decode step is left to PyTorch, slower than compiled: %s", reason)
    return False
