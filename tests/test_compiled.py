"""Budgets of the compiled kernels, held without a GPU: what every default tuning entry must be made of, on every architecture.

The default set is the shapes of Llama-3.1-8B in bfloat16 on sm_90; the long set is the same on sm_80 and sm_100, every shape that
the x-ray knows, in two dtypes, each on two of NVIDIA's architectures, and the options of attention. They hold for whichever Triton
is installed; CI runs the three architectures and the options under the oldest and the newest that setup.py promises.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from trillama.bench import xray
from trillama.bench.cases import FURTHER, OPS, available, case
from trillama.bench.peers import why_not
from trillama.kernels import tuning

pytestmark = pytest.mark.host

KINDS = [(op, backward) for op in available() for backward in ((False, True) if OPS[op].differentiable else (False,))]
NAMES = [op + (" backward" if backward else "") for op, backward in KINDS]
NVIDIA = [arch for arch in xray.ARCHITECTURES if arch.startswith("sm_")]
MATRIX = {  # prefill attention: the widest matrix instruction of the architecture
    "sm_80": "HMMA", "sm_86": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA",
}  # fmt: skip
# Fraction of tensor peak that the unmasked loop of attention reaches at head size 128 if nothing overlaps (bench/LOG.md).
CEILING = {"sm_80": 0.73, "sm_90": 0.74, "sm_100": 0.57}
OLD = tuning.TRITON < (3, 7)
if OLD:  # tiles of 32 keys on sm_80; sums on sm_100 that are not made two at a time
    CEILING |= {"sm_80": 0.71, "sm_100": 0.54}


def violations(r):
    """What in a report breaks a budget, as text."""
    if "error" in r:
        return [r["error"]]
    found = []
    # The operands of a product of 256 columns in float32, each in two parts, are more than 255 registers whatever the tile.
    too_wide = r["op"].startswith("flash_attention") and r["dtype"] == "fp32" and r["case"].startswith("head 256")
    if (r["spills"] or r["stack"]) and not too_wide:
        found.append(f"{r['spills']} accesses to local memory, {r['stack']} bytes of stack")
    if r["shared"] > r["shared_limit"]:
        found.append(f"{r['shared']} bytes of shared memory of {r['shared_limit']}")
    if r["programs_per_multiprocessor"] == 0:
        found.append("no program fits on a multiprocessor")
    if r["f64"]:
        found.append(f"{r['f64']} float64 instructions")
    # Scalars are read and written around the loop, data within it; of a short loop the compiler leaves straight code.
    where = r["loop"] or r
    # Positions and the block table; the two statistics of a row; x and norm, a row that comes from L2.
    allowed = {"rope_append_": 3, "flash_attention backward": 2, "decode_linear": 2, "decode_linear swiglu": 2}
    allowed |= {"decode_linear int8": 2, "decode_linear int4": 6}  # scales and minima of groups too
    # An id and a length; the flags of the rows; ids that stay, wherever they come to lie.
    allowed |= {"embed_next_": 2, "choose_": 4, "choose_ cut": 16}
    allowed = allowed.get(r["op"], 0) * (2 if "attention" in r["op"] and r["dtype"] == "fp32" else 1)  # of two rows a thread
    for kind in ("loads", "stores"):
        narrow = {width: n for width, n in where[kind].items() if width not in ("128", "256", "TMA")}
        steps = 1
        if kind == "loads" and r["kernel"] == "linear_kernel" and r["loop"] is None:
            steps = r["loads"].get("128", 0) // 8  # in bfloat16 each has eight wide ones
        if sum(narrow.values()) > steps * allowed:
            found.append(f"{kind} of {narrow} bits")
    products = r["op"].startswith("flash_attention") and r["kernel"] != "delta_kernel" and r["dtype"] != "fp32"
    if r["kernel"] == "dkv_kernel" and r["case"].startswith("head 256"):
        products = False  # tiles of 32 rows, as more do not fit, and the instructions of sm_90 and sm_100 take 64
    if products and MATRIX[r["arch"]] not in r["matrix"]:
        found.append(f"matrix instructions {r['matrix']}, expected {MATRIX[r['arch']]}")
    if r["op"] == "decode_attention" and r["dtype"] != "fp32" and "HMMA" not in r["matrix"]:
        found.append(f"matrix instructions {r['matrix']}, expected HMMA")
    return found


def check(reports):
    assert reports
    broken = [f"{r['op']} {r['case']} {r['dtype']} {r['arch']} {r.get('kernel', '')}: {v}" for r in reports for v in violations(r)]
    assert not broken, "\n".join(broken)


@pytest.fixture(scope="module", params=[pytest.param(a, marks=[pytest.mark.slow] * (a != "sm_90")) for a in xray.USUAL])
def reports(request):
    return xray.survey([case(op, "Llama-3.1-8B", backward=backward) for op, backward in KINDS], [request.param])


@pytest.mark.parametrize("name", NAMES)
def test_budgets(reports, name):
    check([r for r in reports if r["op"] == name])


def test_attention_leaves_the_tensor_cores_enough(reports):
    (r,) = (r for r in reports if r["op"] == "flash_attention")
    assert r["loop"]["no_overlap"] >= CEILING[r["arch"]]


@pytest.mark.parametrize("compiler", [(3, 6), (3, 7), (3, 8), (3, 9)])
def test_entries_for_triton_3_6_are_for_no_other(monkeypatch, compiler):
    monkeypatch.setattr(tuning, "TRITON", compiler)
    forward, (_, dkv) = (choose.__wrapped__(80, 128, 2) for choose in (tuning.attention, tuning.attention_backward))
    assert (forward.block_n, dkv.gather) == ((32, True) if compiler == (3, 6) else (64, False))


def test_the_entries_of_the_installed_triton_are_what_is_launched():
    code = """
