"""Reading SASS, the machine code of NVIDIA GPUs: instructions, loops, and what they ask of the pipes of a multiprocessor.

Static reading: what is counted is the code as compiled, once an iteration of a loop; nothing is executed and nothing is timed.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

PIPES = ("tensor", "mufu", "fma", "alu", "lsu", "shuffle", "uniform", "control")

# CUDA 12.8's cuobjdump, which Triton 3.6 brings, puts scheduling hints behind what it reads of sm_120: `&req={1}  ?trans5;`.
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)([\w.]*)\s*([^;]*?)\s*(?:[&?]\w[^;]*)?;", re.M)
_TENSOR = re.compile(r"[HIBDQO]MMA|[HIBQ]GMMA|UTC[HIQO]MMA")
_FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "FFMA32I", "FMUL32I", "FADD32I", "HFMA2", "HMUL2", "HADD2"}
_MUFU = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"}
_SHUFFLE = {"SHFL"}
_LSU = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL", "LD", "ST", "ATOM", "ATOMG", "ATOMS", "RED",
        "REDG", "LDTM", "STTM", "UTMALDG", "UTMASTG", "UTMAREDG", "UTMAPF", "UBLKCP", "UBLKRED"}  # fmt: skip
_CONTROL = {"BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BAR", "BSSY", "BSYNC", "BREAK", "BMOV", "WARPSYNC", "YIELD", "NOP",
            "NANOSLEEP", "DEPBAR", "LDGDEPBAR", "LDTMDEPBAR", "ERRBAR", "MEMBAR", "FENCE", "CCTL", "CCTLL", "SYNCS", "WARPGROUP",
            "ELECT", "VOTE", "ARRIVES", "ACQBULK", "CGAERRBAR", "UCGABAR_ARV", "UCGABAR_WAIT", "UTCBAR", "UTCATOMSWS",
            "UTMACMDFLUSH", "KILL", "BPT", "WARPGROUPSET", "ENDCOLLECTIVE", "PREEXIT", "ACQSHMINIT", "S2R",
            "USETMAXREG"}  # fmt: skip
LOADS = ("LDG", "LDGSTS", "LD", "UTMALDG", "UBLKCP")  # of global memory
STORES = ("STG", "ST", "UTMASTG", "RED", "REDG", "ATOMG", "ATOM")
_ISSUED = ("UTMALDG", "UTMASTG", "UBLKCP", "UTCBAR", "SYNCS", "BAR")
_F64 = re.compile(r"^D(ADD|MUL|FMA|SETP|MMA|MNMX)$")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction: `[@guard] opcode.modifier.modifier operands`."""

    address: int
    guard: str
    opcode: str
    modifiers: tuple
    operands: str
    tcgen05: float = 0.0  # FLOP of such an instruction, whose shape is in a descriptor, over the number of warps

    @cached_property
    def pipe(self):
        if _TENSOR.fullmatch(self.opcode):
            return "tensor"
        for name, opcodes in (("mufu", _MUFU), ("fma", _FMA), ("shuffle", _SHUFFLE), ("lsu", _LSU), ("control", _CONTROL)):
            if self.opcode in opcodes:
                return name
        if self.opcode == "IMAD":
            return "fma"
        return "uniform" if self.opcode[0] == "U" or self.opcode in ("R2UR", "S2UR", "LDC", "REDUX", "VOTEU") else "alu"

    @property
    def name(self):
        return ".".join((self.opcode, *self.modifiers))

    @property
    def bits(self):
        """Width of a memory access of one lane."""
        for m in self.modifiers:
            if m in ("64", "128", "256"):
                return int(m)
            if re.fullmatch(r"[US](8|16)", m):
                return int(m[1:])
        return 32

    @property
    def is_f64(self):
        """Arithmetic in float64; rounding a float64 argument to float32, once, is none."""
        if _F64.match(self.opcode) or "RCP64H" in self.modifiers or "RSQ64H" in self.modifiers:
            return True
        return "F64" in self.modifiers and not (self.opcode == "F2F" and self.modifiers[0] == "F32")

    @property
    def flops(self):
        """FLOP of a matrix instruction, one warp's share of it."""
        if self.tcgen05:
            return self.tcgen05
        if self.pipe != "tensor" or not self.modifiers:
            return 0
        warpgroup = re.fullmatch(r"64x(\d+)x(\d+)", self.modifiers[0])
        if warpgroup:
            return 2 * 64 * int(warpgroup[1]) * int(warpgroup[2]) // 4  # four warps share it
        warp = re.fullmatch(r"(16|8)8(\d+)", self.modifiers[0])
        return 2 * int(warp[1]) * 8 * int(warp[2]) if warp else 0

    def target(self):
        found = re.search(r"(?:^|\s|`\()(0x[0-9a-f]+)\)?$", self.operands)
        return int(found[1], 16) if found else None

    def cycles(self, sm):
        """Cycles of its pipe that one warp occupies, on a multiprocessor that has the pipe once (roofline.Multiprocessor)."""
        if self.pipe == "tensor":
            rate = sm.tensor * (1 if self.opcode[1:] == "GMMA" else sm.mma_sync if self.opcode[0] != "U" else 1)
            return self.flops / rate
        if self.pipe == "fma":
            half_rate = self.opcode in ("IMAD", "FFMA2", "FMUL2", "FADD2") or self.opcode[0] == "H"
            return 32 / (sm.imad if half_rate else sm.fma)
        if self.pipe == "lsu":
            if self.opcode in ("LDSM", "STSM"):
                return {"4": 4, "2": 2}.get(self.modifiers[-1] if self.modifiers else "", 1) * 128 / sm.shared_bytes
            return 1 if self.opcode[0] == "U" else max(1, self.bits * 32 / 8 / sm.shared_bytes)
        # The uniform datapath has no published throughput: one instruction a clock in each quarter is assumed.
        return {"mufu": 32 / sm.mufu, "alu": 32 / sm.alu, "shuffle": 32 / sm.shuffle, "uniform": 0.25, "control": 0}[self.pipe]


