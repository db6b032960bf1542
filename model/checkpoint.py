"""Checkpoints: Hugging Face folders, GGUF files and Meta folders, read through one interface.

A checkpoint calls its tensors what Hugging Face calls them and hands them out one at a time, each in a memory map of its own. A
tensor that was copied into the model and dropped is unmapped at once, so that loading needs the weights and one tensor more, not
the weights and the files. (safetensors' own reader maps the whole file, which stays resident for as long as it is open.)
"""

import hashlib
import json
import math
import mmap
import re
import zipfile
from typing import NamedTuple

import numpy as np
import torch

from .files import CheckpointError, brief, mapped, read_json
from .gguf_file import package, read_gguf
from .presets import locate

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

PIECE = 1 << 17  # values that are dequantised at a time
WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def open_checkpoint(source):
    """The Checkpoint behind a source: a Hugging Face folder, a Meta folder, a .gguf file, a hub id or the name of a preset.

    Raises CheckpointError, a ValueError of one line, for anything that is missing or broken.
    """
    path = locate(source)
    if path.is_file():
        checkpoint = GgufFile(path)
    elif (path / "config.json").is_file():
        checkpoint = HuggingFaceFolder(path)
    elif (path / "params.json").is_file():
        checkpoint = MetaFolder(path)
    else:
        raise CheckpointError(f"{path}: holds neither config.json nor params.json, expected a model's folder or a .gguf file")
    try:
        _check_sizes(checkpoint)
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    path: object
    name: str  # the file's own name for it
    dtype: torch.dtype
    shape: tuple
    offset: int = 0  # in bytes
    size: int = 0
    ggml_type: int = 0


class Checkpoint:
    """An open checkpoint: Hugging Face's names, layout and config fields, whatever the format of the files.

    config: the fields of config.json. folder: where the tokenizer is: the folder, or the .gguf file itself.
    """

    def __init__(self, folder):
        self.folder, self.config = folder, {}
        self._stored = {}  # name -> Stored
        self._files = {}  # path -> open file

    def names(self):
        return set(self._stored)

    def shape(self, name):
        return self._find(name).shape

    def dtype(self, name):
        """The dtype that `load` returns: the file's own, or float32 for quantised tensors."""
        return self._find(name).dtype

    def kind(self, name):
        """What the tensor is in its file: a torch dtype, or ggml's name of a quantised type."""
        return _short(self._find(name).dtype)

    def load(self, name):
        """The tensor on the CPU, to be copied and dropped: mapped from the file where its bytes are as torch wants them."""
        stored = self._find(name)
        if stored.dtype not in WEIGHTS:
            raise CheckpointError(f"{self.describe(name)}: dtype is {_short(stored.dtype)}, expected float16, bfloat16 or float32")
        return self._read(name, stored)

    def parts(self, name):
        """Yields what `load` returns, rows behind rows: with less memory and time where they have to be made."""
        yield self.load(name)

    def describe(self, name):
        """The file and the tensor, for error messages."""
        stored = self._stored.get(name)
        if stored is None:
            return f"{self.folder}: tensor {name}"
        alias = "" if stored.name == name else f" ({name})"
        return f"{stored.path}: tensor {stored.name}{alias}"

    def digest(self):
        """A word for the config and for the names, shapes, types and sizes of the tensors: the same for equal files elsewhere."""
        tensors = sorted((name, *map(str, (t.dtype, t.shape, t.size, t.ggml_type))) for name, t in self._stored.items())
        return hashlib.sha256(json.dumps([self.config, tensors], sort_keys=True, default=str).encode()).hexdigest()[:12]

    def close(self):
        """Closes the files. Tensors that were handed out stay valid."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _find(self, name):
        if name not in self._stored:
            raise CheckpointError(f"{self.describe(name)} is missing")
        return self._stored[name]

    def _read(self, name, stored):
        return self._map(stored, stored.dtype).view(stored.shape)

    def _map(self, stored, dtype):
        """The bytes of a tensor in a memory map of its own, as a flat tensor."""
        if stored.size == 0:
            return torch.empty(0, dtype=dtype)
        if stored.path not in self._files:
            self._files[stored.path] = open(stored.path, "rb")  # noqa: SIM115 - closed by close()
        flat = torch.frombuffer(mapped(self._files[stored.path], stored.offset, stored.size), dtype=torch.uint8)
        if stored.offset % dtype.itemsize:
            flat = _scratch((stored.size,), torch.uint8).copy_(flat)
        return flat.view(dtype)


def _scratch(shape, dtype):
    """An uninitialised tensor on pages of its own, which go back to the system with it. Taken from the heap among the tensors of
    a model that grows, temporary ones leave holes that nothing fits: half the weights again."""
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def _short(dtype):
    return str(dtype).removeprefix("torch.")


def _check_sizes(checkpoint):
    """The config's sizes against the tensors, so that an absurd one is met before anything is allocated."""
    name, config = "model.embed_tokens.weight", checkpoint.config
    shape, expected = tuple(checkpoint.shape(name)), (config.get("vocab_size"), config.get("hidden_size"))
    if shape != expected:
        raise CheckpointError(
            f"{checkpoint.describe(name)}: shape is {shape}, expected (vocab_size, hidden_size) = {brief(expected)}"
        )
    layers = {int(m[1]) for m in map(re.compile(r"model\.layers\.([0-9]{1,9})\..*").fullmatch, checkpoint.names()) if m}
    if config.get("num_hidden_layers") != len(layers):
        raise CheckpointError(
            f"{checkpoint.folder}: num_hidden_layers is {brief(config.get('num_hidden_layers'))}, "
            f"but there are tensors of {len(layers)} layers"
        )