from trillama.bench import xray
from trillama.bench.cases import case

with xray.compiling_for("sm_80"):
    (_, _, _, forward), = xray.launches_of(case("flash_attention", "Llama-3.1-8B"))
    (_, _, _, dkv) = xray.launches_of(case("flash_attention", "Llama-3.1-8B", backward=True))[-1]
print(forward["BLOCK_N"], dkv["GATHER"])
"""
    assert run(code) == ("32 True" if OLD else "64 False")


@pytest.mark.parametrize("name", [name for name, (op, _) in zip(NAMES, KINDS) if "attention" not in op])
def test_row_kernels_can_hide_behind_memory(reports, name):
    """At the datasheet's bandwidth their instructions take well under the issue slots that there are."""
    for r in reports:
        if r["op"] == name and r["programs"] > 1000 and name != "decode_linear int4":  # which is bound by issue (bench/LOG.md)
            assert r["issue_at_full_bandwidth"] < 0.75, (r["arch"], r["issue_at_full_bandwidth"])


@pytest.mark.slow
def test_float_scalars_cost_nothing_where_they_arrive_as_float64():
    """torch.compile passes Python floats as float64: without a cast the arithmetic would follow, at 1/64 of the rate."""
    floats = [(op, backward) for op, backward in KINDS if "norm" in op or "attention" in op or "linear" in op]
    reports = xray.survey([case(op, "Llama-3.2-1B", backward=backward) for op, backward in floats], ["sm_90"], fp64_scalars=True)
    assert {r["op"] for r in reports} >= {"rms_norm", "rms_norm backward", "flash_attention", "decode_attention"}
    assert [(r["op"], r["f64"]) for r in reports if r["f64"]] == []


@pytest.mark.slow
def test_float64_scalars_would_be_seen():
    """The same, of a kernel that does not cast: the check above can fail."""
    code = """
import torch, triton, triton.language as tl
from trillama.bench import xray

@triton.jit
def careless(x_ptr, eps):
    i = tl.arange(0, 128)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + eps)

with xray.compiling_for("sm_90", fp64_scalars=True):
    kernel = xray.compiled((careless, (1,), (torch.empty(128), 1e-6), {}))
    print(xray.read_nvidia(kernel, "sm_90")["f64"])
"""
    assert int(run(code)) > 0


def run(code):
    """The output of a Python program in a process in which Triton compiles; it is a file, as Triton reads its kernels' source."""
    import tempfile

    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRILLAMA_BACKEND")}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        done = subprocess.run([sys.executable, file.name], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


