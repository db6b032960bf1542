"""`trillama convert`: a checkpoint in another layout. What is not quantised keeps its bits; one tensor at a time is in memory.

Meta's files and Hugging Face's differ in the names, in the config, and in the rows of q and k: Meta rotates features 0 and 1, 2 and
3, ... of a head together, Hugging Face feature i and i + D/2.
"""

import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import LLAMA_32, META_NAMES, SAFETENSORS_DTYPES, CheckpointError, HuggingFaceFolder, open_checkpoint
from .config import Config
from .files import brief, check_new_folder, naming, read_json
from .llama import Llama, unpacked
from .tokenizer import Tokenizer

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model",
)  # fmt: skip
LARGEST_SHARD = 5_000_000_000


class Item(NamedTuple):
    """A tensor to be written: its name in the target, in the source, and what it will be."""

    name: str
    source: str
    dtype: torch.dtype
    shape: tuple

    @property
    def size(self):
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def convert(source, target, to, *, dtype=None, shard_size=LARGEST_SHARD):
    """Writes the model of `source`, as for `Llama.from_pretrained`, to the new folder `target` in the layout "hf" or "meta".

    dtype: of the weights; None keeps them as they are, float32 for quantised ones. shard_size: bytes of a .safetensors file above
    which there are several. Returns the names of the files. The folder appears when all is in it. ValueError for a target that is
    there, a source that is no whole model, and what the layout has no place for.
    """
    if to not in ("hf", "meta"):
        raise ValueError(f"to is {brief(to)}, expected 'hf' or 'meta'")
    check_new_folder(target)
    target = Path(target)
    with open_checkpoint(source) as checkpoint:
        config = Config.read(checkpoint.config)
        names = wanted(checkpoint, config)
        items = [Item(name, name, dtype or checkpoint.dtype(name), tuple(checkpoint.shape(name))) for name in names]
        with naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                write_tokenizer(checkpoint.folder, folder)
                if to == "hf":
                    write_hf(checkpoint, config, items, folder, dtype, shard_size)
                else:
                    write_meta(checkpoint, config, items, folder)
                folder.chmod(0o777 & ~umask())
                folder.rename(target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return sorted(path.name for path in target.iterdir())


def wanted(checkpoint, config):
    """The checkpoint's tensors in the order of the model, each checked to be there and to have its shape."""
    with torch.device("meta"):
        model = Llama(config)
    names, found = checkpoint.names(), []
    for name, parameter in model.named_parameters():
        whole = [(name, parameter.shape[0])]
        for part, rows in whole if name in names else unpacked(name, config) or whole:
            shape = (rows, *parameter.shape[1:])
            if part not in names:
                raise CheckpointError(f"{checkpoint.describe(part)} is missing, expected one of shape {shape}")
            if tuple(checkpoint.shape(part)) != shape:
                raise CheckpointError(f"{checkpoint.describe(part)}: shape is {tuple(checkpoint.shape(part))}, expected {shape}")
            found.append(part)
    extra = sorted(name for name in names - {*found, "lm_head.weight"} if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise CheckpointError(f"{checkpoint.describe(extra[0])} has no place in a {config.model_type} with this config")
    return found


def loaded(checkpoint, config, item, interleaved):
    """The tensor as the target has it."""
    tensor = checkpoint.load(item.source).to(item.dtype)
    kind = re.search(r"\.(q|k|qkv)_proj\.(weight|bias)$", item.source)
    if kind is None or config.rope_interleaved == interleaved:
        return tensor.contiguous()
    if kind[1] == "qkv" or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{checkpoint.describe(item.source)}: is packed or rotated in part, expected q and k by themselves")
    heads = config.num_attention_heads if kind[1] == "q" else config.num_key_value_heads
    return rotary_rows(tensor, heads, interleaved)


def rotary_rows(tensor, heads, interleaved):
    """The rows of q or k, [heads D] or [heads D, N], from halves to interleaved pairs, or back."""
    split = (-1, 2) if not interleaved else (2, tensor.shape[0] // heads // 2)
    return tensor.view(heads, *split, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, fields):
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(source, folder):
    """The vocabulary's files as they are; a tokenizer.json where the source has none."""
    for name in TOKENIZER_FILES if source.is_dir() else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer.json").is_file() and (source.is_file() or (source / "tokenizer.model").is_file()):
        Tokenizer.from_pretrained(source).save(folder)


def write_ends(checkpoint, folder):
    """generation_config.json, where chat models name the ends of a turn."""
    fields = {key: checkpoint.config[key] for key in ("bos_token_id", "eos_token_id") if checkpoint.config.get(key) is not None}
    write_json(folder / "generation_config.json", fields)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def write_hf(checkpoint, config, items, folder, dtype, shard_size):
    kept = isinstance(checkpoint, HuggingFaceFolder)
    fields = dict(read_json(checkpoint.folder / "config.json") if kept else checkpoint.config)
    fields.pop("rope_interleaved", None)
    if not kept:
        scaling = fields.get("rope_scaling") or {}
        if config.model_type == "phi3" and "original_max_position_embeddings" in scaling:  # Phi-3 has it beside its rope_scaling
            fields["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        fields = {key: value for key, value in fields.items() if value is not None}
        fields.update(architectures=[ARCHITECTURES[config.model_type]], pad_token_id=fields.get("pad_token_id"))
    if dtype is not None or not kept:
        fields.pop("torch_dtype", None)
        fields["dtype"] = str(items[0].dtype)[6:]
    write_json(folder / "config.json", fields)
    if kept and (checkpoint.folder / "generation_config.json").is_file():
        shutil.copyfile(checkpoint.folder / "generation_config.json", folder / "generation_config.json")
    elif not kept:
        write_ends(checkpoint, folder)
    shards = sharded(items, shard_size)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {item.name: file for shard, file in zip(shards, files) for item in shard}
        metadata = {"total_size": sum(item.size for item in items)}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    with progress(items) as bar:
        for shard, file in zip(shards, files):
            write_safetensors(folder / file, shard, lambda item: loaded(checkpoint, config, item, interleaved=False), bar)


def sharded(items, shard_size):
    """The items in lists of at most so many bytes, or of one tensor that is larger."""
    shards, size = [[]], 0
    for item in items:
        if shards[-1] and size + item.size > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size
    return shards


def write_safetensors(path, items, load, bar):
    """8 bytes of the header's length, the header in JSON, then the tensors; wide types first, so that all are aligned."""
    items = sorted(items, key=lambda item: -item.dtype.itemsize)
    short, header, end = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for item in items:
        header[item.name] = {"dtype": short[item.dtype], "shape": item.shape, "data_offsets": [end, end := end + item.size]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            file.write(content(load(item)))
            bar.update(item.size)


def content(tensor):
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def progress(items):
    from tqdm import tqdm

    total = sum(item.size for item in items)
    return tqdm(desc="converting", total=total, unit="B", unit_scale=True, delay=1.0, leave=False, disable=None)


# --- Meta ------------------------------------------------------------------------------------------------------------


def write_meta(checkpoint, config, items, folder):
    write_json(folder / "params.json", params(checkpoint, config))
    write_ends(checkpoint, folder)
    items = [item._replace(name=meta_name(checkpoint, item.source)) for item in items]
    with progress(items) as bar:
        write_pth(folder / "consolidated.00.pth", items, lambda item: loaded(checkpoint, config, item, interleaved=True), bar)


def meta_name(checkpoint, name):
    theirs = {ours: meta for meta, ours in META_NAMES.items()}
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", stem)
    if kind == "weight" and stem in theirs:
        return f"{theirs[stem]}.weight"
    if kind == "weight" and layer and layer[2] in theirs:
        return f"layers.{layer[1]}.{theirs[layer[2]]}.weight"
    raise CheckpointError(f"{checkpoint.describe(name)} has no place in Meta's layout")


def params(checkpoint, config):
    """params.json. Fields that Meta's own code does not know are written only where the model differs from what it assumes."""
    where, rope = checkpoint.folder, config.rope_parameters
    if len(set(config.windows)) > 1 or not all(config.rotary) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where}: layers that differ, or are rotated in part, have no place in Meta's params.json")
    hidden = int(2 * 4 * config.hidden_size / 3)
    fields = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        # Meta rounds 8/3 dim, times the multiplier, up to a multiple: that it comes to the size of this MLP
        "multiple_of": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
    }
    if config.intermediate_size < hidden:
        fields["ffn_dim_multiplier"] = config.intermediate_size / hidden
    length = 8192 if config.vocab_size > 100_000 else 4096
    if rope["rope_type"] == "llama3":
        factor = 32.0 if (config.hidden_size, config.num_hidden_layers) in LLAMA_32 else 8.0
        fields["use_scaled_rope"], length = True, 131072
        if rope["factor"] != factor:
            fields["rope_scaling_factor"] = rope["factor"]
        usual = (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]) == (1, 4, 8192)
    else:
        usual = rope["rope_type"] == "default"
    if not usual:
        raise CheckpointError(f"{where}: rope_parameters is {brief(rope)}, Meta's params.json has place for llama3's or none")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = config.head_dim
    if config.windows[0] is not None:
        fields["sliding_window"] = config.windows[0]
    if config.max_position_embeddings != length:
        fields["max_seq_len"] = config.max_position_embeddings
    return fields


class Storage(NamedTuple):
    """Stands for the bytes of a tensor in torch's pickle."""

    key: str
    dtype: torch.dtype
    numel: int


class Placed(NamedTuple):
    """Stands for a tensor in torch's pickle."""

    storage: Storage
    shape: tuple


class TensorPickler(pickle.Pickler):
    """Writes what torch.save writes of tensors, of which there are only the shapes."""

    def persistent_id(self, thing):
        if not isinstance(thing, Storage):
            return None
        name = {torch.float64: "Double", torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}[thing.dtype]
        return ("storage", getattr(torch, f"{name}Storage"), thing.key, "cpu", thing.numel)

    def reducer_override(self, thing):
        if not isinstance(thing, Placed):
            return NotImplemented
        stride, strides = 1, []
        for length in reversed(thing.shape):
            strides.insert(0, stride)
            stride *= length
        return torch._utils._rebuild_tensor_v2, (thing.storage, 0, thing.shape, tuple(strides), False, OrderedDict())


def write_pth(path, items, load, bar):
    """The file that torch.save would write, an uncompressed zip archive, a tensor at a time. A head that shares the embedding's
    weight shares its bytes here too."""
    storages = [Storage(str(key), item.dtype, item.size // item.dtype.itemsize) for key, item in enumerate(items)]
    placed = {item.name: Placed(storage, item.shape) for item, storage in zip(items, storages)}
    if "output.weight" not in placed:
        placed["output.weight"] = placed["tok_embeddings.weight"]
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("consolidated/data.pkl", "w") as file:
            TensorPickler(file, protocol=2).dump(placed)
        archive.writestr("consolidated/byteorder", sys.byteorder)
        for key, item in enumerate(items):
            with archive.open(aligned(archive, f"consolidated/data/{key}"), "w", force_zip64=True) as file:
                file.write(content(load(item)))
            bar.update(item.size)
        archive.writestr("consolidated/version", "3\n")


def aligned(archive, name, to=64):
    """The zip entry of this name, with as much padding in its header that its bytes begin at a multiple: they are mapped."""
    header = 30 + len(name) + 20 + 4  # of the entry, of the extra field with its 64-bit sizes, of the padding's own
    entry = zipfile.ZipInfo(name)
    padding = -(archive.fp.tell() + header) % to
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return entry
