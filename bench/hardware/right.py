"""Is everything right: every op and tile against float64, the captured step, gradients, torch.compile, transformers."""

import contextlib
import copy
import math
import time
import traceback
from unittest import mock

import torch

from ... import kernels
from ...kernels import decode_attention, reference, use_backend
from ...kernels.compat.flash_attn import flash_attn_with_kvcache
from ...kernels.dispatch import dependent_launch
from ...model import KVCache, Llama, generate, generation
from .. import oracle, proofs, timing
from ..apart import one_line
from ..cases import DTYPES, Model, torch_dtype
from . import Job

PARALLEL = True
SHOWN = ("ok", "failed", "out of memory")
BORDER = 512  # bytes of NaN around every tensor of an op's case

# Cases a job, and kernels compiled a case: a crash costs the rest of a job, every new process an import.
OPS = {
    "flash_attention": (7, 1.2), "flash_attention_varlen": (3, 2.2), "decode_linear": (12, 0.8), "decode_attention": (12, 0.7),
    "rms_norm": (14, 0.9), "add_rms_norm": (12, 1.0), "swiglu": (15, 0.9), "apply_rope": (15, 0.9), "rope_append_": (12, 1.0),
    "choose": (6, 1.0), "embed": (3, 1.0),
}  # fmt: skip
FEW = 2  # cases an op forward in a rehearsal, and one backward


# --- jobs ------------------------------------------------------------------------------------------------------------


def jobs(card):
    dtypes = ("fp16",) if card.small else tuple(DTYPES)  # the interpreter rounds bfloat16 wrongly
    return [*_compiled_jobs(card), *_large_jobs(card), *_step_jobs(card), *_op_jobs(card, dtypes), *_other_jobs(card)]


def _op_jobs(card, dtypes):
    for op, (size, compiled) in OPS.items():
        for dtype in dtypes:
            names = proofs.trials(op, torch_dtype(dtype))
            if card.small:
                names = _cheap(op)
            for start in range(0, len(names), size):
                some = names[start : start + size]
                numbered = f"{op} {dtype}" + (f" {start // size + 1}" if len(names) > size else "")
                work = {"what": "op", "op": op, "dtype": dtype, "names": some}
                yield Job(numbered, work, 0.06 * len(some), round(compiled * len(some)))


def _cheap(op):
    """A few of an op's cases for all dtypes, those of the fewest numbers."""

    def size(name):
        values = proofs.TRIALS[op]["* " + name].values()
        return sum(math.prod(v) if isinstance(v, tuple) else v for v in values if isinstance(v, (tuple, int)))

    common = sorted(proofs.trials(op, torch.float32), key=size)
    return [n for n in common if "backward" not in n][:FEW] + [n for n in common if "backward" in n][:1]


LARGE = {  # (dtype, head size): [(S, T, options, backward)]
    ("bf16", 64): [(4097, 4097, {}, False), (129, 4097, {}, False), (1000, 1000, {}, True), (2049, 2049, {}, True)],
    ("bf16", 96): [(4096, 4096, {}, False), (1000, 1000, {}, True)],
    ("bf16", 128): [(4097, 4097, {}, False), (129, 4097, {}, False), (1000, 1000, {}, True), (2049, 2049, {}, True),
                    (2049, 2049, {"window": 1000}, True)],
    ("bf16", 256): [(2049, 2049, {}, True), (4000, 4000, {"window": 1024, "softcap": 50.0}, False)],
    ("fp16", 128): [(4097, 4097, {}, False), (1000, 1000, {}, True)],
    ("fp32", 64): [(1000, 1000, {}, True)],
    ("fp32", 128): [(1000, 1000, {}, True)],
    ("fp32", 256): [(1000, 1000, {}, True)],
}  # fmt: skip
DECODE = [(1, 1, 1), (4, 1, 1), (8, 1, 1), (32, 1, 1), (8, 1, 5)]  # query heads, key/value heads, new tokens
LINEAR = [  # columns, bits, fused, rows
    *((K, None, {"residual": True}, rows) for K in (2048, 4096, 14336) for rows in (1, 2, 4, 8)),
    *((K, None, {"norm": True, "activation": "swiglu"}, rows) for K in (1536, 4096) for rows in (1, 3, 8)),
    *((K, bits, {"residual": True}, 1) for bits in (8, 4) for K in (2048, 4096, 14336)),
    *((4096, bits, {"residual": True}, rows) for bits in (8, 4) for rows in (2, 8)),
    *((4096, bits, {"norm": True, "activation": "swiglu"}, rows) for bits in (8, 4) for rows in (1, 8)),
]


