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


@pytest.mark.slow
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


@pytest.mark.parametrize("order", ["patch shard", "shard patch", "patch shard unpatch", "patch shard unpatch patch"])
def test_patched_before_and_after_fsdp2(order, tmp_path):
    """Every norm, attention and MLP sharded for itself: FSDP2 derives their classes, of ours or below ours."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from trillama.kernels.compat.transformers import patch, patched, unpatch

    model = unpatch(worlds.tiny())
    ids = next(worlds.batches([0]))[:2, :9]
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    kinds = [m for m in model.modules() if type(m).__name__ in ("LlamaRMSNorm", "LlamaAttention", "LlamaMLP")]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))

        def shard(model):
            for module in (*kinds, model):
                fully_shard(module, mesh=mesh)

        for step in order.split():
            {"patch": patch, "unpatch": unpatch, "shard": shard}[step](model)
        assert sum(patched(model).values()) == (0 if order.endswith("unpatch") else len(kinds) + 1)
        assert all(isinstance(m, FSDPModule) for m in kinds)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert abs(loss.item() - expected.item()) < 1e-5
        for name, p in model.named_parameters():
            assert oracle.error(p.grad.full_tensor(), gradients[name].double()) < 1e-4, name
    finally:
        dist.destroy_process_group()


def test_a_trainer_with_sequences_in_one_row(tmp_path):
    """transformers' own, with what its collators and its loss pass down: the losses are those of eager, packed and padded."""
    pytest.importorskip("accelerate")
    import transformers

    def losses(name, flat):
        torch.manual_seed(0)
        model = worlds.tiny()
        model.set_attn_implementation(name)
        generator = torch.Generator().manual_seed(1)
        lengths = (5, 9, 3, 12, 7, 8, 4, 6)
        size = model.config.vocab_size
        rows = [{"input_ids": torch.randint(3, size, (n,), generator=generator).tolist()} for n in lengths]
        rows = [{**row, "labels": row["input_ids"]} for row in rows]

        def padded(batch):
            longest = max(len(row["labels"]) for row in batch)
            ids, labels = (torch.tensor([r["labels"] + [f] * (longest - len(r["labels"])) for r in batch]) for f in (0, -100))
            return {"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()}

        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True) if flat else padded
        options = dict(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", gradient_accumulation_steps=2, remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, transformers.TrainingArguments(**options), collator, rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    for flat in (True, False):
        given, expected = losses("trillama", flat), losses("eager", flat)
        assert len(given) == 4
        assert np.abs(np.array(given) - expected).max() < 2e-4


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
