"""transformers' models on the attention "trillama" and patched, against the same weights on eager: padding, caches, windows,
packing, training, compile; and the masks that are refused. Runs with transformers 4.57 and 5."""

import copy
import inspect
import warnings

import numpy as np
import pytest
import rounding
import torch
from families import FAMILIES, LAYERS, agree, models, padding, tokens, transformers, trillama
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from trillama.bench import oracle

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


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


@pytest.mark.few(20)
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


def test_a_layer_reads_where_sequences_begin_without_a_copy():
    causal = transformers.masking_utils.causal_mask_function
    mask = trillama.attention_mask(3, 13, 13, mask_function=causal, attention_mask=padding("mixed").bool())
    for moved in (mask, mask.clone()):
        (queries, keys), orders = trillama._several_queries(moved, 13, 13)
        assert orders is None
        assert queries.is_contiguous()
        assert queries.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr() == moved.untyped_storage().data_ptr()


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


@pytest.mark.slow
def test_the_kernels_themselves_with_holes_and_a_gradient(triton):
    """What is visible brought to the front of each row, and a single query as a sequence: forward and backward."""
    theirs, ours = models("llama", num_hidden_layers=1, initializer_range=0.1)
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0]])
    longer, logits = torch.cat((mask, mask[:, :1] | 1), 1), []
    for model in (ours, theirs):
        first = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        last = dict(position_ids=longer.sum(1)[:, None] - 1, past_key_values=first.past_key_values)
        logits.append((first.logits, model(ids[:, :1], attention_mask=longer, **last).logits))
        (logits[-1][0][mask.bool()].square().mean() + logits[-1][1].square().mean()).backward()
    agree(logits[0][0], logits[1][0], mask)
    agree(logits[0][1], logits[1][1])
    assert {"_forward_kernel", "_dq_kernel", "_dkv_kernel"} <= set(triton.names)
    assert "_decode_kernel" not in triton.names
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
        assert oracle.error(q.grad, p.grad.double()) < rounding.gradients(), name


@pytest.mark.slow
@torch.no_grad()
def test_the_kernels_themselves_without_causality(triton):
    """Hidden keys on the left, on the right and between; fewer queries than keys; a window to both sides."""
    function = getattr(transformers.masking_utils, "bidirectional_mask_function", None)
    if function is None:
        pytest.skip("this transformers makes masks of encoders itself")
    module, config = torch.nn.Module(), transformers.LlamaConfig()
    module.is_causal, module.config = False, config
    q, k = torch.randn(3, 4, 5, 16), torch.randn(3, 2, 7, 16)
    seen = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 0, 1], [1] * 7]).bool()
    for S in (5, 1):
        for valid in (seen, seen[[0, 2, 2]]):
            mask = trillama.attention_mask(3, S, 7, mask_function=function, attention_mask=valid)
            got, _ = trillama.attention(module, q[:, :, :S], k, k, mask)
            want = torch.nn.functional.scaled_dot_product_attention(
                q[:, :, :S], k, k, valid[:, None, None].expand(3, 1, S, 7), enable_gqa=True
            )
            agree(got, want.transpose(1, 2))
    config.sliding_window = 2
    function = transformers.masking_utils.sliding_window_bidirectional_mask_function(2)
    near = (torch.arange(7) - torch.arange(7)[:, None]).abs() <= 2
    for valid in (None, seen[[0, 2, 2]]):
        mask, q = (
            trillama.attention_mask(3, 7, 7, mask_function=function, attention_mask=valid, config=config),
            torch.randn(3, 4, 7, 16),
        )
        for window in (2, 3):  # what layers are told differs: the mask says what is meant
            got, _ = trillama.attention(module, q, k, k, mask, sliding_window=window)
            both = near.expand(3, 1, 7, 7) if valid is None else near & valid[:, None, None]
            want = torch.nn.functional.scaled_dot_product_attention(q, k, k, both, enable_gqa=True)
            agree(got, want.transpose(1, 2), valid)
        with pytest.raises(ValueError, match="a window of 5 keys without causality, but the mask has the config's 2"):
            trillama.attention(module, q, k, k, mask, sliding_window=5)
    assert {"_forward_kernel", "_decode_kernel"} <= set(triton.names)


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


