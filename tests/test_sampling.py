"""Both ends of a decode step: the token that goes in, and the choice of the next one with all that follows from it."""

import math

import numpy as np
import pytest
import torch
from trials import trials
from trillama.bench import proofs
from trillama.bench.proofs import OPTIONS, Rows
from trillama.kernels import use_backend
from trillama.kernels.dispatch import INTERPRETED
from trillama.kernels.sampling import clocks, embed_next_, warp

FEW = not (INTERPRETED or torch.cuda.is_available())  # compiled and emulated: seconds for each new shape


def by_reference(function):
    with use_backend("reference"):
        return function()


@pytest.mark.few(2)
@pytest.mark.parametrize("name", trials("choose"))
def test_steps_are_those_of_the_reference(triton, device, dtype, name):
    proofs.run("choose", name, dtype, device)
    assert triton.names == ["_choose_kernel"] * 3


@pytest.mark.few(3)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_vocabulary_of_one(triton, device, dtype, options):
    proofs.choose(device, dtype, vocabulary=1, options=options)


@pytest.mark.few(1)
@pytest.mark.parametrize("vocabulary", [12289, 49152, 128257])
def test_vocabularies_of_models(triton, device, vocabulary):
    """Sizes that fill their tiles and a prime that does not: many programs a row, many groups."""
    logits = torch.randn(2, vocabulary, device=device, dtype=torch.float16) * 3
    for options in ({}, OPTIONS[-1]):
        ours, theirs = Rows(2, vocabulary, device), Rows(2, vocabulary, device)
        ours(logits, **options)
        by_reference(lambda: theirs(logits, **options))  # noqa: B023
        assert ours.all() == theirs.all()


@pytest.mark.few(1)
@pytest.mark.parametrize("vocabulary", [97, 5003])
def test_rows_do_not_depend_on_their_neighbours(triton, device, dtype, vocabulary):
    logits = (torch.randn(8, vocabulary, device=device) * 3).to(dtype)
    for options in (OPTIONS[2], OPTIONS[-1]):
        together = Rows(8, vocabulary, device)(logits, **options)
        assert all(Rows(n, vocabulary, device)(logits[:n], **options) == together[:n] for n in (1, 3))


def test_equals(triton, device, dtype):
    """The largest logit of equals is the first."""
    logits = torch.full((4, 4099), -math.inf, device=device, dtype=dtype)
    logits[0, [4000, 17, 2500]] = 3.0
    logits[1] = 1.0
    logits[2, 4098] = -5.0
    assert Rows(4, 4099, device)(logits) == [17, 0, 4098, 0]


EQUALS = ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"top_k": 5000}, {"top_p": 1.0}, {"min_p": 1.0}, {})


@pytest.mark.few(3)
@pytest.mark.parametrize("options", EQUALS, ids=str)
def test_the_cut_keeps_equals(triton, device, dtype, options):
    """All that equal the last that is kept; -inf is never drawn."""
    logits = torch.full((1, 4099), -math.inf, device=device, dtype=dtype)
    logits[0, [4000, 17, 2500]] = 3.0
    assert set(Rows(12, 4099, device)(logits.expand(12, -1), temperature=1.0, **options)) == {17, 2500, 4000}


EXTREMES = {"top_k": [1, 2, 60, 500], "top_p": [1e-6, 0.5, 0.98, 1.0], "min_p": [1e-3, 0.3, 1.0]}


@pytest.mark.few(5)
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EXTREMES.items() for value in values])
def test_the_cut_is_exact(triton, device, name, value):
    """What may be drawn is known from a sorted list in float64. Of many states two kinds are taken: those in which the last id that
    may be drawn comes first, and those in which the first that may not would."""
    logits = torch.randn(1, 97, device=device) / 2
    p = logits[0].double().cpu().softmax(0).numpy()
    order = np.argsort(-p)
    if name == "top_k":
        n = min(value, 97)
    elif name == "top_p":
        n = min(97, int(np.searchsorted(np.cumsum(p[order]), value)) + 1)
    else:
        n = int((p >= value * p.max() * (1 - 1e-6)).sum())
    states = torch.arange(20_000) * 12345
    score = torch.from_numpy(np.log(p)) - clocks(states, 97).double().log()
    best, allowed = score.argmax(1), score[:, torch.from_numpy(order[:n].copy())]
    taken = [torch.nonzero(best == i)[:2, 0] for i in order[n - 1 : n + 1]]
    assert len(taken[0]) == 2
    assert n == 97 or len(taken[1]) == 2
    taken = torch.cat(taken)
    rows = Rows(len(taken), 97, device)
    rows.state.copy_(states[taken])
    drawn = rows(logits.expand(len(taken), -1), temperature=1.0, **{name: value})
    assert drawn == order[allowed[taken].argmax(1)].tolist()


@pytest.mark.slow
@pytest.mark.skipif(FEW, reason="many draws")
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"top_k": 9}, {"top_p": 0.85}, {"top_k": 14, "top_p": 0.9, "min_p": 0.04}],
    ids=str,
)
def test_frequencies(triton, device, options):
    """Within 5 standard deviations of probabilities in float64."""
    logits, n = torch.randn(1, 20, device=device) * 2, 60 if options else 1000
    p = warp(logits.double().cpu(), temperature=1.3, **options).softmax(-1)[0].numpy()
    counts = np.bincount(Rows(n, 20, device)(logits.expand(n, -1), temperature=1.3, **options), minlength=20)
    assert counts[p == 0].sum() == 0
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def test_extreme_logits(triton, device):
    logits = torch.tensor([[-1e30, 0.0, 1e30], [-math.inf, -math.inf, 2.0], [3e38, -3e38, 0.0]], device=device)
    for temperature in (1e-5, 1.0) if FEW else (1e-5, 1e-3, 1.0, 1e4):
        for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
            assert Rows(3, 3, device)(logits, temperature=temperature, **options) == [2, 2, 0]


