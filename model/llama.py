"""A Llama: blocks of attention and SwiGLU around a residual stream, on the kernels of this project.

Top-down: model, cache, block, attention, mlp, norm. The names of the parameters are Hugging Face's, with q, k, v and gate, up
packed into one matrix each, as Phi-3 has them. What distinguishes the families is data in `Config`, not code. Shapes: B batch,
S tokens in this call, T tokens a cache can hold, Hq query heads, Hk key/value heads, D head size, N hidden size.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..kernels import QuantizedWeight, add_rms_norm, apply_rope, cpu_code, flash_attention, quantize, rms_norm, rope_tables, swiglu
from ..kernels.dispatch import backend, unwatched
from ..kernels.frequencies import same_frequencies
from ..kernels.linear import ROWS
from ..kernels.sampling import embed_next_
from . import shapes
from .config import Config
from .parallel import ALONE, Alone
from .presets import cache_folder

BITS = {"int8": 8, "int4": 4}
LARGE, PIECE = 1 << 25, 1 << 15  # elements: from where threads pay, and up to where torch computes with one


def ops(x):
    """Where the ops of a step with a cache are. If PyTorch alone computes them and nobody watches, they are called without their
    checks: a step on a CPU is hundreds of calls, and their shapes are this file's own."""
    return kernels.reference if unwatched(x) else kernels


def compiled(x):
    """`kernels.cpu`, where it stands for the reference: on a CPU, with code in this process, unless the reference is asked for by
    name."""
    if x.device.type != "cpu" or not cpu_code.loaded or backend() != "auto" or not unwatched(x):
        return None
    return importlib.import_module("..kernels.cpu", __package__)


