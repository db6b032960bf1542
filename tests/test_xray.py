"""The x-ray: reading machine code, the arithmetic of its ceilings, and the command."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trillama.bench import sass, xray
from trillama.bench.cases import case
from trillama.bench.roofline import MULTIPROCESSORS
from trillama.model.cli import main

pytestmark = pytest.mark.host

LISTING = """
        Function : other
        /*0000*/                   EXIT ;                                   /* 0x0 */
        Function : kernel
        /*0000*/                   S2R R0, SR_TID.X ;                       /* 0x0 */
                                                                            /* 0x0 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;                  /* 0x0 */
        /*0020*/                   LDG.E.U16 R8, [R2.64+0x10] ;             /* 0x0 */
        /*0030*/              @!P0 BRA 0xd0 ;                               /* 0x0 */
        /*0040*/                   LDSM.16.M88.4 R12, [R1] ;                /* 0x0 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;    /* 0x0 */
        /*0060*/                   MUFU.EX2 R4, R4 ;                        /* 0x0 */
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R0 ; /* 0x0 */
        /*0080*/              @!P1 BRA 0x110 ;                              /* 0x0 */
        /*0090*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ; /* 0x0 */
        /*00a0*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;        /* 0x0 */
        /*00b0*/                   IMAD.WIDE R2, R0, 0x2, R2 ;              /* 0x0 */
        /*00c0*/               @P0 BRA 0x40 ;                               /* 0x0 */
        /*00d0*/                   DADD R4, R4, R6 ;                        /* 0x0 */
        /*00e0*/                   STG.E.64 [R2.64], R4 ;                   /* 0x0 */
        /*00f0*/                   STL [R1], R4 ;                           /* 0x0 */
        /*0100*/                   EXIT ;                                   /* 0x0 */
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R0 ; /* 0x0 */
        /*0120*/              @!P1 BRA 0x110 ;                              /* 0x0 */
        /*0130*/                   BRA 0x90 ;                               /* 0x0 */
        /*0140*/                   BRA 0x140;                               /* 0x0 */
        /*0150*/                   NOP;                                     /* 0x0 */
"""


@pytest.fixture
def code():
    return sass.body(sass.parse(LISTING, "kernel"))


def test_the_code_ends_before_its_padding(code):
    assert (len(code), code[-1].address) == (20, 0x130)


def test_loops_come_from_back_edges_not_from_addresses(code):
    """The wait that was put out of line jumps back into the loop: it is no loop from there to here, but part of the loop."""
    found = [(loop[0].address, loop[-1].address, len(loop)) for loop in sass.loops(code)]
    assert found == [(0x110, 0x120, 2), (0x40, 0x130, 12)]
    assert len(sass.hottest(code)) == 12


def test_scheduling_hints_are_no_operands(code):
    """CUDA 12.8's cuobjdump prints them for sm_120; a branch whose target is not found makes no loop."""
    lines = LISTING.replace(" ;", "   &req={1,0} &wr=0x2   ?WAIT5_END_GROUP;").replace("0x140;", "0x140   ?trans5;")
    assert sass.body(sass.parse(lines, "kernel")) == code


def test_of_two_equal_loops_the_shorter_is_the_hottest():
    short = "/*0000*/ HMMA.16816.F32 R0, R1, R2, R3 ;\n/*0010*/ @P0 BRA 0x0 ;\n"
    long = "/*0020*/ HMMA.16816.F32 R0, R1, R2, R3 ;\n/*0030*/ FSEL R0, R1, R2, P1 ;\n/*0040*/ @P0 BRA 0x20 ;\n/*0050*/ EXIT ;\n"
    code = sass.parse("Function : k\n" + short + long, "k")
    assert [x.address for x in sass.hottest(code)] == [0x0, 0x10]


def test_what_a_branch_may_skip_is_counted_apart():
    lines = "HMMA.16816.F32 R0, R1, R2, R3", "@!P1 BRA 0x40", "FMUL R0, R0, R1", "FMUL R1, R0, R1", "FADD R2, R0, R1", "@P0 BRA 0x0"
    text = "Function : k\n" + "".join(f"/*{16 * i:04x}*/ {x} ;\n" for i, x in enumerate([*lines, "EXIT"]))
    code = sass.parse(text, "k")
    (found,) = sass.loops(code)
    assert (len(found), [x.address for x in sass.steady(code, found)]) == (6, [0x0, 0x10, 0x40, 0x50])


