"""What the hardware allows: datasheet rates of GPUs, limits and throughputs of their multiprocessors, and the bounds that follow.

Everything computed here is a bound, a time that no program can beat, never a measurement.
"""

from dataclasses import dataclass


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


GPUS = {
    "A100": GPU(80, 2.039e12, 312e12, 19.5e12, "A100 80GB SXM datasheet"),
    "H100": GPU(90, 3.35e12, 989.4e12, 66.9e12, "H100 SXM datasheet, without sparsity"),
    "H200": GPU(90, 4.8e12, 989.4e12, 66.9e12, "H200 SXM datasheet, without sparsity"),
    "B200": GPU(100, 8.0e12, 2250e12, 75e12, "HGX B200 datasheet, without sparsity"),
    "A10": GPU(86, 0.6e12, 125e12, 31.2e12, "A10 datasheet, without sparsity"),
    "RTX 4090": GPU(89, 1.008e12, 165.2e12, 82.6e12, "Ada architecture whitepaper, float32 accumulation"),
    "RTX 5090": GPU(120, 1.792e12, 209.5e12, 104.8e12, "RTX Blackwell architecture whitepaper, float32 accumulation"),
}


def bound(gpu, moved, flops=0, itemsize=2):
    """Seconds that `moved` bytes and `flops` FLOP take at least on the GPU of that name, if one hides behind the other."""
    peak = GPUS[gpu]
    return max(moved / peak.bandwidth, flops / peak.rate(itemsize))


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