def _large_jobs(card):
    if card.small:
        yield Job("attention of 64, large, fp16", {"what": "large", "dtype": "fp16", "head_dim": 64, "small": True})
        yield Job("decode of 64, large, fp16", {"what": "decode", "dtype": "fp16", "head_dim": 64, "small": True})
        yield Job("products, large, fp16", {"what": "linear", "dtype": "fp16", "some": [0, 20], "small": True})
        return
    for (dtype, head_dim), shapes in sorted(LARGE.items(), key=lambda item: -item[0][1]):
        backward = any(b for *_, b in shapes)
        work = {"what": "large", "dtype": dtype, "head_dim": head_dim}
        compiled = 2 * len({str(options) for *_, options, _ in shapes}) + 3 * backward
        yield Job(f"attention of {head_dim}, large, {dtype}", work, 0.7 * len(shapes), compiled)
    for head_dim in (64, 96, 128, 256):
        yield Job(f"decode of {head_dim}, large, bf16", {"what": "decode", "dtype": "bf16", "head_dim": head_dim}, 3.0, len(DECODE))
    for start in range(0, len(LINEAR), 8):
        some = list(range(start, min(start + 8, len(LINEAR))))
        yield Job(f"products, large, bf16 {start // 8 + 1}", {"what": "linear", "dtype": "bf16", "some": some}, 3.0, len(some))
    yield Job("vocabularies, bf16", {"what": "choose", "dtype": "bf16"}, 3.0, 4)


MODELS = {
    "small": Model(256, 4, 2, 64, 512, 2, 1000),
    "real heads": Model(1024, 8, 2, 128, 2816, 2, 32000),
    "tiny": Model(64, 2, 1, 32, 96, 1, 64),  # of a rehearsal
}
STEPS = [  # model, bits of its weights, rows
    ("small", None, 1), ("small", None, 8), ("small", None, 16), ("real heads", None, 1), ("real heads", 8, 1),
    ("real heads", 4, 8),
]  # fmt: skip


def _step_jobs(card):
    if card.small:
        tiny = {"model": "tiny", "dtype": "fp16"}
        yield Job("step, tiny, int8, 2 rows", {"what": "step", **tiny, "bits": 8, "rows": 2, "new": 3}, 6.0)
        yield Job("model, tiny, fp16", {"what": "model", **tiny, "bits": None, "new": 2}, 6.0)
        return
    for model, bits, rows in STEPS:
        name = f"step, {model}, {f'int{bits}' if bits else 'bf16'}, {rows} row{'s' * (rows > 1)}"
        work = {"what": "step", "model": model, "dtype": "bf16", "bits": bits, "rows": rows, "new": 64}
        yield Job(name, work, 4.0, 4 if rows > 8 else 20)
    for model, bits in (("small", None), ("real heads", None), ("real heads", 4)):
        name = f"model, {model}, {f'int{bits}' if bits else 'bf16'}"
        work = {"what": "model", "model": model, "dtype": "bf16", "bits": bits, "new": 12}
        yield Job(name, work, 3.0, 10 if bits is None else 2)


def _compiled_jobs(card):
    rows, attention = ("rms_norm", "swiglu", "decode_linear"), ("apply_rope", "rope_append_", "decode_attention")
    for names in (rows, attention, ("flash_attention",)):
        yield Job(f"torch.compile of {', '.join(names)}", {"what": "compile", "names": names}, 0.5 if card.small else 20.0, 4)