@pytest.mark.few(1)
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
            assert oracle.error(q.grad, p.grad.double()) < rounding.gradients(), name


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_forward_with_and_without_padding(padded):
    theirs, ours = models("llama")
    ids, mask = tokens(), padding("left") if padded else None
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        agree(compiled(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits, mask)


@torch.no_grad()
def test_holes_stop_a_compiled_model():
    """Whose mask no host looks at: an error, not a wrong number."""
    _, ours = models("llama")
    with pytest.raises(RuntimeError, match="a padding mask with holes, in a graph"):
        torch.compile(ours, fullgraph=True, backend="aot_eager")(tokens(), attention_mask=holes())


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


# --- masks with holes, of encoders and of the user's own -----------------------------------------------------------------


def holes(B=3, S=13):
    """Left padding, a hole of two tokens, a hole of one and right padding: of each row something else."""
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, 4:6] = 0
    mask[1, :3] = mask[1, 7] = mask[1, S - 2 :] = 0
    mask[2, 1] = mask[2, S - 1] = 0
    return mask


def both_logits(ours, theirs, ids, mask, **arguments):
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return [m(ids, attention_mask=mask, position_ids=positions, **arguments).logits for m in (ours, theirs)]


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma", "smollm3"])
def test_padding_with_holes(family):
    """Logits and gradients; in one wait. What a window that is longer than the batch would hide is nothing."""
    theirs, ours = models(family)
    ids, mask = tokens(), holes()
    with Waits() as waits, torch.no_grad():
        ours(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert waits.count == 1
    got, want = both_logits(ours, theirs, ids, mask)
    agree(got, want, mask)
    for logits in (got, want):
        torch.nn.functional.cross_entropy(logits[mask.bool()], ids[mask.bool()]).backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
        assert oracle.error(q.grad, p.grad.double()) < rounding.gradients(), name


@torch.no_grad()
def test_holes_in_a_turn_after_a_turn():
    """In what the cache holds, in the new tokens, in both; with a static cache too."""
    theirs, ours = models("llama")
    ids, mask = tokens(3, 20), torch.cat((holes(), holes()[:, 3:10]), 1)
    for make in (
        lambda m: transformers.DynamicCache(config=m.config),
        lambda m: transformers.StaticCache(config=m.config, max_cache_len=24),
    ):
        logits = []
        for model in (ours, theirs):
            cache, parts = make(model), []
            for a, b in ((0, 12), (12, 17), (17, 18), (18, 20)):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, a:b]
                arguments = dict(
                    attention_mask=mask[:, :b], position_ids=positions, past_key_values=cache, cache_position=torch.arange(a, b)
                )
                parts.append(model(ids[:, a:b], **arguments).logits)
            logits.append(torch.cat(parts, 1))
        agree(*logits, mask)


@torch.no_grad()
def test_holes_and_a_window():
    theirs, ours = models("mistral", sliding_window=13)
    agree(*both_logits(ours, theirs, tokens(), holes()), holes())
    _, ours = models("mistral window")
    with pytest.raises(ValueError, match="a padding mask with holes and a window; use attn_implementation='sdpa'"):
        ours(tokens(), attention_mask=holes())


def encoders(name, **options):
    """(on sdpa, on trillama) with the same random weights."""
    config = getattr(transformers, name + "Config")(**{**SMALL, **options})
    make = getattr(transformers, name + "Model")._from_config
    theirs, ours = (make(copy.deepcopy(config), attn_implementation=n) for n in ("sdpa", "trillama"))
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


SMALL = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    initializer_range=0.3, pad_token_id=0,
)  # fmt: skip
has_masks_of_encoders = pytest.mark.skipif(
    not hasattr(transformers.masking_utils, "create_bidirectional_mask"), reason="this transformers makes masks of encoders itself"
)


