"""The kernels under PyTorch's own training engines: a tiny transformers Llama over two processes against one."""

import sys

import numpy as np
import pytest
import torch
import worlds
from trillama.bench import oracle
from trillama.kernels import add_rms_norm, rms_norm, swiglu, use_backend

pytest.importorskip("transformers")
pytestmark = [pytest.mark.host, pytest.mark.skipif(sys.platform != "linux", reason="the worlds of these tests are Linux's")]

ENGINES = {  # and the steps that they train
    "ddp": worlds.STEPS, "fsdp2": worlds.STEPS, "fsdp2, activation checkpointing": worlds.FEW, "distributed checkpoint": worlds.FEW,
}  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    return worlds.alone()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return worlds.World(folder, 2, worlds.engines, str(folder / "saved")).results()


@pytest.mark.parametrize("engine", ENGINES)
def test_losses(engine, given, expected):
    """Steps of AdamW on half of the rows a process give the losses of one process on all of them."""
    assert expected[-1] < 0.8 * expected[0], "nothing is learnt"
    steps = ENGINES[engine]
    for rank in given:
        assert len(rank[engine]) == steps
        assert np.abs(np.array(rank[engine]) - expected[:steps]).max() < 1e-4, (rank[engine], expected)


def test_activation_checkpointing_alone(expected):
    """Recomputing a block in the backward gives the same bits: the ops are deterministic."""
    assert worlds.alone(checkpointing=True, steps=4) == expected[:4]


def test_triton_kernels_train_the_same(triton, device):
    """Loss and gradients through the Triton kernels, forward and backward, under activation checkpointing."""
    ids = next(worlds.batches([0]))[:1, :9].to(device)
    gradients = {}
    for backend in ("reference", "triton"):
        model = worlds.tiny(checkpointing=True).to(device)
        del model.model.layers[1]
        with use_backend(backend):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients[backend] = [p.grad for p in model.parameters()]
    assert any("backward" in name for name in triton.names), triton.names
    for given, expected in zip(gradients["triton"], gradients["reference"]):
        assert oracle.error(given, expected) < 1e-5


def test_sequence_parallel(tmp_path):
    """Each process has a part of the tokens: norms and SwiGLU on views of [B, S, N], gradients of the weight added up."""
    x, residual, weight = worlds.inputs_of_rows()
    weight.requires_grad_()
    for name, y in (
        ("rms_norm", rms_norm(x, weight)), ("add_rms_norm", add_rms_norm(x, residual, weight)[0]),
        ("swiglu", swiglu(x, residual) * weight),
    ):  # fmt: skip
        (gradient,) = torch.autograd.grad(y.square().sum(), weight)
        for rank in _shards(tmp_path):
            assert oracle.error(torch.from_numpy(rank[name][0]), y) < 1e-6
            assert oracle.error(torch.from_numpy(rank[name][1]), gradient) < 1e-6


def _shards(folder, made={}):  # noqa: B006 - one world for all three
    if not made:
        made[0] = worlds.World(folder, 2, worlds.shards_of_a_sequence).results()
    return made[0]


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (3, 2, 2), (2, 1, 3, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_any_leading_shape(leading, backend, device, request):
    """[tokens, N], [S, B, N] with the sequence first, more axes, none at all; also as a transposed view."""
    if backend == "triton":
        request.getfixturevalue("triton")
    generator = torch.Generator().manual_seed(len(leading))
    x, residual, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((*leading, 40), (*leading, 40), (40,)))
    views = [(x, residual)]
    if len(leading) > 1:
        views.append(tuple(t.transpose(0, 1) for t in (x, residual)))
    with use_backend(backend):
        for a, b in views:
            rows, others = (t.reshape(-1, 40) for t in (a, b))
            for given, flat in (
                (rms_norm(a, weight), rms_norm(rows, weight)),
                (add_rms_norm(a, b, weight)[0], add_rms_norm(rows, others, weight)[0]),
                (add_rms_norm(a, b, weight)[1], rows + others),
                (swiglu(a, b), swiglu(rows, others)),
            ):
                assert given.shape == a.shape
                assert torch.equal(given.reshape(-1, 40), flat)
