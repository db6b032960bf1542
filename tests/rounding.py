"""What float32 costs on the machine at hand, of which the bounds for whole models are multiples: each processor adds in an order of
its own."""

import copy
import functools

import torch
from trillama.bench import oracle


@functools.cache
def rounding():
    """How far the logits of transformers' Llama in float32 are from those in float64. Tiny models of any family have that of 0.7 to
    1.5 of it (three layers, weights of a standard deviation of 0.2)."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        ids = torch.randint(96, (4, 40))
        return oracle.error(model(ids).logits, copy.deepcopy(model).double()(ids).logits)


def logits():
    """The bound for logits that are computed in two ways, each of which rounds."""
    return 8 * rounding()


def gradients():
    """The bound for gradients of parameters, which sum what all tokens give."""
    return 24 * rounding()
