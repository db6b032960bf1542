"""Checkpoints of every format hand out Hugging Face's tensors, within bounded memory, and refuse what is broken in one line."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from trillama.model.checkpoint import CheckpointError, open_checkpoint  # noqa: E402

pytestmark = pytest.mark.host

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, initializer_range=0.3,
)  # fmt: skip


def make(family="llama", dtype=torch.float32, **fields):
    """A seeded tiny model of transformers."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **{**SIZES, "pad_token_id": 0, **fields})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def weights(model):
    """The tensors of a model as its files hold them: a tied head is not there."""
    tied = model.config.tie_word_embeddings
    return {name: t.detach().clone() for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def assert_same(checkpoint, expected):
    assert checkpoint.names() == set(expected)
    for name, tensor in expected.items():
        loaded = checkpoint.load(name)
        assert tuple(checkpoint.shape(name)) == tuple(loaded.shape) == tuple(tensor.shape), name
        assert checkpoint.dtype(name) == loaded.dtype == tensor.dtype, name
        assert torch.equal(loaded, tensor), name


def refused(source, *words):
    """The one line with which a source is refused; it holds all the words."""
    with pytest.raises(CheckpointError) as caught, open_checkpoint(source) as checkpoint:
        for name in checkpoint.names():
            checkpoint.load(name)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    for word in words:
        assert word in line, line
    return line


# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_hugging_face(tmp_path, precision, tied, shard):
    model = make(dtype=precision, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "60KB")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, weights(model))
        assert checkpoint.config["hidden_size"] == 64
        assert checkpoint.folder == tmp_path


def test_source_may_be_a_string(tiny_folder):
    with open_checkpoint(str(tiny_folder)) as checkpoint:
        assert "model.norm.weight" in checkpoint.names()