def test_nan_leads_nowhere_else(triton, device):
    """Whatever comes of it, an id comes of it."""
    logits = torch.full((2, 300), float("nan"), device=device)
    logits[1, 5] = 1.0
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}):
        assert all(0 <= id < 300 for id in Rows(2, 300, device)(logits, **options))


def test_the_end_of_all(triton, device):
    """A row that has ended keeps its id and its cache is empty; the flag says when all have. More rows than one tile of flags."""
    rows, logits = Rows(130, 50, device, ends=[3, 9]), torch.zeros(130, 50, device=device)
    logits[:, 7] = 1.0
    logits[1:, 3] = 2.0
    assert rows(logits) == [7] + [3] * 129
    assert (rows.finished.item(), rows.ended.tolist()) == (False, [False] + [True] * 129)
    assert rows.lengths.tolist() == [7] + [0] * 129
    logits[:, 9] = 3.0
    assert rows(logits) == [9] + [3] * 129
    assert rows.finished.item()
    assert rows.lengths.tolist() == [0] * 130


@pytest.mark.parametrize("columns", [96, 576, 2000])
def test_embedding(triton, device, dtype, columns):
    proofs.embed(device, dtype, columns=columns)
    assert triton.names == ["_embed_kernel"]


def test_ids_outside_of_the_table(triton, device, dtype):
    table, lengths = torch.randn(50, 96, device=device).to(dtype), torch.zeros(4, dtype=torch.int32, device=device)
    x, _ = embed_next_(torch.tensor([50, -1, 1, 1], device=device), table, lengths)
    assert x.isnan().all((1, 2)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("ids", [[1, 50], [-1, 3]])
def test_ids_outside_of_the_table_are_named_by_the_reference(ids):
    table, lengths = torch.randn(50, 96), torch.tensor([4, 5], dtype=torch.int32)
    message = f"^embed_next_: ids are {ids[0]} to {ids[1]}, expected 0 to 49, the rows of table$"
    with use_backend("reference"), pytest.raises(IndexError, match=message):
        embed_next_(torch.tensor(ids), table, lengths)
    assert lengths.tolist() == [4, 5]


@pytest.mark.few(3)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", [torch.tensor, np.asarray, np.float64], ids=["tensor", "array", "numpy"])
def test_numbers_of_any_kind(device, backend, kind):
    """The same ids as of Python's numbers."""
    logits, integer = torch.randn(3, 300, device=device), np.int64 if kind is np.float64 else kind
    plain = {"temperature": 0.75, "top_k": 50, "top_p": 0.75, "min_p": 0.125, "repetition_penalty": 1.5}
    found = []
    for options in (plain, {name: (integer if name == "top_k" else kind)(x) for name, x in plain.items()}):
        rows = Rows(3, 300, device)
        with use_backend(backend):
            rows(logits, **options)
        found.append(rows.ids.tolist())
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"choose_: top_k is 2\.5, expected an integer"):
        Rows(3, 300, device)(logits, temperature=1.0, top_k=2.5)


@pytest.mark.host
def test_bad_arguments():
    rows, logits = Rows(2, 10, "cpu"), torch.randn(2, 10)
    with pytest.raises(ValueError, match="choose_: logits has shape"):
        rows(logits.T)
    rows.ids = rows.ids.int()
    with pytest.raises(ValueError, match=r"choose_: ids is \(torch.int32"):
        rows(logits)
    rows = Rows(3, 10, "cpu")
    with pytest.raises(ValueError, match="choose_: ids is"):
        rows(logits)
    with pytest.raises(ValueError, match="embed_next_: lengths is"):
        embed_next_(torch.zeros(2, dtype=torch.int64), torch.randn(4, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_is_written_counts_a_version(device, backend):
    """So that autograd sees that ids it has kept are others now; the second calls are remembered ones."""
    rows, table = Rows(2, 10, device), torch.randn(10, 8, device=device)
    logits = torch.randn(2, 10, device=device)
    with use_backend(backend):
        for _ in range(2):
            mutable = (rows.ids, rows.ended, rows.finished, rows.state, rows.seen, rows.lengths)
            before = [t._version for t in mutable]
            rows(logits, temperature=1.0, repetition_penalty=1.2)
            assert all(t._version > b for t, b in zip(mutable, before))
            before = rows.lengths._version, rows.ids._version, rows.state._version
            embed_next_(rows.ids, table, rows.lengths)
            assert (rows.lengths._version > before[0], rows.ids._version) == (True, before[1])
            rows(logits, repetition_penalty=1.2)
            assert rows.state._version == before[2]


@pytest.mark.host
@pytest.mark.parametrize("backend", ["reference", "triton"] if INTERPRETED else ["reference"])
def test_as_ops(backend):
    """For dispatch modes and torch.compile they are ops that say what they write."""
    from trillama.kernels.sampling import _choose_op, _embed_op

    rows, logits = Rows(2, 10, "cpu", ends=[4]), torch.randn(2, 10)
    written = (rows.state, rows.seen, rows.lengths)
    with use_backend(backend):
        known = (logits, rows.ids, rows.ended, rows.finished, rows.ends, *written)
        torch.library.opcheck(_choose_op, (*known, 1.0, 3, 0.9, None, 1.2))
        torch.library.opcheck(_embed_op, (rows.ids, torch.randn(10, 8), rows.lengths))