class Llama(nn.Module):
    """The model and its head. config: a `Config`, a config.json's dict or an object with its fields; the weights are random.

    ranks: where several devices share the model, its part in it; `config` then has the heads and the columns of this part.
    """

    def __init__(self, config: Any, ranks: Alone = ALONE) -> None:
        super().__init__()
        self.ranks, self.config = ranks, ranks.slice(Config.read(config))
        config, vocabulary = self.config, len(ranks.share(self.config.vocab_size))
        self.model = nn.ModuleDict({
            # Drawing numbers on the meta device, as Embedding's constructor would, imports all of torch's compiler: seconds.
            "embed_tokens": nn.Embedding.from_pretrained(torch.empty(vocabulary, config.hidden_size), freeze=False),
            "layers": nn.ModuleList(Block(config, layer, ranks) for layer in range(config.num_hidden_layers)),
            "norm": Norm(config.hidden_size, config.rms_norm_eps),
        })  # fmt: skip
        self.lm_head = Linear(config.hidden_size, vocabulary, bias=False)
        self.rope = Rope(config)
        self.kept = Kept()  # the last cache of `generate`'s own, where a captured step goes with it
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.tie()
        self.register_load_state_dict_pre_hook(_pack)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None,
        quantize: str | None = None, ranks: Alone = ALONE,
    ) -> "Llama":  # fmt: skip
        """The model behind `source`: a Hugging Face or Meta folder, a .gguf file, a hub id or "smollm2"; in eval mode.

        device: a GPU where there is one, else the CPU. dtype: a floating-point torch.dtype; on the CPU float32, or bfloat16 for
        quantised weights, elsewhere the checkpoint's own. quantize: None, "int8" (a scale a row) or "int4" (a scale and a minimum
        for every 32 columns): the projections are quantised as they are loaded, the head always in 8 bits; embedding and norms
        stay. ranks: of `parallel.join()`, to load this rank's part of the model, without gradients. Raises a ValueError that
        names file and tensor or field for anything that does not fit.
        """
        from .checkpoint import open_checkpoint

        device, dtype = _target(device, dtype, quantize)
        with contextlib.closing(open_checkpoint(source)) as checkpoint:
            try:
                checkpoint = ranks.open(checkpoint, dtype)
                with torch.device("meta"):
                    model = cls(checkpoint.config, ranks)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
            dtype = dtype or _lightest(device, quantize) or checkpoint.dtype("model.embed_tokens.weight")
            _load(model, checkpoint, device, dtype, BITS.get(quantize))
        ranks.wait()
        if ranks is not ALONE:
            model.requires_grad_(False)
        return model.eval()

    @classmethod
    def random(
        cls, shape: Any, *, layers: int | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None, quantize: str | None = None, seed: int = 0,
    ) -> "Llama":  # fmt: skip
        """A model of random weights, in eval mode: to see how fast one runs, which no values decide, without fetching it.

        shape: a name in `shapes.SHAPES`, like "llama-3.1-8b", or "llama-3.1-70b-shard" for what one of eight GPUs has of that; or a
        config as the constructor takes it. layers: so many in place of all that the name has. device, dtype, quantize: as in
        `from_pretrained`, bfloat16 where there the checkpoint decides. Weights are made on the device, in their dtype, and
        quantised one by one, so that memory never holds much more than the model. Matrices are scaled by their columns: activations
        and logits are of the order of 1, however many layers and steps. The same seed gives the same weights on the same kind of
        device. Raises a ValueError for anything that does not fit.
        """
        if isinstance(shape, str):
            shape = shapes.config(shape, layers)
        elif layers is not None:
            raise ValueError(f"layers is {layers!r}, expected None with a config, which has its own number")
        device, dtype = _target(device, dtype, quantize)
        with torch.device("meta"):
            model = cls(shape)
        _draw(model, device, dtype or _lightest(device, quantize) or torch.bfloat16, BITS.get(quantize), seed)
        return model.eval()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that the weights are stored in: parameters, and what quantised weights hold."""
        yield from self.parameters()
        for module in self.modules():
            if isinstance(module, Linear) and module.quantized:
                yield from (t for t in (module.weight.data, module.weight.scale, module.weight.minimum) if t is not None)

    def _apply(self, function, recurse=True):
        self.kept.clear()  # the weights move or change their dtype
        return super()._apply(function, recurse)

    def tie(self):
        """Lets the head share the embedding's weight where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: torch.Tensor, cache: "KVCache | None" = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, S, vocab_size] in float32 of the tokens input_ids [B, S]. cache, positions: as in `hidden_states`."""
        hidden = self.hidden_states(input_ids, cache, positions)
        further = cache is not None and cache.filled > input_ids.shape[1]
        return self.head(hidden, cache if further else None)

    def head(self, hidden, cache=None):
        """Logits [..., vocab_size] in float32 of hidden states [..., N]. cache: of a sequence that these tokens continue."""
        cpu = self.compiled(hidden, cache) if cache is not None and hidden.shape[:-1].numel() <= ROWS else None
        logits = self.lm_head(hidden) if cpu is None else cpu.decode_linear(hidden, cpu.narrowed_head(self.lm_head.weight, cache))
        return self.ranks.gather(logits.float(), self.config.vocab_size)

    def hidden_states(
        self, input_ids: torch.Tensor, cache: "KVCache | None" = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the head sees of the tokens input_ids [B, S]: [B, S, N], after the last norm.

        cache: a `KVCache` with the tokens before these, to which these are added; no gradients then. positions: [S] or [B, S],
        only without a cache: the rotary positions in place of 0..S-1; attention stays causal in the order of the tokens.
        """
        _check_ids(input_ids)
        B, S = input_ids.shape
        if cache is not None and positions is not None:
            raise ValueError("positions is given beside a cache, expected None: the cache knows them")
        length = _longest(positions) if positions is not None else S if cache is None else cache.filled + S
        if length > self.config.context_length:
            raise ValueError(f"input_ids reaches {length} tokens, expected at most {self.config.context_length} positions")
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            if cache is not None:
                positions = cache.advance(B, S)
            rope = self.rope(length, length if cache is None else cache.max_length, input_ids.device)
            x = self.ranks.embed(self.model.embed_tokens, input_ids, self.config.vocab_size)
            self.compiled(x, cache)
            return self.model.norm(*self.blocks(x, rope, positions, cache))[0]

    def blocks(self, x, rope, positions, cache):
        """What the last norm takes: x and the residual to be added to it, or None."""
        few = cache is not None and x.shape[:-1].numel() <= ROWS and self.ranks.size == 1
        cpu = self.compiled(x, cache) if few else None
        through = cpu.decode_layers(x, self.model.layers, rope, positions, cache) if cpu else None
        if through is not None:
            return through, None
        residual = None
        for block in self.model.layers:
            x, residual = block(x, residual, rope, positions, cache)
        return x, residual

    def step(self, ids, cache):
        """The decode step: logits [B, rows of lm_head], in the dtype of the weights, of what follows ids int64 [B] in the cache.

        The same as `hidden_states` and `lm_head`, with as few launches as there can be: one before the layers and one behind.
        """
        cache.reserve(1)
        table, norm, head = self.model.embed_tokens, self.model.norm, self.lm_head
        rope = self.rope(cache.filled, cache.max_length, ids.device)
        if self.ranks.size == 1:
            x, positions = embed_next_(ids, table.weight, cache.lengths)
        else:
            x = self.ranks.embed(table, ids[:, None], self.config.vocab_size)
            positions = cache.count(1)
        x, residual = self.blocks(x, rope, positions, cache)
        if residual is not None:
            return head(norm(x, residual)[0])[:, 0]
        cpu = self.compiled(x, cache)
        weight = head.weight if cpu is None else cpu.narrowed_head(head.weight, cache)
        return (cpu or ops(x)).decode_linear(x[:, 0], weight, norm=norm.weight, eps=norm.eps)

    def compiled(self, x, cache):
        """`kernels.cpu`, where it computes the sequence in the cache: from its beginning on or not at all."""
        if cache is None or x.device.type != "cpu" or backend() != "auto" or not unwatched(x):
            return None
        if "compiled" not in cache.streams:
            cache.streams["compiled"] = self.prepare()
        return compiled(x) if cache.streams["compiled"] else None

    @torch.no_grad()
    def prepare(self, wait=False):
        """Whether the machine code that a decode step on a CPU needs is in this process, after it has been loaded from disk.

        Where it is not on disk a process beside this one compiles it, in half a minute, and PyTorch computes each sequence that
        begins before that is done; `generate` asks by itself. wait: it is compiled here and now, before something is measured or
        served. False too for a model that has none: small, on a GPU, in float16, without Numba.
        """
        norm, head = self.model.norm.weight, self.lm_head.weight
        if norm.device.type != "cpu" or backend() != "auto":
            return False
        blocks = self.model.layers if self.ranks.size == 1 else ()
        return cpu_code.ready(cpu_code.needs(norm.dtype, blocks, head), cache_folder(), wait)

    @torch.no_grad()
    def streamed(self, batch=1):
        """[(weight, what a decode step of so many rows reads instead)]: on a CPU, copies in fewer bytes of the same values."""
        cpu = compiled(self.model.norm.weight)
        if cpu is None or batch > ROWS or self.ranks.size > 1:
            return []
        groups = [linear.weight for block in self.model.layers for linear in block.linears], [self.lm_head.weight]
        return [pair for weights in groups for pair in zip(weights, cpu.narrowed(weights))]


class KVCache:
    """The keys and values of the tokens so far: k[i], v[i] [B, Hk, T, D] of each layer, allocated once.

    lengths: int32 [B] on the device, the tokens of each row. filled: an upper bound of them that the host knows without reading
    the device. Rows may be shortened by writing to `lengths`: what stands behind their ends is overwritten by what comes next.
    `filled` may then be lowered too, down to the longest row.
    """

    def __init__(
        self, config: Any, batch: int, max_length: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        config = Config.read(config)
        for name, value in (("batch", batch), ("max_length", max_length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"KVCache: {name} is {value!r}, expected a positive integer")
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        # Zeros: a masked key gets weight 0, and 0 times what uninitialised memory may hold is not 0.
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.batch, self.max_length, self.filled = batch, max_length, 0
        self.streams = {}  # what `kernels.cpu` knows of the weights and of this cache, from the beginning of a sequence to its end
        self.steps = Kept()  # what `generate` has captured that reads and writes these tensors: freed with them

    def reserve(self, tokens):
        """The host's part of `advance`: counts the tokens, or says that there is no room for them."""
        if self.filled + tokens > self.max_length:
            raise ValueError(f"input_ids has {tokens} tokens after {self.filled}, but the cache ends at {self.max_length}")
        if self.filled == 0:
            self.streams.clear()
        self.filled += tokens

    def advance(self, batch, tokens):
        """Makes room for so many tokens in every row; returns their positions [B, S], on the device."""
        if batch != self.batch:
            raise ValueError(f"input_ids has {batch} rows, expected {self.batch} as the cache")
        self.reserve(tokens)
        return self.count(tokens)

    def count(self, tokens):
        """The device's part of `advance`."""
        self.lengths += tokens
        if tokens == 1:
            return (self.lengths - 1)[:, None]
        return self.lengths[:, None] + torch.arange(-tokens, 0, dtype=torch.int32, device=self.lengths.device)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.filled = 0
        self.lengths.zero_()


class Kept(dict):
    """What is kept with an object for the next time and can be made anew: copies and files of the object have none of it."""

    def __reduce__(self):
        return Kept, ()


class Rope:
    """The rotary tables of a model in float32, whatever the dtype of its weights, made when a sequence first needs them."""

    def __init__(self, config):
        self.config, self.made = config, {}

    def __call__(self, length, rows, device):
        """{True: (cos, sin), False: (1, 0)} for a sequence of `length` tokens that may grow to `rows`.

        Layers without rotary embedding take the second pair, so that they write their cache with the same kernel.
        """
        first, last = same_frequencies(self.config.rope_parameters, length)
        last = min(last, self.config.context_length)
        tables = self.made.get((first, device))
        have = 0 if tables is None else tables[True][0].shape[0]
        if have < min(rows, last):
            rows = min(max(rows, 2 * have, 256), last)
            with torch.inference_mode(False):  # tables made while generating must do for a training step too
                cos, sin = rope_tables(self.config, self.config.head_dim, rows, device=device)
                tables = {True: (cos, sin)}
                if not all(self.config.rotary):
                    tables[False] = (torch.ones_like(cos), torch.zeros_like(sin))
            while len(self.made) > 2:  # dynamic scaling has tables for each length
                self.made.pop(next(iter(self.made)))
            self.made[first, device] = tables
        return tables


class Block(nn.Module):
    """Attention and MLP. The sum with the residual is left to the next norm, which makes it in the same pass over memory."""

    def __init__(self, config, layer, ranks=ALONE):
        super().__init__()
        self.ranks = ranks
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    @property
    def linears(self):
        """The four projections, in the order in which they are taken."""
        return self.self_attn.qkv_proj, self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj

    def forward(self, x, residual, rope, positions, cache):
        if cache is not None and x.shape[:-1].numel() <= ROWS:
            return self.decode(x, rope, positions, cache), None
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn.o_proj(self.self_attn(self.self_attn.qkv_proj(x), rope, positions, cache))
        x, residual = self.post_attention_layernorm(self.ranks.sum(x), residual)
        return self.ranks.sum(self.mlp(x)), residual

    def decode(self, x, rope, positions, cache):
        """The same for a few tokens, whose time is that of reading the weights: six launches, norms and sums in the products."""
        before, attention, after, mlp = self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp
        decode_linear = ops(x).decode_linear
        qkv = decode_linear(x, attention.qkv_proj.weight, bias=attention.qkv_proj.bias, norm=before.weight, eps=before.eps)
        out = attention(qkv, rope, positions, cache)
        x = self.add(x, out, attention.o_proj)
        y = decode_linear(
            x, mlp.gate_up_proj.weight, bias=mlp.gate_up_proj.bias, norm=after.weight, eps=after.eps, activation="swiglu"
        )
        return self.add(x, y, mlp.down_proj)

    def add(self, residual, x, linear):
        """residual + linear(x), the sum of all ranks' products."""
        residual = residual if self.ranks.rank == 0 else None
        return self.ranks.sum(ops(x).decode_linear(x, linear.weight, bias=linear.bias, residual=residual))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; q, k and v are views of one projection."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.window, self.rotary, self.interleaved = config.windows[layer], config.rotary[layer], config.rope_interleaved
        self.qkv_proj = Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = Norm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, qkv, rope, positions, cache):
        """What o_proj takes, [B, S, Hq D], of what qkv_proj gives."""
        B, S, _ = qkv.shape
        q, k, v = qkv.view(B, S, -1, self.head_dim).transpose(1, 2).split(self.heads, 1)
        if self.q_norm is not None:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        cos, sin = rope[self.rotary]
        if cache is None:
            q, k = apply_rope(q, k, cos, sin, positions=positions, interleaved=self.interleaved)
            out = flash_attention(q, k, v, window=self.window)
        else:
            keys, values = cache.k[self.layer], cache.v[self.layer]
            q = ops(q).rope_append_(q, k, v, cos, sin, keys, values, positions, interleaved=self.interleaved)
            if cache.filled == S:  # these are the first tokens
                out = flash_attention(q, keys[:, :, :S], values[:, :, :S], window=self.window)
            else:
                out = ops(q).decode_attention(q, keys, values, cache.lengths, window=self.window)
        return out.transpose(1, 2).reshape(B, S, -1)