def test_tensor_outlives_the_checkpoint(tiny_folder):
    with open_checkpoint(tiny_folder) as checkpoint:
        tensor = checkpoint.load("model.norm.weight")
    assert torch.equal(tensor, torch.ones_like(tensor))


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    make().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.load("model.norm.weight").fill_(7)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def unalign(path):
    """Moves the tensors of a safetensors file to odd addresses."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * (-length % 8 + 3)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_unaligned_tensors(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    unalign(tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, weights(model))


def test_end_of_turn_of_generation_config(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config["eos_token_id"] == [2, 9]


def test_missing_name_names_folder_and_tensor(tiny_folder):
    with open_checkpoint(tiny_folder) as checkpoint, pytest.raises(CheckpointError, match=r"nope\.weight is missing"):
        checkpoint.load("nope.weight")


def test_describe(tmp_path):
    make().save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.describe("model.norm.weight") == f"{tmp_path / 'model.safetensors'}: tensor model.norm.weight"


# --- broken safetensors ----------------------------------------------------------------------------------------------


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


NORM = "model.norm.weight"


def edit(**fields):
    def change(header, body):
        header[NORM].update(fields)
        return header, body

    return change


def overlap(header, body):
    other = next(name for name in header if name not in (NORM, "__metadata__") and header[name]["shape"] == header[NORM]["shape"])
    header[NORM]["data_offsets"] = header[other]["data_offsets"]
    return header, body


def twice(header, body):
    text = json.dumps(header)
    return (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}' + "}").encode(), body


BROKEN = {
    "cut in the data": (lambda h, b: (h, b[:-1000]), "cut short"),
    "cut to nothing": (lambda h, b: (h, b""), "cut short"),
    "bytes too many": (lambda h, b: (h, b + b"x"), "its header promises"),
    "not JSON": (lambda h, b: (b"{" * 50, b), "header is not JSON"),
    "deeply nested": (lambda h, b: (b'{"a":' + b"[" * 100_000, b), "header is not JSON"),
    "not UTF-8": (lambda h, b: (b'{"\xff\xfe": 1}', b), "header is not JSON"),
    "a list": (lambda h, b: (b"[1, 2]", b), "expected a JSON object"),
    "entry is a number": (lambda h, b: ({NORM: 3}, b), NORM),
    "no fields": (lambda h, b: ({NORM: {}}, b), "dtype is None"),
    "unknown dtype": (edit(dtype="F12"), "dtype is 'F12'"),
    "dtype is a list": (edit(dtype=["F32"]), "dtype is ['F32']"),
    "integers": (edit(dtype="I32"), "dtype is int32"),
    "negative shape": (edit(shape=[-64]), "shape is [-64]"),
    "shape of booleans": (edit(shape=[True]), "shape is [True]"),
    "shape is text": (edit(shape="64"), "shape is '64'"),
    "huge shape": (edit(shape=[1 << 47, 1 << 47]), "expected"),
    "endless shape": (edit(shape=[1] * 1000), "shape is"),
    "shape of another size": (edit(shape=[63]), "has 256 bytes, expected 252"),
    "offsets swapped": (edit(data_offsets=[256, 0]), "has -256 bytes"),
    "offsets past the end": (edit(data_offsets=[1 << 40, (1 << 40) + 256]), "begins at byte"),
    "offsets negative": (edit(data_offsets=[-256, 0]), "data_offsets is [-256, 0]"),
    "three offsets": (edit(data_offsets=[0, 1, 2]), "expected two whole numbers"),
    "two tensors on one place": (overlap, "begins at byte"),
    "a name twice": (twice, "occurs twice"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_safetensors(tmp_path, how):
    change, words = BROKEN[how]
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    rewrite(path, *change(*header_of(path)))
    refused(tmp_path, "model.safetensors", words)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_stub_of_a_file(tmp_path, size):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(tmp_path, "model.safetensors", "cut short")


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1, 200_000_000])
def test_absurd_header_length(tmp_path, length):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(max(os.path.getsize(path), 300_000_000))
    refused(tmp_path, "model.safetensors", "header")


INDEX = {
    "outside by dots": ("../model-00001.safetensors", "expected a .safetensors file beside it"),
    "absolute": ("/etc/passwd", "expected a .safetensors file beside it"),
    "absolute safetensors": ("/x.safetensors", "expected a .safetensors file beside it"),
    "backslashes": ("..\\x.safetensors", "expected a .safetensors file beside it"),
    "a drive": ("C:x.safetensors", "expected a .safetensors file beside it"),
    "itself": ("model.safetensors.index.json", "expected a .safetensors file beside it"),
    "a number": (3, "said to lie in 3"),
    "not there": ("nowhere.safetensors", "nowhere.safetensors: No such file"),
    "a NUL": ("x\0.safetensors", "expected a .safetensors file beside it"),
}


def sharded(folder):
    make().save_pretrained(folder, max_shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("how", INDEX)
def test_index_that_points_elsewhere(tmp_path, how):
    target, words = INDEX[how]
    path, index = sharded(tmp_path)
    index["weight_map"][NORM] = target
    path.write_text(json.dumps(index))
    refused(tmp_path, words)


def test_index_names_the_wrong_shard(tmp_path):
    path, index = sharded(tmp_path)
    mine = index["weight_map"][NORM]
    index["weight_map"][NORM] = next(file for file in index["weight_map"].values() if file != mine)
    path.write_text(json.dumps(index))
    refused(tmp_path, NORM, "is missing")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "nonsense", "\xff"])
def test_broken_index(tmp_path, text):
    path, _ = sharded(tmp_path)
    path.write_text(text, encoding="latin-1")
    refused(tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"), ("[1]", "expected a JSON object"), ("{" * 99999, "is not JSON"), ("{}", "vocab_size"),
        ('{"vocab_size": 96, "hidden_size": 64}', "num_hidden_layers is None, but there are tensors of 2 layers"),
        ('{"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1000000000}', "num_hidden_layers is 1000000000"),
        ('{"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": "2"}', "num_hidden_layers is '2'"),
        ('{"vocab_size": 960000000, "hidden_size": 64, "num_hidden_layers": 2}', "960000000"),
        ('{"vocab_size": 96, "hidden_size": -64, "num_hidden_layers": 2}', "-64"),
    ],
)  # fmt: skip
def test_broken_config(tmp_path, text, words):
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, words)


@pytest.mark.parametrize("files", [[], ["pytorch_model.bin"], ["model.gguf"]])
def test_folder_without_weights(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, "holds neither config.json nor params.json")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "expected model.safetensors", *files)


@pytest.mark.parametrize("source", ["", "nowhere", "a/b/c", "./x/y.gguf"])
def test_no_such_source(source):
    refused(source, "no such file or folder", "smollm2")


# --- GGUF ------------------------------------------------------------------------------------------------------------

GGUF_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{match[1]}.{GGUF_PARTS[match[2]]}.{kind}" if match else f"{GGUF_TOP[stem]}.{kind}"


def permuted(name, tensor, config):
    """llama.cpp's converter: the rows of q and k in the order of interleaved pairs, for the architecture llama."""
    if config.model_type != "llama" or not re.search(r"[qk]_proj", name):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path, model, kind="F32", extra=None, tensors=None):
    """The GGUF of a model, matrices in the given type (a name of GGMLQuantizationType), norms in float32."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(str(path), model.config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for add in extra or ():
        add(writer)
    quantised = {}
    for name, tensor in weights(model).items():
        array = permuted(name, tensor.float().numpy(), config)
        if tensor.dim() == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), array.astype(np.float32))
            continue
        ggml = gguf.GGMLQuantizationType[kind]
        raw = gguf.quants.quantize(array, ggml)
        quantised[name] = raw
        writer.add_tensor(gguf_name(name), raw, raw_dtype=ggml)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantised


def unpermuted(name, array, config):
    if config.model_type != "llama" or not re.search(r"[qk]_proj", name):
        return array
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gguf_has_the_tensors_of_its_twin(tmp_path, family, tied):
    model = make(family, tie_word_embeddings=tied)
    write_gguf(tmp_path / "x.gguf", model)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert_same(checkpoint, weights(model))
        config, twin = checkpoint.config, model.config
        for field in ("model_type", "tie_word_embeddings", "rms_norm_eps", *list(SIZES)[:-1]):
            assert config[field] == getattr(twin, field), field
        assert config["rope_theta"] == twin.rope_parameters["rope_theta"]
        assert config["head_dim"] == (getattr(twin, "head_dim", None) or 16)
        assert checkpoint.folder == tmp_path / "x.gguf"


def test_gguf_biases_of_llama_are_permuted_too(tmp_path):
    model = make(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    write_gguf(tmp_path / "x.gguf", model)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert_same(checkpoint, weights(model))
        assert checkpoint.config["attention_bias"] is True
        assert checkpoint.config["mlp_bias"] is True


def half(raw):
    return raw.copy().view(np.float16).astype(np.float64)


def dequantised(raw, kind):
    """ggml's block formats from their definition (ggml-quants.c), value by value in float64. raw: [rows, bytes]."""
    blocks = raw.reshape(-1, {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q4_K": 144, "Q6_K": 210}[kind])
    if kind == "Q8_0":
        values = half(blocks[:, :2]) * blocks[:, 2:].view(np.int8)
    elif kind in ("Q4_0", "Q4_1"):
        head = 2 if kind == "Q4_0" else 4
        q = np.concatenate((blocks[:, head:] & 15, blocks[:, head:] >> 4), 1).astype(np.float64)
        values = half(blocks[:, :2]) * (q - 8) if kind == "Q4_0" else half(blocks[:, :2]) * q + half(blocks[:, 2:4])
    elif kind == "Q4_K":
        values = np.empty((len(blocks), 256))
        for row, block in zip(values, blocks):
            d, dmin, s = half(block[:2])[0], half(block[2:4])[0], block[4:16].astype(int)
            for j in range(8):
                if j < 4:
                    scale, least = s[j] & 63, s[j + 4] & 63
                else:
                    scale, least = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)
                q = block[16 + 32 * (j // 2) : 48 + 32 * (j // 2)]
                row[32 * j : 32 * j + 32] = d * scale * (q >> 4 if j % 2 else q & 15) - dmin * least
    else:
        values = np.empty((len(blocks), 256))
        for row, block in zip(values, blocks):
            low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8).astype(int), half(block[208:])[0]
            for i in range(256):
                n, r = divmod(i, 128)
                quarter, l = divmod(r, 32)
                nibble = low[64 * n + 32 * (quarter % 2) + l] >> (4 * (quarter // 2)) & 15
                q = (int(nibble) | (int(high[32 * n + l]) >> (2 * quarter) & 3) << 4) - 32
                row[i] = d * scales[8 * n + 2 * quarter + l // 16] * q
    return values


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_gguf_halves(tmp_path, kind):
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    model = make()
    write_gguf(tmp_path / "x.gguf", model, kind)
    expected = {name: t.to(dtype) if t.dim() > 1 else t for name, t in weights(model).items()}
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert_same(checkpoint, expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_quantised(tmp_path, kind):
    model = make()
    raw = write_gguf(tmp_path / "x.gguf", model, kind)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        for name, tensor in weights(model).items():
            loaded = checkpoint.load(name)
            assert loaded.dtype == checkpoint.dtype(name) == torch.float32
            expected = dequantised(raw[name], kind).reshape(tensor.shape) if name in raw else tensor.numpy()
            np.testing.assert_allclose(loaded.numpy(), unpermuted(name, expected, model.config), rtol=1e-6, atol=0)
            # The file's numbers stand for the weights: half a step of 4 or 8 bits away at most.
            assert (loaded - tensor).abs().max() <= tensor.abs().max() * (0.01 if kind == "Q8_0" else 0.14)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_gguf_k_quants(tmp_path, kind):
    rng = np.random.default_rng(5)
    model = make(hidden_size=256)
    block = {"Q4_K": 144, "Q6_K": 210}[kind]
    raw = rng.integers(0, 256, (256, block), dtype=np.uint8)
    scales = (slice(0, 2), slice(2, 4)) if kind == "Q4_K" else (slice(208, 210),)
    for place in scales:
        raw[:, place] = rng.standard_normal(256).astype(np.float16).view(np.uint8).reshape(256, 2)
    expected = dequantised(raw, kind)
    gguf = pytest.importorskip("gguf")
    writer_type, name = gguf.GGMLQuantizationType[kind], "model.layers.1.self_attn.v_proj.weight"

    def replace(writer):
        add = writer.add_tensor

        def swap(tensor, array, **options):
            if tensor == "blk.1.attn_v.weight":
                return add(tensor, raw[:128], raw_dtype=writer_type)
            return add(tensor, array, **options)

        writer.add_tensor = swap

    write_gguf(tmp_path / "x.gguf", model, extra=[replace])
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        np.testing.assert_allclose(checkpoint.load(name).numpy(), expected[:128], rtol=2e-6, atol=1e-6)


def rope_of(config):
    """(inverse frequencies, scale of cos and sin) as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    twin = transformers.LlamaConfig(**{k: v for k, v in config.items() if k not in ("model_type", "rope_interleaved")})
    return ROPE_INIT_FUNCTIONS[twin.rope_parameters["rope_type"]](twin, "cpu", seq_len=8)


def test_gguf_rope_of_llama3_is_its_table_of_divisors(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128}  # fmt: skip
    model = make(rope_parameters=scaling, head_dim=16)
    plain = 500000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    scaled, _ = rope_of({**SIZES, "head_dim": 16, "rope_parameters": scaling})
    divisors = (plain / scaled.double()).float().numpy()
    assert divisors.max() > 2
    write_gguf(tmp_path / "x.gguf", model, tensors={"rope_freqs.weight": divisors})
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        frequencies, scale = rope_of(checkpoint.config)
        assert scale == 1.0
        torch.testing.assert_close(frequencies, scaled, rtol=1e-6, atol=0)
        assert_same(checkpoint, weights(model))  # the table is no weight


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_gguf_rope_scaling(tmp_path, kind):
    gguf = pytest.importorskip("gguf")

    def add(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    write_gguf(tmp_path / "x.gguf", make(), extra=[add])
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        scaling = checkpoint.config["rope_scaling"]
        assert scaling["rope_type"] == kind
        assert scaling["factor"] == 4.0
        if kind == "yarn":
            assert scaling["original_max_position_embeddings"] == 128


def test_gguf_longrope_of_phi3(tmp_path):
    rng = np.random.default_rng(1)
    tables = {f"rope_factors_{w}.weight": (1 + rng.random(6)).astype(np.float32) for w in ("short", "long")}

    def add(writer):
        writer.add_rope_dimension_count(12)
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_rope_scaling_attn_factors(1.19)
        writer.add_sliding_window(100)

    write_gguf(tmp_path / "x.gguf", make("phi3"), extra=[add], tensors=tables)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        config, scaling = checkpoint.config, checkpoint.config["rope_scaling"]
        assert scaling["rope_type"] == "longrope"
        np.testing.assert_array_equal(scaling["short_factor"], tables["rope_factors_short.weight"])
        np.testing.assert_array_equal(scaling["long_factor"], tables["rope_factors_long.weight"])
        assert scaling["attention_factor"] == 1.19
        assert scaling["original_max_position_embeddings"] == 128
        assert config["partial_rotary_factor"] == 0.75
        assert config["sliding_window"] == 100


def gguf_bytes(tmp_path, **options):
    write_gguf(tmp_path / "x.gguf", make(), **options)
    return (tmp_path / "x.gguf").read_bytes()


def put(data, position, value, width=8):
    return data[:position] + int(value).to_bytes(width, "little") + data[position + width :]


def after(data, text, skip):
    """The place `skip` bytes behind a string of a GGUF file."""
    return data.index(len(text).to_bytes(8, "little") + text) + 8 + len(text) + skip


GGUF_BROKEN = {
    "empty": (lambda d: b"", "cut short"),
    "magic": (lambda d: b"GGML" + d[4:], "begins with b'GGML'"),
    "version 1": (lambda d: put(d, 4, 1, 4), "version is 1"),
    "big-endian": (lambda d: put(d, 4, 3 << 24, 4), "version is 50331648"),
    "cut in the header": (lambda d: d[:200], "cut short"),
    "cut in the data": (lambda d: d[:-400], "cut short"),
    "too many tensors": (lambda d: put(d, 8, 1 << 60), "number of tensors"),
    "more tensors than there are": (lambda d: put(d, 8, 100), "x.gguf"),
    "too many entries": (lambda d: put(d, 16, 1 << 63), "number of metadata entries"),
    "a key without end": (lambda d: put(d, 24, 1 << 62), "metadata key"),
    "architecture unknown": (lambda d: d.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"), "is 'mamba'"),
    "type of value unknown": (lambda d: put(d, after(d, b"llama.block_count", 0), 99, 4), "has type 99"),
    "block count huge": (lambda d: put(d, after(d, b"llama.block_count", 4), 1 << 31, 4), "num_hidden_layers is 2147483648"),
    "no heads": (lambda d: put(d, after(d, b"llama.attention.head_count", 4), 0, 4), "head_count is 0"),
    "one head too many": (lambda d: put(d, after(d, b"llama.attention.head_count", 4), 33, 4), "rows, expected a multiple of 66"),
    "infinite epsilon": (
        lambda d: put(d, after(d, b"llama.attention.layer_norm_rms_epsilon", 4), 0x7F800000, 4), "epsilon is inf",
    ),
    "name not UTF-8": (lambda d: d.replace(b"output_norm.weight", b"output_norm\xff\xfeeight"), "expected UTF-8"),
    "a name twice": (lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "occurs twice"),
    "a name missing": (lambda d: d.replace(b"token_embd.weight", b"token_embx.weight"), "model.embed_tokens.weight is missing"),
    "a key twice": (lambda d: d.replace(b"llama.context_length", b"llama.block_count\0\0\0"), "x.gguf"),
    "99 axes": (lambda d: put(d, after(d, b"output_norm.weight", 0), 99, 4), "has 99 axes"),
    "huge axis": (lambda d: put(d, after(d, b"output_norm.weight", 4), 1 << 62), "lies upon"),
    "type of tensor unknown": (lambda d: put(d, after(d, b"output_norm.weight", 12), 200, 4), "type is 200"),
    "rows that no block fits": (lambda d: put(d, after(d, b"blk.0.attn_q.weight", 20), 12, 4), "rows of a multiple of 256"),
    "axis of zero": (lambda d: put(d, after(d, b"output_norm.weight", 4), 0), "expected rows of a multiple of 1"),
    "offset unaligned": (lambda d: put(d, after(d, b"output_norm.weight", 16), 1), "expected a multiple of 32"),
    "offset past the end": (lambda d: put(d, after(d, b"output_norm.weight", 16), 1 << 40), "cut short"),
    "offset of another": (lambda d: put(d, after(d, b"output_norm.weight", 16), 32), "lies upon"),
}  # fmt: skip


@pytest.mark.parametrize("how", GGUF_BROKEN)
def test_broken_gguf(tmp_path, how):
    change, words = GGUF_BROKEN[how]
    data = gguf_bytes(tmp_path)
    changed = change(data)
    assert changed != data
    (tmp_path / "x.gguf").write_bytes(changed)
    refused(tmp_path / "x.gguf", "x.gguf", words)


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (lambda w: w.add_expert_count(8), "mixtures of experts"),
        (lambda w: w.add_uint32("split.count", 3), "one part of 3"),
        (lambda w: w.add_uint32("split.count", 0), "split.count is 0"),
        (lambda w: w.add_string("split.count", "2"), "split.count is '2'"),
        (lambda w: w.add_string("llama.rope.scaling.type", "su"), "scaling.type is 'su'"),
        (lambda w: w.add_uint32("general.alignment", 33), "x.gguf"),
        (lambda w: w.add_value_length(32), "value_length"),
        (lambda w: w.add_array("llama.x", [[1, 2], [3]]), "array of type 9"),
    ],
)
def test_gguf_that_is_not_supported(tmp_path, add, words):
    write_gguf(tmp_path / "x.gguf", make(), extra=[add])
    refused(tmp_path / "x.gguf", words)


def split_gguf(folder, model):
    """The GGUF of a model in three parts, as llama.cpp splits: metadata and some tensors in the first, tensors in the others."""
    write_gguf(folder / "x.gguf", model)
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(folder / "x.gguf")
    tensors, paths = list(reader.tensors), [folder / f"x-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    for number, (path, some) in enumerate(zip(paths, (tensors[:5], tensors[5:12], tensors[12:]))):
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_uint16("split.count", 3)
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    writer.add_key_value(key, field.contents(), field.types[0])
        for tensor in some:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_gguf_in_parts(tmp_path):
    model = make()
    paths = split_gguf(tmp_path, model)
    with open_checkpoint(paths[0]) as checkpoint:
        assert_same(checkpoint, weights(model))
    refused(paths[1], "one part of 3")
    paths[2].write_bytes(paths[1].read_bytes())
    refused(paths[0], paths[2].name, "is in", "too")
    paths[2].unlink()
    refused(paths[0], paths[2].name, "No such file")


def test_gguf_table_of_the_wrong_length(tmp_path):
    write_gguf(tmp_path / "x.gguf", make(), tensors={"rope_freqs.weight": np.ones(3, np.float32)})
    refused(tmp_path / "x.gguf", "rope_freqs.weight", "expected float32 (8,)")


# --- Meta ------------------------------------------------------------------------------------------------------------

META_PARTS = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
META_TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


def meta_name(name):
    stem = name.removesuffix(".weight")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return (f"layers.{match[1]}.{META_PARTS[match[2]]}" if match else META_TOP[stem]) + ".weight"


def write_meta(folder, model, ranks=1, embedding_axis=0, **params):
    """Meta's files of a model; returns what a checkpoint must hand out: Hugging Face's names with Meta's order of rows."""
    config, expected = model.config, {}
    shards = [{"rope.freqs": torch.ones(8)} for _ in range(ranks)]
    for name, tensor in weights(model).items():
        expected[name] = torch.from_numpy(permuted(name, tensor.numpy(), config)).contiguous()
        axis = embedding_axis if "embed" in name else 1 if re.search("o_proj|down_proj", name) else 0
        parts = [expected[name]] * ranks if tensor.dim() == 1 else expected[name].chunk(ranks, axis)
        for shard, part in zip(shards, parts):
            shard[meta_name(name)] = part.clone()
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    given = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size, "norm_eps": config.rms_norm_eps,
        "multiple_of": 32, "rope_theta": config.rope_parameters["rope_theta"], **params,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(given))
    return expected


@pytest.mark.parametrize(("ranks", "axis"), [(1, 0), (2, 0), (2, 1)], ids=["one", "two, vocabulary split", "two, features split"])
def test_meta(tmp_path, ranks, axis):
    model = make()
    expected = write_meta(tmp_path, model, ranks, axis)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, expected)
        config = checkpoint.config
        assert config["rope_interleaved"] is True
        for field in list(SIZES)[:-2]:
            assert config[field] == SIZES[field]
        assert config["rope_scaling"] is None
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_meta_vocabulary_from_the_tensors(tmp_path):
    write_meta(tmp_path, make(), vocab_size=-1)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config["vocab_size"] == 96


def test_meta_llama_3_rotary_scaling_and_ends(tmp_path):
    write_meta(tmp_path, make(vocab_size=100_256), use_scaled_rope=True)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config["rope_scaling"] == {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        assert checkpoint.config["bos_token_id"] == 100_000
        assert checkpoint.config["eos_token_id"] == [100_001, 100_008, 100_009]


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_that_wants_to_run_code(tmp_path):
    write_meta(tmp_path, make())
    mark = tmp_path / "ran"
    torch.save({"norm.weight": Payload(f"touch {mark}")}, tmp_path / "consolidated.00.pth")
    refused(tmp_path, "consolidated.00.pth", "is not a checkpoint of tensors")
    (tmp_path / "consolidated.00.pth").write_bytes(pickle.dumps(Payload(f"touch {mark}")))
    refused(tmp_path, "consolidated.00.pth", "is not a checkpoint of tensors")
    assert not mark.exists()


def test_zip_bomb(tmp_path):
    write_meta(tmp_path, make())
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 50_000_000)
    assert path.stat().st_size < 100_000
    refused(tmp_path, "consolidated.00.pth", "compressed")


META_BROKEN = {
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-500]), "is not a checkpoint of tensors"),
    "empty": (lambda p: p.write_bytes(b""), "is not a checkpoint of tensors"),
    "a list": (lambda p: torch.save([torch.ones(2)], p), "expected a dict of tensors"),
    "a number inside": (lambda p: torch.save({"norm.weight": 3}, p), "'norm.weight' is int"),
    "a number as name": (lambda p: torch.save({3: torch.ones(2)}, p), "3 is Tensor"),
    "sparse": (lambda p: torch.save({"norm.weight": torch.eye(2).to_sparse()}, p), "expected a named dense tensor"),
    "expanded": (lambda p: torch.save({"norm.weight": torch.ones(1).expand(1 << 40)}, p), "is not contiguous"),
    "integers": (lambda p: torch.save({**torch.load(p), "norm.weight": torch.ones(64).int()}, p), "dtype is int32"),
    "nothing": (lambda p: torch.save({}, p), "expected a dict of tensors"),
    "one tensor only": (lambda p: torch.save({"norm.weight": torch.ones(64)}, p), "is missing"),
}


@pytest.mark.parametrize("how", META_BROKEN)
def test_broken_pth(tmp_path, how):
    change, words = META_BROKEN[how]
    write_meta(tmp_path, make())
    change(tmp_path / "consolidated.00.pth")
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"dim": 0}, "dim is 0"), ({"dim": "64"}, "dim is '64'"), ({"n_layers": 3}, "num_hidden_layers is 3"),
        ({"n_heads": -1}, "n_heads is -1"), ({"norm_eps": None}, "norm_eps is None"), ({"vocab_size": 7}, "vocab_size is 7"),
        ({"moe": {}}, "'moe' is not supported"), ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"n_heads": 1 << 70}, "n_heads is"),
    ],
)  # fmt: skip
def test_broken_params(tmp_path, params, words):
    write_meta(tmp_path, make(), **params)
    refused(tmp_path, words)


