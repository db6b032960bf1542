"""A thin model on the kernels: checkpoints of several families and formats in, text out."""

from .generate import generate
from .llama import KVCache, Llama
from .tokenizer import Tokenizer

__all__ = ["KVCache", "Llama", "Tokenizer", "generate"]
