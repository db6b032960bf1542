"""What the hardware allows: datasheet rates of GPUs, limits and throughputs of their multiprocessors, and the bounds that follow.

    python -m trillama.bench.roofline       Llama 8B, 70B and 405B on 1 to 16 GPUs: the tables of docs/parallel.md

Everything computed here is a bound, a time that no program can beat, never a measurement.
"""

import sys
from dataclasses import dataclass

from ..model import cli


@dataclass(frozen=True)
class GPU:
    """Datasheet peaks: bandwidth in bytes a second, dense FLOP a second of the tensor cores with float32 accumulation (16-bit
    operands), and of the float32 units."""

    arch: int
    bandwidth: float
    tensor: float
    fp32: float
    source: str

    def rate(self, itemsize):
        """FLOP a second for operands of `itemsize` bytes; float32 means float32, not TF32."""
        return self.tensor if itemsize == 2 else self.fp32

    def bound(self, moved, flops=0, itemsize=2):
        """Seconds that `moved` bytes and `flops` FLOP take at least, if one hides behind the other."""
        return max(moved / self.bandwidth, flops / self.rate(itemsize))


GPUS = {
    "A100": GPU(80, 2.039e12, 312e12, 19.5e12, "A100 80GB SXM datasheet"),
    "H100": GPU(90, 3.35e12, 989.4e12, 66.9e12, "H100 SXM datasheet, without sparsity"),
    "H200": GPU(90, 4.8e12, 989.4e12, 66.9e12, "H200 SXM datasheet, without sparsity"),
    "B200": GPU(100, 8.0e12, 2250e12, 75e12, "HGX B200 datasheet, without sparsity"),
    "A10": GPU(86, 0.6e12, 125e12, 31.2e12, "A10 datasheet, without sparsity"),
    "RTX 4090": GPU(89, 1.008e12, 165.2e12, 82.6e12, "Ada architecture whitepaper, float32 accumulation"),
    "RTX 5090": GPU(120, 1.792e12, 209.5e12, 104.8e12, "RTX Blackwell architecture whitepaper, float32 accumulation"),
}


def datasheet(name):
    """The GPU of GPUS with the name that torch gives a device, or None: a chip is also on cards with slower memory."""
    words = set(name.replace("-", " ").split())
    if words & {"PCIe", "NVL", "40GB", "Laptop"}:
        return None
    return next((gpu for known, gpu in GPUS.items() if words >= set(known.split())), None)


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor and results a clock of its pipes.

    Limits: CUDA C++ Programming Guide, technical specifications by compute capability. Lanes a clock: its table of arithmetic
    throughput. Tensor FLOP a clock: datasheet peak / (multiprocessors x boost clock), 16-bit operands, float32 accumulation.
    """

    name: str
    warps: int
    blocks: int
    shared: int  # bytes a multiprocessor
    shared_block: int  # bytes a block may ask for
    fma: int  # float32 lanes
    tensor: int  # FLOP a clock at the peak instruction of the architecture
    mma_sync: float = 1.0  # share of that peak which warp-level `mma.sync` reaches
    registers: int = 65536
    alu: int = 64
    imad: int = 64
    mufu: int = 16
    shuffle: int = 32
    shared_bytes: int = 128  # bytes a clock between shared memory or L1 and registers

    def occupancy(self, registers, shared, warps, tensor_memory=0):
        """(programs that fit on a multiprocessor at once, what limits them)."""
        by = {
            "warps": self.warps // warps,
            "blocks": self.blocks,
            "registers": self.registers // (warps * 32 * -(-max(registers, 1) // 8) * 8),
            "shared": self.shared // (-(-shared // 128) * 128 + 1024),  # the system keeps 1 KiB a block
        }
        if tensor_memory:
            by["tensor memory"] = 512 // tensor_memory
        limit = min(by, key=by.get)
        return by[limit], limit


KIB = 1024
MULTIPROCESSORS = {
    80: Multiprocessor("A100", 64, 32, 164 * KIB, 163 * KIB, fma=64, tensor=2048),
    86: Multiprocessor("A10", 48, 16, 100 * KIB, 99 * KIB, fma=128, tensor=1024),
    89: Multiprocessor("RTX 4090, L40", 48, 24, 100 * KIB, 99 * KIB, fma=128, tensor=512),
    # mma.sync: 62.9 % of the peak of wgmma on average, arXiv:2402.13499.
    90: Multiprocessor("H100, H200", 64, 32, 228 * KIB, 227 * KIB, fma=128, tensor=4096, mma_sync=0.629),
    # mma.sync: taken as sm_80's 2048 FLOP a clock; no published measurement is known to us.
    100: Multiprocessor("B200", 64, 32, 228 * KIB, 227 * KIB, fma=128, tensor=8192, mma_sync=0.25),
    120: Multiprocessor("RTX 5090", 48, 24, 100 * KIB, 99 * KIB, fma=128, tensor=512),
}


# --- several GPUs: tensor parallelism --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A machine of several GPUs: memory of each in bytes, and the bytes a second that each sends to the others of its machine and
    to other machines, in one direction."""

    memory: float
    link: float
    network: float
    source: str
    gpus: int = 8


