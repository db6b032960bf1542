"""One model on several devices: tensor parallelism over the processes ("ranks") that torchrun starts, on torch.distributed.

Every rank holds an ordinary `Llama` of fewer heads, fewer MLP columns and fewer rows of the vocabulary, and the ranks add up what
they get (Shoeybi et al. 2019, arXiv:1909.08053):

    attention    a rank's query heads and the key/value heads they use; o_proj gives a summand     one all-reduce
    MLP          a rank's columns of gate, up and down; down_proj gives a summand                  one all-reduce
    embedding    a rank's rows of the table, zeros for the ids of others                           one all-reduce a pass
    head         the same rows; of greedy decoding each rank's largest logit and its id are gathered, else all logits

Nothing has to divide evenly. With at most as many ranks as key/value heads, a rank takes whole groups of heads; beyond, several
ranks share a key/value head, each with a copy of it and a part of its queries. The residual and the biases of o_proj and down_proj
are added by the first rank alone. Inference only: an all-reduce has no gradient here.

Ranks that end together or not at all: each holds a TCP connection to the first, which the system closes whatever kills its process.
Whoever fails or dies takes all others along with one line, whether they compute, load or wait.
"""

import contextlib
import math
import os
import queue
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .. import kernels

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets for the processes that it starts
PATIENCE = 45.0  # seconds that a rank is waited for where all should answer at once
GRACE = 1.0  # seconds in which the cause of a failure may arrive after its consequences


# --- who has what ----------------------------------------------------------------------------------------------------