@has_masks_of_encoders
@pytest.mark.parametrize("kind", ["none", "ones", "left", "right", "mixed", "holes"])
def test_padded_encoders(kind):
    """Every token of a row, hidden ones too, sees all that are not hidden; gradients of what it gives."""
    theirs, ours = encoders("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ids, direction = tokens(), torch.randn(3, 13, 64)
    made = {"none": lambda: None, "ones": lambda: torch.ones(3, 13), "holes": holes}
    mask = made.get(kind, lambda: padding(kind))()
    states = []
    for model in (ours, theirs):
        states.append(model(ids, attention_mask=mask).last_hidden_state)
        (states[-1] * direction).sum().backward()
    agree(*states)
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
        if p.grad is not None and "key.bias" not in name:  # a constant added to all scores: its gradient is a rounding error
            assert oracle.error(q.grad, p.grad.double()) < rounding.gradients(), name


@has_masks_of_encoders
@pytest.mark.parametrize("length", [3, 5, 13, 30])
@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_windows_to_both_sides(length, side):
    theirs, ours = encoders(
        "ModernBert", num_hidden_layers=3, local_attention=8, global_attn_every_n_layers=3, attention_dropout=0.0, mlp_dropout=0.0,
        embedding_dropout=0.0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    ids, mask = tokens(3, length), None
    if side is not None:
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, slice(0, 2) if side == "left" else slice(length - 2, length)] = 0
    states = [m(ids, attention_mask=mask).last_hidden_state for m in (ours, theirs)]
    agree(*states, mask)


@has_masks_of_encoders
def test_holes_and_a_window_to_both_sides():
    config = transformers.ModernBertConfig(local_attention=8)
    function = transformers.masking_utils.sliding_window_bidirectional_mask_function(4)
    with pytest.raises(ValueError, match="a padding mask with holes and a window"):
        trillama.attention_mask(3, 13, 13, mask_function=function, attention_mask=holes().bool(), config=config)
    with pytest.raises(ValueError, match="a window without causality and with a cache"):
        trillama.attention_mask(3, 2, 13, q_offset=11, mask_function=function, config=config)


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@torch.no_grad()
def test_padded_cross_attention(kind):
    """An encoder and a decoder that looks at it, several tokens and one."""
    options = dict(
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, init_std=0.3, dropout=0.0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    theirs, ours = encoders("Bart", **options)
    mask, ids = holes() if kind == "holes" else padding(kind), tokens()
    for S in (1, 5, 17):
        decoder = tokens(3, S)
        states = [m(ids, attention_mask=mask, decoder_input_ids=decoder).last_hidden_state for m in (ours, theirs)]
        agree(*states)
    caches = []
    for model in (ours, theirs):
        first = model(ids, attention_mask=mask, decoder_input_ids=decoder[:, :4], use_cache=True)
        rest = dict(encoder_outputs=(first.encoder_last_hidden_state,), past_key_values=first.past_key_values, use_cache=True)
        caches.append(model(attention_mask=mask, decoder_input_ids=decoder[:, 4:5], **rest).last_hidden_state)
    agree(*caches)


def random_masks(B, H, S):
    """Of every shape that can be broadcast, each query seeing itself."""
    for shape in ((B, 1, S, S), (1, 1, S, S), (B, H, S, S), (B, 1, 1, S)):
        mask = torch.rand(shape) < 0.5
        yield mask | torch.eye(S, dtype=torch.bool) if shape[2] > 1 else mask | (torch.arange(S) == 0)


@pytest.mark.parametrize("integer", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.int8])
def test_a_mask_of_four_axes_of_the_users_own(integer):
    """0 hides, whatever the dtype; as sdpa, which takes only booleans. int32 is what our own masks are, of another shape."""
    theirs, ours = models("llama")
    theirs.set_attn_implementation("sdpa")
    for B in (1, 2, 3):
        ids = tokens(B, 6)
        for mask in random_masks(B, 4, 6):
            got, want = ours(ids, attention_mask=mask.to(integer)).logits, theirs(ids, attention_mask=mask).logits
            agree(got, want)
        got.square().mean().backward()
        want.square().mean().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
        assert oracle.error(q.grad, p.grad.double()) < rounding.gradients(), name


@torch.no_grad()
def test_a_mask_that_is_added():
    """Of the model's window nothing is added to it: a mask of four axes is all there is, in transformers too."""
    for family in ("llama", "mistral window", "gemma2"):
        theirs, ours = models(family)
        ids, mask = tokens(2, 6), torch.randn(2, 1, 6, 6)
        mask = mask.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
        arguments = dict(attention_mask={k: mask for k in LAYERS} if family == "gemma2" else mask)
        agree(ours(ids, **arguments).logits, theirs(ids, **arguments).logits)


@torch.no_grad()
def test_rows_of_a_mask_that_see_nothing_give_zero():
    x = torch.randn(2, 4, 3, 16)
    for mask in (torch.zeros(2, 1, 3, 3, dtype=torch.int32), torch.full((1, 1, 3, 3), float("-inf"))):
        out, _ = trillama.attention(torch.nn.Module(), x, x, x, mask)
        assert torch.equal(out, torch.zeros(2, 3, 4, 16))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 6), torch.ones(3, 1, 6, 6), torch.ones(2, 1, 6, 7, dtype=torch.int32), torch.ones(2, 3, 6, 6),
     torch.ones(3, 1, 2, 6, dtype=torch.int32), torch.ones(3, 1, 1, 6, dtype=torch.int32), {}, "causal"],
    ids=lambda mask: str(list(mask.shape)) if isinstance(mask, torch.Tensor) else type(mask).__name__,
)  # fmt: skip
def test_masks_of_no_use_are_refused(mask):
    x = torch.randn(2, 4, 6, 16)
    what = (
        r"a torch.\w+ mask of shape .* for scores of shape \(2, 4, 6, 6\)" if isinstance(mask, torch.Tensor) else "a mask of type"
    )
    with pytest.raises(ValueError, match=what + ".*; use attn_implementation='sdpa'"):
        trillama.attention(torch.nn.Module(), x, x, x, mask)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_are_those_of_eager(family):
    """Of every kind of mask, and the logits with them."""
    theirs, ours = models(family)
    ids = tokens()

    def same(ids, seen=None, **arguments):
        got, want = (m(ids, output_attentions=True, **arguments) for m in (ours, theirs))
        agree(got.logits, want.logits, seen)
        for given, expected in zip(got.attentions, want.attentions, strict=True):
            assert given.shape == expected.shape
            rows = slice(None) if seen is None else seen.bool()
            agree(given.transpose(1, 2)[rows], expected.transpose(1, 2)[rows])
        return [m.past_key_values for m in (got, want)]

    same(ids)
    masks = [padding(side) for side in ("left", "right", "mixed")]
    if "sliding_window" not in FAMILIES[family][1] or FAMILIES[family][1]["sliding_window"] is None:
        masks.append(holes())
    for mask in masks:
        same(ids, mask, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    packed = torch.cat([torch.arange(n) for n in (5, 8)])[None].expand(3, -1)
    same(ids, position_ids=packed, use_cache=False)


@torch.no_grad()
def test_weights_of_one_query_and_of_cuts():
    theirs, ours = models("llama")
    ids = tokens()
    for mask in (torch.ones(3, 13, dtype=torch.long), padding("left"), holes()):
        longer, weights = torch.cat((mask, mask[:, :1] | 1), 1), []
        for model in (ours, theirs):
            cache = model(ids, attention_mask=mask).past_key_values
            positions = longer.sum(1)[:, None] - 1
            weights.append(
                model(
                    ids[:, :1], attention_mask=longer, position_ids=positions, past_key_values=cache, output_attentions=True
                ).attentions
            )
        for given, expected in zip(*weights, strict=True):
            agree(given, expected)
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    cuts = cuts_of(1, 4, 8)
    _, weights = trillama.attention(torch.nn.Module(), q, k, k, None, output_attentions=True, **cuts)
    seen = torch.block_diag(torch.zeros(1, 1), torch.ones(3, 3).tril(), torch.ones(4, 4).tril(), torch.zeros(1, 1))
    assert torch.equal((weights > 0).float(), seen.expand(1, 4, 9, 9))


@torch.no_grad()
def test_weights_and_a_mask_of_the_users_own_compiled():
    module, causal = torch.nn.Module(), transformers.masking_utils.causal_mask_function
    q, k = torch.randn(3, 4, 13, 16), torch.randn(3, 2, 13, 16)
    compiled = torch.compile(trillama.attention, fullgraph=True, backend="aot_eager")
    ours = trillama.attention_mask(3, 13, 13, mask_function=causal, attention_mask=holes().bool())
    for mask in (None, ours, next(random_masks(3, 4, 13)).int()):
        for given, expected in zip(*(f(module, q, k, k, mask, output_attentions=True) for f in (compiled, trillama.attention))):
            agree(given, expected)


def test_weights_are_warned_of_once():
    from trillama.kernels.compat import transformers as adapter

    adapter._tell_once.cache_clear()
    x = torch.randn(1, 4, 3, 16)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            trillama.attention(torch.nn.Module(), x, x, x, None, output_attentions=True)
            trillama.attention(torch.nn.Module(), x, x, x, torch.ones(1, 1, 3, 3))
    assert [str(w.message) for w in warned] == [
        f"attention 'trillama': {what} is computed in plain PyTorch, with all scores in memory"
        for what in ("output_attentions", "a mask of four axes")
    ]


# --- one token with a gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral window", "gemma2"])
@pytest.mark.parametrize("kind", ["ones", "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_one_token_with_a_gradient(family, kind, cache):
    """Keys of the cache at the front, in the middle, with hidden ones between; the gradient goes into the cache too."""
    theirs, ours = models(family, initializer_range=0.1)  # weights of 0.3 make a softmax of one, and a gradient of rounding errors
    ids = tokens()
    mask = torch.ones(3, 13, dtype=torch.long) if kind == "ones" else padding(kind)
    longer = torch.cat((mask, mask[:, :1] | 1), 1)
    logits = []
    for model in (ours, theirs):
        past = transformers.DynamicCache(config=model.config)
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=20)
        with torch.set_grad_enabled(cache == "dynamic"):  # a static cache is written in place
            first = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0), cache_position=torch.arange(13))
            model(ids, attention_mask=mask, past_key_values=past, **first)
        last = dict(position_ids=longer.sum(1)[:, None] - 1, cache_position=torch.tensor([13]))
        logits.append(model(ids[:, :1], attention_mask=longer, past_key_values=past, **last).logits)
        logits[-1].square().mean().backward()
    agree(*logits)
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
        if p.grad is not None:
            assert oracle.error(q.grad, p.grad.double()) < rounding.gradients(), name


