"""Looking inside: the sizes are those of the loaded model, attention maps are transformers', probabilities are the logits'."""

import builtins
import json
import re
import sys

import pytest
from trillama.model import Llama, Tokenizer
from trillama.model.inspection import anatomy, attention_map, size

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {"no_rope_layer_interval": 2},
}


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_names_modules_and_sizes(trillama, tiny_folder):
    status, out, err = trillama("inspect", "--model", tiny_folder, "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    model = Llama.from_pretrained(tiny_folder, device="cpu")
    assert out.startswith(repr(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"a llama of {total:,} parameters, float32 in the file, {size(2 * total)} in memory as bfloat16" in out
    one = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert re.search(rf"\nlayers 0 to 1, each +{one:,} ", out)
    assert re.search(r"\n  self_attn.qkv_proj.weight +80 x 48 +3,840 +7.7 kB  float32\n", out)


def test_inspect_json(trillama, tiny_folder):
    report = json.loads(trillama("inspect", "--model", tiny_folder, "--json", "--dtype", "float16")[1])
    model = Llama.from_pretrained(tiny_folder, device="cpu")
    assert {row["name"]: row["shape"] for row in report["tensors"]} == {n: list(p.shape) for n, p in model.named_parameters()}
    assert report["parameters"] == sum(row["parameters"] for row in report["tensors"])
    assert report["bytes"] == 2 * report["parameters"]
    assert [row["layer"] for row in report["layers"]] == [0, 1]
    assert report["config"]["num_attention_heads"] == 6
    assert report["cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 2


def test_layers_that_differ_are_told_apart(trillama, tmp_path):
    config = transformers.SmolLM3Config(**SIZES, no_rope_layer_interval=3)
    transformers.SmolLM3ForCausalLM(config).save_pretrained(tmp_path)
    _, out, _ = trillama("inspect", "--model", tmp_path)
    assert re.findall(r"\nlayers? (\S+(?: to \d+)?)", out) == ["0 to 1", "2", "3"]
    assert out.endswith("lm_head.weight is model.embed_tokens.weight\n")


def test_inspect_loads_no_weights(tiny_folder, monkeypatch):
    monkeypatch.setattr("trillama.model.checkpoint.Checkpoint.load", None)
    assert anatomy(tiny_folder)[1]["parameters"] > 0


def test_quantised_files(trillama, smollm2_gguf):
    _, out, _ = trillama("inspect", "--model", smollm2_gguf)
    assert "a llama of 134,515,008 parameters, Q8_0, Q4_1, float32 in the file" in out
    assert re.search(r"\nlayers 0 to 29, each +3,540,096 ", out)


def test_size():
    counts = [0, 999, 1000, 123456, 999_000_000, 5e15]
    assert [size(count) for count in counts] == ["0 B", "999 B", "1.0 kB", "123.5 kB", "999.0 MB", "5000.0 TB"]


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_transformers(family):
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    ours = Llama(config).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 97, (1, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = theirs(ids, output_attentions=True).attentions
    for layer in range(4):
        weights, angles = attention_map(ours, ids[0].tolist(), layer)
        torch.testing.assert_close(weights, wanted[layer][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 11))
        assert not weights.triu(1).any()
        assert weights[:, -1].std() > 0.01
        assert ((angles >= 0) & (angles < 2 * torch.pi)).all()
        theta = torch.arange(11.0, dtype=torch.float64)  # the first pair turns by one radian a token
        first = theta if ours.config.rotary[layer] else torch.zeros(11, dtype=torch.float64)
        torch.testing.assert_close(angles[:, 0], first % (2 * torch.pi), rtol=0, atol=1e-6)


def test_attention_command(trillama, tiny_folder, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "map.png"
    arguments = ("inspect", "--model", tiny_folder, "--attention", "the capital of", "--layer", 1, "--head", 5)
    assert trillama(*arguments, "--plot", file) == (0, "", "")
    assert file.read_bytes().startswith(b"\x89PNG")
    report = json.loads(trillama(*arguments, "--json")[1])
    model, tokenizer = Llama.from_pretrained(tiny_folder, device="cpu"), Tokenizer.from_pretrained(tiny_folder)
    weights, angles = attention_map(model, report["ids"], 1)
    assert report["ids"] == tokenizer.encode("the capital of")
    assert "".join(report["tokens"]) == "the capital of"
    torch.testing.assert_close(torch.tensor(report["weights"]), weights[5])
    assert torch.tensor(report["angles"]).shape == angles.shape
    _, out, _ = trillama(*arguments)
    lines = out.splitlines()
    assert len(lines) == len(report["ids"])
    best = max(range(len(lines)), key=lambda j: report["weights"][-1][j])
    assert re.search(r"'  +(\d\.\d\d) '", lines[-1])[1] == f"{report['weights'][-1][best]:.2f}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attention", "a", "--layer", 2], "--layer is 2, expected 0 to 1"),
        (["--attention", "a", "--head", -1], "--head is -1"),
        (["--attention", ""], "PROMPT is empty"),
        (["--plot", "x.png"], "--plot is of an attention map, expected --attention PROMPT"),
        (["--attention", "a", "--plot", f"{__file__}/x.png"], "x.png, expected a file that can be written"),
        (["--attention", "a", "--plot", "x.doc"], "doc"),
        (["--device", "toaster"], "--device is 'toaster'"),
    ],
)
def test_mistakes(trillama, tiny_folder, options, words):
    status, out, err = trillama("inspect", "--model", tiny_folder, *options)
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("trillama: error: ")
    assert err.count("\n") == 1


def test_plot_without_matplotlib(trillama, tiny_folder, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    result = trillama("inspect", "--model", tiny_folder, "--attention", "a", "--plot", "x.png")
    assert result == (2, "", "trillama: error: plots need matplotlib: pip install 'trillama[plot]'\n")


# --- next ------------------------------------------------------------------------------------------------------------


def test_next(trillama, tiny_folder):
    model, tokenizer = Llama.from_pretrained(tiny_folder, device="cpu"), Tokenizer.from_pretrained(tiny_folder)
    ids = tokenizer.encode("the capital of")
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0, -1].double().softmax(-1)
    report = json.loads(trillama("next", "the capital of", "--model", tiny_folder, "--json")[1])
    assert report["prompt_ids"] == ids
    assert [row["id"] for row in report["next"]] == wanted.argsort(descending=True)[:10].tolist()
    for row in report["next"]:
        assert row["probability"] == pytest.approx(wanted[row["id"]].item(), rel=1e-4)
        assert row["token"] == tokenizer.token(row["id"])
    status, out, err = trillama("next", "the capital of", "--model", tiny_folder, "--top-k", 3)
    assert (status, err) == (0, "")
    rows = [line.split(maxsplit=2) for line in out.splitlines()]
    assert [(float(p), int(id), token) for p, id, token in rows] == [
        (round(row["probability"], 4), row["id"], repr(row["token"])) for row in report["next"][:3]
    ]
    everything = json.loads(trillama("next", "a", "--model", tiny_folder, "--top-k", 100_000, "--json")[1])["next"]
    assert len(everything) == model.config.vocab_size
    assert sum(row["probability"] for row in everything) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_next_is_paris(trillama, smollm2_path):
    _, out, _ = trillama("next", "The capital of France is", "--top-k", 3)
    assert out.splitlines()[0].endswith("' Paris'")


@pytest.mark.parametrize(("options", "words"), [(["a", "--top-k", 0], "--top-k is 0"), ([""], "PROMPT is empty"), ([], "PROMPT")])
def test_mistakes_of_next(trillama, tiny_folder, options, words):
    status, out, err = trillama("next", "--model", tiny_folder, *options)
    assert (status, out) == (2, "")
    assert words in err
