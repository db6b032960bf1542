"""Bytes through memory: that the counter counts, and what the kernels move against the least possible."""

import os
from dataclasses import replace

import pytest
import torch
from trillama.bench import roofline, traffic
from trillama.bench.cases import MODELS, OPS, Model, available, case
from trillama.kernels import decode_attention, flash_attention
from trillama.kernels.dispatch import INTERPRETED, jit, launch, tl

pytestmark = [pytest.mark.host, pytest.mark.skipif(not INTERPRETED, reason="accesses are counted in Triton's interpreter")]


@jit
def _shift(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < n) & (n > 0)  # of a vector and a number: integers in the interpreter
    tl.store(y_ptr + i, tl.load(x_ptr + i, inside) + tl.load(x_ptr + tl.minimum(i + 1, n - 1), inside), inside)


def test_the_counter_against_a_count_by_hand():
    """100 floats, read twice from program to program: 400 bytes, 13 sectors from an aligned start, 200 accesses asked for."""
    x, y = torch.randn(128)[:100], torch.empty(100)
    assert x.data_ptr() % 32 == y.data_ptr() % 32 == 0
    with traffic.counting() as launches:
        launch(_shift, (2,), x, y, 100, BLOCK=64)
    (one,) = launches
    read, written = one.buffers
    assert (one.kernel, one.programs, read.name, written.name) == ("_shift", 2, "x_ptr", "y_ptr")
    assert (read.bytes("read"), read.sectors("read"), read.requested["read"]) == (400, 416, 800)
    assert (written.bytes("written"), written.sectors("written"), written.bytes("read")) == (400, 416, 0)
    assert (one.hbm, one.requested) == (832, 1200)


def test_an_access_outside_of_all_arguments_is_an_error():
    x, y = torch.randn(100), torch.empty(100)
    with pytest.raises(Exception, match="lies in none of its arguments"):  # the interpreter wraps it
        with traffic.counting():
            launch(_shift, (1,), x, y, 1 << 20, BLOCK=1 << 20)


ROWS = [(op, backward) for op in available() if OPS[op].moved_backward and "attention" not in op for backward in (False, True)]


@pytest.mark.parametrize(("op", "backward"), ROWS)
@pytest.mark.parametrize("model", ["SmolLM2-135M", "Qwen3-0.6B"])
def test_row_kernels_move_the_least(op, backward, model):
    """Each byte of input and output once. A norm's backward also writes its programs' shares of dweight, which is counted here with
    one row a program: the share falls with the rows."""
    c = case(op, model, tokens=4, dtype="fp16", backward=backward)
    partial = 4 * c.m.hidden * 4 - c.m.hidden * 2 if backward and "norm" in op else 0
    assert sum(l.hbm for l in traffic.count(c)) <= 1.01 * c.moved + partial


@pytest.mark.slow
@pytest.mark.parametrize(("op", "backward"), ROWS)
@pytest.mark.parametrize("model", ["Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B/8", "Llama-3.1-405B/8"])
def test_row_kernels_of_all_widths_move_the_least(op, backward, model):
    test_row_kernels_move_the_least(op, backward, model)


@pytest.mark.few(5)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("op", [op for op in available() if OPS[op].phase == "decode"])
def test_decode_operators_read_the_least(op, precision):
    """Weights, cache, table and logits once; a cut goes through the logits that it keeps several times more."""
    c = traffic.small(case(op, "SmolLM2-135M", dtype=precision))
    (one,) = traffic.count(c)
    small = 64 * traffic.SECTOR  # ids, flags, counters and partial results: a sector each, however few their bytes
    assert one.hbm <= (5 if op == "choose_ cut" else 1.03) * c.moved + small


def test_dweight_costs_little_at_a_usual_number_of_rows():
    c = case("rms_norm", "SmolLM2-135M", tokens=4096, backward=True)
    partial = 216 * c.m.hidden * 4  # at most: two programs a multiprocessor, on the architecture the interpreter stands for
    assert partial < 0.04 * c.moved


@pytest.mark.parametrize(("model", "context"), [("SmolLM2-135M", 64), ("SmolLM2-135M", 1500), ("Llama-3.1-8B", 700)])
def test_decode_reads_the_cache_exactly_once(model, context):
    """Every valid key and value is asked for once; partial results of the split add at most three hundredths."""
    c = replace(case("decode_attention", model, dtype="fp16"), context=context)
    (one,) = traffic.count(c)
    buffers = {b.name: b for b in one.buffers}
    cache = c.batch * c.m.kv_heads * context * c.m.head_dim * 2
    for name in ("k_ptr", "v_ptr"):
        assert buffers[name].requested["read"] == buffers[name].sectors("read") == cache
    assert one.hbm <= 1.03 * c.moved + 64  # and two counters, a sector each


