"""Tensor parallelism over 2 and 4 processes against one: the same numbers, less memory, and a common end."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
import worlds
from trillama.bench import oracle, roofline
from trillama.bench.cases import MODELS
from trillama.model import KVCache, generate, parallel
from trillama.model.config import Config
from trillama.model.llama import Llama

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.host, pytest.mark.skipif(sys.platform != "linux", reason="the worlds of these tests are Linux's")]

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CASES = {
    "8/2": ("Llama", {}),
    "8/8": ("Llama", {"num_key_value_heads": 8}),
    "4/1": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}),
    "9/3, tied": ("Llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "6/2, biases": ("Llama", {"hidden_size": 72, "num_attention_heads": 6, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 4}),
    "phi3": ("Phi3", {}),
}  # fmt: skip
UNEVEN = ("8/2", "8/8", "4/1", "9/3, tied", "6/2, biases")  # those of four ranks too: some of these share heads, or have more


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for case, (family, changes) in CASES.items():
        torch.manual_seed(len(made))
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases are ones and zeros otherwise
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        made[case] = tmp_path_factory.mktemp("model")
        model.save_pretrained(made[case], max_shard_size="100KB" if case == "8/2" else "1GB")
    assert len(list(made["8/2"].glob("*.safetensors"))) > 1
    return made


@pytest.fixture(scope="module")
def expected(folders):
    return worlds.answers(folders, alone=True)


@pytest.fixture(scope="module")
def given(folders, tmp_path_factory):
    """What each rank of so many has computed, by size."""
    sizes = {2: folders, 4: {case: folder for case, folder in folders.items() if case in UNEVEN}}

    @functools.cache
    def given(size):
        return worlds.World(tmp_path_factory.mktemp("world"), size, worlds.answers, sizes[size]).results()

    return given


@pytest.mark.parametrize(
    ("size", "case"), [*((2, case) for case in CASES), *(pytest.param(4, c, marks=pytest.mark.slow) for c in UNEVEN)]
)
def test_same_numbers(size, case, given, expected):
    first, *others = (rank[case] for rank in given(size))
    for name, value in first.items():
        assert all(np.array_equal(value, other[name]) for other in others), f"{name}: the ranks differ"
        if name.startswith(("whole", "cached")):
            assert error(value, expected[case][name]) < rounding.logits(), name
        elif name != "drawn without a seed":
            assert value.tolist() == expected[case][name].tolist(), name


def error(actual, exact):
    return oracle.error(torch.from_numpy(actual), torch.from_numpy(exact))


def test_every_size(folders):
    """Heads, columns and rows are each somebody's, once; key/value heads go with their queries; the refusal names what works."""
    for heads, kv_heads in ((8, 2), (8, 8), (4, 1), (9, 3), (12, 4), (32, 8), (40, 10)):
        config = Config.read({**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16,
                              "intermediate_size": 1536})  # fmt: skip
        for size in range(1, heads + 1):
            ranks = [_rank(r, size) for r in range(size)]
            pairs = [r.heads(config) for r in ranks]
            assert [h for q, _ in pairs for h in q] == list(range(heads))
            for q, kv in pairs:
                assert sorted({h * kv_heads // heads for h in q}) == list(kv)
                assert len(q) % len(kv) == 0
                assert len(q) <= -(-heads // size) * 2, "two ranks' work for one"
            assert [c for r in ranks for c in r.columns(config)] == list(range(1536))
            assert all(len(r.columns(config)) % 16 == 0 for r in ranks)
            assert [v for r in ranks for v in r.share(97)] == list(range(97))
        with pytest.raises(ValueError, match=f"{heads + 1} ranks are too many for {heads} heads .* expected 1 to {heads}$"):
            _rank(0, heads + 1).slice(config)


def _rank(rank, size):
    one = parallel.Alone()
    one.rank, one.size = rank, size
    return one


@pytest.mark.parametrize("case", CASES)
def test_slices(case, folders):
    """The parts of all ranks, put together, are the whole model; what is not split is everybody's, or the first rank's alone."""
    from trillama.model.checkpoint import open_checkpoint

    with open_checkpoint(folders[case]) as whole:
        config = Config.read(whole.config)
        for size in (2, 4):
            slices = [parallel.Slice(whole, config, _rank(r, size)) for r in range(size)]
            for name in whole.names():
                tensor, parts = whole.load(name), [s.load(name) for s in slices]
                assert [tuple(part.shape) for part in parts] == [s.shape(name) for s in slices]
                if name.endswith(("o_proj.bias", "down_proj.bias")):
                    assert torch.equal(parts[0], tensor)
                    assert not any(part.any() for part in parts[1:])
                elif tensor.dim() == 1 and "proj" not in name:
                    assert all(torch.equal(part, tensor) for part in parts)
                elif not re.search("[kv]_proj|qkv_proj|gate_up_proj", name):
                    assert torch.equal(torch.cat(parts, 1 if "o_proj" in name or "down_proj" in name else 0), tensor)


def test_a_misshapen_tensor(folders):
    """Its slice would fit; the whole does not."""
    from trillama.model.checkpoint import open_checkpoint

    with open_checkpoint(folders["8/2"]) as whole:
        config = dataclasses.replace(Config.read(whole.config), num_attention_heads=4)
        part = parallel.Slice(whole, config, _rank(0, 2))
        name = "model.layers.0.self_attn.q_proj.weight"
        with pytest.raises(ValueError, match=rf"tensor {name}: shape is \(64, 64\), expected 32 on axis 0"):
            part.shape(name)


def test_alone_is_as_before(folders):
    """Without ranks nothing is added, gathered or sliced, and gradients flow."""
    model = Llama.from_pretrained(folders["8/2"])
    assert model.ranks is parallel.ALONE is parallel.ranks()
    assert all(p.requires_grad for p in model.parameters())


def test_triton(folders, expected, tmp_path):
    """The same launches a layer as on one device, on every rank; the same ids."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the ranks of this test are on the CPU, where kernels run in the interpreter alone")
    alone = generate(Llama.from_pretrained(folders["4/1"]), [[5, 6, 7]], max_new_tokens=2, eos=[]).tolist()
    for ids, names in worlds.World(tmp_path, 2, worlds.launches, folders["4/1"]).results():
        assert ids == alone
        # Layers, products a layer, passes (the prompt is short enough), and the head in each pass.
        assert names.count("_linear_kernel") == 2 * 4 * 2 + 2
        assert names.count("_decode_kernel") == 2


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset here")
def test_memory_falls(tmp_path):
    """Peak memory of a rank while it loads: its part of the weights, and of one more tensor."""
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        vocab_size=16000, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    save_file({name: torch.rand(shape).to(torch.bfloat16) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    total = 4 * sum(shape.numel() for shape in shapes.values())
    peaks = {}
    for size in (1, 2, 4):
        (tmp_path / str(size)).mkdir()
        results = worlds.World(tmp_path / str(size), size, worlds.peak_while_loading, tmp_path).results()
        assert sum(part for _, part in results) == pytest.approx(total, rel=1e-3)  # only norms are everybody's
        peaks[size] = max(peak for peak, _ in results)
        print(f"{size} ranks: weights {total / 1e6:.1f} MB in all, peak of a rank {peaks[size] / 1e6:.1f} MB")
        assert peaks[size] < total / size + 40e6
    assert peaks[4] < 0.6 * peaks[2] < 0.36 * peaks[1]


def test_prompt_on_standard_input(tiny_folder, tmp_path):
    """Read once and shared; printed once."""
    words = ["generate", "-", "--model", str(tiny_folder), "--device", "cpu", "--max-new-tokens", "3", "--json"]
    world = worlds.World(tmp_path, 2, worlds.prompt_on_stdin, words, "the capital of France")
    assert world.codes() == [0, 0], world.words()
    assert json.loads(world.output(0))["prompt_tokens"] > 3
    assert world.output(1) == ""


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B"])
def test_bytes_of_the_plan_are_the_models(name):
    """What the page says a rank reads is what the rank's own model has, and its cache."""
    model = MODELS[name]
    few = dataclasses.replace(model, layers=2)
    for size in (1, 2, 4, 8, 16):
        with torch.device("meta"):
            share = Llama(few.config(), _rank(size - 1, size))
            cache = KVCache(share.config, 3, 100, torch.bfloat16, "meta")
        step = roofline.shared_step(few, "H100", size, batch=3, context=100)
        embedding = share.model.embed_tokens.weight.numel()
        assert step.weights == 2 * (sum(p.numel() for p in share.parameters()) - embedding)
        assert step.cache == sum(t.nbytes for t in (*cache.k, *cache.v))
        assert step.latencies == (0 if size == 1 else 5)
        assert step.collective == 3 * step.latencies * model.hidden * 2


def test_bounds_of_the_plan():
    """8B on two H100, by hand."""
    step = roofline.shared_step(MODELS["Llama-3.1-8B"], "H100", 2)
    parameters = 32 * (4096 * 128 * (32 + 16) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096) + 4096 + 4096 * 128256
    norms = 65 * 4096
    assert step.weights == 2 * ((parameters - norms) / 2 + norms)
    assert step.memory_seconds == (step.weights + 8192 * 32 * 2 * 4 * 128 * 2) / 3.35e12
    assert step.link_seconds == 65 * 8192 / 450e9
    assert step.seconds == step.memory_seconds
    assert step.with_latency(1e-5) == step.memory_seconds + step.link_seconds + 65e-5
    across = roofline.shared_step(MODELS["Llama-3.1-8B"], "H100", 16)
    assert across.link_seconds == pytest.approx(65 * 8192 * (1 / 450e9 + 1 / 8 / 50e9))


def test_the_page_has_what_the_command_prints(capsys):
    assert roofline.main([]) == 0
    page = (Path(__file__).parent.parent / "docs" / "parallel.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page
    for node in roofline.NODES.values():
        assert node.source in page


# --- the end ---------------------------------------------------------------------------------------------------------

LIMIT = 600  # seconds in which a failure of one rank has ended all on any machine
ENDLESS = 3600.0  # patience of a rank: who ends before has not waited for another


def generating(folder, *options):
    return ["generate", "the capital", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "490", "--no-cache", *options]


def ended(world, survivors, message):
    """Asserts that all survivors end with status 2, and that stderr has one line."""
    world.deadline = time.monotonic() + LIMIT
    codes = world.codes()
    assert [codes[rank] for rank in survivors] == [2] * len(survivors), (codes, world.words())
    for rank in survivors:
        lines = [line for line in world.output(rank, "err").splitlines() if line.startswith("trillama")]
        assert lines == ([f"trillama: error: {message}"] if rank == survivors[0] else []) or (
            lines == [f"trillama: error: {message}"] and 0 not in survivors
        ), world.words()
        assert "Traceback" not in world.output(rank, "err")


@pytest.mark.few(1)
@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_rank_is_killed(dies, tiny_folder, tmp_path):
    """SIGKILL in the middle of a text, without torchrun to notice it: the system says that a connection is closed."""
    world = worlds.World(tmp_path, 3, worlds.command, generating(tiny_folder), None, None, ENDLESS)
    world.wait_for(lambda: world.output(0))
    world.signal(dies)
    ended(world, [rank for rank in range(3) if rank != dies], f"rank {dies} is gone")


def test_a_rank_is_killed_while_others_wait_for_it_to_load(tiny_folder, tmp_path):
    world = worlds.World(tmp_path, 3, worlds.slow_to_load, generating(tiny_folder), ENDLESS)
    world.wait_for(lambda: world.output(1))
    world.signal(1)
    ended(world, [0, 2], "rank 1 is gone")


@pytest.mark.slow
def test_a_rank_that_is_stuck(tiny_folder, tmp_path):
    """Stopped, not dead: its connections stay open, and the collectives' own limit ends the others."""
    world = worlds.World(tmp_path, 2, worlds.command, generating(tiny_folder), None, None, 8.0)
    world.wait_for(lambda: world.output(0))
    world.signal(1, signal.SIGSTOP)
    world.processes[0].join(LIMIT)
    assert world.processes[0].exitcode == 2, world.words()
    assert "trillama: error: " in world.output(0, "err")
    world.signal(1, signal.SIGCONT)
    assert world.codes()[1] == 2


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_comes(absent, tiny_folder, tmp_path):
    world = worlds.World(tmp_path, 2, worlds.command, generating(tiny_folder), None, absent, 1.0)
    assert world.codes()[1 - absent] == 2
    assert "trillama: error: the ranks did not find each other within 1 s: " in world.output(1 - absent, "err")


@pytest.mark.slow
def test_an_error_on_one_rank(tiny_folder, tmp_path):
    world = worlds.World(tmp_path, 2, worlds.failing, generating(tiny_folder), 1)
    ended(world, [0, 1], "rank 1: CUDA out of memory. Tried to allocate 20 GiB")


def test_an_error_on_all_ranks(tiny_folder, tmp_path):
    world = worlds.World(tmp_path, 2, worlds.command, generating(tiny_folder, "--temperature", "-1"))
    ended(world, [0, 1], "temperature is -1.0, expected a number from 0 on")


def test_too_many_ranks(folders, tiny_folder, tmp_path):
    size = 7  # for 6 heads
    world = worlds.World(tmp_path, size, worlds.command, generating(tiny_folder))
    ended(world, range(size), f"{tiny_folder}: 7 ranks are too many for 6 heads and an intermediate_size of 80, expected 1 to 5")


def test_other_files(tiny_folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    world = worlds.World(tmp_path, 2, worlds.command, generating(tiny_folder), {1: generating(other)})
    assert world.codes() == [2, 2]
    (line,) = world.output(0, "err").splitlines()
    assert line.startswith("trillama: error: rank 1: ")
    assert "checkpoint is 21 tensors whose names, shapes, sizes and config have the digest" in line


def test_join_without_torchrun_is_one_rank(tiny_folder, monkeypatch):
    """What a script does in which the README's lines stand and that is started as any other."""
    for name in parallel.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with parallel.join() as ranks:
        assert ranks is parallel.ranks() is parallel.ALONE
        shared = Llama.from_pretrained(tiny_folder, device=ranks.device(), ranks=ranks)
    alone = Llama.from_pretrained(tiny_folder)
    assert generate(shared, [[1, 2, 3]], max_new_tokens=4).tolist() == generate(alone, [[1, 2, 3]], max_new_tokens=4).tolist()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="RANK is set and WORLD_SIZE is not, expected all that torchrun sets: RANK, WORLD_SIZE"):
        with parallel.join():
            pass


def test_other_version(tiny_folder, tmp_path):
    world = worlds.World(tmp_path, 2, worlds.other_version, generating(tiny_folder))
    ended(world, [0, 1], f"rank 1: {tiny_folder}: trillama is 9.9, but on rank 0 it is {parallel.kernels.__version__}")


# --- torchrun --------------------------------------------------------------------------------------------------------


def torchrun(size, *arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--standalone", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def script():
    file = Path(sys.executable).with_name("trillama")
    if not file.exists():
        pytest.skip("the console script is not installed beside this Python")
    return file


def test_torchrun_and_a_killed_rank(tiny_folder):
    run = torchrun(2, script(), *generating(tiny_folder))
    try:
        assert run.stdout.read(1)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        worker = next(int(c) for c in children if b"RANK=1" in Path(f"/proc/{c}/environ").read_bytes().split(b"\0"))
        os.kill(worker, signal.SIGKILL)
        _, words = run.communicate(timeout=LIMIT)
        assert run.returncode != 0
        assert "trillama: error: rank 1 is gone" in words or "SIGKILL" in words
    finally:
        run.kill()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_smollm2(size, smollm2_gguf):
    """The commands of the README: the same text as on one device, printed once."""
    words = ["generate", "The capital of France is", "--model", smollm2_gguf, "--device", "cpu", "--max-new-tokens", "24", "--json"]
    alone = subprocess.run([script(), *words], capture_output=True, text=True, check=True)
    shared = torchrun(size, script(), *words)
    out, err = shared.communicate(timeout=400)
    assert shared.returncode == 0, err
    assert json.loads(out)["ids"] == json.loads(alone.stdout)["ids"]


@pytest.mark.slow
def test_smollm2_logits(smollm2_gguf, tmp_path):
    expected = worlds.answers({"smollm2": smollm2_gguf}, alone=True)["smollm2"]
    for size in (2, 3, 4):
        (tmp_path / str(size)).mkdir()
        given = worlds.World(tmp_path / str(size), size, worlds.answers, {"smollm2": smollm2_gguf}, timeout=400).results()[0]
        for name, value in given["smollm2"].items():
            if name.startswith(("whole", "cached")):
                assert error(value, expected[name]) < rounding.logits(), (size, name)
        assert given["smollm2"]["greedy"].tolist() == expected["greedy"].tolist()


@pytest.mark.slow
def test_benchmark(tiny_folder, tmp_path):
    run = torchrun(2, "-m", "trillama.bench.decode", "--model", tiny_folder, "--device", "cpu", "--prompt", 8, "--new", 8,
                   "--rounds", 1, "--json", tmp_path / "rows.json")  # fmt: skip
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    assert out.count("streaming bandwidth") == 1
    assert json.loads((tmp_path / "rows.json").read_text())["card"]["ranks"] == 2