def test_meta_shards_that_do_not_belong_together(tmp_path):
    write_meta(tmp_path, make(), ranks=2)
    shard = torch.load(tmp_path / "consolidated.01.pth")
    shard["norm.weight"] = shard["norm.weight"][:-1].clone()
    torch.save(shard, tmp_path / "consolidated.01.pth")
    refused(tmp_path, "consolidated.01.pth", "'norm.weight' differs")
    (tmp_path / "consolidated.01.pth").rename(tmp_path / "consolidated.02.pth")
    refused(tmp_path, "consolidated.02.pth", "expected all")


# --- the model of every format ---------------------------------------------------------------------------------------


def assert_same_logits(source, twin):
    from trillama.kernels import use_backend
    from trillama.model import Llama

    ids = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), use_backend("reference"):
        ours, theirs = Llama.from_pretrained(source, device="cpu", dtype=torch.float32)(ids), twin(ids).logits
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}), ("llama", {"num_key_value_heads": 1}), ("qwen2", {}), ("qwen3", {"head_dim": 32}),
        ("phi3", {}),
    ],
    ids=str,
)  # fmt: skip
def test_logits_from_gguf(tmp_path, family, fields):
    model = make(family, **fields)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0)
    write_gguf(tmp_path / "x.gguf", model)
    assert_same_logits(tmp_path / "x.gguf", model)