# --- arguments ---------------------------------------------------------------------------------------------------------


def cuts_of(*starts, dtype=torch.int32):
    starts = torch.tensor(starts, dtype=dtype)
    longest = int(starts.diff().max())
    return dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=longest, max_length_k=longest)


@torch.no_grad()
def test_sequences_by_their_cuts():
    """As DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them."""
    theirs, ours = models("llama")
    ids = tokens(1, 14)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 8)])[None]
    alone = torch.cat([theirs(part[None], use_cache=False).logits[0] for part in ids[0].split((5, 1, 8))])
    for dtype in (torch.int32, torch.int64):
        logits = ours(ids, position_ids=positions, use_cache=False, **cuts_of(0, 5, 6, 14, dtype=dtype)).logits
        agree(logits[0], alone)


def test_cuts_that_do_not_fit_are_refused():
    x, y = torch.randn(2, 4, 6, 16), torch.randn(1, 4, 6, 16)
    module, cuts = torch.nn.Module(), cuts_of(0, 2, 6)
    with pytest.raises(
        ValueError, match="cu_seq_lens_q and 2 rows, expected the sequences in one row, as DataCollatorWithFlattening"
    ):
        trillama.attention(module, x, x, x, None, **cuts)
    for name in cuts:
        with pytest.raises(ValueError, match="expected all or none of cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k"):
            trillama.attention(module, y, y, y, None, **{**cuts, name: None})
    with pytest.raises(ValueError, match="cu_seq_lens_q together with an attention mask"):
        trillama.attention(module, y, y, y, torch.ones(1, 1, 6, 6), **cuts)
    with pytest.raises(TypeError, match=r"cu_seqlens_q is torch\.float32, expected an int32 or int64 tensor"):
        trillama.attention(module, y, y, y, None, **{**cuts, "cu_seq_lens_q": torch.tensor([0.0, 2, 6])})


