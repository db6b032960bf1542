"""Every public op launched once on a small input and compared with its reference: what `trillama doctor` asks of a machine."""

import inspect
import math
from dataclasses import dataclass

import torch

from .. import kernels
from ..kernels import dispatch, use_backend
from .cases import OPS, Case, case, torch_dtype

SAME_EVERYWHERE = ("quantize", "rope_tables")  # computed once, by torch alone


def ops():
    """The public functions of trillama.kernels that have a kernel and a reference."""
    functions = [name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))]
    return [name for name in functions if name not in SAME_EVERYWHERE]


@dataclass(frozen=True)
class Packed(Case):
    """flash_attention's tensors as two sequences behind one another."""

    def inputs(self, device="cpu", empty=False):
        q, k, v = (t[0].transpose(0, 1) for t in super().inputs(device, empty).values())
        starts, longest = torch.tensor([0, self.tokens // 3, self.tokens], dtype=torch.int32, device=device), self.tokens
        return {
            "q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest
        }  # fmt: skip

    def prepare(self, inputs):
        if not self.backward:
            return torch.no_grad()(lambda: kernels.flash_attention_varlen(**inputs))
        leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v")}
        out = kernels.flash_attention_varlen(**{**inputs, **leaves})
        return lambda: torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), retain_graph=True)


def calls(op, dtype):
    """The small cases of the op: each of its forms, forward and, where there is one, backward."""
    if op == "flash_attention_varlen":
        return [Packed(**vars(c)) for c in calls("flash_attention", dtype)]
    small = []
    for name, form in OPS.items():
        if (form.function or name) == op:  # decode over more keys than one split has
            shape = {"batch": 2, "context": 700} if form.phase == "decode" else {"tokens": 70}
            small += [
                case(name, "SmolLM2-135M", dtype=dtype, backward=backward, **shape)
                for backward in ((False, True) if form.differentiable else (False,))
            ]
    return small


def outcome(c, device, change=lambda t: t):
    """The tensors that a call of the case on fresh inputs, always the same, returns or writes. change: of each floating input."""
    torch.manual_seed(0)
    inputs = c.inputs(device)
    tensors = {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor)}
    inputs |= {name: change(t) for name, t in tensors.items() if t.is_floating_point()}
    value = c.prepare(inputs)()
    returned = value if isinstance(value, tuple) else () if value is None else (value,)
    in_place = (OPS[c.op].function or c.op).endswith("_")
    return [*returned, *(inputs[name] for name in tensors if in_place)]


def error(found, exact):
    """Relative error in the 2-norm; infinite where something is not finite or an integer is another."""
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, exact) else math.inf
    found, exact = found.double(), exact.double()
    e = ((found - exact).norm() / exact.norm().clamp_min(1e-300)).item()
    return e if math.isfinite(e) else math.inf


def check(op, device):
    """Yields "ok", or which form of the op is wrong: its error against float64 is more than twice the reference's in the same
    dtype, half a unit in the last place granted to both. bfloat16 where the GPU has it, else float16, in the interpreter too."""
    if dispatch.INTERPRETED:
        from .traffic import quicken

        quicken()
    device = torch.device(device)
    wide = device.type == "cuda" and not dispatch.INTERPRETED and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bf16" if wide else "fp16"
    for c in calls(op, dtype):
        with use_backend("reference"):
            exact, plain = outcome(c, device, torch.Tensor.double), outcome(c, device)
        with use_backend("triton"):
            found = outcome(c, device)
        for i, (f, p, e) in enumerate(zip(found, plain, exact)):
            got, allowed = error(f, e), 2 * max(error(p, e), torch.finfo(torch_dtype(dtype)).eps / 4)
            if not got <= allowed:
                yield f"{c.name}: tensor {i} is {got:.1e} from float64, allowed {allowed:.1e}, twice the reference's in {dtype}"
                return
    yield "ok"