class MLP(nn.Module):
    """SwiGLU between two projections; gate and up are the halves of one."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(swiglu(gate, up))


class Linear(nn.Linear):
    """A projection. Its weight is a parameter or, after `quantize_`, a `QuantizedWeight`: no parameter, in no state dict."""

    @property
    def quantized(self):
        return isinstance(self.weight, QuantizedWeight)

    def quantize_(self, bits):
        weight = quantize(self.weight, bits)
        del self.weight
        self.weight = weight

    def forward(self, x):
        if self.quantized:
            return (compiled(x) or ops(x)).decode_linear(x, self.weight, bias=self.bias)
        if not torch.is_grad_enabled() and x.shape[:-1].numel() <= ROWS:
            return ops(x).decode_linear(x, self.weight, bias=self.bias)
        return super().forward(x)

    def _apply(self, function, recurse=True):
        if self.quantized:
            self.weight = self.weight.apply(function)
        return super()._apply(function, recurse)


class Norm(nn.Module):
    """RMSNorm of x + residual; returns it and the sum, which is the next residual."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def extra_repr(self):
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(self, x, residual=None):
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)


def _check_ids(input_ids):
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids is {getattr(input_ids, 'dtype', type(input_ids).__name__)}, expected an int64 tensor")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected [batch, tokens] with at least one of each")