@torch.no_grad()
def test_numbers_of_numpy_and_tensors():
    x = torch.randn(1, 4, 6, 16)
    want, _ = trillama.attention(torch.nn.Module(), x, x, x, None, scaling=0.5, softcap=2.0, sliding_window=3)
    for made in (np.float64, np.float32, torch.tensor):
        whole = torch.tensor(3) if made is torch.tensor else np.int64(3)
        got, _ = trillama.attention(torch.nn.Module(), x, x, x, None, scaling=made(0.5), softcap=made(2.0), sliding_window=whole)
        assert torch.equal(got, want)
    for name, value in (("scaling", "1"), ("softcap", torch.ones(2)), ("sliding_window", 2.5)):
        with pytest.raises((TypeError, ValueError), match=f"attention 'trillama': {name} is .*, expected a"):
            trillama.attention(torch.nn.Module(), x, x, x, None, **{name: value})
    with pytest.raises(ValueError, match="scaling requires a gradient"), torch.enable_grad():
        trillama.attention(torch.nn.Module(), x, x, x, None, scaling=torch.tensor(0.5, requires_grad=True))


@torch.no_grad()
def test_a_mask_on_another_device_is_moved_or_refused():
    """meta stands for a second GPU here, from which nothing can be moved; pretended tensors for two of which it can."""
    x, ids = torch.randn(2, 4, 6, 16), torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    causal, padded = transformers.masking_utils.causal_mask_function, torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]).bool()
    packed = transformers.masking_utils.and_masks(causal, transformers.masking_utils.packed_sequence_mask_function(ids))
    masks = {
        "sequences": trillama.attention_mask(2, 6, 6, mask_function=causal, attention_mask=padded),
        "keys": trillama.attention_mask(2, 1, 6, q_offset=5, mask_function=causal, attention_mask=padded),
        "packed": trillama.attention_mask(2, 6, 6, mask_function=packed), "user's": torch.ones(2, 1, 6, 6, dtype=torch.int32),
    }  # fmt: skip
    for name, mask in masks.items():
        q = x[:, :, :1] if name == "keys" else x
        with pytest.raises(ValueError, match="the mask is on meta, expected cpu as query"):
            trillama.attention(torch.nn.Module(), q, x, x, mask.to("meta"))
        with FakeTensorMode() as pretended:
            second = [torch.empty(t.shape, device="cuda:1") for t in (q, x, x)]
            parts = (mask.starts, mask.count) if name == "packed" else (mask,)
            parts = [pretended.from_tensor(t) for t in parts]
            parts[0] = parts[0].to("cuda:0")
            out, _ = trillama.attention(torch.nn.Module(), *second, type(mask)(*parts) if name == "packed" else parts[0])
            assert (out.device, out.shape) == (second[0].device, (2, q.shape[2], 4, 16))
    for place in range(3):
        tensors = [x] * 3
        tensors[place] = x.to("meta")
        with pytest.raises(ValueError, match=r"is on \w+, expected \w+ as q"):
            trillama.attention(torch.nn.Module(), *tensors, None)
    cuts = cuts_of(0, 2, 6)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        with pytest.raises(ValueError, match=f"{name.replace('seq_lens', 'seqlens')} is on meta, expected cpu as q"):
            trillama.attention(torch.nn.Module(), x[:1], x[:1], x[:1], None, **{**cuts, name: cuts[name].to("meta")})
    norm, rotary = models("llama")[1].model.norm, trillama._apply_rotary_pos_emb
    with pytest.raises(ValueError, match="weight is on meta, expected cpu"):
        norm.to("meta")(torch.randn(2, 64))
    cos = torch.randn(1, 6, 16)
    with pytest.raises(ValueError, match="is on meta, expected cpu"):
        rotary(x, x, cos.to("meta"), cos)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_training_passes_down_means_nothing(family):
    """The keywords that a Trainer, collators and `generate` hand to every layer."""
    _, ours = models(family)
    ids = tokens()
    more = dict(num_items_in_batch=torch.tensor(39), output_hidden_states=True, return_dict=True, logits_to_keep=0)
    ours(ids, labels=ids, attention_mask=torch.ones_like(ids), **more).loss.backward()
    for cache in (None, "static"):
        ours.generate(ids, max_new_tokens=2, return_dict_in_generate=True, disable_compile=True, cache_implementation=cache)


