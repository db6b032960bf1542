"""`trillama bench`: random weights of a named shape, transformers on the same weights, and bandwidth by the device's own clock."""

import errno
import json
import math
import os
import runpy
import sys
import types
from pathlib import Path

import pytest
import rounding
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from trillama.bench import cache_study, decode, files, oracle, timing
from trillama.kernels import quantized, use_backend
from trillama.model import Llama, generate, shapes

pytestmark = pytest.mark.host
FAMILIES = {
    "llama": shapes.Model(64, 4, 2, 16, 96, 2, 128), "tied": shapes.Model(64, 4, 2, 16, 96, 2, 128, True),
    "phi3": shapes.Model(64, 4, 4, 16, 96, 2, 32064, False, "phi3"),
    "qwen2": shapes.Model(64, 4, 2, 16, 96, 2, 128, False, "qwen2"),
    "qwen3": shapes.Model(64, 4, 2, 32, 96, 2, 128, True, "qwen3"),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """The names of FAMILIES as shapes."""
    for name, model in FAMILIES.items():
        monkeypatch.setitem(shapes.SHAPES, name, model)


# --- the shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_is_a_model(name):
    """On the meta device, where a model of any size fits."""
    with torch.device("meta"):
        model = Llama(shapes.config(name, 2))
    assert len(model.model.layers) == 2
    known = {"smollm2-135m": 134.5e6, "llama-3.2-1b": 1.236e9, "llama-3.1-8b": 8.03e9, "qwen2.5-7b": 7.62e9, "phi-3-mini": 3.82e9}
    if name in known:  # as their cards say
        with torch.device("meta"):
            whole = Llama(shapes.config(name))
        assert sum(p.numel() for p in whole.parameters()) == pytest.approx(known[name], rel=2e-3)


def test_a_shard_is_an_eighth():
    whole, part = shapes.config("llama-3.1-70b"), shapes.config("llama-3.1-70b-shard")
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert 8 * part[field] == whole[field]
    assert (part["hidden_size"], part["head_dim"], part["num_hidden_layers"]) == (8192, 128, 80)


@pytest.mark.few(3)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hundreds_of_steps(small, family, quantize):
    """Finite, of the size of 1, and drawing does not run into few ids."""
    model = Llama.random(family, quantize=quantize, device="cpu", dtype=torch.float32)
    ids = generate(model, [[5, 9, 11]], max_new_tokens=300, eos=[], temperature=1.0, seed=1)
    assert len(set(ids[0].tolist())) > 80
    with torch.no_grad():
        logits = model(ids.clone())
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_steps(weights):
    """Through a vocabulary of the usual size they go on for as long as chance lets them, although the head is the embedding."""
    model = Llama.random("smollm2-135m", layers=1, device="cpu", dtype=weights)
    with use_backend("reference"):
        assert len(set(generate(model, [[5, 9, 11]], max_new_tokens=100, eos=[])[0].tolist())) > 20


def test_depth_changes_nothing():
    config = {**FAMILIES["llama"].config(), "num_hidden_layers": 60}
    with torch.no_grad():
        logits = Llama.random(config, device="cpu", dtype=torch.bfloat16)(torch.randint(128, (2, 50)))
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2


def test_seeds_devices_and_dtypes(small):
    one, same, other = (dict(Llama.random("llama", device="cpu", seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if not name.endswith("norm.weight"))
    assert {p.dtype for p in one.values()} == {torch.float32}
    model = Llama.random("llama", device="cpu", dtype="bfloat16", layers=1)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}
    assert not model.training
    assert len(model.model.layers) == 1
    assert Llama.random("llama", device="cpu", quantize="int8").model.norm.weight.dtype == torch.bfloat16
    before = torch.random.get_rng_state()
    Llama.random("tied", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
def test_on_a_gpu():
    model = Llama.random("smollm2-135m", layers=2)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cuda")}
    assert generate(model, [[1, 2]], max_new_tokens=4, eos=[]).shape == (1, 4)


class Memory(TorchDispatchMode):
    """Elements of the largest tensor of each dtype that a block makes."""

    def __init__(self):
        super().__init__()
        self.largest = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.device.type != "meta":
                self.largest[t.dtype] = max(self.largest.get(t.dtype, 0), t.numel())
        return out


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_weights_are_made_in_their_dtype(small, monkeypatch, quantize):
    """No detour over float32, but for the part of a weight that is being quantised."""
    monkeypatch.setattr(quantized, "TILE", 512)
    with Memory() as memory:
        model = Llama.random("llama", device="cpu", dtype=torch.bfloat16, quantize=quantize)
    largest = max(p.numel() for p in Llama(shapes.config("llama")).parameters())
    assert memory.largest[torch.bfloat16] == largest
    assert memory.largest.get(torch.float32, 0) == (0 if quantize is None else 512)
    assert model.lm_head.quantized is (quantize is not None)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_in_parts_changes_nothing(monkeypatch, bits):
    weight = torch.randn(70, 64)
    whole = quantized.quantize(weight, bits)
    monkeypatch.setattr(quantized, "TILE", 64 * 9)
    parts = quantized.quantize(weight, bits)
    assert parts.shape == whole.shape
    for name in ("data", "scale", *(["minimum"] if bits == 4 else [])):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-9",), "shape is 'llama-9', expected one of smollm2-135m, "),
        (("llama-3.1-8b", {"layers": 0}), "num_hidden_layers is 0, expected an integer from 1"),
        (("llama-3.1-8b", {"layers": 2.5}), "num_hidden_layers is 2.5, expected an integer from 1"),
        ((FAMILIES["llama"].config(), {"layers": 2}), "layers is 2, expected None with a config"),
        (("smollm2-135m", {"quantize": "int3"}), "quantize is 'int3', expected 'int8', 'int4' or None"),
        (("smollm2-135m", {"dtype": "int8"}), "dtype is torch.int8, expected a floating-point torch.dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(arguments, message):
    name, options = (*arguments, {})[:2]
    with pytest.raises(ValueError) as error:
        Llama.random(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_shape_from_the_command_line(trillama, small, tmp_path):
    file = tmp_path / "out.json"
    line = ("--shape", "llama", "--layers", 1, "--batch", "1,2", "--prompt", 4, "--new", 4, "--rounds", 1, "--device", "cpu")
    status, out, err = trillama("bench", *line, "--quantize", "int8", "--json", file)
    assert (status, err) == (0, "")
    report = json.loads(file.read_text())
    assert report["card"]["model"] == "llama, random weights of 1 layers"
    assert report["card"]["quantize"] == "int8"
    assert report["card"]["datasheet_bandwidth"] is None
    assert "measured: one long read" in out
    assert "datasheet" not in out
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    assert all(row["decode_tokens_per_s"] > 0 for row in report["rows"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--shape", "gpt-2"), "shape is 'gpt-2', expected one of smollm2-135m"),
        (("--layers", 2), "--layers is 2 without --shape"),
        (("--threads", 0), "--threads is 0, expected at least 1"),
        (("--threads", -2), "--threads is -2, expected at least 1"),
        (("--shape", "llama-3.1-8b", "--model", "smollm2"), "not allowed with"),
        (("--shape", "smollm2-135m", "--layers", 0), "--layers is 0, expected at least 1"),
    ],
)
def test_mistakes(trillama, line, message):
    status, out, err = trillama("bench", *line)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("more", [(), ("--cache-study",)], ids=["rows", "cache-study"])
@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError("CUDA error")], ids=["interruption", "error"])
def test_what_was_measured_is_in_the_file_whatever_comes_then(trillama, small, tmp_path, monkeypatch, more, end):
    """A row is in it before the next one begins; until then it holds what it did."""
    file, found = tmp_path / "link.json", []
    (tmp_path / "real.json").write_text("of before")
    file.symlink_to("real.json")
    owner, name = (cache_study, "study") if more else (decode, "measure")
    real = getattr(owner, name)

    def until_the_third(*arguments):
        found.append(file.read_text())
        if len(found) == 3:
            raise end
        return real(*arguments)

    monkeypatch.setattr(owner, name, until_the_third)
    line = ("--shape", "llama", "--prompt", "4,5,6", "--new", 4, "--rounds", 1, "--device", "cpu", "--json", file, *more)
    status, *_ = trillama("bench", *line)
    assert status == (130 if end is KeyboardInterrupt else 2)
    assert found[0] == "of before"
    assert [row["prompt"] for row in json.loads(found[1])["rows"]] == [4]
    assert [row["prompt"] for row in json.loads(file.read_text())["rows"]] == [4, 5]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link.json", "real.json"]


def test_a_pipe_gets_one_document(trillama, small):
    line = ("--shape", "llama", "--prompt", "4,5", "--new", 2, "--rounds", 1, "--device", "cpu")
    read, write = os.pipe()
    with open(read) as pipe:
        status, _, error = trillama("bench", *line, "--json", f"/dev/fd/{write}")
        assert status == 0, error
        os.close(write)
        assert [row["prompt"] for row in json.load(pipe)["rows"]] == [4, 5]


@pytest.mark.parametrize(
    ("command", "option", "file", "said"),
    [
        *((command, option, name, said) for command in ("bench", "xray") for option, name, said in (
            ("--json", "none/x.json", "a file that can be written: No such file or directory"),
            ("--json", ".", "a file that can be written: Is a directory"),
            ("--plot", "x.xyz", "a name that ends in one of "),
            ("--plot", "file/x.png", "a file that can be written: Not a directory"),
        )),
        ("bench --cache-study", "--json", "none/x.json", "a file that can be written: No such file or directory"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_told_before_anything_runs(trillama, tmp_path, monkeypatch, command, option, file, said):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    if command == "xray":
        pytest.importorskip("triton")

    def nothing(*_, **__):
        raise AssertionError("something was begun")

    monkeypatch.setattr(Llama, "from_pretrained", nothing)
    monkeypatch.setattr("trillama.bench.xray.Workers", nothing)
    (tmp_path / "file").write_text("of before")
    status, out, err = trillama(*command.split(), option, tmp_path / file)
    assert (status, out) == (2, "")
    assert err.startswith(f"trillama: error: {option} is {tmp_path / file}, expected {said}")
    assert err.count("\n") == 1
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_backend_of_a_benchmark(trillama, monkeypatch):
    from trillama.kernels import dispatch

    monkeypatch.setattr(decode, "run", lambda args: print(dispatch.backend()))
    assert trillama("bench", "--backend", "triton") == (0, "triton\n", "")
    assert trillama("bench") == (0, "reference\n", "")  # of the environment
    monkeypatch.delenv("TRILLAMA_BACKEND")
    assert trillama("bench") == (0, "auto\n", "")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    from trillama.bench import plots

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"x\.json: No space left on device$"):
        files.rewrite(tmp_path / "x.json", "new")
    with pytest.raises(OSError, match=r"x\.png: No space left on device$"):
        plots.save(types.SimpleNamespace(savefig=full), tmp_path / "x.png")


def test_a_plot_needs_matplotlib_before_anything_runs(trillama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(Llama, "from_pretrained", None)
    status, out, err = trillama("bench", "--plot", tmp_path / "x.png")
    assert (status, out, err) == (2, "", "trillama: error: plots need matplotlib: pip install 'trillama[plot]'\n")


def test_a_check_leaves_no_trace(trillama, tmp_path):
    """Nor does a mistake found after it."""
    (tmp_path / "a.json").write_text("of before")
    for name in ("a.json", "b.json"):
        assert trillama("bench", "--model", tmp_path / "none", "--json", tmp_path / name)[0] == 2
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a.json", "of before")]


def test_a_file_that_cannot_be_replaced_is_written_in_its_place(tmp_path, monkeypatch):
    """A container's mount, for one."""
    file = tmp_path / "x.json"
    file.write_text("of before")
    before = file.stat().st_ino

    def fail(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(Path, "replace", fail)
    reason = errno.EBUSY
    files.rewrite(file, "new")
    assert (file.read_text(), file.stat().st_ino) == ("new", before)
    reason = errno.ENOSPC  # which writing in its place would not survive
    with pytest.raises(OSError, match="No space"):
        files.rewrite(file, "newer")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("x.json", "new")]


def test_the_rows_are_drawn(trillama, small, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plots" / "x.png"
    line = ("--shape", "llama", "--batch", "1,2", "--prompt", 4, "--new", 2, "--rounds", 1, "--device", "cpu", "--plot", file)
    assert trillama("bench", *line)[0] == 0
    assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_on_the_same_weights(small, family, quantize):
    pytest.importorskip("transformers")
    model = Llama.random(family, device="cpu", dtype=torch.float32, quantize=quantize)
    theirs, _ = decode.transformers_twin(shapes.config(family), decode.lent(model), torch.device("cpu"))
    ids = torch.randint(128, (2, 20))
    with torch.no_grad():
        want = theirs(ids).logits
        if family in ("tied", "qwen3") and quantize:  # their head is the embedding itself
            model.lm_head.weight = model.model.embed_tokens.weight
        assert oracle.error(model(ids), want.double()) < rounding.logits()
    if quantize is None:
        mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert {p.untyped_storage().data_ptr() for p in theirs.parameters()} <= mine


def test_against_transformers_from_the_command_line(trillama, small, tiny_folder):
    line = ("--prompt", 4, "--new", 3, "--rounds", 1, "--device", "cpu", "--against", "hf")
    for source in (("--shape", "tied"), ("--model", tiny_folder)):
        status, out, _ = trillama("bench", *source, *line)
        assert status == 0
        assert "hf tok/s" in out


# --- bandwidth and clocks --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["tune", "report", "traffic", "roofline", "host", "xray", "hardware", "decode"])
def test_a_mistake_on_the_command_line_is_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--nonsense"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"trillama.bench.{name}", run_name="__main__", alter_sys=True)
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("trillama: error: ")
    assert error.count("\n") == 1


def test_every_command_of_bench_ends_in_one_way():
    """In one line and exit status 2 where the user or the machine is wrong, quietly where it is interrupted."""
    folder = Path(decode.__file__).parent
    commands = [f for f in (*folder.glob("*.py"), folder / "hardware" / "__main__.py") if '__main__"' in f.read_text()]
    assert len(commands) >= 8
    for file in commands:
        end = file.read_text().rstrip().splitlines()[-2:]
        assert end[0] == 'if __name__ == "__main__":', file
        assert end[1].strip() in ("sys.exit(cli.status(main))", 'sys.exit(cli.main(["bench", *sys.argv[1:]]))'), file


@pytest.mark.parametrize(
    ("name", "arch", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 90, 3.35e12), ("NVIDIA H200", 90, 4.8e12), ("NVIDIA A100-SXM4-80GB", 80, 2.039e12),
        ("NVIDIA A10", 86, 0.6e12), ("NVIDIA GeForce RTX 4090", 89, 1.008e12), ("NVIDIA B200", 100, 8e12),
        *((name, None, None) for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA GH200 480GB",
                                          "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4")),
    ],
)  # fmt: skip
def test_datasheets(name, arch, bandwidth):
    gpu = decode.datasheet(name)
    assert (gpu and (gpu.arch, gpu.bandwidth)) == (arch and (arch, bandwidth))


@pytest.fixture
def events(monkeypatch):
    """A GPU whose copies take a millisecond for each GiB that is read or written, but for one that takes ten."""
    now, made = [0.0], types.SimpleNamespace(streams=[], copies=0, device=[], synchronized=[])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            made.streams.append(stream)
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Bytes:
        def __init__(self, n):
            self.nbytes = n

        def copy_(self, source):
            assert source.nbytes == self.nbytes
            made.copies += 1
            now[0] += 2 * self.nbytes / 2**30 * (10 if made.copies == 5 else 1)

    class Device:
        def __init__(self, device):
            made.device.append(torch.device(device))

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: made.memory)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: made.synchronized.append(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "ones", lambda n, **_: Bytes(n))
    monkeypatch.setattr(torch, "empty_like", lambda like: Bytes(like.nbytes))
    made.now, made.memory = now, (2**36, 2**37)
    return made


def test_bandwidth_of_a_gpu(events):
    """Both directions count, and one slow copy does not."""
    device = torch.device("cuda", 1)
    assert decode.streaming_bandwidth(device) == pytest.approx(2**30 * 1000)
    assert events.device == [device]
    assert timing.copy_bandwidth("cuda:1") == pytest.approx(2**30 * 1000)
    events.memory = (2**32, 2**37)
    before = events.now[0]
    assert timing.copy_bandwidth(device) == pytest.approx(2**30 * 1000)
    assert events.now[0] - before == pytest.approx(13 * 2)  # of a GiB each, not of two


def test_the_clock_of_a_gpu_that_is_not_the_current_one(events):
    clock = decode.Clock(torch.device("cuda", 1))
    events.now[0] = 5.0
    clock.tick()
    assert clock.intervals() == [0.005]
    assert events.streams == ["stream of cuda:1"] * 2
    assert events.synchronized == [torch.device("cuda", 1)]


def test_bandwidth_of_a_cpu():
    assert 1e8 < decode.streaming_bandwidth(torch.device("cpu"), 1 << 24) < math.inf


@pytest.mark.gpu
def test_bandwidth_is_near_the_datasheet():
    gpu = decode.datasheet(torch.cuda.get_device_name())
    if gpu is None:
        pytest.skip("a GPU without a datasheet here")
    assert 0.75 * gpu.bandwidth < timing.copy_bandwidth("cuda") < gpu.bandwidth


def test_both_fractions_are_shown(capsys):
    row = dict.fromkeys(("prefill_s", "prefill_tokens_per_s", "decode_ms_median", "decode_ms_p95", "decode_tokens_per_s"), 1.0)
    row |= {"batch": 1, "prompt": 4, "new": 4, "bound_tokens_per_s": 2.0, "peak_memory_bytes": 10**9}
    decode.show_header(None, 3.35e12)
    decode.show_row({**row, "fraction_of_bound": 0.91, "fraction_of_datasheet": 0.82})
    header, line = capsys.readouterr().out.splitlines()
    assert header.index("of datasheet") + len("of datasheet") == line.index("82%") + 3
    assert header.index("of it") + len("of it") == line.index("91%") + 3
    decode.show_header(None, None)
    decode.show_row({**row, "fraction_of_bound": 0.91})
    header, line = capsys.readouterr().out.splitlines()
    assert "datasheet" not in header
    assert header.index("| ", 60) == line.index("| ", 60)