def _longest(positions):
    if not isinstance(positions, torch.Tensor) or positions.numel() == 0:
        raise TypeError(f"positions is {positions!r}, expected a tensor of integers")
    first, last = (int(edge) for edge in positions.aminmax())
    if first < 0:
        raise ValueError(f"positions holds {first}, expected numbers from 0 on")
    return last + 1


# --- loading ---------------------------------------------------------------------------------------------------------


def unpacked(name, config):
    """[(Hugging Face's name, rows), ...] of a packed parameter, in the order in which the rows stand; [] for any other."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    mlp = config.intermediate_size
    for packed, parts in (
        ("qkv_proj", {"q_proj": q, "k_proj": kv, "v_proj": kv}),
        ("gate_up_proj", {"gate_proj": mlp, "up_proj": mlp}),
    ):
        if f".{packed}." in name:
            return [(name.replace(packed, part), rows) for part, rows in parts.items()]
    return []


def _pack(model, state_dict, prefix, *_):
    """Before load_state_dict: Hugging Face's own names are packed, and a tied head takes its weight from the embedding."""
    for name in [name for name, _ in model.named_parameters()]:
        parts = [prefix + part for part, _ in unpacked(name, model.config)]
        if parts and all(part in state_dict for part in parts):
            state_dict[prefix + name] = torch.cat([state_dict.pop(part) for part in parts])
    head, embedding = prefix + "lm_head.weight", prefix + "model.embed_tokens.weight"
    if model.config.tie_word_embeddings and embedding in state_dict:
        state_dict[head] = state_dict[embedding]