DECODE = """
import torch, triton
from trillama.bench import xray
from trillama.bench.cases import Model
from trillama.kernels import use_backend
from trillama.kernels.dispatch import observe
from trillama.model import KVCache, Llama

config = Model(256, 4, 2, 64, 512, 2, 64).config()
made, steps = [], {}

def compile_only(kernel, grid, arguments, options):
    kernel.warmup(*arguments, grid=grid, **options)
    steps[step] = steps.get(step, 0) + 1
    return True

def note(**what):
    made.append((step, what["repr"]))

triton.knobs.runtime.jit_post_compile_hook = note
with xray.compiling_for("sm_90"), use_backend("triton"), observe(compile_only), torch.inference_mode():
    llama = Llama(config).to(torch.bfloat16).eval()
    cache = KVCache(config, BATCH, 1024, torch.bfloat16, "cpu")
    step = "prefill"
    llama(torch.zeros(BATCH, 440, dtype=torch.int64), cache)
    step = "warm-up"
    llama(torch.zeros(BATCH, 1, dtype=torch.int64), cache)
    for step in range(200):
        llama(torch.zeros(BATCH, 1, dtype=torch.int64), cache)
late = [m for m in made if isinstance(m[0], int)]
assert steps["warm-up"] == steps[199] > 4 and [m for m in made if m[0] == "warm-up"], (steps, made)
print(len(late), late[:3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_of_200_steps_compiles_nothing_after_its_first(batch):
    """From 441 to 641 tokens: across a split boundary, multiples of 16 and of 64, and back."""
    assert run(DECODE.replace("BATCH", str(batch))) == "0 []"


ROWS = ("rms_norm", "add_rms_norm", "swiglu")  # Liger's rope multiplies in bfloat16: that is another function


@pytest.mark.skipif(bool(why_not("rms_norm", "liger", "cuda")), reason="Liger is not installed")
def test_row_kernels_take_fewer_instructions_than_ligers():
    """Warp instructions for every 16 bytes, both compiled here and now."""
    compare(("Llama-3.1-8B",), xray.USUAL)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not("rms_norm", "liger", "cuda")), reason="Liger is not installed")
def test_row_kernels_of_all_widths_take_fewer_instructions_than_ligers():
    compare(("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-70B/8", "Llama-3.1-405B/8"), xray.USUAL)


def compare(models, architectures):
    cases = {e: [case(op, model, engine=e) for op in ROWS for model in models] for e in ("trillama", "liger")}
    ours, theirs = (xray.survey(cases[e], architectures) for e in ("trillama", "liger"))
    assert len(ours) == len(theirs) == len(ROWS) * len(models) * len(architectures)
    worse = [
        (a["op"], a["case"], a["arch"], a["per_16_bytes"], b["per_16_bytes"])
        for a, b in zip(ours, theirs)
        if a["per_16_bytes"] >= b["per_16_bytes"]
    ]
    assert not worse


@pytest.fixture(scope="module")
def everything():
    """The shapes of every model, in each dtype on two architectures, in turn; `trillama xray --all` has all of them on all."""
    questions = []
    for turn, arch in enumerate(NVIDIA):
        for shift, precision in enumerate(("bf16", "fp32")):
            cases = [
                case(op, model, dtype=precision, backward=backward)
                for op, backward in KINDS
                for i, model in enumerate(OPS[op].models)
                if (i + turn + shift) % 3 == 0
            ]
            questions += xray.code_questions(cases, [arch])
    with xray.Workers() as workers:
        return [report for reports in xray.answers(questions, workers) for report in reports]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_all_budgets(everything, name, precision):
    check([r for r in everything if (r["op"], r["dtype"]) == (name, precision)])


@pytest.fixture(scope="module")
def on_amd():
    return xray.survey([case(op, "Llama-3.1-8B", backward=backward) for op, backward in KINDS], ["gfx942"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_amd_compiles(on_amd, name):
    """As far as Triton goes there: it compiles, without spills, within the 64 KiB that a program may have."""
    r = next(r for r in on_amd if r["op"] == name)
    assert not violations({**r, "op": "", "loop": None, "loads": {}, "stores": {}} if "error" not in r else r)


@pytest.fixture(scope="module")
def further():
    return xray.survey([case(op, "Llama-3.1-8B", backward=backward) for op in FURTHER for backward in (False, True)])


# Bytes of stack, all used around the loops (bench/LOG.md): the forward keeps 255 registers busy without offsets of sequences.
STACK = {("flash_attention packed window softcap", "sm_90"): 8}
if OLD:
    STACK = {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [op + backward for op in FURTHER for backward in ("", " backward")])
def test_no_option_of_attention_spills(further, name):
    mine = [r for r in further if r["op"] == name]
    assert {r["arch"] for r in mine} == set(xray.USUAL)
    assert not [r["error"] for r in mine if "error" in r]
    allowed = {r["arch"]: STACK.get((name, r["arch"]), 0) for r in mine}
    spilled = {(r["arch"], r["kernel"]): (r["spills"], r["stack"]) for r in mine if r["spills"] or r["stack"]}
    assert {where: what for where, what in spilled.items() if what[1] > allowed[where[0]]} == {}
