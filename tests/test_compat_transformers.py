"""transformers' models on the attention "trillama" and patched, against the same weights on eager: padding, caches, windows,
packing, training, compile; and the masks that are refused. Runs with transformers 4.57 and 5."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trillama.bench import oracle

transformers = pytest.importorskip("transformers")
trillama = pytest.importorskip("trillama.kernels.compat.transformers")

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("Llama", {}),
    "llama mha": ("Llama", dict(num_key_value_heads=4, mlp_bias=True, attention_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral window": ("Mistral", dict(sliding_window=5)),
    "phi3": ("Phi3", dict(partial_rotary_factor=0.5, sliding_window=None)),
    "phi3 window": ("Phi3", dict(sliding_window=6)),
    "qwen2": ("Qwen2", {}),
    "qwen2 mixed": ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "gemma": ("Gemma", dict(head_dim=16)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=5, attn_logit_softcapping=20.0, query_pre_attn_scalar=16)),
    "gemma3": ("Gemma3", dict(head_dim=16, sliding_window=4, query_pre_attn_scalar=16, layer_types=LAYERS)),
    "smollm3": ("SmolLM3", {}),
}


def models(family, dtype=torch.float32, **changes):
    """(on eager, on trillama's attention and patched) with the same random weights."""
    name, options = FAMILIES[family]
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))(**{**SIZES, **options, **changes})
    make = getattr(transformers, name + "ForCausalLM")._from_config
    theirs = make(copy.deepcopy(config), attn_implementation="eager").to(dtype)
    ours = make(copy.deepcopy(config), attn_implementation="trillama").to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), trillama.patch(ours.eval())


def tokens(B=3, S=13):
    return torch.randint(3, 96, (B, S))


def padding(side, B=3, S=13):
    """Padded on the left, the right, or (a row each) on both."""
    mask = torch.ones(B, S, dtype=torch.long)
    for row in range(1, B):
        n = 4 + 2 * row
        if side == "left" or (side == "mixed" and row % 2):
            mask[row, :n] = 0
        else:
            mask[row, S - n :] = 0
    return mask


def agree(ours, theirs, where=None, limit=1e-5):
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    assert oracle.error(ours, theirs.double()) <= limit


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_plain_and_padded(family):
    theirs, ours = models(family)
    for B in (1, 3):
        ids = tokens(B)
        agree(ours(ids).logits, theirs(ids).logits)
    for side in ("left", "right", "mixed"):
        mask, ids = padding(side), tokens()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        arguments = dict(attention_mask=mask, position_ids=positions)
        agree(ours(ids, **arguments).logits, theirs(ids, **arguments).logits, mask)
    mask = torch.ones_like(ids)
    agree(ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_sequences(family):
    theirs, ours = models(family)
    ids = tokens(2, 14)
    positions = torch.stack((torch.cat([torch.arange(n) for n in (5, 1, 8)]), torch.cat([torch.arange(n) for n in (7, 7)])))
    logits = ours(ids, position_ids=positions, use_cache=False).logits
    alone = [theirs(part[None], use_cache=False).logits[0] for part in (*ids[0].split((5, 1, 8)), *ids[1].split((7, 7)))]
    agree(logits.flatten(0, 1), torch.cat(alone))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation(family, side, cache):
    """Prefill and 12 steps, past the windows' ends; the same tokens, and the logits of every step."""
    theirs, ours = models(family)
    ids, options = tokens(), dict(
        max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None,
        disable_compile=True, cache_implementation="static" if cache == "static" else None,
    )  # fmt: skip
    mask = torch.ones_like(ids) if side is None else padding(side)
    got, want = (m.generate(ids, attention_mask=mask, **options) for m in (ours, theirs))
    if side != "right":  # there a batch's own padding is a token's past, and what stands on padding differs
        assert torch.equal(got.sequences, want.sequences)
        agree(torch.stack(got.logits), torch.stack(want.logits))
    else:
        agree(torch.stack(got.logits)[:, 0], torch.stack(want.logits)[:, 0])


@torch.no_grad()
def test_a_turn_after_a_turn():
    """Several tokens at a time into a cache that has some, padded on the left."""
    for family in ("llama", "mistral window", "qwen2 mixed"):
        theirs, ours = models(family)
        ids, mask = tokens(3, 20), padding("left", 3, 20)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = []
        for model in (ours, theirs):
            cache, parts = transformers.DynamicCache(config=model.config), []
            for a, b in ((0, 12), (12, 17), (17, 18), (18, 20)):
                arguments = dict(attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache)
                parts.append(model(ids[:, a:b], **arguments).logits)
            logits.append(torch.cat(parts, 1))
        agree(*logits, mask)


@torch.no_grad()
def test_right_padding_leaves_a_hole_in_the_cache():
    theirs, ours = models("llama")
    ids, mask = tokens(2, 9), padding("right", 2, 9)
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    logits = []
    for model in (ours, theirs):
        cache = model(ids, attention_mask=mask).past_key_values
        logits.append(model(ids[:, :1], attention_mask=longer, past_key_values=cache).logits)
    agree(*logits)


class Waits(TorchDispatchMode):
    """How often the host reads a value of a tensor: on a GPU it waits for all that was launched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "phi3 window"])
@torch.no_grad()
def test_at_most_one_wait_for_a_mask(family):
    """Of a whole pass, be there padding or none; transformers' own attention waits as often, unless there is a window."""
    theirs, ours = models(family)
    theirs.set_attn_implementation("sdpa")
    ids, ones = tokens(), torch.ones(3, 13, dtype=torch.long)

    def waits(model, ids, **arguments):
        with Waits() as waits:
            model(ids, **arguments)
        return waits.count

    assert waits(ours, ids) == 0
    for mask in (ones, padding("left"), padding("right"), padding("mixed")):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        assert waits(ours, ids, attention_mask=mask, position_ids=positions) == 1
    assert waits(theirs, ids, attention_mask=ones, position_ids=positions) == (family == "llama")
    for mask in (ones, padding("left")):
        cache = ours(ids, attention_mask=mask).past_key_values
        longer = torch.cat((mask, ones[:, :1]), 1)
        assert waits(ours, ids[:, :1], attention_mask=longer, position_ids=longer.sum(1)[:, None] - 1, past_key_values=cache) == 1


@torch.no_grad()
def test_holes_where_no_keys_are_yet():
    """A mask as long as a static cache: what it says of keys to come is no hole."""
    theirs, ours = models("llama")
    ids, logits = tokens(2, 6), []
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0, 1, 0]])
    for model in (ours, theirs):
        cache = transformers.StaticCache(config=model.config, max_cache_len=10)
        arguments = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :6], cache_position=torch.arange(6))
        logits.append(model(ids, attention_mask=mask, past_key_values=cache, **arguments).logits)
    agree(*logits, mask[:, :6])