def _target(device, dtype, quantize):
    """Device and dtype (None is passed on) as torch has them, checked together with the name of a quantisation."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype}, expected a floating-point torch.dtype")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch finds no GPU")
    if quantize is not None and quantize not in BITS:
        raise ValueError(f"quantize is {quantize!r}, expected 'int8', 'int4' or None")
    return device, dtype


def _lightest(device, quantize):
    """The dtype in which a CPU is quickest; None for other devices."""
    return None if device.type != "cpu" else torch.bfloat16 if quantize else torch.float32


def _place(model, name, weight, bits):
    """Makes the tensor the parameter of that name, quantised where it is a projection's and bits are given."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(weight))
    if bits is not None and isinstance(module, Linear) and leaf == "weight":
        module.quantize_(8 if module is model.lm_head else bits)


def _finish(model, bits):
    model.tie()
    if bits is not None and not model.lm_head.quantized:
        model.lm_head.quantize_(8)


def _copied(target, parts):
    """Copies tensors, rows behind rows, into another; returns the sum of what is there now, in float32: not finite where one of the
    values is not.

    What is not large goes in pieces on a CPU, each of which one thread copies and adds up while it is in the cache: on busy cores
    threads wait for each other longer than they work.
    """
    begin, sums = 0, []
    for part in parts:
        into, begin = target[begin : begin + len(part)], begin + len(part)
        small = target.device.type == "cpu" and part.numel() < LARGE
        rows = max(1, PIECE * len(part) // part.numel()) if small else len(part)
        sums += [here.copy_(piece).sum(dtype=torch.float32) for here, piece in zip(into.split(rows), part.split(rows))]
    return sum(sums)


@torch.no_grad()
def _draw(model, device, dtype, bits, seed):
    """Fills a model that was built on the meta device with random weights, see `Llama.random`."""
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(name, shape):
        weight = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            return weight.fill_(1)
        return weight.normal_(std=0.1 if name.endswith("bias") else shape[1] ** -0.5, generator=generator)

    # The largest first: what quantising takes beside a weight then stands beside the fewest others.
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: -pair[1].numel()):
        _place(model, name, drawn(name, parameter.shape), bits)
    _finish(model, bits)


