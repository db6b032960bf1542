"""compute-sanitizer over one small case of every kernel: accesses outside of memory, races in shared memory.

Where the tool is not installed, or cannot instrument the device, its jobs are left out and say why.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

from .. import proofs
from ..cases import torch_dtype
from . import Job

PARALLEL = True
SHOWN = ("ok", "failed", "left out")
TOOLS = {
    "memcheck": ("--print-limit", "5", "--report-api-errors", "no"),  # torch asks the driver for what may not be there
    "racecheck": ("--print-limit", "100", "--racecheck-report", "analysis"),
}
LIMIT = 75  # seconds that one may take
GROUPS = {  # every kernel once, those of wide rows too, and attention with tensor descriptors and without
    "rows": {
        "rms_norm": ("100", "100000", "backward (3, 7, 100) llama", "backward (4, 20000) llama"), "add_rms_norm": ("100",),
        "swiglu": ("100", "backward packed (3, 7, 100)"),
    },
    "rope": {"apply_rope": ("96 of 128",), "rope_append_": ("9 to 3 heads, 64 of 64, pages of 24",)},
    "attention": {"flash_attention": ("plain", "columns", "backward, window")},
    "varlen": {"flash_attention_varlen": ("longer keys, an empty sequence of each",)},
    "decode": {"decode_attention": ("64 wide, paged", "own splits, lengths (512, 513, 1100)")},
    "products": {
        "decode_linear": (
            "norm-activation-residual-bias, 8 rows", "40 x 576, 1 rows", "int8, bare, 1 rows", "int4-32, bare, 1 rows",
        ),
    },
    "ends": {"embed": ("576",), "choose": ("4099, greedy", f"4099, {proofs.OPTIONS[-1]}")},
}  # fmt: skip
REFUSALS = re.compile(
    r"[^\n]*(?:not supported|unable to|internal (?:sanitizer )?error|insufficient|permission|terminated before)[^\n]*",
    re.IGNORECASE,
)  # fmt: skip
# Lanes of a Triton reduction write the same place, and its butterfly gives them sums in different order: triton-lang/triton 7264.
READS = re.compile(r"Read access|\b(?:RAW|WAR)\b")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)s?(?: displayed \((\d+) errors?, (\d+) warnings?\))?")


def jobs(card):
    """Side by side, so that together they take as long as the slowest. What they compile `right` has compiled."""
    return [
        Job(f"{tool}, {group}", {"tool": tool, "group": group, "small": card.small}, 1.0 if card.small else 25.0)
        for tool in TOOLS
        for group in GROUPS
    ]


def executable():
    """compute-sanitizer, or None."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)


def run(tool, group, small=False):
    told = {"tool": tool, "group": group}
    program = executable()
    if program is None:
        yield {**told, "status": "left out", "error": "compute-sanitizer is not installed"}
        return
    command = [
        program, "--tool", tool, *TOOLS[tool], "--error-exitcode", "9",
        "--target-processes", "application-only",
        sys.executable, "-m", "trillama.bench.hardware.safety", json.dumps({"group": group, "small": small}),
    ]  # fmt: skip
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT + 10)
    except subprocess.TimeoutExpired:
        yield {**told, "status": "left out", "error": f"no end after {LIMIT + 10} s"}
        return
    print(done.stdout, done.stderr, flush=True)
    yield {**told, **judged(done.returncode, done.stdout + done.stderr)}


LATE = 4  # exit status of a process that ends itself


def judged(code, text):
    """{"errors", "warnings"} as counted, with status and error where there are any, or where nothing was instrumented. Races among
    writes alone count as warnings."""
    marked = [line.strip("= ") for line in text.splitlines() if line.startswith("=========") and line.strip("= ")]
    found = SUMMARY.search(text)
    if code == LATE:
        return {"status": "left out", "error": f"no end after {LIMIT} s"}
    refused = REFUSALS.search("\n".join(marked))
    if found is None or refused:
        return {"status": "left out", "error": (refused or re.match(".*", marked[-1] if marked else "it says nothing"))[0][:200]}
    errors, warnings = int(found[2] or found[1]), int(found[3] or 0)
    if found[2] and not READS.search("\n".join(marked)):
        errors, warnings = 0, warnings + errors
    first = next((line for line in marked if "SUMMARY" not in line and not line.startswith("COMPUTE-SANITIZER")), "")
    if errors:
        return {"errors": errors, "warnings": warnings, "status": "failed", "error": f"{errors} errors: {first}"[:300]}
    if code not in (0, 9):
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("=========")]
        return {"status": "failed", "error": f"exit status {code}: {lines[-1] if lines else ''}"[:300]}
    return {"errors": 0, "warnings": warnings}


def show(results, known=()):
    lines = []
    for tool in TOOLS:
        mine = [r for r in results if r.get("tool") == tool]
        ran = [r for r in mine if r["status"] == "ok"]
        if mine:
            lines.append(f"{tool}: {len(ran)} of {len(mine)} groups without a finding, {sum(r['warnings'] for r in ran)} warnings")
        out = {}
        for r in mine:
            if r["status"] == "left out":
                out.setdefault(r["error"], []).append(r["group"])
        lines += [f"  left out: {', '.join(groups)}: {error}" for error, groups in out.items()]
    return lines


# --- the process under the tool --------------------------------------------------------------------------------------


def main(group, small):
    """Runs the group's cases, every tensor in an allocation of its own size."""
    import contextlib

    timer = threading.Timer(LIMIT, lambda: os._exit(LATE))  # the tool ends when this process does
    timer.daemon = True
    timer.start()
    with contextlib.ExitStack() as stack:
        if small:
            from .rehearsal import pretend

            stack.enter_context(pretend())
        for op, names in GROUPS[group].items():
            for name in names:
                proofs.run(op, name, torch_dtype("fp16" if small else "bf16"), "cuda")
                print(op, name, flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