def _other_jobs(card):
    yield Job("transformers", {"what": "transformers", "dtype": "fp16" if card.small else "bf16"}, 8.0, 14)
    yield Job("flash-attention's cache", {"what": "kvcache", "dtype": "fp16" if card.small else "bf16"}, 2.0, 8)
    yield Job("another device", {"what": "device", "dtype": "fp16"}, 1.0, 6)


# --- running ---------------------------------------------------------------------------------------------------------


def run(what, **work):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker has one core, and the CPU's part is small products
    try:
        yield from {
            "op": ops, "large": large, "decode": decode, "linear": linear, "choose": choose, "step": step, "model": whole_model,
            "compile": compiled, "transformers": adapter, "kvcache": kvcache,
            "device": device,
        }[what](**work)  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def verdict(op, case, dtype, prove, border=BORDER):
    """The result of one case: ok, or failed and why; and the comparison that came nearest to what is allowed. Nothing else of the
    job suffers, as long as the device does as it is told. border: 0 leaves memory as it is."""
    result, start, doubt = {"op": op, "case": case, "dtype": dtype}, time.monotonic(), False
    with oracle.measured() as found:
        try:
            with proofs.poisoned(border) if border else contextlib.nullcontext():
                prove()
        except torch.cuda.OutOfMemoryError as error:
            result |= {"status": "out of memory", "error": f"{case}: {one_line(error)}"}
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip() if isinstance(error, AssertionError) else one_line(error)
            text = text or traceback.extract_tb(error.__traceback__)[-1].line  # of a bare assertion
            result |= {"status": "failed", "error": f"{case}, {dtype}: {text}"[:400]}
            doubt = not isinstance(error, AssertionError)
    if found:
        wrong, allowed = max(found, key=lambda pair: pair[0] / pair[1])
        result |= {"wrong": wrong if wrong < math.inf else None, "allowed": allowed}  # None: NaN, or infinite where it must not be
    yield {**result, "seconds": round(time.monotonic() - start, 3)}
    torch.cuda.synchronize()  # raises where the device is lost
    if doubt:
        timing.Captures.look()
    if timing.Captures.broken:
        raise RuntimeError("after a capture that failed the rest of the job would prove nothing")


def ops(op, dtype, names):
    for name in names:
        yield from verdict(op, name, dtype, lambda name=name: proofs.run(op, name, torch_dtype(dtype), "cuda"))


# --- every tile at real sizes ----------------------------------------------------------------------------------------


def large(dtype, head_dim, small=False):
    shapes = [(70, 70, {}, False), (33, 33, {}, True)] if small else LARGE[dtype, head_dim]
    for S, T, options, backward in shapes:
        case = f"{head_dim} wide, {S} x {T}" + "".join(f", {n} {v}" for n, v in options.items()) + ", backward" * backward
        yield from verdict(
            "flash_attention", case, dtype, lambda a=(S, T, options, backward): _attention(torch_dtype(dtype), head_dim, *a)
        )  # fmt: skip


