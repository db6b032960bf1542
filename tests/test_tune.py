"""The tuner's search and the file that overrides the tables; what it measures needs a GPU."""

import json

import pytest
import torch
from trillama.bench import tune
from trillama.bench.cases import case
from trillama.kernels import rms_norm, tuning, use_backend
from trillama.kernels.dispatch import INTERPRETED, observe

pytestmark = pytest.mark.host


def launched_with(rows):
    seen = []
    with use_backend("triton"), observe(lambda kernel, grid, arguments, options: seen.append((grid, options)) or True):
        rms_norm(torch.randn(rows, 64), None)
    return seen[0]


@pytest.fixture
def forgetful():
    yield
    tuning.measured.cache_clear()
    tune._forget()


@pytest.mark.skipif(not INTERPRETED, reason="launches on the CPU need Triton's interpreter")
def test_a_file_takes_the_place_of_the_table(tmp_path, monkeypatch, forgetful):
    before = launched_with(32)
    own = tuning.rows(64, 4)
    found = {("rows", (64, 4)): ({"block_rows": own.block_rows // 2, "warps": 2}, 1e-6, 2e-6)}
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps(tune.document(found, "some GPU")))
    monkeypatch.setenv("TRILLAMA_TUNING", str(file))
    tuning.measured.cache_clear()
    tune._forget()
    grid, options = launched_with(32)
    assert (grid[0], options["num_warps"]) == (2 * before[0][0], 2)
    assert tuning.rows(128, 4) == tuning.rows.__wrapped__(128, 4)  # what was not measured stays


@pytest.mark.parametrize("content", ["", "[]", '{"entries": [{"function": "rows"}]}'])
def test_a_broken_file_is_named(tmp_path, monkeypatch, forgetful, content):
    file = tmp_path / "tuning.json"
    file.write_text(content)
    monkeypatch.setenv("TRILLAMA_TUNING", str(file))
    tuning.measured.cache_clear()
    tune._forget()
    with pytest.raises(ValueError, match=f"TRILLAMA_TUNING names {file}") as caught:
        tuning.rows(64, 4)
    assert "\n" not in str(caught.value)


def test_neighbours():
    near = tune.neighbours(tuning.Attention(128, 64, 8, 1))
    assert {"block_m": 64, "block_n": 128, "warps": 4, "stages": 2} in near
    assert len(near) == 3 * 3 * 3 * 2  # no stage less than one
    pair = tune.candidates(("attention_backward", (80, 64, 2)))
    assert all(len(value) == 2 for value in pair)


@pytest.mark.skipif(not INTERPRETED, reason="launches on the CPU need Triton's interpreter")
def test_the_fastest_that_computes_the_same_is_found():
    """With a clock that likes small tiles, and a rule that forbids the smallest."""
    c = case("rms_norm", "SmolLM2-135M", tokens=3, dtype="fp32")

    def measure(_):
        tile = tuning.rows(576, 4)
        return 1e-6 * tile.block_rows * tile.warps

    with use_backend("triton"):
        own = tuning.rows(576, 4)
        found = tune.tune(c, measure, fits=lambda _: tuning.rows(576, 4).warps > 1, device="cpu")
    assert own.warps == 4
    ((key, (fields, seconds, before)),) = found.items()
    assert key == ("rows", (576, 4))
    assert fields == {"block_rows": max(1, own.block_rows // 2), "warps": 2}
    assert seconds == pytest.approx(1e-6 * fields["block_rows"] * 2)
    assert before == pytest.approx(1e-6 * own.block_rows * 4)
    assert tuning.rows(576, 4) == own


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="tune measures on a GPU, and torch finds none"):
        tune.main(["rms_norm"])
    with pytest.raises(ValueError, match="OP is 'softmax'"):
        tune.main(["softmax"])


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    assert tune.main(["rms_norm", "--model", "SmolLM2-135M", "--output", str(tmp_path / "tuning.json")]) == 0
    assert "entries" in json.loads((tmp_path / "tuning.json").read_text())
