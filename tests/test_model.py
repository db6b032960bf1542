"""Llama against transformers: every family on tiny random models in float32, whole and step by step through the cache."""

import json

import pytest
import rounding
import torch
from trillama.bench import oracle
from trillama.model import KVCache, Llama
from trillama.model.config import Config

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0 + 0.02 * i for i in range(8)], "long_factor": [2.0 + 0.7 * i for i in range(8)],
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": None}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-linear": ("Llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN}),
    "llama-dynamic": ("Llama", {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 32}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": 11}),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 16, "rope_scaling": LONGROPE}),
    "phi3-longrope-partial": ("Phi3", {
        "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75,
        "rope_scaling": {**LONGROPE, "short_factor": LONGROPE["short_factor"][:6], "long_factor": LONGROPE["long_factor"][:6]},
    }),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-layers": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-window": ("Qwen3", {"head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 7,
                               "max_window_layers": 2}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-window": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7}),
}  # fmt: skip


def make(case, **changes):
    """(our model, transformers' model) with the same random weights, norms and biases included."""
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options, **changes}, attn_implementation="eager")
    torch.manual_seed(len(case))
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    ours = Llama(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def prompt(batch=2, tokens=40):
    return torch.randint(SIZES["vocab_size"], (batch, tokens))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_prefill(case):
    ours, theirs = make(case)
    ids = prompt()
    for tokens in (7, 16, 17, 40):  # 16 and 17: both sides of longrope's and dynamic's boundary
        logits = ours(ids[:, :tokens])
        assert logits.dtype == torch.float32
        assert oracle.error(logits, theirs(ids[:, :tokens]).logits) < rounding.logits()


@pytest.mark.few(10)
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_steps(case):
    """Prefill of 5, then one token at a time, across the window's and the scaling's boundaries."""
    ours, theirs = make(case)
    ids = prompt(tokens=22)
    cache, memory = KVCache(ours.config, 2, 22), transformers.DynamicCache(config=theirs.config)
    for chunk in ids.split([5] + [1] * 17, 1):
        logits = ours(chunk, cache)
        assert oracle.error(logits, theirs(chunk, past_key_values=memory).logits) < rounding.logits()
    assert cache.filled == 22
    assert cache.lengths.tolist() == [22, 22]


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "llama-bias", "mistral", "phi3-partial", "qwen2-layers", "qwen3", "smollm3-window"])
def test_cache_changes_nothing(case):
    """However the tokens are divided among calls, their logits are those of one call without a cache."""
    ours, _ = make(case)
    ids = prompt(3, 24)
    whole = ours(ids)
    for sizes in ([24], [1] * 24, [13, 1, 2, 8], [1, 23]):
        cache = KVCache(ours.config, 3, 29)
        logits = torch.cat([ours(chunk, cache) for chunk in ids.split(sizes, 1)], 1)
        assert oracle.error(logits, whole) < rounding.logits()
    cache.reset()
    assert oracle.error(ours(ids, cache), whole) < rounding.logits()


@torch.no_grad()
def test_rows_of_unequal_length():
    """What `generate` does: pads on the right, then the cache goes on at each row's own end."""
    ours, _ = make("mistral")
    ids, lengths = prompt(3, 20), [20, 4, 11]
    cache = KVCache(ours.config, 3, 30)
    ours(ids, cache)
    cache.lengths.copy_(torch.tensor(lengths))
    more = prompt(3, 6)
    logits = torch.cat([ours(chunk, cache) for chunk in more.split([1, 1, 3, 1], 1)], 1)
    for b, length in enumerate(lengths):
        alone = ours(torch.cat((ids[b, :length], more[b]))[None])[:, length:]
        assert oracle.error(logits[b], alone[0]) < rounding.logits()


@torch.no_grad()
def test_positions():
    ours, theirs = make("llama-llama3")
    ids = prompt(2, 9)
    positions = torch.stack((torch.arange(9) + 30, torch.arange(9) * 3))
    assert oracle.error(ours(ids, positions=positions), theirs(ids, position_ids=positions).logits) < rounding.logits()
    assert oracle.error(ours(ids, positions=torch.arange(9) + 200), ours(ids)) < 2 * rounding.logits()  # only distances count


