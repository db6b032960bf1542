"""The sizes of well-known models, as data: what the benchmarks look at, and what `Llama.random` makes a model of."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama-style model, or of one GPU's share of it. layers: 0 where only its shapes of attention are used."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: int = 0
    vocab: int = 0
    tied: bool = False
    family: str = "llama"

    def share(self, n):
        """One of n tensor-parallel shares."""
        parts = {name: getattr(self, name) // n for name in ("heads", "kv_heads", "ffn", "vocab")}
        return replace(self, **parts)

    def config(self):
        """What a config.json would say of these sizes."""
        return {
            "model_type": self.family, "hidden_size": self.hidden, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "vocab_size": self.vocab, "tie_word_embeddings": self.tied,
            "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        }  # fmt: skip


MODELS = {  # from the config.json of each checkpoint
    "SmolLM2-135M": Model(576, 9, 3, 64, 1536, 30, 49152, True),
    "Qwen3-0.6B": Model(1024, 16, 8, 128, 3072, 28, 151936, True, "qwen3"),
    "Llama-3.2-1B": Model(2048, 32, 8, 64, 8192, 16, 128256, True),
    "Phi-3-mini": Model(3072, 32, 32, 96, 8192, 32, 32064, False, "phi3"),
    "Qwen2.5-7B": Model(3584, 28, 4, 128, 18944, 28, 152064, False, "qwen2"),
    "Gemma-2-9B": Model(3584, 16, 8, 256, 14336),
    "Llama-3.1-8B": Model(4096, 32, 8, 128, 14336, 32, 128256),
    "Llama-3.1-70B": Model(8192, 64, 8, 128, 28672, 80, 128256),
    "Llama-3.1-405B": Model(16384, 128, 8, 128, 53248, 126, 128256),
}
MODELS |= {f"{name}/8": MODELS[name].share(8) for name in ("Llama-3.1-70B", "Llama-3.1-405B")}

# The names under which `Llama.random` and `trillama bench --shape` have those that are whole models, or a GPU's share of one.
SHAPES = {name.lower().replace("/8", "-shard"): model for name, model in MODELS.items() if model.layers}


def config(name, layers=None):
    """What a config.json would say of a name in SHAPES, of so many layers if told; ValueError for any other name."""
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}, expected one of {', '.join(SHAPES)}")
    whole = SHAPES[name].config()
    return whole if layers is None else {**whole, "num_hidden_layers": layers}
