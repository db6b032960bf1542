"""Processes as torchrun starts them, for the tests of what runs on several: forked from a server that has torch already, so that a
world of four costs a second. The functions at the end run in them."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None)
context.set_forkserver_preload([
    "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "trillama.model.llama", "trillama.model.generation",
    "trillama.model.checkpoint", "trillama.model.tokenizer", "trillama.kernels.compat.transformers",
])  # fmt: skip


class World:
    """size processes, each calling function(*arguments) with torchrun's environment; folder: where they write."""

    def __init__(self, folder, size, function, *arguments, timeout=600.0):
        self.folder, self.size, self.deadline = Path(folder), size, time.monotonic() + timeout
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # The port is free now and maybe not later: the first rank's store reports that, which has not been seen.
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = []
        for rank in range(size):
            environment = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            process = context.Process(target=_run, args=(str(self.folder), rank, environment, function, arguments), daemon=True)
            process.start()
            self.processes.append(process)

    def output(self, rank, stream="out"):
        file = self.folder / f"{rank}.{stream}"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def wait_for(self, condition):
        while not condition():
            assert time.monotonic() < self.deadline, self.words()
            assert all(process.exitcode in (None, 0) for process in self.processes), self.words()
            time.sleep(0.02)

    def signal(self, rank, number=signal.SIGKILL):
        os.kill(self.processes[rank].pid, number)

    def codes(self):
        """Exit statuses; a process that does not end in time is killed."""
        for process in self.processes:
            process.join(max(0.0, self.deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
        return codes

    def results(self):
        """What the functions returned, rank by rank."""
        codes = self.codes()
        assert codes == [0] * self.size, (codes, self.words())
        return [pickle.loads((self.folder / f"{rank}.result").read_bytes()) for rank in range(self.size)]

    def words(self):
        return [self.output(rank, "err") for rank in range(self.size)]


def _run(folder, rank, environment, function, arguments):
    os.environ.update(environment)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with open(f"{folder}/{rank}.{name}", "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    import torch

    torch.set_num_threads(1)  # torchrun's default; threads that spin for others without a core made ten seconds a hundred
    try:
        result = function(*arguments)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    Path(f"{folder}/{rank}.result").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)


# --- what runs in them: inference ------------------------------------------------------------------------------------


def command(argv, replaced=None, absent=None, patience=None):
    """The command line; `replaced`: {rank: the words of another command}; absent: a rank that never starts; patience: that of
    `parallel`."""
    from trillama.model import cli, parallel

    if os.environ["RANK"] == str(absent):
        sys.exit(0)
    if patience is not None:
        parallel.PATIENCE = patience
    sys.exit(cli.main((replaced or {}).get(int(os.environ["RANK"]), argv)))


def prompt_on_stdin(argv, prompt):
    """The command line where the first rank alone has a standard input, as under torchrun."""
    import io

    sys.stdin = io.StringIO(prompt if os.environ["RANK"] == "0" else "")
    command(argv)


def other_version(argv):
    """The command line where rank 1 believes to have another version of the package."""
    from trillama.model import parallel

    if os.environ["RANK"] == "1":
        parallel.kernels.__version__ = "9.9"
    command(argv)


def failing(argv, rank):
    """The command line where one rank meets an error in the middle of its work."""
    from trillama.model import generation

    if os.environ["RANK"] == str(rank):
        choose, steps = generation.Step.choose, []

        def failing_choice(self, hidden):
            steps.append(1)
            if len(steps) == 5:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nand more lines")
            choose(self, hidden)

        generation.Step.choose = failing_choice
    command(argv)


def slow_to_load(argv, seconds):
    """The command line where rank 1 takes its time to load, and the others' patience does not end before."""
    from trillama.model import llama, parallel

    parallel.PATIENCE = seconds
    if os.environ["RANK"] == "1":
        load = llama._load

        def late(*arguments):
            print("loading", flush=True, file=sys.__stdout__)
            time.sleep(seconds)
            load(*arguments)

        llama._load = late
    command(argv)


def answers(folders, alone=False, backend="auto"):
    """{case: what `answer` gives} for the models in these folders, shared by the ranks."""
    from trillama.kernels import use_backend
    from trillama.model import parallel

    with contextlib.nullcontext(parallel.ALONE) if alone else parallel.join() as ranks, use_backend(backend):
        return {case: answer(folder, ranks) for case, folder in folders.items()}


def answer(folder, ranks):
    """Logits of a batch of 3 and of 1, whole and through the cache, and generated ids, greedy and drawn."""
    import torch
    from trillama.model import KVCache, Llama, generate

    model = Llama.from_pretrained(folder, device="cpu", dtype=torch.float32, ranks=ranks)
    generator = torch.Generator().manual_seed(5)
    out = {}
    for batch in (1, 3):
        ids = torch.randint(3, model.config.vocab_size, (batch, 13), generator=generator)
        with torch.inference_mode():
            out[f"whole {batch}"] = model(ids)
            cache = KVCache(model.config, batch, 20)
            steps = [model(part, cache) for part in ids.split((10, 1, 2), 1)]
        out[f"cached {batch}"] = torch.cat(steps, 1)
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17]]
    out["greedy"] = generate(model, prompts, max_new_tokens=6, eos=[])
    out["greedy, no cache"] = generate(model, prompts[:1], max_new_tokens=2, eos=[], use_cache=False)
    out["drawn"] = generate(model, prompts, max_new_tokens=3, eos=[], temperature=0.9, top_k=20, seed=3)
    torch.manual_seed(ranks.rank)
    out["drawn without a seed"] = generate(model, prompts, max_new_tokens=3, eos=[], temperature=2.0)
    out["penalised"] = generate(model, prompts, max_new_tokens=3, eos=[], repetition_penalty=1.3)
    return {name: value.clone().numpy() for name, value in out.items()}


