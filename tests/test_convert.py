"""Layouts into one another: bit for bit and back, read by transformers and by torch.load, whole or not at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from trillama.model import Llama, Tokenizer
from trillama.model.checkpoint import CheckpointError, open_checkpoint
from trillama.model.convert import convert, rotary_rows

transformers = pytest.importorskip("transformers")

from test_checkpoint import LLAMA_3_ROPE, assert_same, make, permuted, weights, write_gguf, write_meta  # noqa: E402

pytestmark = pytest.mark.host


def logits(source):
    ids = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Llama.from_pretrained(source, device="cpu", dtype=torch.float32)(ids)


def of_transformers(folder):
    ids = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(1))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(ids).logits


def close(a, b):
    return (a - b).norm() <= 1e-5 * b.norm()


def same_config(a, b):
    from trillama.model.config import Config

    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        one, other = (vars(Config.read(checkpoint.config)).copy() for checkpoint in (one, other))
    for config in (one, other):
        for field in ("rope_interleaved", "model_type", "initializer_range"):
            config.pop(field)
        config["rope_parameters"] = {key: value for key, value in config["rope_parameters"].items() if value is not None}
    assert one == other


# --- round trips -----------------------------------------------------------------------------------------------------

FIELDS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one key head": {"num_key_value_heads": 1},
    "head size": {"head_dim": 24},
    "llama 3": {"rope_parameters": LLAMA_3_ROPE, "max_position_embeddings": 131072, "eos_token_id": [4, 9]},
    "llama 3, other factor": {"rope_parameters": {**LLAMA_3_ROPE, "factor": 16.0}, "max_position_embeddings": 131072},
    "narrow": {"intermediate_size": 40},
    "window": {"family": "mistral", "sliding_window": 5, "max_position_embeddings": 4096},
}


@pytest.mark.parametrize("how", FIELDS)
def test_hugging_face_to_meta_and_back(tmp_path, how):
    precision = torch.float32 if how in ("plain", "narrow", "window") else torch.bfloat16
    fields = dict(FIELDS[how])
    model = make(fields.pop("family", "llama"), precision, **fields)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    expected = weights(model)
    with open_checkpoint(tmp_path / "back") as checkpoint:
        assert_same(checkpoint, expected)
    with open_checkpoint(tmp_path / "meta") as checkpoint:
        config = model.config
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for name, tensor in expected.items():
            kind = re.search(r"([qk])_proj", name)
            assert torch.equal(checkpoint.load(name), rotary_rows(tensor, heads[kind[1]], True) if kind else tensor)
    for folder in ("meta", "back"):
        assert close(logits(tmp_path / folder), logits(tmp_path / "hf"))
        same_config(tmp_path / folder, tmp_path / "hf")
    assert close(of_transformers(tmp_path / "back"), logits(tmp_path / "hf"))


def test_rows_are_those_of_the_formula():
    """Feature i of a head and i + D/2 become neighbours."""
    q = torch.arange(3 * 8.0)[:, None] * torch.ones(5)
    assert rotary_rows(q, 3, True)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(rotary_rows(rotary_rows(q, 3, True), 3, False), q)
    assert torch.equal(rotary_rows(q[:, 0], 3, True), rotary_rows(q, 3, True)[:, 0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_meta_to_hugging_face_and_back(tmp_path, ranks):
    """From files that torch.save wrote; to files that torch.load reads as it reads those."""
    source, model = tmp_path / "source", make()
    source.mkdir()
    expected = write_meta(source, model, ranks)
    convert(source, tmp_path / "hf", "hf")
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        assert_same(checkpoint, weights(model))
    assert close(of_transformers(tmp_path / "hf"), logits(source))
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    with open_checkpoint(tmp_path / "meta") as checkpoint:
        assert_same(checkpoint, expected)
    for mapped in (True, False):
        read = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True, mmap=mapped)
        assert torch.equal(read["layers.1.attention.wq.weight"], expected["model.layers.1.self_attn.q_proj.weight"])
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in read.values() if mapped)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    hidden = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * params["dim"] / 3))  # as Meta's code has it
    assert params["multiple_of"] * -(-hidden // params["multiple_of"]) == model.config.intermediate_size


def test_tied_head_shares_its_bytes(tmp_path):
    make(tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    read = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert torch.equal(read["output.weight"], read["tok_embeddings.weight"])
    assert (tmp_path / "meta" / "consolidated.00.pth").stat().st_size < (tmp_path / "hf" / "model.safetensors").stat().st_size * 1.1


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "F32"), ("llama", "BF16"), ("llama", "Q4_1"), ("qwen2", "F32"), ("qwen3", "BF16"), ("phi3", "Q4_1")],
)
def test_gguf_to_hugging_face(tmp_path, family, kind):
    model = make(family, **({"head_dim": 32} if family == "qwen3" else {}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0)
    write_gguf(tmp_path / "x.gguf", model, kind)
    drop_vocabulary(tmp_path / "x.gguf", lambda: convert(tmp_path / "x.gguf", tmp_path / "hf", "hf"))
    with open_checkpoint(tmp_path / "x.gguf") as source, open_checkpoint(tmp_path / "hf") as target:
        assert source.names() == target.names()
        for name in source.names():
            assert source.dtype(name) == target.dtype(name)
            assert torch.equal(source.load(name), target.load(name))
    if kind == "F32":
        with open_checkpoint(tmp_path / "hf") as checkpoint:
            assert_same(checkpoint, weights(model))
    same_config(tmp_path / "x.gguf", tmp_path / "hf")
    assert close(of_transformers(tmp_path / "hf"), logits(tmp_path / "x.gguf"))


def drop_vocabulary(path, run):
    """Runs the function while these files of tests, which have no vocabulary, are not asked for one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trillama.model.convert.write_tokenizer", lambda source, folder: None)
        run()


