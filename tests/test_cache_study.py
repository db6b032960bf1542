"""`trillama bench --cache-study`: the same tokens both ways, and times that are those of the two ways."""

import json

import pytest
from trillama.model import Llama, cli, generate

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.host


def bench(capsys, *arguments):
    capsys.readouterr()
    try:
        status = cli.main(["bench", "--cache-study", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    return (status, *capsys.readouterr())


def test_cache_study(capsys, monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setenv("TRILLAMA_BACKEND", "reference")
    calls, file = [], tmp_path / "study.json"
    real = generate

    def counted(model, ids, **options):
        calls.append((options["max_new_tokens"], options["use_cache"]))
        return real(model, ids, **options)

    monkeypatch.setattr("trillama.bench.cache_study.generate", counted)
    options = ("--model", tiny_folder, "--prompt", "8,20", "--new", 30, "--json", file, "--device", "cpu")
    status, out, err = bench(capsys, *options)
    assert (status, err) == (0, "")
    assert calls == 2 * [(2, True), (2, False), (30, True), (30, False)]
    assert out.count("the same tokens") == 2
    report = json.loads(file.read_text())
    assert [row["prompt"] for row in report["rows"]] == [8, 20]
    model = Llama.from_pretrained(tiny_folder, device="cpu")
    for row in report["rows"]:
        ids = torch.randint(3, model.config.vocab_size, (1, row["prompt"]), generator=torch.Generator().manual_seed(0))
        assert row["ids"] == real(model, ids, max_new_tokens=30, eos=[])[0].tolist()
        assert row["same_tokens"] == 30
        for way in ("with", "without"):
            assert len(row[way]["step_seconds"]) == 30
            assert row[way]["seconds"] == pytest.approx(sum(row[way]["step_seconds"]))
            assert row[way]["tokens_per_second"] == pytest.approx(30 / row[way]["seconds"])
        assert row["ratio"] == pytest.approx(row["without"]["seconds"] / row["with"]["seconds"])


def test_tokens_that_differ_are_counted(capsys, monkeypatch, tiny_folder):
    real = generate

    def wrong(model, ids, **options):
        new = real(model, ids, **options).clone()
        if not options["use_cache"]:
            new[:, 5:] = 1
        return new

    monkeypatch.setattr("trillama.bench.cache_study.generate", wrong)
    _, out, _ = bench(capsys, "--model", tiny_folder, "--prompt", 4, "--new", 12, "--device", "cpu")
    assert "the first 5 tokens the same" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--batch", "2"], "--batch"), (["--against", "hf"], "--against"), (["--new", 1], "--new is 1"), (["--prompt", 600], "512")],
)
def test_mistakes(capsys, tiny_folder, options, words):
    status, out, err = bench(capsys, "--model", tiny_folder, *options)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