@torch.no_grad()
def test_interleaved():
    """Meta's files: the rows of q and k in pairs, and the rotation to match."""
    _, theirs = make("llama")
    state = theirs.state_dict()
    for name in state:
        if "q_proj" in name or "k_proj" in name:
            state[name] = state[name].view(-1, 2, 8, 64).transpose(1, 2).reshape(-1, 64)
    meta = Llama({**theirs.config.to_dict(), "rope_interleaved": True})
    meta.load_state_dict(state)
    ids = prompt()
    cache = KVCache(meta.config, 2, 40)
    assert oracle.error(meta(ids), theirs(ids).logits) < rounding.logits()
    stepped = torch.cat([meta(chunk, cache) for chunk in ids.split([39, 1], 1)], 1)
    assert oracle.error(stepped, theirs(ids).logits) < rounding.logits()


@pytest.mark.parametrize("case", ["llama-bias", "qwen3", "phi3-partial"])
def test_gradients(case):
    ours, theirs = make(case)
    ids = prompt(2, 12)
    wanted = torch.autograd.grad(theirs(ids).logits.square().mean(), list(theirs.parameters()))
    state = dict(zip([name for name, _ in theirs.named_parameters()], wanted))
    theirs.load_state_dict(state)
    exact = Llama(theirs.config)
    exact.load_state_dict(theirs.state_dict())  # packs the gradients as it packs the weights
    ours(ids).square().mean().backward()
    for (name, parameter), gradient in zip(ours.named_parameters(), exact.parameters()):
        assert oracle.error(parameter.grad, gradient) < 5e-5, name


@torch.no_grad()
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(low):
    """At most twice as far from float32 as transformers in the same dtype; the rotary tables stay in float32."""
    ours, theirs = make("llama-llama3")
    ids = prompt(2, 60)
    exact = theirs(ids).logits
    ours, theirs = ours.to(low), theirs.to(low)
    logits = ours(ids)
    assert logits.dtype == torch.float32
    assert oracle.error(logits, exact) < 2 * oracle.error(theirs(ids).logits, exact)
    cos, _ = ours.rope(60, 60, ids.device)[True]
    assert cos.dtype == torch.float32


def test_training_after_generating():
    """Tables that were made in inference mode must not reach autograd."""
    ours, _ = make("llama")
    with torch.inference_mode():
        ours(prompt())
    ours(prompt()).sum().backward()
    assert ours.lm_head.weight.grad.isfinite().all()


def test_cache_has_no_history():
    ours, _ = make("llama")
    cache = KVCache(ours.config, 2, 8)
    for tokens in (4, 1):
        assert not ours.hidden_states(prompt(2, tokens), cache).requires_grad
    assert not any(t.requires_grad for t in (*cache.k, *cache.v))


@torch.no_grad()
def test_tables_grow():
    ours, _ = make("llama", max_position_embeddings=2000)
    ours(prompt(1, 3))
    ids = prompt(1, 700)
    fresh = Llama(ours.config)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(ours(ids), fresh(ids))
    cache = KVCache(ours.config, 1, 1500)
    ours(ids, cache)
    tables = ours.rope(701, 1500, ids.device)[True]
    ours(ids[:, :1], cache)
    assert ours.rope(702, 1500, ids.device)[True] is tables  # made once for all that the cache can hold
    assert tables[0].shape[0] == 1500


@pytest.mark.slow
@torch.no_grad()
def test_compile():
    """One graph for all lengths and one for all decode steps, none of them broken."""
    from torch._dynamo.utils import counters

    ours, _ = make("llama")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for tokens in (10, 11, 12, 30):
        ids = prompt(2, tokens)
        assert oracle.error(compiled(ids), ours(ids)) < rounding.logits()
    cache, other = KVCache(ours.config, 2, 40), KVCache(ours.config, 2, 40)
    ours(ids, cache), ours(ids, other)
    before = counters["stats"]["unique_graphs"]
    assert before <= 2
    for _ in range(5):
        ids = prompt(2, 1)
        assert oracle.error(compiled(ids, cache), ours(ids, other)) < rounding.logits()
    assert counters["stats"]["unique_graphs"] - before <= 2


@torch.no_grad()
def test_no_host_read_in_a_decode_step():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    ours, _ = make("qwen3")
    cache = KVCache(ours.config, 2, 8)
    ours(prompt(2, 4), cache)
    with Watch():
        ours(prompt(2, 1), cache)
    reads = [name for name in Watch.seen if "local_scalar" in name or "nonzero" in name or "_to_copy" in name]
    assert not reads
    assert "trillama.decode_attention.default" in Watch.seen
    copies = [name for name in Watch.seen if "clone" in name or "contiguous" in name or "cat" in name]
    assert not copies


