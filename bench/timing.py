"""The device's own time of a call, and what the device can do at most, measured on a GPU."""

import itertools
import statistics
from dataclasses import dataclass

import torch

from ..kernels.decode import counters
from .apart import one_line


@dataclass(frozen=True)
class Timing:
    """Seconds of one call. events: the median between two CUDA events around it, which includes waiting for the host where that is
    slower than the device. graph: by the replay of a CUDA graph of many calls, or None and `why`."""

    events: float
    graph: float | None
    why: str | None = None

    @property
    def seconds(self):
        return self.events if self.graph is None else self.graph

    def asdict(self):
        """Plain values, in microseconds."""
        graph = None if self.graph is None else self.graph * 1e6
        return {"us": self.seconds * 1e6, "events_us": self.events * 1e6, "graph_us": graph, "why": self.why}


class Captures:
    """When a capture fails, torch 2.11 leaves its allocator in the state of capturing, and every later one in the process dies of
    it: `broken` says that one has failed, and why. Whoever measures on goes to another process."""

    broken = None

    @classmethod
    def look(cls):
        """Where something has failed that may have been a capture, torch.compile's for one: tries another."""
        if cls.broken is None:
            try:
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    torch.zeros(1, device="cuda")
            except Exception as error:
                cls.broken = one_line(error)


def device_seconds(c, seconds=0.05):
    """The Timing of the case's call, its data in HBM."""
    return measure(lambda: c.prepare(c.inputs("cuda")), c.moved, c.held, seconds)


def timings(c):
    """The same as a job of `bench.apart`, which yields."""
    yield device_seconds(c)


def measure(make, moved, held, seconds=0.05, graph=True):
    """The Timing of run(), run = make() having made the arguments anew.

    moved: the bytes that a call needs at least, held: those that its arguments take. The calls go through as many sets of arguments
    as overflow the L2 cache: one that stays warm makes a kernel look up to 1.6 times as fast as it is in a model. Everything, the
    forward pass of a backward one included, happens on one stream, where a capture finds it. seconds: about how long to measure.
    graph: False where a call is so long that the host, which launches it, cannot be what is waited for.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), counters("cuda"):
        runs = [make() for _ in range(sets(moved, held))]
        for run in runs:  # compiles and loads the kernels, which a capture forbids
            run()
        once = _between(runs, stream) / len(runs)
        rounds = max(3, min(50, int(seconds / max(once, 1e-7) / len(runs))))
        pairs = []
        for _ in range(rounds):
            for run in runs:
                pairs.append((_stamp(stream), run(), _stamp(stream))[::2])  # what it returns is freed: as in a loop of a user's
        stream.synchronize()
        events = statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3
        if not graph:
            return Timing(events, None, "not asked for")
        return Timing(events, *_replayed(runs, stream, rounds))


def sets(moved, held):
    """How many sets of arguments to go through: those that a call has overflown three times the L2 cache with, as long as together
    they take no more than that (two at least) and no more than half of the memory that is free (one at least)."""
    l2, (free, _) = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, torch.cuda.mem_get_info()
    wanted = -(-3 * l2 // max(1, moved))
    return max(1, min(64, max(2, wanted), max(2, 3 * l2 // max(1, held)), free // 2 // max(1, held)))


def _stamp(stream):
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _between(runs, stream):
    """Seconds of all runs, one after the other."""
    start = _stamp(stream)
    for run in runs:
        run()
    stop = _stamp(stream)
    stream.synchronize()
    return start.elapsed_time(stop) / 1e3


def _replayed(runs, stream, rounds):
    """(seconds of one run by the replay of a graph of them all, None) or (None, why not)."""
    if Captures.broken:
        return None, f"an earlier capture in this process failed: {Captures.broken}"
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = [run() for run in runs]  # so that no output takes the place of another, warm in the cache
    except Exception as error:  # an engine whose host code waits for the device cannot be captured
        Captures.broken = one_line(error)
        return None, Captures.broken
    graph.replay()
    times = [_between([graph.replay] * max(1, rounds // 3), stream) / max(1, rounds // 3) for _ in range(5)]
    del kept
    return statistics.median(times) / len(runs), None


def elapsed(function, repeats=5, warm=1):
    """The median of the seconds, by CUDA events, that function() keeps the current stream busy."""
    stream = torch.cuda.current_stream()
    for _ in range(warm):
        function()
    stream.synchronize()
    return statistics.median(_between([function], stream) for _ in range(repeats))


def copy_bandwidth(device="cuda"):
    """Bytes a second of a GPU's memory, read and written, in one long copy: the median of several, by CUDA events. It copies 2 GiB,
    or a quarter of what is free where that is less."""
    with torch.cuda.device(device):
        source = torch.ones(min(1 << 31, torch.cuda.mem_get_info()[0] // 4), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        target.copy_(source)  # which meets memory that nobody has touched
        stamps = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
        for stamp in stamps:
            stamp.record()
            target.copy_(source)
        torch.cuda.synchronize()
    milliseconds = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(stamps))
    return 2 * source.nbytes / (milliseconds / 1e3)


def product_rate(n, device="cuda"):
    """FLOP a second of an n x n x n product of bfloat16 by the vendor's library, on random data: zeros would run faster."""
    with torch.cuda.device(device):
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * n**3 / elapsed(lambda: torch.mm(a, b, out=out), 10, 3)