def _integer(where, fields, key, default=None, least=1):
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 40:
        raise CheckpointError(f"{where}: {key} is {brief(value)}, expected a whole number of at least {least}")
    return value


def _number(where, fields, key, default=None):
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key} is {brief(value)}, expected a positive number")
    return value


def _renamed(name, layer, table):
    """Hugging Face's name of a tensor "<layer>.7.<part>.weight" or "<part>.weight"; the name itself if the table lacks it."""
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(layer + r"\.([0-9]+)\.(.+)", stem)
    if match and match[2] in table:
        return f"model.layers.{match[1]}.{table[match[2]]}.{kind}"
    return f"{table[stem]}.{kind}" if stem in table else name


# --- Hugging Face: config.json and safetensors -----------------------------------------------------------------------

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
LARGEST_HEADER = 100_000_000  # safetensors' own limit


class HuggingFaceFolder(Checkpoint):
    """config.json with model.safetensors, or with the shards that model.safetensors.index.json lists."""

    def __init__(self, folder):
        super().__init__(folder)
        self.config = read_json(folder / "config.json")
        _read_ends(folder, self.config)
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            self._stored = read_safetensors(single)
        elif index.is_file():
            self._stored = _sharded(folder, index)
        else:
            others = ", ".join(sorted(p.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for p in folder.glob(pattern)))
            raise CheckpointError(
                f"{folder}: holds {others or 'no weights'}, expected model.safetensors or model.safetensors.index.json"
            )


def _read_ends(folder, config):
    """Chat models name their end of turn in generation_config.json only."""
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        config["eos_token_id"] = config.get("eos_token_id") if eos is None else eos


