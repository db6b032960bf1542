"""What the card is, and what it can do at most: bandwidth of a copy, rate of a product, clocks.

Everything else is judged by these two, measured here and now, and by the datasheet's figures beside them.
"""

import datetime
import os
import platform
import subprocess
import time
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
        Job("clocks", {"what": "clocks", "n": min(8192, sizes[-1])}, 2.5),
    ]


def run(what, n=None):
    if what == "card":
        yield card()
    elif what == "copy":
        yield {"bytes_per_s": timing.copy_bandwidth()}
    elif what == "product":
        yield {"n": n, "flop_per_s": timing.product_rate(n)}
    else:
        yield {"clocks": at_work(n)}


def card():
    asked = ask("driver_version", *CLOCKS)
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory, "l2": gpu.L2_cache_size,
        "multiprocessors": gpu.multi_processor_count, "driver": asked.pop("driver_version"), "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in PACKAGES}, "python": platform.python_version(), "cpus": os.cpu_count(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "clocks": asked,
    }  # fmt: skip


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def at_work(n):
    """The clocks as they are in the midst of products, a second and a half of them on a fast card: nobody here sets any."""
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    for _ in range(1000 if n > 1024 else 1):
        torch.mm(a, a, out=out)  # which the host does not wait for
    time.sleep(0.5 if n > 1024 else 0)
    found = ask(*CLOCKS)
    torch.cuda.synchronize()
    return found


def ask(*fields):
    """{field: what nvidia-smi says of this process's GPU, or None}: of the GPUs of the machine it may be any."""
    command = ["nvidia-smi", f"--query-gpu=uuid,{','.join(fields)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    rows = [line.split(", ") for line in said.splitlines()]
    own = str(getattr(torch.cuda.get_device_properties(0), "uuid", "unknown"))
    mine = [values for uuid, *values in rows if len(rows) == 1 or uuid.endswith(own)]
    values = mine[0] if mine and len(mine[0]) == len(fields) else [None] * len(fields)
    return {field: None if value and value.startswith("[") else value for field, value in zip(fields, values)}  # "[N/A]"


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
            said = ", ".join(f"{k} {v}" for k, v in r["clocks"].items() if v)
            lines.append(f"clocks in the midst of products: {said or 'nvidia-smi says nothing of this GPU'}")
    return lines