@torch.no_grad()
def test_lower_precision():
    """At most twice as far from float64 as eager."""
    for family in ("llama", "phi3", "qwen3", "gemma"):
        theirs, ours = models(family, torch.bfloat16)
        exact = copy.deepcopy(theirs).double()
        ids = tokens(2, 30)
        oracle.check(ours(ids).logits, exact(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("family", ["llama", "phi3 window"])
@torch.no_grad()
def test_the_kernels_themselves(triton, family):
    theirs, ours = models(family, num_hidden_layers=1)
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = dict(max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True, disable_compile=True)
    got = ours.generate(ids, attention_mask=mask, **options)
    names = set(triton.names)
    want = theirs.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got.sequences, want.sequences)
    agree(torch.stack(got.logits), torch.stack(want.logits))
    assert {"_rms_norm_kernel", "_rope_kernel", "_swiglu_kernel", "_forward_kernel", "_decode_kernel"} <= names


# --- training ------------------------------------------------------------------------------------------------------------


def losses(model, steps, batches, forward=None, **arguments):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    out = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        loss = (model if forward is None else forward)(**batch, labels=batch["input_ids"], use_cache=False, **arguments).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        out.append(loss.item())
    return torch.tensor(out)


@pytest.mark.parametrize("mode", ["eager", "checkpointing", "compile"])
def test_fifty_steps_of_training(mode):
    theirs, ours = (m.train() for m in models("llama", initializer_range=0.1))
    batches = [{"input_ids": tokens(4, 16)} for _ in range(4)]
    if mode == "compile" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        # Dynamo cannot see into a mask function that holds a tensor, which is what transformers makes of position_ids alone
        batches = [{**batch, "attention_mask": torch.ones(4, 16, dtype=torch.int64)} for batch in batches]
    want = losses(theirs, 50, batches)
    if mode == "checkpointing":
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    forward = torch.compile(ours, fullgraph=True, backend="aot_eager") if mode == "compile" else None
    got = losses(ours, 50, batches, forward)
    assert want[-1] < want[0] - 0.5
    assert ((got - want).abs() / want).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    """Of every parameter, for a padded and a packed batch."""
    theirs, ours = (m.train() for m in models(family))
    mask, ids = padding("left"), tokens()
    packed = torch.cat([torch.arange(n) for n in (5, 8)])[None].expand(3, -1)
    told = mask.bool() & mask.roll(1, 1).bool()  # a row's first token is told from its padding
    for arguments in (
        dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), labels=torch.where(told, ids, -100)),
        dict(position_ids=packed, labels=ids),
    ):
        for model in (theirs, ours):
            model.zero_grad()
            model(ids, use_cache=False, **arguments).loss.backward()
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
            assert oracle.error(q.grad, p.grad.double()) < 1e-4, name


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_forward_with_and_without_padding(padded):
    theirs, ours = models("llama")
    ids, mask = tokens(), padding("left") if padded else None
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        agree(compiled(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits, mask)


@torch.no_grad()
def test_compiled_decoding_with_a_static_cache():
    """One graph for all steps: positions and lengths are data."""
    from torch._dynamo.testing import CompileCounterWithBackend

    theirs, ours = models("llama")
    ids, counter = tokens(2, 9), CompileCounterWithBackend("aot_eager")
    step = torch.compile(ours.forward, fullgraph=True, backend=counter)
    caches = [transformers.StaticCache(config=ours.config, max_cache_len=24) for _ in range(2)]
    for model, cache in zip((ours, theirs), caches):
        model(ids, past_key_values=cache, cache_position=torch.arange(9))
    for position in range(9, 15):
        ids, where = tokens(2, 1), torch.tensor([position])
        arguments = dict(position_ids=where[None], cache_position=where)
        logits = step(ids, past_key_values=caches[0], **arguments).logits
        agree(logits, theirs(ids, past_key_values=caches[1], **arguments).logits)
    assert counter.frame_count == 1


def test_autocast():
    theirs, ours = models("qwen3")
    ids = tokens()
    exact = theirs(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, plain = ours(ids).logits, theirs(ids).logits
    assert oracle.error(got, exact.double()) <= 2 * oracle.error(plain, exact.double())


# --- patch and unpatch ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_patch_is_reversible_and_of_one_instance():
    theirs, ours = models("llama")
    other = copy.deepcopy(theirs)
    before = {name: type(m).forward for name, m in ours.named_modules()}
    keys = list(ours.state_dict())
    trillama.patch(ours)  # a second time changes nothing
    assert sum("forward" in m.__dict__ for m in ours.modules()) == 2 * 4 + 2  # norms, attention and MLP; final norm and rotary
    ids = tokens()
    agree(copy.deepcopy(ours)(ids).logits, theirs(ids).logits)
    assert trillama.unpatch(ours) is ours
    assert not any("forward" in m.__dict__ or hasattr(m, "_trillama_patched") for m in ours.modules())
    assert before == {name: type(m).forward for name, m in ours.named_modules()}
    assert keys == list(ours.state_dict())
    assert not any("forward" in m.__dict__ for m in other.modules())
    ours.set_attn_implementation("eager")
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_patch_leaves_what_is_not_swiglu():
    _, ours = models("gemma")
    assert not any("forward" in m.__dict__ for n, m in ours.named_modules() if n.endswith("mlp"))
    assert sum("forward" in m.__dict__ for n, m in ours.named_modules() if "norm" in n) == 5


def test_patch_refuses_an_unknown_model():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8)
    with pytest.raises(ValueError, match="patch: GPT2LMHeadModel has nothing to patch, expected a model of Llama, Mistral, Phi3"):
        trillama.patch(transformers.GPT2LMHeadModel(config))


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_masks_that_no_kernel_honours_are_refused():
    _, ours = models("llama")
    ids = tokens(2, 6)
    with pytest.raises(ValueError, match="padding mask with holes"):
        ours(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]] * 2))
    for mask in (torch.ones(2, 1, 6, 6, dtype=torch.bool).tril(), torch.zeros(2, 1, 6, 6)):
        with pytest.raises(ValueError, match=r"mask of shape \(2, 1, 6, 6\); use attn_implementation='sdpa'"):
            ours(ids, attention_mask=mask)
    masking = transformers.masking_utils
    chunked = masking.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
    for function in (chunked, masking.or_masks(masking.causal_mask_function, chunked)):
        with pytest.raises(ValueError, match="no kernel for the mask pattern"):
            trillama.attention_mask(2, 6, 6, mask_function=function)


