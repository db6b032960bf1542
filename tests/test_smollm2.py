"""The main job on real weights: SmolLM2-135M-Instruct beside transformers' model of the same numbers.

The oracle is built from the GGUF by hand (names, and the rows of q and k that GGUF has permuted), not by this project's loader.
"""

import re

import numpy
import pytest
import torch
from trillama.bench import oracle
from trillama.kernels import use_backend
from trillama.model import KVCache, Llama, Tokenizer, generate

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

NEW = 40
PROMPTS = {
    "one token": "The",
    "a fact": "The capital of France is",
    "a story": "Once upon a time, in a village by the sea, there lived an old clockmaker who",
    "a list": "My shopping list:\n1. apples\n2. bread\n3.",
    "arithmetic": "12 + 30 = 42\n7 + 8 = 15\n100 + 23 =",
    "code": 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    "json": '{"name": "Ada", "born": 1815, "fields": ["mathematics", "',
    "french": "Il était une fois une petite fille qui habitait près de la forêt et",
    "chinese": "人工智能是计算机科学的一个分支，",
    "russian": "В начале было слово, и слово",
    "arabic": "كان يا ما كان في قديم الزمان",
    "emoji": "I love pizza 🍕🍕 and ice cream 🍨! My favourite",
    "spaces": "a\tb\n\n\n   c    d",
}
LONG = "The lighthouse keeper wrote one line in the log each night, and the sea answered in its own hand. " * 45
CHAT = [{"role": "user", "content": "Name three primary colours."}]


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return Tokenizer.from_pretrained(smollm2_gguf)


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    model = Llama.from_pretrained(smollm2_gguf, device="cpu", dtype=torch.float32)
    with use_backend("auto"):
        model.prepare(wait=True)  # the compiled step is what is tested, not whatever is ready by then
    return model


@pytest.fixture(scope="module")
def theirs(smollm2_gguf):
    """transformers' Llama with the weights of the GGUF."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True,
        attn_implementation="sdpa",
    )  # fmt: skip
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in GGUFReader(smollm2_gguf).tensors:
        data = dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        layer, leaf = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        if leaf in ("attn_q", "attn_k"):
            rows, width = data.shape
            data = data.reshape(rows // 64, 32, 2, width).swapaxes(1, 2).reshape(rows, width)
        prefix = "" if layer is None else f"model.layers.{layer}."
        state[f"{prefix}{names[leaf]}.weight"] = torch.from_numpy(numpy.ascontiguousarray(data))
    twin = transformers.LlamaForCausalLM(config)
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    twin.tie_weights()
    return twin.eval()


def encode(tokenizer, name):
    if name == "chat":
        return tokenizer.apply_chat_template(CHAT)
    return tokenizer.encode(LONG if name == "long" else PROMPTS[name])


@pytest.fixture(scope="module")
def continued(model, tokenizer):
    """Our greedy continuations of all prompts: the short ones in one batch of unequal lengths, the long one alone."""
    short = [*PROMPTS, "chat"]
    ids = [encode(tokenizer, name) for name in short]
    new = generate(model, ids, max_new_tokens=NEW, eos=[])
    long = encode(tokenizer, "long")
    assert len(long) > 850
    continuations = {name: (row, n.tolist()) for name, row, n in zip(short, ids, new)}
    continuations["long"] = (long, generate(model, [long], max_new_tokens=NEW, eos=[])[0].tolist())
    return continuations


@pytest.fixture(scope="module")
def fact(model, tokenizer):
    """Our greedy continuation of one prompt."""
    prompt = encode(tokenizer, "a fact")
    return prompt, generate(model, [prompt], max_new_tokens=NEW, eos=[])[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PROMPTS, "chat", "long"])
def test_greedy_tokens_and_logits_are_transformers(name, continued, model, theirs):
    """Where transformers' largest logit after every prefix is the token we chose, its greedy decoding is ours, token for token.
    Of two that are nearer than the rounding of both models either may be chosen: each CPU adds in its own order."""
    agree(*continued[name], model, theirs)


def test_greedy_tokens_and_logits_of_a_fact(fact, model, theirs):
    agree(*fact, model, theirs)


def agree(prompt, new, model, theirs):
    ids = torch.tensor([prompt + new])
    with torch.inference_mode():
        logits = theirs(ids).logits[0, len(prompt) - 1 :]
        ours = model(ids)[0, len(prompt) - 1 :]
    rounding = 2 * (ours - logits)[:-1].abs().amax(-1)
    chosen = logits[:-1].gather(1, torch.tensor(new)[:, None])[:, 0]
    assert (logits[:-1].amax(-1) - chosen <= rounding).all()
    assert oracle.error(ours, logits) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a fact", "code"])
def test_greedy_tokens_are_those_of_transformers_generate(name, continued, theirs):
    prompt, new = continued[name]
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert out[0, len(prompt) :].tolist() == new


def test_knows_the_capital_of_france(fact, tokenizer):
    assert "Paris" in tokenizer.decode(fact[1])


def test_cache_and_no_cache_agree(model, fact):
    prompt, new = fact
    assert generate(model, [prompt], max_new_tokens=8, eos=[], use_cache=False)[0].tolist() == new[:8]


@pytest.mark.slow
def test_triton_agrees_with_the_reference(model, tokenizer, triton):
    """A prefill and a decode step of the whole model through the Triton kernels."""
    ids = torch.tensor([encode(tokenizer, "a fact")])
    steps = [ids, torch.tensor([[7042]])]

    def run():
        cache = KVCache(model.config, 1, 64)
        with torch.inference_mode():
            return [model(step, cache) for step in steps]

    ours = run()
    assert len(triton.names) == 2 * (6 * 30 + 2)  # six launches a layer, the last norm, the head; the prompt is short too
    with use_backend("reference"):
        expected = run()
    for a, b in zip(ours, expected):
        assert oracle.error(a, b) < 1e-5


@pytest.fixture(scope="module")
def half(smollm2_gguf):
    return Llama.from_pretrained(smollm2_gguf, device="cpu", dtype=torch.bfloat16)


def test_bfloat16_is_close(half, model, tokenizer):
    """bfloat16 does not keep float32's greedy tokens; its logits stay near."""
    ids = torch.tensor([encode(tokenizer, "a story")])
    with torch.inference_mode():
        assert oracle.error(half(ids), model(ids)) < 0.05