@torch.no_grad()
def test_projections_are_not_copied(monkeypatch):
    from trillama.model import llama

    ours, _ = make("llama")
    packed, seen = [], []
    ours.model.layers[0].self_attn.qkv_proj.register_forward_hook(lambda m, i, out: packed.append(out))
    rope, swiglu = llama.apply_rope, llama.swiglu
    monkeypatch.setattr(llama, "apply_rope", lambda q, k, *a, **o: (seen.append((q, k)), rope(q, k, *a, **o))[1])
    monkeypatch.setattr(llama, "swiglu", lambda gate, up: (seen.append((gate, up)), swiglu(gate, up))[1])
    ours(prompt())
    storage = packed[0].untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == storage for t in seen[0])
    assert seen[1][0].untyped_storage().data_ptr() == seen[1][1].untyped_storage().data_ptr()


SOON = ("qwen3", "phi3-longrope-partial", "smollm3-window")
ONE_LAYER = {"smollm3-window": {"no_rope_layers": [0]}, "qwen2-layers": {"layer_types": ["sliding_attention"]}}


@torch.no_grad()
@pytest.mark.parametrize("case", [*SOON, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in SOON)])
def test_triton(case, device):
    """The kernels themselves, in the interpreter where there is no GPU: prefill, a few tokens, one token, past the boundaries."""
    from trillama.kernels import use_backend
    from trillama.kernels.dispatch import observe

    ours, theirs = make(case, num_hidden_layers=1, **ONE_LAYER.get(case, {}))
    ids, names = prompt(2, 19), set()
    with use_backend("triton"), observe(lambda kernel, *_: names.add(getattr(kernel, "fn", kernel).__name__)):
        ours = ours.to(device)
        cache = KVCache(ours.config, 2, 24, device=device)
        logits = [ours(chunk.to(device), cache) for chunk in ids.split([12, 6, 1], 1)]
    memory = transformers.DynamicCache(config=theirs.config)
    for mine, chunk in zip(logits, ids.split([12, 6, 1], 1)):
        assert oracle.error(mine, theirs(chunk, past_key_values=memory).logits) < rounding.logits()
    assert len(names) >= 5, names


# --- from_pretrained -------------------------------------------------------------------------------------------------


def saved(folder, case, change=None, **changes):
    """transformers' model, saved into a folder of Hugging Face's layout; `change(tensors)` edits what lies in the file."""
    from safetensors.torch import load_file, save_file

    _, theirs = make(case, **changes)
    theirs.save_pretrained(folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-mqa", "llama-bias", "phi3-longrope", "qwen2-window", "qwen3", "smollm3"])
def test_from_pretrained(tmp_path, case, capfd):
    theirs = saved(tmp_path, case)
    ours = Llama.from_pretrained(tmp_path, device="cpu")
    ids = prompt(2, 20)
    assert oracle.error(ours(ids), theirs(ids).logits) < rounding.logits()
    assert not ours.training
    assert all(p.dtype == torch.float32 and p.requires_grad and not p.is_meta for p in ours.parameters())
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == theirs.config.tie_word_embeddings
    assert "loading" not in capfd.readouterr().err


def test_dtypes(tmp_path):
    saved(tmp_path, "llama")
    for dtype in (torch.bfloat16, "bfloat16"):
        model = Llama.from_pretrained(str(tmp_path), device="cpu", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"dtype is torch\.int8, expected a floating-point"):
        Llama.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="dtype is float99"):
        Llama.from_pretrained(tmp_path, dtype="float99")


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"tensor {Q} is missing, expected one of shape (64, 64)"),
        (lambda t: t.update({Q: t[Q][:32].clone()}), f"tensor {Q}: shape is (32, 64), expected (64, 64)"),
        (lambda t: t.update({Q + ".extra": t[Q].clone()}), f"tensor {Q}.extra has no place in a llama"),
        (lambda t: t.update({Q.replace("weight", "bias"): torch.ones(64)}), "self_attn.q_proj.bias has no place in a llama"),
        (lambda t: t[Q][3, 5].fill_(float("nan")), f"tensor {Q} holds values that are not finite in float32"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing, expected one of shape (96, 64)"),
    ],
)
def test_bad_checkpoints(tmp_path, change, message):
    saved(tmp_path, "llama", change)
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path, device="cpu")
    assert message in str(error.value)
    assert str(tmp_path / "model.safetensors") in str(error.value) or "is missing" in message
    assert "\n" not in str(error.value)


