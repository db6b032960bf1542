"""JSON that is well formed and absurd: every file either gives a model that runs, or is refused in one line, soon and in little
memory. (Files that are damaged byte by byte: test_checkpoint.py.)
"""

import copy
import json
import random
import time

import pytest
import torch
from trillama.model import Llama, Tokenizer

pytest.importorskip("transformers")

from test_checkpoint import LLAMA_3_ROPE, make, write_meta
from test_tokenizer import VOCABULARIES, saved

pytestmark = pytest.mark.host

ABSURD = [
    None, -1, 0, 1, 7, 1 << 31, 1 << 63, 10**400, 1e300, -0.5, float("nan"), float("inf"), "", "x" * 300, "\ud800", "silu", [],
    [[]], [1], [None], {}, {"a": 1}, True, False, "llama3", "yarn", "../../x",
]  # fmt: skip


def places(value, path=()):
    """The paths of all that a JSON value holds, fifty of a long list or object."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for _, (key, item) in zip(range(50), items):
        yield from places(item, (*path, key))


def mutated(value, rng):
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(list(places(value)) or [None])
        if path is None:
            break
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.15:
            del holder[path[-1]]
        else:
            holder[path[-1]] = rng.choice(ABSURD)
    return value


def run_model(folder):
    with torch.no_grad():
        Llama.from_pretrained(folder, device="cpu")(torch.tensor([[1, 2, 3]]))


def run_tokenizer(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.decode(tokenizer.encode("hello there 123"))


FILES = {
    "config.json": run_model, "generation_config.json": run_model, "params.json": run_model, "tokenizer.json": run_tokenizer,
    "tokenizer_config.json": run_tokenizer,
}  # fmt: skip


def survive(folder, name, count, seed):
    """The refusals of so many mutations of a file; anything but a refusal of one line is an error here."""
    model, refusals, rng = make(rope_parameters=LLAMA_3_ROPE), [], random.Random(seed)
    if name == "params.json":
        write_meta(folder, model, use_scaled_rope=True)
    else:
        model.save_pretrained(folder)
        backend, fields = VOCABULARIES["byte-level"]()
        saved(folder, backend, **fields)
    original = json.loads((folder / name).read_text())
    for _ in range(count):
        (folder / name).write_text(json.dumps(mutated(original, rng)))
        start = time.process_time()
        try:
            FILES[name](folder)
        except ValueError as error:
            refusals.append(str(error))
        assert time.process_time() - start < 2
    assert not any("\n" in line or len(line) > 1000 for line in refusals)
    return refusals


@pytest.mark.parametrize("name", FILES)
def test_absurd_json(tmp_path, name):
    assert len(survive(tmp_path, name, 60, seed=3)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_absurd_json_many_times(tmp_path, name):
    assert len(survive(tmp_path, name, 300, seed=4)) > 10