def test_dropout_and_weights_are_refused():
    _, ours = models("llama", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout of 0.1 on the attention weights"):
        ours.train()(tokens())
    ours.eval()(tokens())
    x = torch.randn(1, 4, 3, 16)
    for name in ("s_aux", "output_attentions", "position_bias"):
        with pytest.raises(ValueError, match=f"the argument {name}"):
            trillama.attention(torch.nn.Module(), x, x, x, None, **{name: True})


def test_an_unknown_window_is_refused():
    module = torch.nn.Module()
    module.config = transformers.MistralConfig(sliding_window=3)
    x = torch.randn(1, 4, 3, 16)
    with pytest.raises(ValueError, match="does not say whether its window is the config's 3"):
        trillama.attention(module, x, x, x, None)


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_says_the_same(smollm2_gguf, tmp_path):
    from trillama.model.convert import convert

    convert(smollm2_gguf, tmp_path / "hf", "hf")  # transformers reads a GGUF only where accelerate is installed
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, ours = (load(tmp_path / "hf", dtype=torch.float32, attn_implementation=name) for name in ("eager", "trillama"))
    trillama.patch(ours)
    ids = torch.tensor([[504, 3575, 282, 4649, 314], [0, 0, 1348, 28, 1013]])
    mask = (ids != 0).long()
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **options), theirs.generate(ids, attention_mask=mask, **options))