def test_decode_reads_nothing_behind_a_length():
    q, k, v = torch.randn(2, 4, 1, 64).half(), torch.randn(2, 2, 300, 64).half(), torch.randn(2, 2, 300, 64).half()
    lengths = torch.tensor([17, 300], dtype=torch.int32)
    with traffic.counting() as launches:
        decode_attention(q, k, v, lengths)
    read = next(b for b in launches[0].buffers if b.name == "k_ptr")
    assert read.requested["read"] == (17 + 300) * 2 * 64 * 2


def test_attention_reads_each_head_once_from_memory():
    c = case("flash_attention", "SmolLM2-135M", tokens=200, dtype="fp16")
    launches = traffic.count(c)
    assert sum(l.hbm for l in launches) <= 1.01 * c.moved


def test_a_window_leaves_out_what_nobody_sees():
    q, k, v = (torch.randn(1, 1, n, 64).half() for n in (64, 1024, 1024))
    with traffic.counting() as launches:
        flash_attention(q, k, v, window=16)
    read = next(b for b in launches[0].buffers if b.name.startswith("k"))
    assert read.bytes("read") <= 256 * 64 * 2  # 79 keys are seen; what is read are whole tiles


# --- a whole step --------------------------------------------------------------------------------------------------------

TINY = Model(64, 4, 2, 16, 96, 3, 50)


def total(lines, field):
    return sum(getattr(line, field) for line in lines)


def test_a_decode_step_reads_every_weight_once():
    from trillama.model import Llama

    lines = traffic.step(TINY.config(), batch=1, tokens=1, context=40)
    llama = Llama(TINY.config())
    weights = sum(p.numel() for name, p in llama.named_parameters() if "embed_tokens" not in name) * 2
    cache = 3 * 2 * 2 * 40 * 16 * 2
    assert weights + cache <= total(lines, "moved") <= weights + cache + 24_000  # and activations
    products = 2 * sum(p.numel() for name, p in llama.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
    assert total(lines, "flops") == products + 3 * 4 * 4 * 16 * 40


def test_a_prefill_step_computes_the_head_for_one_token_only():
    lines = {line.name: line for line in traffic.step(TINY.config(), batch=2, tokens=32, context=32)}
    layer = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 96
    assert lines["linear"].flops == 2 * 2 * 32 * 3 * layer
    assert lines["decode_linear"].flops == 2 * 2 * 64 * 50
    assert lines["flash_attention"].flops == 3 * 4 * 2 * 4 * 16 * (32 * 33 // 2)


def test_launches_of_a_step():
    lines = {line.name: line for line in traffic.step(TINY.config(), batch=1, tokens=1, context=40)}
    assert all(line.launches == line.calls for line in lines.values())  # each op is one launch
    assert total(lines.values(), "launches") == 3 * 6 + 2  # the embedding, the head


def test_bounds():
    """Llama-3.1-8B at batch 1: 15.0 GB of weights and 1.1 GB of cache a token; perf figures of datasheets."""
    lines = traffic.step(MODELS["Llama-3.1-8B"].config(), 1, 1, 8192)
    assert total(lines, "moved") == pytest.approx(16.1e9, rel=0.01)
    assert traffic.seconds(lines, "H100") == pytest.approx(16.1e9 / 3.35e12, rel=0.01)
    assert roofline.GPUS["A100"].bound(2.039e12) == 1
    assert roofline.GPUS["A100"].bound(0, 312e12) == 1
    assert roofline.GPUS["A100"].bound(0, 19.5e12, itemsize=4) == 1


def test_the_command(capsys):
    assert traffic.main(["rms_norm", "--model", "SmolLM2-135M", "--dtype", "fp16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["rms_norm", "hidden", "576"]
    assert lines[1].split()[-2] == "1.000"
    assert traffic.main(["--step", "--model", "SmolLM2-135M", "--context", "512"]) == 0
    text = capsys.readouterr().out
    assert text.count("Bounds, not measurements") == 2
    assert "A100" in text and "RTX 4090" in text  # noqa: PT018
    for argv in (["softmax"], ["--model", "GPT-2"], ["--dtype", "int4"], ["--step", "--model", "Gemma-2-9B"]):
        with pytest.raises(ValueError, match=argv[-1]):
            traffic.main(argv)


def test_counting_needs_the_interpreter():
    import subprocess
    import sys

    code = "from trillama.bench import traffic, cases\ntraffic.count(cases.case('rms_norm', 'SmolLM2-135M'))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "set TRITON_INTERPRET=1 before Triton is imported" in done.stderr