def _sharded(folder, index):
    """name -> Stored for all tensors of an index, each from the shard that the index gives for it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map is {brief(weight_map)}, expected an object of tensor and file names")
    shards, stored = {}, {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", file):
            raise CheckpointError(
                f"{index}: tensor {brief(name)} is said to lie in {brief(file)}, expected a .safetensors file beside it"
            )
        if file not in shards:
            shards[file] = read_safetensors(folder / file)
        if name not in shards[file]:
            raise CheckpointError(f"{folder / file}: tensor {brief(name)} is missing, {index.name} says that it is here")
        stored[name] = shards[file][name]
    return stored


def read_safetensors(path):
    """name -> Stored of a safetensors file, from its header: 8 bytes of length, then JSON; the tensors follow without gaps."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= size - 8:
                raise CheckpointError(f"{path}: header of {length} bytes does not fit a file of {size}: is it cut short?")
            if length > LARGEST_HEADER:
                raise CheckpointError(f"{path}: header has {length} bytes, expected at most {LARGEST_HEADER}")
            header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: header is not JSON: {brief(str(error))}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is {brief(header)}, expected a JSON object")
    header.pop("__metadata__", None)
    stored = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    end = 8 + length
    for tensor in sorted(stored.values(), key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: tensor {brief(tensor.name)} begins at byte {tensor.offset}, expected {end}")
        end += tensor.size
    if end != size:
        raise CheckpointError(f"{path}: has {size} bytes, its header promises {end}: is it cut short?")
    return stored


def _unique(path, pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise CheckpointError(f"{path}: {brief(next(n for n in names if names.count(n) > 1))} occurs twice in the header")
    return fields


def _entry(path, name, fields, start):
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where} is {brief(fields)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"{where}: dtype is {brief(dtype)}, expected one of {', '.join(SAFETENSORS_DTYPES)}")
    if not _naturals(shape) or len(shape) > 8:
        raise CheckpointError(f"{where}: shape is {brief(shape)}, expected whole numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets is {brief(offsets)}, expected two whole numbers")
    dtype, size = SAFETENSORS_DTYPES[dtype], offsets[1] - offsets[0]
    needed = math.prod(shape) * dtype.itemsize
    if size != needed:
        raise CheckpointError(f"{where}: has {size} bytes, expected {needed} for {_short(dtype)} {brief(shape)}")
    return Stored(path, name, dtype, tuple(shape), start + offsets[0], size)


def _naturals(value):
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


# --- GGUF ------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GGUF_FAMILIES = {
    "llama": GGUF_NAMES,
    "qwen2": GGUF_NAMES,
    "qwen3": GGUF_NAMES,
    "phi3": {**GGUF_NAMES, "ffn_up": "mlp.gate_up_proj"},
}
GGUF_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
GGUF_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}


def _parts(path, count):
    """The files of a GGUF that is split, of which `path` is the first."""
    if count == 1:
        return [path]
    match = re.fullmatch(r"(.+)-00001-of-([0-9]{5})\.gguf", path.name)
    if not match or int(match[2]) != count:
        raise CheckpointError(f"{path}: is one part of {brief(count)}, expected the first by name: ...-00001-of-{count:05}.gguf")
    return [path.with_name(f"{match[1]}-{part:05}-of-{match[2]}.gguf") for part in range(1, count + 1)]