NODES = {
    "H100": Node(80e9, 450e9, 50e9, "H100 SXM datasheet: 80 GB, NVLink 900 GB/s both ways; DGX H100 datasheet: 8 x 400 Gb/s"),
    "B200": Node(180e9, 900e9, 50e9, "DGX B200 datasheet, of 8 GPUs: 1,440 GB, NVLink 14.4 TB/s both ways, 8 x 400 Gb/s"),
}


@dataclass(frozen=True)
class SharedStep:
    """A decode step of `batch` sequences on one of several ranks; bytes are those of one rank, seconds bounds.

    collective: what a rank sends. latencies: all-reduces that wait for one another.
    """

    weights: float
    cache: float
    collective: float
    latencies: int
    memory_seconds: float
    link_seconds: float
    prefill_seconds: float  # for each token of a long prompt
    fits: bool

    @property
    def seconds(self):
        """The least, if all-reduces hide behind the reading of weights, which no program has done to the full."""
        return max(self.memory_seconds, self.link_seconds)

    def with_latency(self, seconds):
        """One after the other, with so many seconds for each all-reduce beside its bytes: an estimate, not a bound."""
        return self.memory_seconds + self.link_seconds + self.latencies * seconds


def shared_step(model, gpu, ranks, batch=1, context=8192, itemsize=2):
    """The SharedStep of `model` (a `cases.Model`) on so many GPUs of that name, as `model/parallel.py` shares it out.

    A rank reads its heads, columns and rows of the vocabulary and its key/value heads' cache, and sums a vector of `hidden` numbers
    for each token: once for the embedding, twice a layer. In an all-reduce a rank sends its summand at least once (twice without a
    switch that adds); over several machines each GPU sends at least its eighth of it to the other ones.
    """
    peak, node = GPUS[gpu], NODES[gpu]
    kv_heads = -(-model.kv_heads // ranks)
    heads = -(-model.heads // ranks)
    hidden, dim = model.hidden, model.head_dim
    layer = (heads + 2 * kv_heads) * dim * hidden + heads * dim * hidden + 3 * hidden * -(-model.ffn // ranks)
    head = -(-model.vocab // ranks) * hidden
    norms = (2 * model.layers + 1) * hidden
    read = (model.layers * layer + head + norms) * itemsize  # of the embedding a step reads a few rows
    kept = read + (0 if model.tied else head * itemsize)
    cache = 2 * model.layers * kv_heads * dim * batch * context * itemsize
    latencies = 2 * model.layers + 1 if ranks > 1 else 0
    vectors = latencies * hidden * itemsize  # bytes a token
    per_token = vectors / node.link + (vectors / node.gpus / node.network if ranks > node.gpus else 0)
    flops = 2 * (model.layers * layer)  # a token, without attention itself; the head sees one token of a prompt
    return SharedStep(
        weights=read, cache=cache, collective=batch * vectors, latencies=latencies,
        memory_seconds=(read + cache) / peak.bandwidth, link_seconds=batch * per_token,
        prefill_seconds=max(flops / peak.rate(itemsize), per_token), fits=kept + cache <= node.memory,
    )  # fmt: skip


def shared_tables(batch=1, context=8192, latency=10e-6, counts=(1, 2, 4, 8, 16)):
    """The lines that the command prints: for each model what a GPU reads and sends for a token, and how fast it may be."""
    from .cases import MODELS
    from .plots import table

    header = ("", "GPUs", "weights GB", "cache GB", "sent kB", "tokens/s at most", f"at {latency * 1e6:g} us an all-reduce",
              "gain", "prompt tokens/s at most")  # fmt: skip
    for name in ("Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B"):
        rows, stops = [], []
        for gpu in NODES:
            before, pays = None, None
            for ranks in counts:
                step = shared_step(MODELS[name], gpu, ranks, batch, context)
                row = (gpu, ranks, f"{step.weights / 1e9:.2f}", f"{step.cache / 1e9:.2f}", f"{step.collective / 1e3:,.0f}")
                if not step.fits:
                    rows.append((*row, "does not fit", "", "", ""))
                    continue
                rate = batch / step.with_latency(latency)
                gain = rate / before if before else None
                if gain is None or gain >= 1.5:
                    pays = ranks
                before = rate
                rows.append((*row, f"{batch / step.seconds:,.0f}", f"{rate:,.0f}", f"{gain:.2f}x" if gain else "",
                             f"{1 / step.prefill_seconds:,.0f}"))  # fmt: skip
            stops.append(f"{pays} {gpu}")
        yield f"{name}, bfloat16, batch {batch}, {context:,} tokens in the cache"
        yield ""
        yield from table(header, rows)
        yield ""
        yield f"Doubling brings 1.5 times the tokens/s or more up to {' and '.join(stops)}."
        yield ""


def main(argv=None):
    parser = cli.Parser(
        prog="python -m trillama.bench.roofline", description="Bounds of tensor parallelism from datasheets. Needs no GPU."
    )
    add = parser.add_argument
    add("--batch", type=int, default=1, help="sequences that a step continues (default: 1)")
    add("--context", type=int, default=8192, help="tokens of each in the cache (default: 8192)")
    add("--latency", type=float, default=10.0, metavar="US", help="of an all-reduce in microseconds, an assumption (default: 10)")
    options = parser.parse_args(argv)
    if options.batch < 1 or options.context < 1 or not options.latency >= 0:
        parser.error("expected --batch and --context from 1 on and --latency from 0 on")
    print("\n".join(shared_tables(options.batch, options.context, options.latency * 1e-6)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(cli.status(main))