def parse(text, function, tcgen05=()):
    """The instructions of `function` in the output of `cuobjdump -sass`. tcgen05: FLOP (over warps) of each tcgen05.mma of its
    PTX; where ptxas has kept their number their order is taken to be the same, else each is given the mean."""
    found = {part.split(None, 1)[0]: _LINE.findall(part) for part in text.split("Function : ")[1:]}
    if function not in found:
        raise ValueError(f"the disassembly has no function {function}")
    number = sum(opcode.startswith("UTC") and bool(_TENSOR.fullmatch(opcode)) for _, _, opcode, _, _ in found[function])
    if number != len(tcgen05):
        tcgen05 = [sum(tcgen05) / max(1, len(tcgen05))] * number
    shapes = iter(tcgen05)
    return [
        Instruction(
            int(address, 16), guard, opcode, tuple(m for m in modifiers.split(".") if m), operands,
            next(shapes) if opcode.startswith("UTC") and _TENSOR.fullmatch(opcode) else 0.0,
        )
        for address, guard, opcode, modifiers, operands in found[function]
    ]  # fmt: skip


def body(code):
    """The code without what follows its last exit: an endless branch and padding."""
    ends = (x.opcode in ("EXIT", "RET") or (x.opcode == "BRA" and x.target() != x.address) for x in code)
    return code[: max((i + 1 for i, end in enumerate(ends) if end), default=len(code))]


