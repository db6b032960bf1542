"""The device's own time of a kernel, on a GPU."""

import itertools
import statistics

import torch


def device_seconds(c, repeats=20):
    """(median by CUDA events, mean by the replay of a CUDA graph or None) of one call of the case, its data in HBM.

    Both go through as many copies of the arguments as overflow the L2 cache: a cache that stays warm makes a kernel look up to 1.6
    times as fast as it is in a model.
    """
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(64, -(-4 * l2 // max(1, c.moved))))
    runs = [c.prepare(c.inputs("cuda")) for _ in range(copies)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # the first launch of a kernel loads it, which a capture forbids
        for run in runs:
            run()
    torch.cuda.synchronize()

    times = []
    for _ in range(repeats):
        for run in runs:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            times.append((start, stop))
    torch.cuda.synchronize()
    events = statistics.median(a.elapsed_time(b) for a, b in times) / 1e3

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = [run() for run in runs]
    except Exception:  # an engine whose host code waits for the device cannot be captured
        torch.cuda.synchronize()
        return events, None
    graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    del kept
    return events, start.elapsed_time(stop) / 1e3 / repeats / copies


def copy_bandwidth(device):
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