def test_bad_config_file(tmp_path):
    saved(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path, device="cpu")
    assert str(error.value) == f"{tmp_path}: config: hidden_act is 'gelu', expected 'silu'"


# --- configs ---------------------------------------------------------------------------------------------------------


def test_dialects():
    """One model as transformers 4 and 5 write it, as a dict and as an object."""
    new = transformers.Phi3Config(**{**SIZES, **CASES["phi3-longrope"][1], "rope_theta": 5e4})
    old = {k: v for k, v in new.to_dict().items() if k != "rope_parameters"}
    scaling = {"type": "su", **{k: v for k, v in LONGROPE.items() if k != "rope_type"}}
    old |= {"rope_theta": 5e4, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    a, b = Config.read(new), Config.read(json.loads(json.dumps(old, default=str)))
    assert {**vars(a), "rope_parameters": None} == {**vars(b), "rope_parameters": None}
    for name in ("rope_theta", "short_factor", "long_factor", "original_max_position_embeddings", "rope_type"):
        assert a.rope_parameters[name] == b.rope_parameters[name]


PLAIN = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def test_plain_dict():
    model = Llama(PLAIN)
    assert model(prompt(1, 3)).shape == (1, 3, 96)
    assert model.config.num_key_value_heads == 4
    assert model.config.eos_token_id == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "config: model_type is 'gpt2', expected one of llama, mistral"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"hidden_size": None}, "hidden_size is None, expected an integer from 1 to"),
        ({"hidden_size": -64}, "hidden_size is -64, expected an integer from 1 to"),
        ({"hidden_size": 10**30}, "hidden_size is 1000"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 66}, "hidden_size is 66, expected a multiple of num_attention_heads = 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected an integer from 1 to 1024"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of num_attention_heads = 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 15}, "head_dim is 15, expected an even number"),
        ({"head_dim": 512}, "head_dim is 512, expected an integer from 1 to 256"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [1, -2]}, "eos_token_id is [1, -2]"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_type is 'ntk'"),
        (
            {"original_max_position_embeddings": 9, "rope_scaling": {**LONGROPE, "long_factor": [1.0]}},
            "long_factor is [1.0], expected a list of 8",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, a field that is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, a field that is not supported"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True, a field that is not supported"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types is ['full_attention']"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 2}, "layer_types is"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "layer_types is"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers is [1]"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ],
    ids=str,
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError) as error:
        Llama({**PLAIN, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- calls that cannot work ------------------------------------------------------------------------------------------


def test_bad_calls():
    model = Llama({**PLAIN, "max_position_embeddings": 32})
    cache = KVCache(model.config, 2, 10)
    with pytest.raises(TypeError, match=r"input_ids is torch\.float32, expected an int64 tensor"):
        model(torch.zeros(1, 3))
    with pytest.raises(TypeError, match="input_ids is list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\), expected \[batch, tokens\]"):
        model(torch.arange(3))
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 0\)"):
        model(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="input_ids reaches 33 tokens, expected at most 32"):
        model(prompt(1, 33))
    with pytest.raises(ValueError, match="input_ids has 1 rows, expected 2 as the cache"):
        model(prompt(1, 3), cache)
    with pytest.raises(ValueError, match="input_ids has 11 tokens after 0, but the cache ends at 10"):
        model(prompt(2, 11), cache)
    with pytest.raises(ValueError, match="positions is given beside a cache"):
        model(prompt(2, 3), cache, torch.arange(3))
    with pytest.raises(ValueError, match="positions holds -1"):
        model(prompt(2, 3), positions=torch.tensor([-1, 0, 1]))
    with pytest.raises(ValueError, match="input_ids reaches 41 tokens"):
        model(prompt(2, 3), positions=torch.tensor([0, 1, 40]))
    with pytest.raises(TypeError, match=r"positions is \[0, 1, 2\]"):
        model(prompt(2, 3), positions=[0, 1, 2])
    with pytest.raises(ValueError, match="KVCache: max_length is 0"):
        KVCache(model.config, 2, 0)
    model(prompt(2, 9), cache)
    with pytest.raises(ValueError, match="input_ids has 2 tokens after 9"):
        model(prompt(2, 2), cache)
    assert cache.filled == 9
    assert cache.lengths.tolist() == [9, 9]