TEXTS = (
    "The Moon is Earth's only natural satellite. It orbits at an average distance of 384,400 kilometres, about thirty times the "
    "diameter of the Earth. Its gravity causes the tides of the oceans, and over millions of years it has slowed the rotation of "
    "our planet. The first people to walk on its surface were Neil Armstrong and Buzz Aldrin in July 1969.",
    "When the ferry finally came, only three of us were still waiting on the pier. The old man with the two dogs had gone home an "
    "hour before, shaking his head at the sky, and the students had found a car. I bought a ticket from the boy in the yellow "
    "jacket and sat down inside, next to a window so covered with salt that the lights of the harbour were nothing but smudges. "
    "My sister used to say that you can tell how long people have lived on an island by the way they look at the weather. She "
    "had left at eighteen and come back at forty, and she never once asked me why I stayed.",
    "To make the bread, dissolve the yeast in a cup of warm water with a spoon of sugar and let it stand for ten minutes. Mix the "
    "flour and the salt in a large bowl, pour in the water and the oil, and knead the dough until it is smooth and no longer "
    "sticks to your hands. Cover it with a towel and leave it in a warm place for an hour, or until it has doubled in size. Bake "
    "it at 220 degrees for half an hour. It is done when it sounds hollow if you knock on the bottom.",
    "A hash table stores pairs of keys and values in an array. A function turns each key into an index, so that looking up a key "
    "takes the same time however many there are. Two keys may have the same index; then either the array holds a list at that "
    "place, or the next free place is taken. When the array is nearly full, a larger one is allocated and all pairs are moved. "
    "Although a single insertion can thus be slow, the average over many of them is constant, because the size doubles each time.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n\n\n"
    "def variance(values):\n    centre = mean(values)\n    return mean([(value - centre) ** 2 for value in values])\n",
    "Parliament will vote next week on a bill that would let cities close streets near schools to cars in the morning. Supporters "
    "say that accidents fell by a third where it was tried; shop owners fear that customers will stay away. The minister, who had "
    "opposed an earlier version, said on Tuesday that she would not stand in the way. A second vote is expected before summer, "
    "and the law could come into force in January.",
)  # fmt: skip


def losses(model, tokenizer):
    """Of every token of the texts; the exponential of their mean is the perplexity."""
    found = []
    with torch.inference_mode():
        for text in TEXTS:
            ids = torch.tensor([tokenizer.encode(text)])
            found.append(torch.nn.functional.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:], reduction="none"))
    return torch.cat(found)


@pytest.fixture(scope="module")
def exactly(model, tokenizer):
    return losses(model, tokenizer)


@pytest.fixture(scope="module")
def noise(half, exactly, tokenizer):
    """How far PyTorch's bfloat16 moves the loss of a token on this CPU, in the mean of squares: each CPU has other products."""
    return (losses(half, tokenizer) - exactly).std()


def test_perplexity(exactly):
    """The weights are read as they were meant: a wrong order of rows or a wrong theta shows here."""
    assert 10 < exactly.mean().exp() < 25


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "worse"), [("int8", 0.01), ("int4", 0.005)])
def test_perplexity_of_quantised_weights(smollm2_gguf, exactly, noise, tokenizer, bits, worse):
    """What the weights cost is the same on every CPU. What bfloat16 adds is not: it scatters a token's loss about as it does with
    plain weights, in both directions, so that the mean of all tokens stays where it was."""
    quantised = Llama.from_pretrained(smollm2_gguf, device="cpu", quantize=bits)
    assert quantised.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(m.quantized for m in quantised.modules() if isinstance(m, torch.nn.Linear))
    found = losses(quantised, tokenizer)
    weights = losses(quantised.float(), tokenizer)
    assert (weights - exactly).mean().expm1() < worse
    assert (found - weights).std() < 2 * noise
    assert (found - weights).mean().abs() < 4 * noise / len(found) ** 0.5
