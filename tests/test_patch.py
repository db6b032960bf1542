"""`patch` and `unpatch`: what is replaced; replicas, copies, pickles, hooks and wrappers compute with their own weights."""

import copy
import functools
import io
import logging
import pickle

import pytest
import torch
from families import agree, models, tokens, transformers, trillama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

OURS = {"LlamaRMSNorm": 5, "LlamaAttention": 2, "LlamaMLP": 2, "LlamaRotaryEmbedding": 1}


@pytest.fixture
def names(monkeypatch):
    """The calls of our ops by the adapter, in order."""
    from trillama.kernels.compat import transformers as adapter

    called = []

    def noted(name, function, *args, **kwargs):
        called.append(name)
        return function(*args, **kwargs)

    for name in ("rms_norm", "swiglu", "apply_rope"):
        monkeypatch.setattr(adapter, name, functools.partial(noted, name, getattr(adapter, name)))
    return called


ALL = {"rms_norm": 5, "swiglu": 2, "apply_rope": 2}


def counted(called, function):
    """What function() gives, and how often it called which op."""
    called.clear()
    result = function()
    return result, {name: called.count(name) for name in ALL}


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


@torch.no_grad()
def test_patch_is_reversible_and_of_one_instance(names):
    theirs, ours = models("llama")
    other = copy.deepcopy(theirs)
    before, keys = classes(theirs), list(theirs.state_dict())
    assert keys == list(ours.state_dict())
    assert all(isinstance(m, before[name]) for name, m in ours.named_modules())
    assert repr(ours) == repr(theirs)
    assert trillama.patch(ours) is ours, "a second time changes nothing"
    assert trillama.patched(ours) == OURS
    ids = tokens()
    logits, calls = counted(names, lambda: ours(ids).logits)
    agree(logits, theirs(ids).logits)
    assert calls == ALL
    assert trillama.unpatch(ours) is ours
    assert classes(ours) == before == classes(other)
    assert not any("forward" in vars(m) for m in ours.modules())
    assert keys == list(ours.state_dict())
    assert trillama.patched(ours) == {}
    ours.set_attn_implementation("eager")
    logits, calls = counted(names, lambda: ours(ids).logits)
    assert torch.equal(logits, theirs(ids).logits)
    assert not any(calls.values())


def test_patch_says_what_it_replaced(caplog):
    _, ours = models("llama")
    trillama.unpatch(ours)
    with caplog.at_level(logging.INFO, "trillama"):
        trillama.patch(ours)
    (line,) = [r.getMessage() for r in caplog.records]
    head, counts = line.split(": ")
    assert head == "patch"
    assert set(counts.split(", ")) == {f"{n} {name}" for name, n in OURS.items()}


def test_patch_leaves_what_is_not_swiglu():
    _, ours = models("gemma")
    assert trillama.patched(ours) == {"GemmaRMSNorm": 5, "GemmaAttention": 2, "GemmaRotaryEmbedding": 1}


def test_patch_refuses_an_unknown_model():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8)
    with pytest.raises(ValueError, match="patch: GPT2LMHeadModel has nothing to patch, expected a model of Llama, Mistral, Phi3"):
        trillama.patch(transformers.GPT2LMHeadModel(config))


def test_a_forward_of_the_instance_is_left_with_a_warning():
    """As Liger and Hugging Face's package kernels put there: what replaces it now would be lost with it."""
    theirs, _ = models("llama")
    norm = theirs.model.norm
    norm.forward = own = lambda x: x * 2
    with pytest.warns(UserWarning, match="patch: left as they are, with a forward of their own: 1 LlamaRMSNorm"):
        trillama.patch(theirs)
    assert norm.forward is own
    assert trillama.patched(theirs) == {**OURS, "LlamaRMSNorm": 4}


@torch.no_grad()
def test_a_forward_of_a_derived_class_is_left_with_a_warning():
    """A user's own model with transformers' modules for its base: what it computes is what it says."""

    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2

    class Relu(LlamaMLP):
        def forward(self, x):
            return self.down_proj(torch.relu(self.gate_proj(x)))

    class Halved(LlamaAttention):
        def forward(self, *arguments, **named):
            out, *rest = super().forward(*arguments, **named)
            return out / 2, *rest

    class Named(LlamaMLP):
        """Has transformers' forward."""

    _, model = models("llama")
    first, second = model.model.layers
    first.input_layernorm.__class__, first.mlp.__class__, first.self_attn.__class__ = Doubled, Relu, Halved
    second.mlp.__class__ = Named
    ids = tokens()
    before = model(ids).logits
    with pytest.warns(UserWarning, match="with a forward of their own: 1 Halved, 1 Relu, 1 Doubled$"):
        trillama.patch(model)
    assert trillama.patched(model) == {"LlamaRMSNorm": 4, "LlamaAttention": 1, "Named": 1, "LlamaRotaryEmbedding": 1}
    agree(model(ids).logits, before)


