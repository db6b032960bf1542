"""What the card is, and what it can do at most: bandwidth of a copy, rate of a product, clocks.

Everything else is judged by these two, measured here and now, and by the datasheet's figures beside them.
"""

import datetime
import os
import platform
import subprocess
from importlib import metadata

import torch

from .. import roofline, timing
from . import PRETENDED, Job

PARALLEL = False
PACKAGES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "flash-attn", "gguf", "trillama")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


def jobs(card):
    sizes = (128,) if card.small else (4096, 8192, 16384)
    return [
        Job("card", {"what": "card"}, 1.0),
        Job("copy", {"what": "copy"}, 1.0),
        *(Job(f"product {n}", {"what": "product", "n": n}, 0.5 if n < 16384 else 2.0) for n in sizes),
        Job("clocks", {"what": "clocks"}, 0.5),
    ]


def run(what, n=None):
    if what == "card":
        yield card()
    elif what == "copy":
        yield {"bytes_per_s": timing.copy_bandwidth()}
    elif what == "product":
        yield {"n": n, "flop_per_s": timing.product_rate(n)}
    else:
        yield {"clocks": clocks()}


def card():
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory, "l2": gpu.L2_cache_size,
        "multiprocessors": gpu.multi_processor_count, "driver": ask("driver_version"), "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in PACKAGES}, "python": platform.python_version(), "cpus": os.cpu_count(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "clocks": clocks(),
    }  # fmt: skip


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def clocks():
    """As they are: nobody here sets any."""
    return {name: ask(name) for name in CLOCKS}


def ask(field):
    """What nvidia-smi says of the first GPU, or None."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def ceilings(results):
    """(bytes a second, FLOP a second) as measured, None where they were not: what the other sections' results are judged by."""
    copies = [r["bytes_per_s"] for r in results if "bytes_per_s" in r]
    products = [r["flop_per_s"] for r in results if "flop_per_s" in r]
    return max(copies, default=None), max(products, default=None)


def datasheet(results):
    """The roofline.GPU of the card, or None."""
    return roofline.datasheet(next((r["gpu"] for r in results if "gpu" in r), ""))


def rehearsed(results):
    """Whether the card was a pretended one."""
    return any(r.get("gpu") == PRETENDED for r in results)


def show(results, known=()):
    lines, sheet = [], datasheet(results)
    for r in results:
        if "gpu" in r:
            versions = ", ".join(f"{name} {v}" for name, v in r["versions"].items() if v)
            lines.append(f"{r['gpu']}, compute capability {r['capability']}, {r['memory'] / 2**30:.0f} GiB, "
                         f"{r['multiprocessors']} multiprocessors, {r['l2'] / 2**20:.0f} MiB L2, driver {r['driver']}")  # fmt: skip
            lines.append(f"{versions}, Python {r['python']}, CUDA {r['cuda']}; {r['date']}")
        elif "bytes_per_s" in r:
            of = f", {r['bytes_per_s'] / sheet.bandwidth:.0%} of the datasheet's {sheet.bandwidth / 1e12:.2f}" if sheet else ""
            lines.append(f"copy, read and written: {r['bytes_per_s'] / 1e12:.2f} TB/s{of}")
        elif "flop_per_s" in r:
            of = f", {r['flop_per_s'] / sheet.tensor:.0%} of the datasheet's {sheet.tensor / 1e12:.0f}" if sheet else ""
            lines.append(f"bfloat16 product of {r['n']}: {r['flop_per_s'] / 1e12:.0f} TFLOP/s{of}")
        elif "clocks" in r:
            lines.append("clocks after the products: " + ", ".join(f"{k} {v}" for k, v in r["clocks"].items() if v))
    return lines