def test_without_a_loop_there_is_no_hottest_one(code):
    assert sass.hottest(code[13:17]) is None


def test_pipes_widths_and_float64(code):
    pipes = {x.opcode: x.pipe for x in code}
    assert pipes["HMMA"] == "tensor"
    assert pipes["MUFU"] == "mufu"
    assert pipes["IMAD"] == "fma"
    assert pipes["ISETP"] == "alu"
    assert pipes["LDSM"] == "lsu"
    assert pipes["SYNCS"] == "control"
    assert pipes["BRA"] == "control"
    assert sass.widths(code, sass.LOADS) == {128: 2, 16: 1}
    assert sass.widths(code, sass.STORES) == {64: 1}
    assert [x.opcode for x in code if x.is_f64] == ["DADD"]
    assert sass.Instruction(0, "", "F2F", ("F64", "F32"), "").is_f64
    assert not sass.Instruction(0, "", "F2F", ("F32", "F64"), "").is_f64
    assert sass.Instruction(0, "", "HFMA2", ("MMA",), "").pipe == "fma"  # a way to write a constant, not a matrix instruction


@pytest.mark.parametrize(
    ("opcode", "modifiers", "flops"),
    [
        ("HMMA", "16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA", "1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HGMMA", "64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("DMMA", "884", 2 * 8 * 8 * 4),
        ("HFMA2", "MMA", 0),
    ],
)
def test_matrix_instructions_carry_their_shape(opcode, modifiers, flops):
    assert sass.Instruction(0, "", opcode, tuple(modifiers.split(".")), "").flops == flops


def test_the_shape_of_tcgen05_is_in_its_descriptor():
    descriptor = (128 >> 4) << 24 | (64 >> 3) << 17 | 0x490
    ptx = f"mov.b32 %r7, {descriptor};\n@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r9 + 0 ], %rd1, %rd2, %r7, %p2;\n"
    assert xray.tcgen05_flops(ptx) == [2 * 128 * 64 * 16]
    text = "Function : k\n/*0000*/ UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR12], tmem[UR50], idesc[UR51], UPT ;\n/*0010*/ EXIT ;\n"
    assert sass.parse(text, "k", [1000.0])[0].flops == 1000


def test_occupancy():
    """Against NVIDIA's occupancy calculator."""
    a100, h100, ada = (MULTIPROCESSORS[arch] for arch in (80, 90, 89))
    assert a100.occupancy(52, 0, 4) == (9, "registers")  # 56 a thread are allocated
    assert a100.occupancy(32, 0, 4) == (16, "warps")
    assert a100.occupancy(32, 0, 1) == (32, "blocks")
    assert a100.occupancy(255, 96 * 1024, 8) == (1, "registers")
    assert a100.occupancy(128, 70 * 1024, 4) == (2, "shared")
    assert h100.occupancy(128, 70 * 1024, 4) == (3, "shared")
    assert ada.occupancy(40, 0, 8) == (6, "warps")
    assert h100.occupancy(64, 0, 4, 256) == (2, "tensor memory")


def made_of(instructions, warps, flops, arch):
    """A loop of so many instructions of a warp, whose matrix work is put on one of them."""
    tensor = sass.Instruction(0, "", "UTCHMMA", (), "", flops / warps)
    loop = [tensor, *[sass.Instruction(1, "", "FMNMX", (), "")] * (instructions - 1)]
    return xray.read_loop(loop, loop, MULTIPROCESSORS[arch], warps)


@pytest.mark.parametrize(
    ("arch", "block_m", "block_n", "instructions", "warps", "ceiling"),
    [(80, 128, 64, 528, 8, 0.66), (80, 128, 128, 895, 8, 0.70), (90, 128, 128, 558, 8, 0.65), (90, 128, 128, 448, 8, 0.70)],
)
def test_no_overlap_ceiling(arch, block_m, block_n, instructions, warps, ceiling):
    """Attention at head size 128: tensor cycles / (tensor cycles + instructions of all warps / 4)."""
    loop = made_of(instructions, warps, 4 * block_m * block_n * 128, arch)
    assert round(loop["no_overlap"], 2) == ceiling
    assert loop["perfect_overlap"] >= loop["no_overlap"]


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out, plot = tmp_path / "out.json", tmp_path / "plots" / "x.png"
    argv = ["xray", "swiglu", "--backward", "--model", "SmolLM2-135M", "--arch", "sm_90", "--json", str(out)]
    pytest.importorskip("triton")
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "swiglu, bf16" in text
    assert "ffn 1536" in text
    assert "not timings" in text
    reports = json.loads(out.read_text())["reports"]
    assert [(r["op"], r["arch"]) for r in reports] == [("swiglu", "sm_90"), ("swiglu backward", "sm_90")]
    for r in reports:
        assert 0 < r["registers"] <= 255
        assert r["spills"] == 0
        assert r["f64"] == 0
        assert r["shared"] <= r["shared_limit"]
        assert sum(r["mix"].values()) == r["instructions"]
    obstacle = re.search("the interpreter of Triton .*", text)
    if obstacle:  # memory traffic is counted there, and an error is not kept
        pytest.skip(obstacle[0])
    monkeypatch.setattr(xray.Workers, "_connect", None)  # what was examined once comes from the disk
    pytest.importorskip("matplotlib")
    assert main([*argv[:-1], "-", "--plot", str(plot)]) == 0
    assert json.loads(capsys.readouterr().out)["reports"] == reports
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["softmax"], "OP is 'softmax', expected one of rms_norm"),
        (["rms_norm", "--arch", "sm_70"], "--arch is 'sm_70', expected one of sm_80"),
        (["rms_norm", "--dtype", "int8"], "--dtype is 'int8', expected one of bf16"),
        (["rms_norm", "--model", "GPT-2"], "--model is 'GPT-2', expected one of SmolLM2-135M"),
    ],
)
def test_mistakes_are_named(argv, message, capsys):
    pytest.importorskip("triton")
    assert main(["xray", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_process_that_does_not_start_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    (report,) = xray.survey([case("rms_norm", "SmolLM2-135M")], ["sm_90"], cached=False)
    assert report["error"] == "the compiler ended its process"


@pytest.mark.slow
def test_a_compiler_that_ends_its_process_is_reported_and_replaced():
    """As an assertion in LLVM does: the jobs after it are answered by another process."""
    pytest.importorskip("triton")
    mistake = {"what": "code", "case": {"op": "softmax"}}
    with xray.Workers() as workers:
        assert workers.ask(mistake)["error"].startswith("TypeError")
        workers.own.code.write("not JSON\n")  # outside of what a worker catches
        assert workers.ask(mistake) == {"error": "the compiler ended its process"}
        assert workers.ask(mistake)["error"].startswith("TypeError")


def test_reports_are_kept_for_one_state_of_the_sources_and_versions(tmp_path, monkeypatch):
    import trillama.kernels

    package = tmp_path / "kernels"
    shutil.copytree(Path(trillama.kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    state = xray._version.__wrapped__
    first = state()
    monkeypatch.setattr(trillama.kernels, "__file__", str(package / "__init__.py"))
    assert state() == first  # where the sources lie is not part of it
    source = package / "rmsnorm.py"
    source.write_text(source.read_text() + "\n")
    changed = state()
    assert changed != first
    for name in ("triton", "torch", "liger-kernel"):
        monkeypatch.setattr(xray, "versions", lambda name=name: {name: "0"})
        assert state() not in (first, changed)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_says_which_variable_names_another():
    command = [sys.executable, "-m", "trillama.bench.xray", "swiglu", "--arch", "sm_90", "--model", "SmolLM2-135M"]
    environment = {**os.environ, "TRITON_CACHE_DIR": os.devnull, "TRILLAMA_CACHE": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "; TRITON_CACHE_DIR names another folder" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