class GgufFile(Checkpoint):
    """A .gguf file, or the first of several: the config is in its metadata, quantised tensors become float32 one by one."""

    def __init__(self, path):
        super().__init__(path)
        self._metadata, tensors = read_gguf(path)
        family = self._metadata.get("general.architecture")
        if not isinstance(family, str) or family not in GGUF_FAMILIES:
            known = ", ".join(GGUF_FAMILIES)
            raise CheckpointError(f"{path}: general.architecture is {brief(family)}, expected one of {known}")
        self._factors = {}
        split = _integer(path, self._metadata, "split.count", 1)
        for part in _parts(path, split):
            for name, info in (tensors if part == path else read_gguf(part)[1]).items():
                dtype = GGUF_DTYPES.get(info.type, torch.float32)
                table, alias = self._stored, _renamed(name, "blk", GGUF_FAMILIES[family])
                if name in GGUF_FACTORS:
                    table, alias = self._factors, name
                if alias in table:
                    raise CheckpointError(f"{part}: tensor {brief(name)} is in {table[alias].path} too")
                table[alias] = Stored(part, name, dtype, info.shape, info.offset, info.size, info.type)
        self.config = self._configure(family)

    def kind(self, name):
        stored = self._find(name)
        if stored.ggml_type in GGUF_DTYPES:
            return super().kind(name)
        return package(stored.path).GGMLQuantizationType(stored.ggml_type).name

    def _configure(self, family):
        where, stored = str(self.folder), self._stored

        def integer(key, default=None):
            return _integer(where, self._metadata, f"{family}.{key}", default)

        def number(key, default=None):
            return _number(where, self._metadata, f"{family}.{key}", default)

        if self._metadata.get(f"{family}.expert_count", 0) != 0:
            raise CheckpointError(f"{where}: {family}.expert_count is not 0, mixtures of experts are not supported")
        hidden, heads = integer("embedding_length"), integer("attention.head_count")
        head_dim = integer("attention.key_length", hidden // heads or None)
        rotary = integer("rope.dimension_count", head_dim)
        if integer("attention.value_length", head_dim) != head_dim:
            raise CheckpointError(f"{where}: {family}.attention.value_length differs from the key length {head_dim}")
        window = _integer(where, self._metadata, f"{family}.attention.sliding_window", 0, least=0)
        config = {
            "model_type": family,
            "hidden_size": hidden,
            "intermediate_size": integer("feed_forward_length"),
            "num_hidden_layers": integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "max_position_embeddings": integer("context_length"),
            "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
            "rope_theta": number("rope.freq_base", 10000.0),
            "rope_scaling": self._scaling(family, rotary, integer, number),
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in stored,
            "sliding_window": window or None,
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._ends(),
        }
        if family == "llama":
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in stored
            config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in stored
        if rotary != head_dim:
            config["partial_rotary_factor"] = rotary / head_dim
        return config

    def _ends(self):
        """The ids that end a text or a turn."""
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        ids = [self._metadata[key] for key in keys if key in self._metadata]
        return ids if len(ids) > 1 else ids[0] if ids else None

    def _scaling(self, family, rotary, integer, number):
        """Hugging Face's rope_scaling. GGUF has Llama 3's as a table of divisors, which is longrope with that one table."""
        context = integer("context_length")
        original = integer("rope.scaling.original_context_length", context)
        tables = {name: self._factor_table(name, rotary // 2) for name in self._factors}
        if "rope_freqs.weight" in tables:
            table = tables["rope_freqs.weight"]
            return {"rope_type": "longrope", "short_factor": table, "long_factor": table, "attention_factor": 1.0,
                    "factor": 1.0, "original_max_position_embeddings": context}  # fmt: skip
        if tables:
            short, long = (tables.get(f"rope_factors_{which}.weight") for which in ("short", "long"))
            if short is None or long is None:
                raise CheckpointError(f"{self.folder}: has one of rope_factors_short and rope_factors_long, expected both")
            return {"rope_type": "longrope", "short_factor": short, "long_factor": long,
                    "attention_factor": number("rope.scaling.attn_factor", 1.0), "factor": context / original,
                    "original_max_position_embeddings": original}  # fmt: skip
        kind = self._metadata.get(f"{family}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": number("rope.scaling.factor")}
        if kind == "yarn":
            return {"rope_type": "yarn", "factor": number("rope.scaling.factor"), "original_max_position_embeddings": original,
                    "beta_fast": number("rope.scaling.yarn_beta_fast", 32.0),
                    "beta_slow": number("rope.scaling.yarn_beta_slow", 1.0)}  # fmt: skip
        raise CheckpointError(f"{self.folder}: {family}.rope.scaling.type is {brief(kind)}, expected none, linear or yarn")

    def _factor_table(self, name, length):
        stored = self._factors[name]
        if stored.dtype != torch.float32 or stored.shape != (length,):
            raise CheckpointError(
                f"{self.folder}: tensor {name}: is {_short(stored.dtype)} {stored.shape}, expected float32 ({length},)"
            )
        return super()._read(name, stored).tolist()

    def parts(self, name):
        stored = self._find(name)
        if stored.ggml_type in GGUF_DTYPES or len(stored.shape) != 2 or self._interleaved(name):
            yield self.load(name)
        else:
            yield from map(torch.from_numpy, self._dequantised(name, stored))

    def _read(self, name, stored):
        if stored.ggml_type in GGUF_DTYPES:
            tensor = super()._read(name, stored)
        else:
            tensor, row = _scratch(stored.shape, torch.float32), 0
            values = tensor.view(-1, stored.shape[-1]).numpy()
            for part in self._dequantised(name, stored):
                values[row : (row := row + len(part))] = part
        if heads := self._interleaved(name):
            if stored.shape[0] % (2 * heads):
                raise CheckpointError(f"{self.describe(name)}: has {stored.shape[0]} rows, expected a multiple of {2 * heads}")
            halves = tensor.view(heads, -1, 2, *stored.shape[1:]).transpose(1, 2)
            tensor = _scratch(halves.shape, halves.dtype).copy_(halves).view(stored.shape)
        return tensor

    def _interleaved(self, name):
        """The heads of a q or k whose rows are in the order of interleaved rotary pairs, as files of one architecture have them."""
        match = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
        if self.config["model_type"] != "llama" or not match:
            return None
        return self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]

    def _dequantised(self, name, stored):
        """Yields the rows of a quantised tensor in float32, as arrays [n, columns] that stay in a core's cache."""
        gguf = package(stored.path)
        kind = gguf.GGMLQuantizationType(stored.ggml_type)
        raw = self._map(stored, torch.uint8).view(math.prod(stored.shape[:-1]), -1).numpy()
        step = max(1, PIECE // stored.shape[-1])
        try:
            for row in range(0, len(raw), step):  # as one: gguf makes 16 rows at a time, which are few values
                with np.errstate(all="ignore"):
                    part = gguf.quants.dequantize(raw[row : row + step].reshape(1, -1), kind)
                yield part.reshape(-1, stored.shape[-1])
        except NotImplementedError:
            raise CheckpointError(f"{self.describe(name)}: type is {kind.name}, which gguf cannot dequantise") from None


# --- Meta: params.json and consolidated.*.pth ------------------------------------------------------------------------

META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
META_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor",
    "multiple_of", "ffn_dim_multiplier", "head_dim", "hidden_dim", "sliding_window", "max_seq_len", "max_batch_size",
}  # fmt: skip
# Llama 3.2's params.json does not say that its rotary scaling is 32: (dim, n_layers) of its two text models.
LLAMA_32 = {(2048, 16), (3072, 28)}
REOPEN = 16  # parts in which the .pth files are read, each mapped anew: torch maps them whole, and what was read stays resident


class MetaFolder(Checkpoint):
    """params.json with consolidated.00.pth, or with one such file per rank of Meta's model parallelism."""

    def __init__(self, folder):
        super().__init__(folder)
        self._paths = sorted(folder.glob("consolidated.*.pth"))
        if not self._paths or [p.name for p in self._paths] != [f"consolidated.{i:02d}.pth" for i in range(len(self._paths))]:
            found = ", ".join(p.name for p in self._paths) or "none"
            raise CheckpointError(f"{folder}: holds {found} of consolidated.00.pth, consolidated.01.pth, ..., expected all")
        self._shards, self._touched = {}, 0
        self._enough = sum(path.stat().st_size for path in self._paths) // REOPEN
        params = read_json(folder / "params.json")
        width = _integer(folder / "params.json", params, "dim")
        first = self._shard(self._paths[0])
        for path in self._paths[1:]:
            for name in first.keys() | self._shard(path).keys():
                a, b = first.get(name), self._shard(path).get(name)
                if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                    raise CheckpointError(f"{path}: tensor {brief(name)} differs in shape or dtype from {self._paths[0].name}")
        for name, tensor in first.items():
            if name == "rope.freqs" or (name == "output.weight" and _same_bytes(tensor, first.get("tok_embeddings.weight"))):
                continue  # computed, or tied
            shape = list(tensor.shape)
            axis = _meta_axis(name, shape, width)
            if axis is not None:
                shape[axis] *= len(self._paths)
            self._stored[_renamed(name, "layers", META_NAMES)] = Stored(self._paths[0], name, tensor.dtype, tuple(shape))
        self.config = self._configure(folder / "params.json", params)
        _read_ends(folder, self.config)

    def _configure(self, where, params):
        unknown = sorted(params.keys() - META_PARAMS)
        if unknown:
            raise CheckpointError(f"{where}: {brief(unknown[0])} is not supported")
        width, heads = params["dim"], _integer(where, params, "n_heads")
        layers, vocabulary = _integer(where, params, "n_layers"), self.shape("model.embed_tokens.weight")[0]
        if params.get("vocab_size", -1) not in (-1, vocabulary):
            raise CheckpointError(f"{where}: vocab_size is {brief(params['vocab_size'])}, the embeddings have {vocabulary} rows")
        third = vocabulary > 100_000  # Llama 3 and its tokenizer with 256 special tokens at the end
        scaling, length = None, 8192 if third else 4096
        if params.get("use_scaled_rope"):
            factor = _number(where, params, "rope_scaling_factor", 32.0 if (width, layers) in LLAMA_32 else 8.0)
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192}  # fmt: skip
            length = 131072
        end = vocabulary - 255
        return {
            "model_type": "mistral" if params.get("sliding_window") else "llama",
            "hidden_size": width,
            "intermediate_size": self.shape("model.layers.0.mlp.gate_proj.weight")[0],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": _integer(where, {"n_kv_heads": params.get("n_kv_heads") or heads}, "n_kv_heads"),
            "head_dim": _integer(where, params, "head_dim", width // heads or None),
            "vocab_size": vocabulary,
            "max_position_embeddings": _integer(where, params, "max_seq_len", length),
            "rms_norm_eps": _number(where, params, "norm_eps"),
            "rope_theta": _number(where, params, "rope_theta", 10000.0),
            "rope_scaling": scaling,
            "rope_interleaved": True,
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self._stored,
            "sliding_window": params.get("sliding_window"),
            "bos_token_id": vocabulary - 256 if third else 1,
            "eos_token_id": [end, end + 7, end + 8] if third else 2,  # end of text, of message, of turn
        }

    def close(self):
        super().close()
        self._shards.clear()

    def _shard(self, path):
        if path not in self._shards:
            self._shards[path] = _read_pth(path)
        return self._shards[path]

    def _read(self, name, stored):
        parts = [self._shard(path)[stored.name] for path in self._paths]
        self._touched += sum(part.nbytes for part in parts)
        if self._touched > self._enough:
            self._shards.clear()
            self._touched = 0
        axis = _meta_axis(stored.name, parts[0].shape, self.config["hidden_size"])
        if axis is None or len(parts) == 1:
            return parts[0]
        return torch.cat(parts, axis, out=_scratch(stored.shape, stored.dtype))


def _same_bytes(a, b):
    return b is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _meta_axis(name, shape, width):
    """The axis along which model parallelism splits a tensor, None for one that every rank has whole."""
    if len(shape) == 1:
        return None
    if name == "tok_embeddings.weight":
        return 0 if shape[1] == width else 1  # Llama 3 splits the vocabulary, Llama 2 the features
    return 1 if re.search(r"\.(wo|w2)\.weight$", name) else 0


def _read_pth(path):
    """The tensors of a file that torch.save wrote, memory-mapped; nothing in it is executed, decompressed or allocated."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise CheckpointError(f"{path}: entry {brief(entry.filename)} is compressed, which torch.save never does")
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a broken or hostile pickle brings up
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: is not a checkpoint of tensors: {brief(reason)}") from None
    if not isinstance(tensors, dict) or not tensors:
        raise CheckpointError(f"{path}: holds {brief(type(tensors).__name__)}, expected a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: {brief(name)} is {type(tensor).__name__}, expected a named dense tensor")
        if not tensor.is_contiguous():
            raise CheckpointError(f"{path}: tensor {brief(name)} is not contiguous")
    return tensors