# --- shards and dtypes -----------------------------------------------------------------------------------------------


def test_shards(tmp_path, trillama):
    model = make()
    model.save_pretrained(tmp_path / "hf")
    status, out, err = trillama("convert", tmp_path / "hf", tmp_path / "shards", "--to", "hf", "--shard-size", "60KB")
    assert (status, err) == (0, "")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 64_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert re.fullmatch(rf".*shards: {len(files) + 3} files, 0\.\d MB\n", out)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(model).values())
    with open_checkpoint(tmp_path / "shards") as checkpoint:
        assert_same(checkpoint, weights(model))
    assert close(of_transformers(tmp_path / "shards"), logits(tmp_path / "hf"))
    shutil.copytree(tmp_path / "shards", tmp_path / "copy")
    convert(tmp_path / "copy", tmp_path / "one", "hf")
    assert (tmp_path / "one" / "model.safetensors").is_file()


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_dtype(tmp_path, trillama, to):
    model = make()
    model.save_pretrained(tmp_path / "hf")
    assert trillama("convert", tmp_path / "hf", tmp_path / "half", "--to", to, "--dtype", "bfloat16")[0] == 0
    with open_checkpoint(tmp_path / "half") as checkpoint:
        for name, tensor in weights(model).items():
            expected = tensor.bfloat16()
            if to == "meta":
                expected = torch.from_numpy(permuted(name, expected.float().numpy(), model.config)).bfloat16()
            assert torch.equal(checkpoint.load(name), expected)
    if to == "hf":
        assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_config_of_hugging_face_is_kept(tmp_path):
    make().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["transformers.js_config"] = {"a": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "again", "hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    assert (tmp_path / "again" / "generation_config.json").read_bytes() == (tmp_path / "hf" / "generation_config.json").read_bytes()


# --- the vocabulary --------------------------------------------------------------------------------------------------

TEXTS = ["The capital of France is", " two  spaces\n", "don't 12345", "日本語 🎉", "<|im_start|>user"]


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_vocabulary_of_a_folder_is_copied(tiny_folder, tmp_path, to):
    convert(tiny_folder, tmp_path / "new", to)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_folder / name).is_file():
            assert (tmp_path / "new" / name).read_bytes() == (tiny_folder / name).read_bytes()
    ours, theirs = Tokenizer.from_pretrained(tmp_path / "new"), Tokenizer.from_pretrained(tiny_folder)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


def assert_same_vocabulary(source, target):
    ours, written = Tokenizer.from_pretrained(source), Tokenizer.from_pretrained(target)
    theirs = transformers.AutoTokenizer.from_pretrained(target)
    for text in TEXTS:
        ids = ours.encode(text)
        assert written.encode(text) == ids
        assert theirs(text, split_special_tokens=True).input_ids == ids
        assert written.encode(text, special=True) == ours.encode(text, special=True) == theirs(text).input_ids
        assert written.decode(ids) == ours.decode(ids)
    assert (written.bos, written.eos, written.vocab_size) == (ours.bos, ours.eos, ours.vocab_size)