def _load(model, checkpoint, device, dtype, bits=None):
    """Fills a model that was built on the meta device, a tensor at a time and straight into its place. bits: of its weights."""
    from tqdm import tqdm

    names, sources, sums = checkpoint.names(), {}, {}
    for name, parameter in model.named_parameters():
        whole = [(name, parameter.shape[0])]
        sources[name] = whole if name in names else unpacked(name, model.config) or whole
        for part, rows in sources[name]:
            shape, where = (rows, *parameter.shape[1:]), checkpoint.describe(part)
            if part not in names:
                raise ValueError(f"{where} is missing, expected one of shape {shape}")
            if tuple(checkpoint.shape(part)) != shape:
                raise ValueError(f"{where}: shape is {tuple(checkpoint.shape(part))}, expected {shape}")
    known = {part for parts in sources.values() for part, _ in parts}
    if model.config.tie_word_embeddings:
        known.add("lm_head.weight")
    extra = sorted(name for name in names - known if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise ValueError(f"{checkpoint.describe(extra[0])} has no place in a {model.config.model_type} with this config")
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    with tqdm(desc="loading", total=total, unit="B", unit_scale=True, delay=1.0, leave=False, disable=None) as progress:
        for name, parts in sources.items():
            weight = torch.empty(model.get_parameter(name).shape, dtype=dtype, device=device)
            for (part, _), rows in zip(parts, weight.split([rows for _, rows in parts])):
                sums[part] = _copied(rows, checkpoint.parts(part))
                progress.update(rows.nbytes)
            _place(model, name, weight, bits)
    _finish(model, bits)
    for part, finite in zip(sums, torch.stack(list(sums.values())).isfinite().tolist()):
        if not finite:
            raise ValueError(f"{checkpoint.describe(part)} holds values that are not finite in {str(dtype)[6:]}")