@pytest.mark.parametrize("name", [
    "block_indices", "indices", "sinks", "s_aux", "position_bias", "head_mask", "cache", "block_table", "k_cache",
    "use_top_left_mask", "what_comes_next",
])  # fmt: skip
def test_unknown_keywords_are_refused(name):
    x = torch.randn(1, 4, 3, 16)
    for value in (torch.zeros(1, 4), torch.zeros(()), 0, True, [1], "x"):
        with pytest.raises(ValueError, match=f"attention 'trillama': the argument {name}; use attn_implementation='sdpa'"):
            trillama.attention(torch.nn.Module(), x, x, x, None, **{name: value})
    for nothing in (None, False, (), [], {}):
        trillama.attention(torch.nn.Module(), x, x, x, None, **{name: nothing})
    harmless = dict(
        position_ids=torch.arange(3)[None], cache_position=torch.arange(3), use_cache=True, num_items_in_batch=torch.tensor(2)
    )
    trillama.attention(torch.nn.Module(), x, x, x, None, **harmless)


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_mask_functions_that_no_kernel_honours_are_refused():
    masking = transformers.masking_utils
    chunked = masking.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
    for function in (chunked, masking.or_masks(masking.causal_mask_function, chunked)):
        with pytest.raises(ValueError, match="no kernel for the mask pattern"):
            trillama.attention_mask(2, 6, 6, mask_function=function)
    window = masking.sliding_window_causal_mask_function(4)
    for config, told in ((None, None), (transformers.LlamaConfig(), None), (transformers.MistralConfig(sliding_window=3), 3)):
        with pytest.raises(ValueError, match=f"a mask with a window of 4, but the layers are told {told}"):
            trillama.attention_mask(2, 6, 6, mask_function=window, config=config)


@pytest.mark.parametrize("masks", [{}, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}], ids=["no mask", "padding"])
def test_a_model_that_computes_with_the_mask_is_refused(masks):
    """Doge makes its own of transformers': of None, which means causal here, one that hides no later key."""
    if "allow_is_causal_skip" not in inspect.getsource(inspect.getmodule(transformers.DogeModel)):
        pytest.skip("this transformers does not say that a mask has to be there")
    config = transformers.DogeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="trillama",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"attention 'trillama': a model that computes with the mask itself; use attn_impl"):
        transformers.DogeForCausalLM(config)(torch.tensor([[1, 2, 3, 4, 5]]), **masks)


def test_dropout_is_refused():
    _, ours = models("llama", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout of 0.1 on the attention weights"):
        ours.train()(tokens())
    ours.eval()(tokens())


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