def other_weights(model):
    """Changed in place, so that whoever computes with the weights of the model gives other logits from now on."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


@torch.no_grad()
def test_a_copy_computes_with_its_own_weights(names):
    theirs, ours = models("llama")
    ids = tokens()
    want = theirs(ids).logits
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(stream, weights_only=False)]
    other_weights(ours)
    for made in copies:
        assert trillama.patched(made) == OURS
        logits, calls = counted(names, lambda: made(ids).logits)  # noqa: B023
        agree(logits, want)
        assert calls == ALL
        trillama.unpatch(made)
        assert classes(made) == classes(theirs)


def replica(model):
    """What DataParallel makes of a model: shallow copies of all modules, here with half the weights."""
    made = {id(m): m._replicate_for_data_parallel() for m in model.modules()}
    for m in model.modules():
        for name, child in m._modules.items():
            made[id(m)]._modules[name] = child and made[id(child)]
        for name, p in m._parameters.items():
            setattr(made[id(m)], name, p if p is None else p * 0.5)
    return made[id(model)]


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma2"])
@torch.no_grad()
def test_a_replica_computes_with_its_own_weights(family):
    theirs, ours = models(family)
    ids = tokens()
    made = replica(ours)
    other_weights(theirs)
    agree(made(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_functional_call(names):
    theirs, ours = models("llama")
    ids = tokens()
    halves = {name: p * 0.5 for name, p in ours.named_parameters()}
    other_weights(theirs)
    output, calls = counted(names, lambda: torch.func.functional_call(ours, halves, (ids,)))
    agree(output.logits, theirs(ids).logits)
    assert calls == ALL


ORDERS = [
    "hook patch", "patch hook", "hook patch unpatch", "patch hook unpatch", "patch hook unhook", "hook patch unhook",
    "patch hook unhook unpatch", "patch hook unpatch unhook", "hook patch unpatch unhook", "hook patch unhook unpatch",
    "hook unhook patch", "hook unhook patch unpatch", "hook patch hook unhook", "hook patch unpatch hook patch unhook",
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_hooks_of_accelerate(order, names):
    """Set and removed before and after: hooks run while they are there, ours computes while it is patched. accelerate's forward is
    bound to the module it was set on, and so is what it leaves behind: a replica has its own weights from the next patch on."""
    hooks = pytest.importorskip("accelerate.hooks")
    theirs, ours = models("llama")
    trillama.unpatch(ours)
    runs = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            runs.append(module)
            return args, kwargs

    def set_hooks(model):
        for m in model.modules():
            if type(m).__name__ in OURS:
                hooks.add_hook_to_module(m, Counting())

    steps = {
        "hook": set_hooks, "unhook": lambda model: hooks.remove_hook_from_module(model, recurse=True),
        "patch": trillama.patch, "unpatch": trillama.unpatch,
    }  # fmt: skip
    is_patched = hooked = False
    for step in order.split():
        steps[step](ours)
        is_patched = {"patch": True, "unpatch": False}.get(step, is_patched)
        hooked = {"hook": True, "unhook": False}.get(step, hooked)
    ids = tokens()
    assert trillama.patched(ours) == (OURS if is_patched else {})
    (logits, calls), want = counted(names, lambda: ours(ids).logits), theirs(ids).logits
    agree(logits, want)
    assert calls == (ALL if is_patched else dict.fromkeys(ALL, 0))
    assert hooked == any(type(m).__name__ == "LlamaRMSNorm" for m in runs)
    if not hooked and order.endswith(" patch"):
        other_weights(theirs)
        agree(replica(ours)(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_a_model_that_accelerate_splits():
    """Every layer behind accelerate's hooks, which move what they are given; the packed mask is an object of ours."""
    accelerate = pytest.importorskip("accelerate")
    theirs, ours = models("llama")
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(ours, places, main_device="cpu", force_hooks=True)
    ids = tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    agree(ours(ids, position_ids=positions, use_cache=False).logits, theirs(ids, position_ids=positions, use_cache=False).logits)


def test_every_kind_of_wrapper_after_and_before(names):
    """A class put above ours (parametrizations do so, as does FSDP2), and ours above one."""
    theirs, ours = models("llama")
    parametrize = torch.nn.utils.parametrize
    ids = tokens()

    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight * 0.5

    parametrize.register_parametrization(theirs.model.norm, "weight", Half())
    parametrize.register_parametrization(ours.model.norm, "weight", Half())
    for expected in (ALL, dict.fromkeys(ALL, 0), ALL):
        (logits, calls) = counted(names, lambda: ours(ids).logits)
        agree(logits, theirs(ids).logits)
        assert calls == expected
        (trillama.unpatch if any(expected.values()) else trillama.patch)(ours)
    assert isinstance(ours.model.norm, type(theirs.model.norm).__bases__[0])


def test_outputs_of_layers_are_recorded():
    """transformers finds the layers whose outputs it collects by their classes."""
    theirs, ours = models("llama")
    ids = tokens()
    for model in (ours, theirs):
        model.out = model(ids, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(getattr(ours.out, name)) == len(getattr(theirs.out, name))
        for given, expected in zip(getattr(ours.out, name), getattr(theirs.out, name)):
            agree(given, expected)
    assert trillama.patched(ours) == OURS


def test_training_after_a_copy_reaches_the_copy():
    _, ours = models("llama")
    made, ids = copy.deepcopy(ours).train(), tokens()
    made.gradient_checkpointing_enable({"use_reentrant": False})
    made(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in made.parameters())
    assert all(p.grad is None for p in ours.parameters())


def test_compiled_before_and_after():
    theirs, ours = models("llama")
    ids = tokens()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(ids)
    with torch.no_grad():
        for change in (None, trillama.unpatch, trillama.patch):
            if change:
                change(ours)
            agree(compiled(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits)