def launches(folder):
    """(ids, names of the kernels launched) of a prompt and one decode step, under Triton."""
    from trillama.kernels import use_backend
    from trillama.kernels.dispatch import observe
    from trillama.model import Llama, generate, parallel

    names = []

    def note(kernel, grid, arguments, options):
        names.append(getattr(kernel, "fn", kernel).__name__)

    with parallel.join() as ranks, use_backend("triton"), observe(note):
        model = Llama.from_pretrained(folder, device="cpu", ranks=ranks)
        ids = generate(model, [[5, 6, 7]], max_new_tokens=2, eos=[])
    return ids.tolist(), names


def peak_while_loading(folder):
    """(bytes that the process grows by at most while its part is loaded, bytes of its part)."""
    import torch
    from trillama.model import Llama, parallel

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    with parallel.join() as ranks:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        model = Llama.from_pretrained(folder, device="cpu", dtype=torch.float32, ranks=ranks)
        return status("VmHWM") - before, sum(p.nbytes for p in model.parameters())


# --- what runs in them: training -------------------------------------------------------------------------------------

STEPS, FEW, ROWS = 20, 6, 4  # rows: of all processes together


def tiny(checkpointing=False):
    """transformers' Llama of random weights on this project's kernels."""
    import torch
    import transformers
    from trillama.kernels.compat.transformers import NAME, patch

    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=64, attn_implementation=NAME, use_cache=False,
    )  # fmt: skip
    model = patch(transformers.LlamaForCausalLM(config)).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # before transformers 5
        enable({"use_reentrant": False})
    return model


def batches(steps):
    import torch

    for step in steps:
        first = torch.randint(0, 61, (ROWS, 1), generator=torch.Generator().manual_seed(step))
        yield (first + 3 * torch.arange(17)) % 61  # with something to learn


def steps_of(model, optimiser, steps, rank=0, size=1):
    """The losses of training steps on this rank's rows, averaged over the ranks."""
    import torch
    import torch.distributed as dist

    losses = []
    for ids in batches(steps):
        ids = ids.chunk(size)[rank]
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss = loss.detach().clone()
        if size > 1:
            dist.all_reduce(loss, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            loss /= size
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in model.parameters() if not hasattr(p, "to_local"))
    return losses


def optimiser_of(model):
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def alone(checkpointing=False, steps=STEPS):
    model = tiny(checkpointing)
    return steps_of(model, optimiser_of(model), range(steps))


def engines(folder):
    """{engine: losses} of DDP and FSDP2, the latter with activation checkpointing and through a saved checkpoint as well."""
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))

    def sharded(checkpointing=False):
        model = tiny(checkpointing)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    out = {}
    model = DistributedDataParallel(tiny())
    out["ddp"] = steps_of(model, optimiser_of(model), range(STEPS), rank, size)
    for name, checkpointing, steps in (("fsdp2", False, STEPS), ("fsdp2, activation checkpointing", True, FEW)):
        model = sharded(checkpointing)
        out[name] = steps_of(model, optimiser_of(model), range(steps), rank, size)

    half = FEW // 2
    model = sharded()
    optimiser = optimiser_of(model)
    losses = steps_of(model, optimiser, range(half), rank, size)
    weights, moments = get_state_dict(model, optimiser)
    checkpoint.save({"model": weights, "optimiser": moments}, checkpoint_id=folder)
    model = sharded()
    for parameter in model.parameters():
        parameter.data.zero_()  # whatever it has, it must come from the files
    optimiser = optimiser_of(model)
    weights, moments = get_state_dict(model, optimiser)
    state = {"model": weights, "optimiser": moments}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    out["distributed checkpoint"] = losses + steps_of(model, optimiser, range(half, FEW), rank, size)
    dist.destroy_process_group()
    return out


def shards_of_a_sequence():
    """Row kernels on this rank's part of the tokens, gathered, and gradients of the weight, summed: what sequence parallelism does
    between an all-gather and a reduce-scatter."""
    import torch
    import torch.distributed as dist
    from trillama.kernels import add_rms_norm, rms_norm, swiglu

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    x, residual, weight = inputs_of_rows()
    weight.requires_grad_()
    out = {}
    for name, function in (
        ("rms_norm", lambda a, b: rms_norm(a, weight)),
        ("add_rms_norm", lambda a, b: add_rms_norm(a, b, weight)[0]),
        ("swiglu", lambda a, b: swiglu(a, b) * weight),
    ):
        a, b = (t.tensor_split(size, 1)[rank] for t in (x, residual))  # views, not contiguous: [B, S / ranks, N]
        y = function(a, b)
        (gradient,) = torch.autograd.grad(y.square().sum(), weight)
        dist.all_reduce(gradient)
        parts = [torch.empty_like(part).contiguous() for part in x.tensor_split(size, 1)]
        for r, part in enumerate(parts):
            dist.broadcast(part.copy_(y.detach()) if r == rank else part, r)
        out[name] = torch.cat(parts, 1).numpy(), gradient.numpy()
    dist.destroy_process_group()
    return out


def inputs_of_rows():
    import torch

    generator = torch.Generator().manual_seed(2)
    return (torch.randn(shape, generator=generator) for shape in ((3, 7, 40), (3, 7, 40), (40,)))