def _graph(code):
    """(blocks as ranges of indices, the blocks that may follow each, its dominators as a set of bits)"""
    at = {x.address: i for i, x in enumerate(code)}
    targets = [at.get(x.target()) if x.opcode in ("BRA", "BSSY", "CALL") else None for x in code]
    jumps = ("BRA", "EXIT", "RET", "BRX")
    starts = {0, *(t for t in targets if t is not None), *(i + 1 for i, x in enumerate(code[:-1]) if x.opcode in jumps)}
    starts = sorted(starts)
    block_of = {}
    blocks = []
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(code)])):
        blocks.append(range(start, stop))
        block_of[start] = number
    following = []
    for number, block in enumerate(blocks):
        last, after = code[block[-1]], set()
        conditional = last.guard or re.search(r"\bU?P\d", last.operands)
        if last.opcode == "BRA" and targets[block[-1]] is not None:
            after.add(block_of[targets[block[-1]]])
        if (last.opcode not in jumps or conditional) and number + 1 < len(blocks):
            after.add(number + 1)
        following.append(after)
    before = [[a for a, f in enumerate(following) if b in f] for b in range(len(blocks))]

    everything = (1 << len(blocks)) - 1  # sets of blocks as bits
    dominators = [1] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for b in range(1, len(blocks)):
            new = everything
            for a in before[b]:
                new &= dominators[a]
            new |= 1 << b
            changed |= new != dominators[b]
            dominators[b] = new
    return blocks, following, dominators


def loops(code):
    """The natural loops of the control-flow graph, innermost first, as lists of instructions.

    A loop is what can reach a back edge without passing its header; a back edge leads to a block that dominates its source
    (Aho, Lam, Sethi, Ullman, Compilers, 9.6). Waiting loops that the compiler put out of line are thus not mistaken for long ones.
    """
    blocks, following, dominators = _graph(code)
    before = [[a for a, f in enumerate(following) if b in f] for b in range(len(blocks))]
    everything = (1 << len(blocks)) - 1
    found = {}
    for tail, after in enumerate(following):
        for header in after:
            if dominators[tail] >> header & 1 and (tail == 0 or dominators[tail] != everything):
                members, waiting = {header}, [tail]
                while waiting:
                    b = waiting.pop()
                    if b not in members:
                        members.add(b)
                        waiting += before[b]
                found.setdefault(header, set()).update(members)
    found = [sorted(m) for m in found.values()]
    return [[code[i] for b in m for i in blocks[b]] for m in sorted(found, key=lambda m: sum(len(blocks[b]) for b in m))]


def steady(code, loop):
    """The instructions of a loop that every iteration executes: what a branch may skip is left out. Blocks that issue matrix work,
    copies or barriers belong to it: those branches choose a warp for them, not an iteration."""
    blocks, following, dominators = _graph(code)
    addresses = {x.address for x in loop}
    inside = [b for b, block in enumerate(blocks) if code[block[0]].address in addresses]
    header = next(h for h in inside if all(dominators[b] >> h & 1 for b in inside))
    tails = [b for b in inside if header in following[b]]
    always = [
        b
        for b in inside
        if all(dominators[tail] >> b & 1 for tail in tails)
        or any(code[i].pipe == "tensor" or code[i].opcode in _ISSUED for i in blocks[b])
    ]
    return [code[i] for b in always for i in blocks[b]]


def hottest(code):
    """The innermost loop with the most tensor work or, where no loop has any, the most memory traffic; None without such a loop.

    Of equals the shortest is taken: the loop over full tiles rather than the one that also masks.
    """
    for work in (lambda x: x.flops, lambda x: x.bits if x.opcode in LOADS + STORES else 0):
        inner = []
        for loop in loops(code):  # innermost first
            addresses = {x.address for x in loop}
            amount = sum(map(work, loop))
            if amount and not any(other <= addresses for _, _, other in inner):
                inner.append((amount, loop, addresses))
        if inner:
            return max(inner, key=lambda entry: (entry[0], -len(steady(code, entry[1]))))[1]
    return None


def mix(code):
    """Instructions by pipe."""
    counts = Counter(x.pipe for x in code)
    return {pipe: counts[pipe] for pipe in PIPES}


def widths(code, opcodes):
    """{access width in bits: number of instructions}; "TMA" for those of the tensor memory accelerator."""
    counts = Counter()
    for x in code:
        if x.opcode in opcodes:
            counts["TMA" if x.opcode[0] == "U" else x.bits] += 1
    return dict(counts)