@pytest.mark.parametrize(("ranks", "axis"), [(1, 0), (2, 0), (2, 1), (4, 0)])
@pytest.mark.parametrize("scaled", [False, True])
def test_logits_from_meta(tmp_path, ranks, axis, scaled):
    model = make(rope_parameters=LLAMA_3_ROPE, num_key_value_heads=4) if scaled else make(num_key_value_heads=4)
    write_meta(tmp_path, model, ranks, axis, use_scaled_rope=scaled)
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_logits_from_hugging_face(tmp_path, shard):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert_same_logits(tmp_path, model)


# --- memory, time and luck -------------------------------------------------------------------------------------------

COPY = """
import sys, torch
from trillama.model.checkpoint import open_checkpoint
def peak(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
torch.ones(10).sum()
with open_checkpoint(sys.argv[1]) as checkpoint:
    before, total, model = peak("VmRSS"), 0, {}
    for name in sorted(checkpoint.names()):
        tensor = checkpoint.load(name)
        model[name] = torch.empty_like(tensor).copy_(tensor)
        total += tensor.nbytes
        del tensor
print((peak("VmHWM") - before) / total)
"""


@pytest.mark.few(1)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("form", ["safetensors", "unaligned", "gguf F32", "gguf Q8_0", "meta 1", "meta 2"])
def test_copying_a_checkpoint_needs_the_weights_and_little_more(tmp_path, form):
    model = make(hidden_size=512, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=8)
    kind, _, detail = form.partition(" ")
    if kind == "gguf":
        write_gguf(tmp_path / "x.gguf", model, detail)
    elif kind == "meta":
        write_meta(tmp_path, model, int(detail))
    else:
        model.save_pretrained(tmp_path)
    if kind == "unaligned":
        unalign(tmp_path / "model.safetensors")
    source = tmp_path / "x.gguf" if kind == "gguf" else tmp_path
    assert sum(t.nbytes for t in weights(model).values()) > 200 << 20
    done = subprocess.run([sys.executable, "-c", COPY, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.15


LOAD = """
import sys, torch
from trillama.model import Llama
def memory(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
torch.ones(10).sum()
before = memory("VmRSS")
model = Llama.from_pretrained(sys.argv[1], device="cpu")
print((memory("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


def sparse_folder(folder, hidden, intermediate, layers, vocabulary, stored="BF16"):
    """A Llama in four shards, of which the file system stores nothing but the headers: all weights are zero."""
    keys = hidden // 4
    sizes = dict(
        model_type="llama", hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=hidden // 128, num_key_value_heads=keys // 128, max_position_embeddings=8192,
    )  # fmt: skip
    shapes = {"model.embed_tokens": [vocabulary, hidden], "lm_head": [vocabulary, hidden], "model.norm": [hidden]}
    for layer in range(layers):
        parts = {"self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [keys, hidden], "self_attn.v_proj": [keys, hidden],
                 "self_attn.o_proj": [hidden, hidden], "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
                 "mlp.gate_proj": [intermediate, hidden], "mlp.up_proj": [intermediate, hidden],
                 "mlp.down_proj": [hidden, intermediate]}  # fmt: skip
        shapes.update({f"model.layers.{layer}.{part}": shape for part, shape in parts.items()})
    index, names = {}, sorted(shapes)
    for shard in range(4):
        header, end, file = {}, 0, f"model-{shard + 1:05}-of-00004.safetensors"
        for name in names[shard::4]:
            size = {"BF16": 2, "F32": 4}[stored] * int(np.prod(shapes[name]))
            header[f"{name}.weight"] = {"dtype": stored, "shape": shapes[name], "data_offsets": [end, end + size]}
            end += size
            index[f"{name}.weight"] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture
def eight_billion(tmp_path):
    return sparse_folder(tmp_path, 4096, 14336, 32, 128256)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("stored", ["F32", pytest.param("BF16", marks=pytest.mark.slow)])
def test_loading_a_model_needs_the_weights_and_little_more(tmp_path, stored):
    """All included: what is imported for it, q, k and v as they are packed."""
    sparse_folder(tmp_path, 1024, 2048, 6, 8000, stored)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 < float(done.stdout) < 1.15


def test_a_large_checkpoint_starts_loading_at_once(eight_billion, monkeypatch):
    import time

    from trillama.model import Llama
    from trillama.model.checkpoint import Checkpoint

    class Begun(Exception):
        pass

    def begin(checkpoint, name):
        raise Begun

    start = time.process_time()
    with open_checkpoint(eight_billion) as checkpoint:
        assert checkpoint.load("model.layers.31.mlp.down_proj.weight")[-1, -1] == 0
    monkeypatch.setattr(Checkpoint, "load", begin)
    with pytest.raises(Begun):
        Llama.from_pretrained(eight_billion, device="cpu", dtype=torch.bfloat16)
    assert time.process_time() - start < 3


def test_a_large_checkpoint_is_inspected_at_once(eight_billion, capsys):
    import time

    from trillama.model import cli

    start = time.process_time()
    assert cli.main(["inspect", "--model", str(eight_billion), "--dtype", "bfloat16"]) == 0
    assert time.process_time() - start < 3
    assert "a llama of 8,030,261,248 parameters, bfloat16 in the file, 16.1 GB in memory as bfloat16" in capsys.readouterr().out


def mutations(data, rng, header):
    """Endless damage: flipped bits, random bytes, wide integers, holes and cuts, mostly within the header."""
    while True:
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(0, header if rng.random() < 0.8 else len(data)))
            how = rng.integers(0, 5)
            if how == 0:
                damaged[place : place + 1] = bytes([damaged[min(place, len(damaged) - 1)] ^ 1 << int(rng.integers(8))])
            elif how == 1:
                damaged[place : place + 4] = rng.bytes(4)
            elif how == 2:
                damaged[place : place + 8] = int(rng.integers(0, 1 << 63)).to_bytes(8, "little")
            elif how == 3:
                del damaged[place : place + int(rng.integers(1, 40))]
            else:
                del damaged[place:]
            if not damaged:
                break
        yield bytes(damaged)


def survive(source, path, data, count, header, seed):
    """Every mutation either loads, with finite time, or is refused in one line."""
    refusals = []
    for damaged, _ in zip(mutations(data, np.random.default_rng(seed), header), range(count)):
        path.write_bytes(damaged)
        try:
            with open_checkpoint(source) as checkpoint:
                for name in checkpoint.names():
                    checkpoint.load(name)
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > count // 4
    assert not any("\n" in line for line in refusals)


def fuzz(tmp_path, count, seed):
    model = make()
    (tmp_path / "hf").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "meta").mkdir()
    model.save_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    write_gguf(tmp_path / "x.gguf", model, "Q4_1")
    write_meta(tmp_path / "meta", model)
    single = tmp_path / "hf" / "model.safetensors"
    index = tmp_path / "shards" / "model.safetensors.index.json"
    pth = tmp_path / "meta" / "consolidated.00.pth"
    for source, path, share in (
        (tmp_path / "hf", single, 0.3), (tmp_path / "hf", tmp_path / "hf" / "config.json", 0.1), (tmp_path / "shards", index, 0.1),
        (tmp_path / "x.gguf", tmp_path / "x.gguf", 0.3), (tmp_path / "meta", pth, 0.2),
    ):  # fmt: skip
        data = path.read_bytes()
        survive(source, path, data, int(count * share), min(len(data), 3000), seed)
        path.write_bytes(data)


def test_damaged_files(tmp_path):
    fuzz(tmp_path, 200, seed=11)


@pytest.mark.slow
def test_damaged_files_many_times(tmp_path):
    fuzz(tmp_path, 3000, seed=12)