def _attention(dtype, D, S, T, options, backward):
    """Against float64, both on the GPU, a group of query heads at a time: q, k, v are views of one projection."""
    torch.manual_seed(S + D)
    Hq, Hk = 4, 2
    q, k, v = torch.randn(1, T, Hq + 2 * Hk, D, device="cuda").to(dtype).transpose(1, 2).split((Hq, Hk, Hk), 1)
    q, dout = q[:, :, T - S :], torch.randn(1, S, Hq, D, device="cuda").to(dtype).transpose(1, 2)

    def parts(function, *tensors):
        """out, or with `backward` out, dq, dk, dv."""
        if not backward:
            return (function(*tensors[:3]),)
        outputs, gradients = proofs.through(function, tensors[:3], tensors[3:])
        return *outputs, *gradients

    def grouped(function, wider):
        made = []
        for h in range(Hk):
            group, one = slice(h * Hq // Hk, (h + 1) * Hq // Hk), slice(h, h + 1)
            tensors = (q[:, group], k[:, one], v[:, one], dout[:, group])
            made.append(parts(function, *(t.to(wider) for t in tensors)))
        return [torch.cat(p, 1).detach() for p in zip(*made)]

    ours = parts(lambda *t: kernels.flash_attention(*t, **options), q, k, v, dout)
    exact = grouped(lambda *t: proofs.formula(*t, **options)[0], torch.float64)
    low = dtype != torch.float32
    plain = grouped(lambda *t: reference.flash_attention(*t, return_lse=True, **options)[0], dtype) if low else exact
    throughout = grouped(lambda *t: proofs.formula(*t, **options)[0], dtype) if low else exact
    for got, want, p, f in zip(ours, exact, plain, throughout):
        oracle.check(got, want, p, fp32=1e-5, eager=f)


def decode(dtype, head_dim, small=False):
    for Hq, Hk, S in DECODE[:2] if small else DECODE:
        T = 130 if small else 8192 if Hq < 32 else 3000
        arguments = {"Hq": Hq, "Hk": Hk, "S": S, "T": T, "D": head_dim, "lengths": (T, T // 2 + 1), "packed": True}
        yield from verdict(
            "decode_attention", f"{head_dim} wide, {Hq} to {Hk} heads, {S} new, {T} keys", dtype,
            lambda arguments=arguments: proofs.decode_attention("cuda", torch_dtype(dtype), **arguments),
        )  # fmt: skip
    if head_dim == 64 and not small:  # more than the second and third axes of a grid take
        many = {"B": 70000, "Hq": 1, "Hk": 1, "T": 3, "D": 16, "lengths": (3,) * 70000}
        prove = lambda: proofs.decode_attention("cuda", torch_dtype(dtype), **many)  # noqa: E731
        yield from verdict("decode_attention", "70000 sequences", dtype, prove)


def linear(dtype, some, small=False):
    for K, bits, fused, rows in (LINEAR[i] for i in some):
        N = 66 if small else 520 * (2 if "activation" in fused else 1)
        case = f"{N} x {K}, {proofs.bits_name(bits, 32) + ', ' if bits else ''}{proofs.fused_name(fused)}, {rows} rows"
        arguments = {"lead": (rows, 1), "K": K, "N": N, "bits": bits, "fused": fused}
        yield from verdict(
            "decode_linear", case, dtype,
            lambda arguments=arguments: proofs.decode_linear("cuda", torch_dtype(dtype), **arguments),
        )  # fmt: skip


def choose(dtype):
    for vocabulary in (128256, 151936):
        for options in (proofs.OPTIONS[0], proofs.OPTIONS[-1]):
            yield from verdict(
                "choose", f"{vocabulary}, {options or 'greedy'}", dtype,
                lambda v=vocabulary, o=options: proofs.choose("cuda", torch_dtype(dtype), vocabulary=v, options=o, steps=2),
            )  # fmt: skip


# --- models ----------------------------------------------------------------------------------------------------------

SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3}


def make(name, dtype, bits):
    """Random weights under which activations keep their size and logits differ by some."""
    m = MODELS[name]
    torch.manual_seed(1)
    model = Llama({**m.config(), "initializer_range": m.hidden**-0.5, "eos_token_id": 0}).to("cuda", torch_dtype(dtype)).eval()
    with torch.no_grad():
        model.lm_head.weight *= 3
    if bits is not None:
        for layer in model.model.layers:
            for projection in layer.linears:
                projection.quantize_(bits)
        model.lm_head.quantize_(8)
    return model.requires_grad_(False)


def graphs(model):
    """The captured steps that the model keeps."""
    _, cache = model.kept["cache"]
    return [captured for slots in cache.steps.values() for captured in slots.captured.values()]


def eagerly():
    """Within the block no step is captured."""
    return mock.patch.object(generation.Step, "__call__", lambda step, width: step.work())


def step(model, dtype, bits, rows, new):
    """Graph replays give the ids that eager steps give, twice the same, with dependent launches too."""
    named, vocabulary = f"{model}, {f'int{bits}' if bits else dtype}, {rows} rows", MODELS[model].vocab
    model = make(model, dtype, bits)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(vocabulary, (5 + 7 * b % 11,), generator=generator).tolist() for b in range(rows)]
    for options in ({}, SAMPLED):
        first = []

        def ids(options=options, first=first):
            found = generate(model, prompts, max_new_tokens=new, eos=[], **options)
            assert found.shape == (rows, new)
            assert ((found >= 0) & (found < vocabulary)).all(), "ids outside the vocabulary"
            assert not first or torch.equal(found, first[0]), _difference(found, first[0])
            return found

        def eager(first=first, ids=ids):
            model.kept.clear()
            with eagerly():
                first[:] = [ids()]
            assert not graphs(model)
            assert len(first[0].unique()) > min(new, 8) / 2, "the model says always the same"

        def replayed(ids=ids):  # the second time what the first has captured
            ids()
            made = graphs(model)
            assert made, "no graph was captured"
            ids()
            assert [*map(id, graphs(model))] == [*map(id, made)], "the captured step was not kept"

        kind = "sampled" if options else "greedy"
        for pdl in (False,) if _interpreted() else (True,) if bits == 8 else (False, True):  # the interpreter has none of it
            for how, prove in (("eager", eager), ("replayed twice", replayed)):
                case = f"{named}, {kind}, {how}{', dependent launches' * pdl}"
                with dependent_launch(pdl):
                    yield from verdict("generate", case, dtype, prove, 0)


def _difference(found, expected):
    row, at = (found != expected).nonzero()[0].tolist()
    return f"row {row} differs from eager steps at id {at}: {found[row, at]}, expected {expected[row, at]}"


def whole_model(model, dtype, bits, new):
    """Logits of prefill and steps and all gradients against the model in float64; rows alone and in company."""
    named = f"{model}, {f'int{bits}' if bits else dtype}"
    vocabulary, model = MODELS[model].vocab, make(model, dtype, bits)
    exactly, plainly = copy.deepcopy(model).double(), copy.deepcopy(model)
    torch.manual_seed(9)
    ids = torch.randint(vocabulary, (3, 9 + new), device="cuda")

    @torch.no_grad()
    def logits():
        with use_backend("reference"):
            exact, plain = exactly(ids), plainly(ids)
        cache = KVCache(model.config, 3, 9 + new, torch_dtype(dtype), "cuda")
        got = [model(ids[:, :9], cache), *(model(ids[:, n : n + 1], cache) for n in range(9, 9 + new))]
        got = torch.cat(got, 1)
        assert got.isfinite().all(), "logits are not finite"
        oracle.check(got.to(torch_dtype(dtype)), exact, plain.to(torch_dtype(dtype)), fp32=1e-5)

    def gradients():
        def of(m):
            m.requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(m(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            made = {}
            for (name, _), g in zip(m.named_parameters(), torch.autograd.grad(loss, list(m.parameters()))):
                made.setdefault(name.split(".", 3)[-1], []).append(g.flatten())
            m.requires_grad_(False)
            return {name: torch.cat(parts) for name, parts in made.items()}

        with use_backend("reference"):
            exact, plain = of(exactly), of(plainly)
        for name, g in of(model).items():
            try:
                oracle.check(g, exact[name], plain[name], fp32=1e-4)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None

    @torch.no_grad()
    def company():
        """Steps of one and three rows from the cache of eight: bit for bit."""
        prompt = torch.randint(vocabulary, (8, 11), device="cuda")
        steps = torch.randint(vocabulary, (1 if _interpreted() else 3, 8, 1), device="cuda")
        start = KVCache(model.config, 8, 64, torch_dtype(dtype), "cuda")
        model.hidden_states(prompt, start)

        def hidden(rows):
            cache = KVCache(model.config, rows, 64, torch_dtype(dtype), "cuda")
            for mine, given in zip((*cache.k, *cache.v, cache.lengths), (*start.k, *start.v, start.lengths)):
                mine.copy_(given[:rows])
            cache.filled = start.filled
            return [model.hidden_states(ids[:rows], cache) for ids in steps]

        together = hidden(8)
        for rows in (1,) if _interpreted() else (1, 3, 8):
            for few, many in zip(hidden(rows), together):
                same = torch.equal(few, many[:rows])
                assert same or _interpreted(), f"{rows} of 8 rows have other bits alone"

    yield from verdict("model", f"{named}, logits of prefill and steps", dtype, logits, 0)
    if bits is None:
        yield from verdict("model", f"{named}, gradients", dtype, gradients, 0)
    yield from verdict("model", f"{named}, rows alone and in company", dtype, company, 0)


def _interpreted():
    """There the products come from a BLAS, which sums one row and eight in different order."""
    from ...kernels.dispatch import INTERPRETED, backend

    return INTERPRETED or backend() == "reference"


# --- torch and transformers ------------------------------------------------------------------------------------------


def _calls(dtype):
    """{name: (function, arguments that have gradients, arguments that have none)}"""

    def randn(*shape):
        return torch.randn(shape, device="cuda").to(dtype)

    q, k, v = (randn(2, 40, h, 64).transpose(1, 2) for h in (4, 2, 2))
    q1, k1, v1 = (t[:, :, :1] for t in (q, k, v))
    cos, sin = (t.to("cuda") for t in proofs.tables(64, 32))
    cache, lengths = randn(2, 2, 64, 64), torch.tensor([41, 9], dtype=torch.int32, device="cuda")
    return {
        "rms_norm": (kernels.rms_norm, (randn(6, 256), randn(256)), ()),
        "swiglu": (kernels.swiglu, randn(6, 512).chunk(2, -1), ()),
        "apply_rope": (lambda q, k, *t: kernels.apply_rope(q, k, *t)[0], (q, k), (cos, sin)),
        "flash_attention": (kernels.flash_attention, (q, k, v), ()),
        "decode_attention": (lambda *t: decode_attention(*t), (), (q1, cache, cache, lengths)),
        "decode_linear": (kernels.decode_linear, (), (randn(2, 256), randn(64, 256))),
        "rope_append_": (
            lambda *t: kernels.rope_append_(*t, torch.zeros_like(cache), torch.zeros_like(cache), lengths[:, None]), (),
            (q1, k1, v1, cos, sin),
        ),
    }  # fmt: skip


def compiled(names):
    """torch.compile(fullgraph=True) gives what the call alone gives, and the same gradients."""
    for name in names:

        def prove(name=name):
            torch.manual_seed(4)
            function, leaves, rest = _calls(torch.float16)[name]
            torch._dynamo.reset()
            both = []
            for how in (torch.compile(lambda *t: function(*t) * 2, fullgraph=True), lambda *t: function(*t) * 2):
                if not leaves:
                    with torch.no_grad():
                        both.append([how(*rest)])
                    continue
                torch.manual_seed(4)
                dout = [torch.randn(function(*leaves, *rest).shape, device="cuda")]
                outputs, gradients = proofs.through(lambda *t, how=how: how(*t, *rest), leaves, dout)
                both.append([*outputs, *gradients])
            assert both[0][0].isfinite().all()
            for got, want in zip(*both):
                assert torch.equal(got, want), f"differs from the call alone by {oracle.error(got, want):.1e}"

        yield from verdict("torch.compile", name, "fp16", prove, 0)


def adapter(dtype):
    try:
        import transformers

        from ...kernels.compat.transformers import patch
    except ImportError as error:
        yield {"op": "transformers", "case": "logits", "dtype": dtype, "status": "left out", "error": str(error)}
        return
    sizes = dict(
        vocab_size=96, hidden_size=256, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    make, config = transformers.LlamaForCausalLM._from_config, transformers.LlamaConfig(**sizes)
    torch.manual_seed(2)
    theirs = make(copy.deepcopy(config), attn_implementation="eager").to("cuda", torch_dtype(dtype)).eval()
    ours = make(copy.deepcopy(config), attn_implementation="trillama").to("cuda", torch_dtype(dtype)).eval()
    ours.load_state_dict(theirs.state_dict())
    patch(ours)
    exact = copy.deepcopy(theirs).float()  # their masks overflow in float64
    ids = torch.randint(3, 96, (2, 5) if _interpreted() else (3, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :2] = 0

    @torch.no_grad()
    def logits(**arguments):
        where = arguments.get("attention_mask", mask.new_ones(mask.shape)).bool()
        got, want, plain = (m(ids, **arguments).logits[where] for m in (ours, exact, theirs))
        assert got.isfinite().all()
        oracle.check(got, want, plain, fp32=1e-5)

    yield from verdict("transformers", "logits", dtype, logits, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    yield from verdict(
        "transformers", "logits of a padded batch", dtype, lambda: logits(attention_mask=mask, position_ids=positions), 0
    )  # fmt: skip


KVCACHE = {  # queries, new tokens, pages, padding on the left, rotary embedding, options
    "append": (1, 1, False, False, False, {"causal": True}),
    "append, rotary": (3, 3, False, False, True, {"causal": True}),
    "append, rotary, pages": (1, 1, True, False, True, {"causal": True}),
    "padded on the left, window": (2, 2, False, True, False, {"causal": True, "window_size": (9, 0)}),
    "not causal, lse": (3, 0, True, False, False, {"return_softmax_lse": True}),
}


def kvcache(dtype):
    for case, arguments in KVCACHE.items():
        yield from verdict("flash_attn_with_kvcache", case, dtype, lambda a=arguments: _kvcache(torch_dtype(dtype), *a))


def _kvcache(dtype, S, new, paged, padded, rotary, options):
    """out, lse and both caches, against the reference in float64 and in the same dtype, which a CPU runs."""
    torch.manual_seed(S + new)
    pages = (8, 16, 2, 64) if paged else (2, 64, 2, 64)
    tensors = [torch.randn(shape).to(dtype) for shape in ((2, S, 4, 64), pages, pages, (2, new, 2, 64), (2, new, 2, 64))]
    lengths, left = torch.tensor([20, 41], dtype=torch.int32), torch.tensor([3, 7], dtype=torch.int32)
    table = torch.randperm(8).view(2, 4).int()
    angle = torch.arange(64.0)[:, None] * 0.7 ** torch.arange(16.0)

    def call(device, wide):
        def on(t, wanted=True):
            return t.to(device) if wanted else None

        q, k_cache, v_cache, k, v = (t.to(device, wide, copy=True) for t in tensors)
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, *((k, v) if new else (None, None)), on(angle.cos(), rotary), on(angle.sin(), rotary), on(lengths),
            block_table=on(table, paged), cache_leftpad=on(left, padded), **options,
        )  # fmt: skip
        return *(out if isinstance(out, tuple) else (out,)), k_cache, v_cache

    for got, exact, plain in zip(call("cuda", dtype), call("cpu", torch.float64), call("cpu", dtype)):
        oracle.check(got, exact, plain, fp32=1e-5)


def device(dtype):
    """Every op on a device that is not the current one, where there is one."""
    if torch.cuda.device_count() < 2:
        yield {"op": "another device", "case": "all", "dtype": dtype, "status": "left out", "error": "there is one GPU only"}
        return
    for op in OPS:
        name = proofs.trials(op, torch.float32)[0]
        yield from verdict("another device", op, dtype, lambda op=op, name=name: proofs.run(op, name, torch_dtype(dtype), "cuda:1"))


# --- the table -------------------------------------------------------------------------------------------------------


def show(results, known=()):
    from ..plots import table

    groups = {}
    for r in results:
        if "op" in r:
            groups.setdefault((r["op"], r["dtype"]), []).append(r)
    lines = []
    for (op, dtype), group in groups.items():
        fractions = [(math.inf if r["wrong"] is None else r["wrong"] / r["allowed"], r["case"]) for r in group if "allowed" in r]
        worst, case = max(fractions, default=(None, ""))
        failed = sum(r["status"] != "ok" for r in group)
        lines.append((op, dtype, case, len(group), failed, "-" if worst is None else f"{worst:.2f}"))
    count, failed = (sum(line[i] for line in lines) for i in (3, 4))
    header = "op", "dtype", "worst case", "cases", "failed", "of the allowed"
    return [*table(header, lines, left=3), f"{count} cases, {failed} failed"]
