"""Proves and measures everything on the GPU at hand: `python -m trillama.bench.hardware`.

A section is a module of this package:

    PARALLEL            True: its jobs may run side by side, as only values count
    jobs(card)          -> [Job]: what there is to do on such a card, in order of value
    warm(**work)        compiles what the job launches; nothing is kept
    run(**work)         yields results, dicts of plain values, each written down the moment it exists
    show(results, known)    -> lines of text, the tables; known: the results of `facts`
    SHOWN               of which status these results are, where it is not "ok" alone

Sections neither know nor import one another, but for the ceilings that `facts` measured. Their jobs run in processes of their own
(`bench.apart`), `__main__` is the command, and `rehearsal` pretends a GPU where there is none.
"""

import dataclasses
import importlib
from dataclasses import dataclass, field

PRETENDED = "a pretended H100"  # what a rehearsal's card is called
SECTIONS = ("facts", "right", "decode", "attention", "rows", "training", "tune", "safety")


def section(name):
    return importlib.import_module(f".{name}", __package__)


def table(lines, name):
    """The lines of the section's tables, of all results."""
    module = section(name)

    def of(name, shown):
        return [line for line in lines if line["section"] == name and line["status"] in shown]

    return module.show(of(name, getattr(module, "SHOWN", ("ok",))), of("facts", ("ok",)))


def carry_out(name, action, work):
    """A job, in a process of its own: yields what `run` of its section does, or nothing for `warm`."""
    import torch

    yield from getattr(section(name), action)(**work) or ()
    torch.cuda.synchronize()


def at_hand(small):
    """The Card, as a job: in a process of its own, so that who starts all others never touches the GPU, nor hangs with it."""
    yield Card.at_hand(small)


@dataclass(frozen=True)
class Job:
    """name: unique within its section. work: what `run` takes. seconds: an estimate of the time on a fast card, `compiled` the
    kernels that are compiled for it before, an estimate as well: 0 where there is nothing to warm."""

    name: str
    work: dict = field(default_factory=dict)
    seconds: float = 1.0
    compiled: int = 0


@dataclass(frozen=True)
class Card:
    """What jobs are chosen by. memory: free bytes. small: a rehearsal, in which sizes do not count."""

    name: str
    arch: int
    memory: int
    small: bool = False

    @classmethod
    def nominal(cls):
        """What `--list` goes by where there is no GPU."""
        return cls("H100", 90, 78 << 30)

    @classmethod
    def at_hand(cls, small=False):
        import torch

        major, minor = torch.cuda.get_device_capability()
        return cls(torch.cuda.get_device_name(), 10 * major + minor, torch.cuda.mem_get_info()[0], small)

    def asdict(self):
        return dataclasses.asdict(self)