def test_vocabulary_of_meta_becomes_a_tokenizer_json(tmp_path):
    from test_tokenizer import llama_3_file

    source = tmp_path / "meta"
    source.mkdir()
    llama_3_file(source / "tokenizer.model")
    write_meta(source, make(vocab_size=Tokenizer.from_pretrained(source).vocab_size))
    convert(source, tmp_path / "hf", "hf")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert_same_vocabulary(source, tmp_path / "hf")
    messages = [{"role": "user", "content": "hi"}]
    ids = [Tokenizer.from_pretrained(folder).apply_chat_template(messages) for folder in (source, tmp_path / "hf")]
    assert ids[0] == ids[1]


@pytest.mark.slow
def test_smollm2(smollm2_gguf, tmp_path, trillama):
    """The default model through all layouts: the same vocabulary and logits for transformers, the same weights bit for bit."""
    assert trillama("convert", smollm2_gguf, tmp_path / "hf", "--to", "hf")[0] == 0
    assert trillama("convert", tmp_path / "hf", tmp_path / "meta", "--to", "meta")[0] == 0
    assert trillama("convert", tmp_path / "meta", tmp_path / "back", "--to", "hf")[0] == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
    assert_same_vocabulary(smollm2_gguf, tmp_path / "back")
    assert close(of_transformers(tmp_path / "back"), logits(smollm2_gguf))


# --- whole or not at all ---------------------------------------------------------------------------------------------


def refused(result, *words):
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("trillama: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err


@pytest.mark.parametrize("there", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(tiny_folder, tmp_path, trillama, there):
    target = tmp_path / "there"
    if there == "folder":
        target.mkdir()
    elif there == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nowhere")
    refused(trillama("convert", tiny_folder, target, "--to", "hf"), str(target), "exists")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_fails_leaves_nothing(tmp_path, trillama):
    make().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    data = path.read_bytes()
    refused(trillama("convert", tmp_path / "hf", tmp_path / "a" / "b", "--to", "meta", "--shard-size", "lots"), "--shard-size")
    refused(trillama("convert", tmp_path / "hf", tmp_path / "a" / "b", "--to", "onnx"), "--to")
    path.write_bytes(data[:-10])
    refused(trillama("convert", tmp_path / "hf", tmp_path / "a" / "b", "--to", "meta"), "model.safetensors")
    path.write_bytes(data.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.op_proj"))
    missing = "model.layers.1.mlp.up_proj.weight is missing"
    refused(trillama("convert", tmp_path / "hf", tmp_path / "a" / "b", "--to", "hf"), missing)
    assert not (tmp_path / "a").exists()
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trillama.model.convert.loaded", lambda *args, **options: (_ for _ in ()).throw(OSError("No space left")))
        refused(trillama("convert", tmp_path / "hf", tmp_path / "a" / "b", "--to", "hf"), "No space left")
    assert list((tmp_path / "a").iterdir()) == []


UNFIT = {
    "biases": ("llama", {"attention_bias": True}, "self_attn.q_proj.bias"),
    "another family": ("qwen3", {"head_dim": 32}, "self_attn.q_norm.weight"),
    "packed": ("phi3", {}, "qkv_proj"),
    "rotary scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters"),
    "layers that differ": ("smollm3", {}, "layers that differ"),
}


@pytest.mark.parametrize("how", UNFIT)
def test_what_meta_has_no_place_for(tmp_path, how):
    family, fields, words = UNFIT[how]
    make(family, **({"num_hidden_layers": 4} if family == "smollm3" else {}), **fields).save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=re.escape(words)):
        convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


MEASURED = """
import sys, torch
from trillama.model.convert import Llama, convert, open_checkpoint
def memory(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
with torch.device("meta"):  # imports much of torch
    Llama(open_checkpoint(sys.argv[1]).config)
before = memory("VmRSS")
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("to", ["meta", pytest.param("hf", marks=pytest.mark.slow)])
def test_memory_is_that_of_a_few_tensors(tmp_path, to):
    model = make(hidden_size=256, intermediate_size=512, num_hidden_layers=20, vocab_size=1000)
    total = sum(tensor.nbytes for tensor in weights(model).values())
    assert total > 40 << 20
    if to == "meta":
        model.save_pretrained(tmp_path / "source")
    else:
        (tmp_path / "source").mkdir()
        write_meta(tmp_path / "source", model)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "source"), str(tmp_path / "target"), to]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.5 * total


SLOWED = """
import sys, time
from trillama.model import cli, convert
real = convert.loaded
convert.loaded = lambda *args, **options: (time.sleep(0.05), real(*args, **options))[1]
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.usefixtures("signals")
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_leaves_nothing(tmp_path):
    make().save_pretrained(tmp_path / "hf")
    command = [sys.executable, "-c", SLOWED, str(tmp_path / "hf"), str(tmp_path / "new"), "--to", "meta"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob(".new.*/consolidated.00.pth")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