class Alone:
    """A model on one device: a single rank that has everything and has nobody to add up with."""

    rank, size = 0, 1

    def share(self, total, unit=1):
        """The range out of 0..total-1 that is this rank's, in multiples of unit."""
        return share(total, self.size, self.rank, unit)

    def heads(self, config):
        """(query heads, key/value heads) of this rank, as ranges."""
        kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        if self.size <= kv_heads:
            kv = self.share(kv_heads)
            return range(kv.start * group, kv.stop * group), kv
        head = ((self.rank + 1) * kv_heads - 1) // self.size  # the one whose ranks head * size // kv_heads, ... include this one
        first, last = (h * self.size // kv_heads for h in (head, head + 1))
        return _shifted(share(group, last - first, self.rank - first), head * group), range(head, head + 1)

    def columns(self, config):
        """The columns of the MLP: a multiple of 16 where that divides, so that rows begin where wide loads can."""
        return self.share(config.intermediate_size, math.gcd(config.intermediate_size, 16))

    def slice(self, config):
        """The Config of this rank's part; the vocabulary is still the whole one's."""
        most = min(config.num_attention_heads, config.intermediate_size // math.gcd(config.intermediate_size, 16))
        if self.size > most:
            raise ValueError(
                f"{self.size} ranks are too many for {config.num_attention_heads} heads and an intermediate_size of "
                f"{config.intermediate_size}, expected 1 to {most}"
            )
        q, kv = self.heads(config)
        return replace(config, num_attention_heads=len(q), num_key_value_heads=len(kv), intermediate_size=len(self.columns(config)))

    def device(self, name=None):
        """The torch.device to use where `name` is asked for; None leaves the choice to the model."""
        return None if name is None else torch.device(name)

    def open(self, checkpoint, dtype):
        """The checkpoint as this rank sees it."""
        return checkpoint

    def wait(self):
        """Until all ranks are here, however long that takes."""

    def agree(self, **facts):
        """ValueError on a rank whose facts differ from those of the first."""

    def first(self, function):
        """What the function gives on the first rank, a str, on all."""
        return function()

    def sum(self, x):
        return x

    def same(self, ids):
        """The first rank's ids."""
        return ids

    def embed(self, table, ids, vocabulary):
        return table(ids)

    def gather(self, logits, vocabulary):
        """All logits [..., vocabulary] from this rank's."""
        return logits

    def argmax(self, logits, vocabulary):
        """The ids [B] of the largest of all logits, from this rank's [B, rows]; of equal ones the first."""
        return logits.argmax(-1)


ALONE = Alone()


def share(total, parts, index, unit=1):
    """The index-th of so many contiguous parts of range(total), as equal as multiples of `unit` allow."""
    units = total // unit
    return range(units * index // parts * unit, units * (index + 1) // parts * unit)


def _shifted(part, offset):
    return range(part.start + offset, part.stop + offset)


class Slice:
    """A checkpoint as one rank sees it: the same names, of each tensor this rank's rows or columns.

    What lies in a memory map is read where the slice is and nowhere else; quantised and Meta's tensors are made whole, one at a
    time. Biases that are added after the all-reduce are the first rank's and zero elsewhere.
    """

    def __init__(self, whole, config, ranks):
        self._whole, self.config, self._first = whole, whole.config, ranks.rank == 0
        self.names, self.dtype, self.describe = whole.names, whole.dtype, whole.describe
        D, H, K, I, V = (
            config.head_dim, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size,
        )  # fmt: skip
        q, kv = (range(part.start * D, part.stop * D) for part in ranks.heads(config))
        mlp, rows = ranks.columns(config), ranks.share(V)
        self._pieces = {  # module -> (axis of its weight, length of that axis in the whole, ranges of it that are this rank's)
            "q_proj": (0, H * D, [q]), "k_proj": (0, K * D, [kv]), "v_proj": (0, K * D, [kv]),
            "qkv_proj": (0, (H + 2 * K) * D, [q, _shifted(kv, H * D), _shifted(kv, (H + K) * D)]),
            "gate_proj": (0, I, [mlp]), "up_proj": (0, I, [mlp]), "gate_up_proj": (0, 2 * I, [mlp, _shifted(mlp, I)]),
            "o_proj": (1, H * D, [q]), "down_proj": (1, I, [mlp]), "embed_tokens": (0, V, [rows]), "lm_head": (0, V, [rows]),
        }  # fmt: skip

    def shape(self, name):
        """Of the slice. ValueError where the whole does not have the config's length."""
        shape = list(self._whole.shape(name))
        axis, total, ranges = self._piece(name)
        if axis is not None and axis < len(shape):
            if shape[axis] != total:
                raise ValueError(f"{self.describe(name)}: shape is {tuple(shape)}, expected {total} on axis {axis}")
            shape[axis] = sum(map(len, ranges))
        return tuple(shape)

    def load(self, name):
        tensor = self._whole.load(name)
        axis, _, ranges = self._piece(name)
        if axis is None:
            return tensor
        if axis == tensor.dim():
            return tensor if self._first else torch.zeros_like(tensor)
        parts = [tensor.narrow(axis, part.start, len(part)) for part in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def parts(self, name):
        yield self.load(name)

    def _piece(self, name):
        return self._pieces.get(name.split(".")[-2] if "." in name else name, (None, None, None))


# --- the ranks of this process's group -------------------------------------------------------------------------------


def ranks() -> "Alone":
    """The Ranks that `join` has made, else ALONE."""
    return _joined or ALONE


@contextlib.contextmanager
def join() -> Iterator["Alone"]:
    """The Ranks of the processes that torchrun started with this one, as a context: leaving it waits for all of them. In a process
    that no torchrun has started (it has no RANK) ALONE, one rank that has everything.

    An exception that leaves the context, on any rank, ends the processes of all of them with status 2 and one line on stderr; so
    does the death of one. Raises RuntimeError where the others do not come within PATIENCE seconds.
    """
    global _joined
    if "RANK" not in os.environ:
        yield ALONE
        return
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise RuntimeError(f"RANK is set and {missing[0]} is not, expected all that torchrun sets: {', '.join(TORCHRUN)}")
    group = Ranks()
    try:
        group.connect()
        _joined = group
        yield group
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError, MemoryError)):
            traceback.print_exception(error, file=sys.__stderr__)  # not the user's mistake: ours
        group.lifeline.fail(brief(error))
    except BaseException as error:  # a command line that asks for help, or someone at the keyboard who has had enough
        group.lifeline.leave(wait=isinstance(error, SystemExit))
        raise
    else:
        group.lifeline.leave()
        dist.destroy_process_group()
    finally:
        _joined = None


_joined = None


class Ranks(Alone):
    """The processes of one tensor-parallel group; made by `join`. NCCL carries what is on GPUs, gloo what is on CPUs."""

    def __init__(self):
        try:
            if os.environ["RANK"] != "0":
                _await(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            self._store, self.rank, self.size = next(dist.rendezvous("env://", timeout=timedelta(seconds=PATIENCE)))
            self.lifeline = Lifeline(self.rank, self.size, self._store)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"the ranks did not find each other within {PATIENCE:.0f} s: {brief(error)}") from None
        self._store.set_timeout(timedelta(days=1))  # a rank that dies is noticed otherwise; one that loads takes its time
        self._calls = 0

    def connect(self):
        """The process group, which takes all ranks."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("trillama", self._store), rank=self.rank, world_size=self.size,
            timeout=timedelta(seconds=PATIENCE),
        )  # fmt: skip

    def device(self, name=None):
        """This rank's: its own GPU of the machine, or the CPU where there is none or it is asked for."""
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(f"device is {device} for {self.size} ranks, expected cuda: each takes the GPU of its number")
        index, local, found = int(os.environ["LOCAL_RANK"]), os.environ.get("LOCAL_WORLD_SIZE", "?"), torch.cuda.device_count()
        if index >= found:
            raise ValueError(f"{local} ranks are on a machine on which torch finds {found} GPUs, expected at most that many")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def open(self, checkpoint, dtype):
        """The Slice of this rank, once it is clear that all ranks have the same checkpoint, versions and dtype."""
        from .config import Config

        facts = f"{len(checkpoint.names())} tensors whose names, shapes, sizes and config have the digest {checkpoint.digest()}"
        self.agree(trillama=kernels.__version__, torch=torch.__version__, dtype=dtype, checkpoint=facts)
        return Slice(checkpoint, Config.read(checkpoint.config), self)

    def agree(self, **facts):
        self._calls += 1
        for name, mine in facts.items():
            key = f"trillama/agree/{self._calls}/{name}"
            if self.rank == 0:
                self._store.set(key, str(mine))
            elif (theirs := self._store.get(key).decode()) != str(mine):
                raise ValueError(f"{name} is {_short(mine)}, but on rank 0 it is {_short(theirs)}")

    def first(self, function):
        self._calls += 1
        key = f"trillama/first/{self._calls}"
        if self.rank == 0:
            self._store.set(key, function())
        return self._store.get(key).decode()

    def wait(self):
        self._calls += 1
        keys = [f"trillama/wait/{self._calls}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], "")
        self._store.wait(keys)

    def sum(self, x):
        dist.all_reduce(x)
        return x

    def same(self, ids):
        dist.broadcast(ids, 0)
        return ids

    def embed(self, table, ids, vocabulary):
        rows = self.share(vocabulary)
        # What lies outside of the vocabulary goes to the first and the last rank, whose tables refuse it.
        mine = torch.ones_like(ids, dtype=torch.bool)
        if self.rank > 0:
            mine &= ids >= rows.start
        if self.rank < self.size - 1:
            mine &= ids < rows.stop
        x = table((ids - rows.start).masked_fill(~mine, 0))
        return self.sum(x.masked_fill(~mine[..., None], 0))

    def gather(self, logits, vocabulary):
        most = -(-vocabulary // self.size)
        everyone = self._all(F.pad(logits, (0, most - logits.shape[-1])))
        return torch.cat([part[..., : len(share(vocabulary, self.size, r))] for r, part in enumerate(everyone)], -1)

    def argmax(self, logits, vocabulary):
        value, index = logits.max(-1)
        index += self.share(vocabulary).start
        values, indices = self._all(torch.stack((value.double(), index.double()), -1)).unbind(-1)
        return indices.gather(0, values.argmax(0, keepdim=True))[0].long()

    def _all(self, x):
        """[size, ...]: x of every rank."""
        everyone = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(everyone, x)
        return torch.stack(everyone)


def _short(value):
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _await(host, port):
    """Until somebody listens there: torch's store would wait twice as long as it is told, and then print its stack."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection((host, port), timeout=PATIENCE).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def brief(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- ending together -------------------------------------------------------------------------------------------------


class Lifeline:
    """A TCP connection from every rank to the first, on which there is silence until the end: "done", or why not.

    The system closes the connections of a process that dies, and keep-alive packets find a machine that does. Threads wait for
    that, as the main thread may be in a collective that never returns, or in a kernel's launch; they end the process.
    """

    def __init__(self, rank, size, store):
        self.rank, self.size = rank, size
        self.events, self.done, self.lines = queue.SimpleQueue(), set(), {}
        host = os.environ["MASTER_ADDR"]
        if rank == 0:
            family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
            with socket.create_server(("", 0), family=family) as listener:
                token = secrets.token_hex(16)
                store.set("trillama/lifeline", f"{listener.getsockname()[1]} {token}")
                listener.settimeout(PATIENCE)
                while len(self.lines) < size - 1:
                    line = Line(listener.accept()[0], hurry=5.0)
                    caller, _, number = line.read().partition(" ")
                    if secrets.compare_digest(caller.encode(), token.encode()):  # anyone can knock
                        line.connection.settimeout(None)
                        self.lines[int(number)] = line
            threading.Thread(target=self._judge, daemon=True).start()
        else:
            port, token = store.get("trillama/lifeline").decode().split()
            self.lines[0] = Line(socket.create_connection((host, int(port)), timeout=PATIENCE))
            self.lines[0].write(f"{token} {rank}")
        self.threads = [threading.Thread(target=self._listen, args=item, daemon=True) for item in self.lines.items()]
        for thread in self.threads:
            thread.start()

    def _listen(self, rank, line):
        word = line.read()
        if word == "done":
            self.done.add(rank)
        elif self.rank == 0:
            self.events.put((rank, word))
        elif word:  # the first rank has said it on its machine
            self._end(word, os.environ.get("LOCAL_RANK") == "0")
        else:
            self._end("rank 0 is gone")

    def _judge(self):
        """The first rank decides what happened: one that fell silent is the cause of what others report, and what it has met
        itself needs no other rank's word."""
        rank, word = self.events.get()
        deadline = time.monotonic() + GRACE
        while word and (left := deadline - time.monotonic()) > 0:
            try:
                other, last = self.events.get(timeout=left)
            except queue.Empty:
                break
            if not last or other == 0:
                rank, word = other, last
        text = f"rank {rank} is gone" if not word else word if rank == 0 else f"rank {rank}: {word}"
        for line in self.lines.values():
            line.write(text)
        self._end(text)

    def fail(self, reason):
        """Ends all ranks; does not return."""
        if self.rank == 0:
            self.events.put((0, reason))
        else:
            self.lines[0].write(reason)
        time.sleep(PATIENCE)
        self._end(reason)

    def leave(self, wait=True):
        """The end of work: until everybody has come to it."""
        if self.rank:
            self.lines[0].write("done")
        if wait:
            for thread in self.threads:
                thread.join()
            if len(self.done) < len(self.lines):  # someone failed: the judge is about to say who
                time.sleep(PATIENCE)
        if self.rank == 0:
            for line in self.lines.values():
                line.write("done")

    def _end(self, text, say=True):
        if say:
            print(f"trillama: error: {text}", file=sys.__stderr__, flush=True)
        os._exit(2)


class Line:
    """Lines of text over a socket; one that is closed reads as "" and swallows what is written."""

    def __init__(self, connection, hurry=None):
        connection.settimeout(hurry)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.connection, self.file = connection, connection.makefile("r", encoding="utf-8")

    def read(self):
        try:
            return self.file.readline().rstrip("\n")
        except OSError:
            return ""

    def write(self, text):
        with contextlib.suppress(OSError):
            self.connection.sendall(" ".join(text.split()).encode() + b"\n")
