"""A token's time in whole models of random weights, beside the bytes that it must read and beside others on the same weights.

Ours is the captured step of `generate`; 24 tokens are made around the context that is named, on caches of random values.
"""

import functools
import statistics
import time

import torch

from .. import decode, peers, plots, timing
from ..apart import one_line
from ..cases import MODELS, Model
from . import Job, facts

PARALLEL = False
BITS = {"bf16": None, "int8": 8, "int4": 4}
STEPS = 24
SHAPES = {**MODELS, "tiny": Model(64, 4, 2, 16, 128, 1, 256, True)}
GREEDY = {"temperature": 0.0, **dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty"))}
TUNED = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}  # what gpt-fast sets


def jobs(card):
    steps = 1 if card.small else STEPS

    def ours(shape, precision, batch, seconds, contexts=(128, 8192), dependent=(False, True)):
        work = {"shape": shape, "precision": precision, "batch": batch, "contexts": contexts, "dependent": dependent}
        return Job(f"{shape} {precision} x{batch}", {"what": "ours", **work, "steps": steps}, seconds, 9 * len(dependent))

    def peer(engine, shape, seconds, compiled, context=128):
        return Job(f"{shape} {engine}", {"what": engine, "shape": shape, "context": context, "steps": steps}, seconds, compiled)

    if card.small:
        return [
            ours("tiny", "bf16", 1, 1, (20,)), ours("tiny", "int4", 2, 1, (20,), (False,)),
            Job("tiny kernels", {"what": "kernels", "shape": "tiny", "precision": "bf16", "context": 20, "steps": 1}, 1),
            *(peer(engine, "tiny", 1, 1, 20) for engine in PEERS),
        ]  # fmt: skip
    small, middle, large = "SmolLM2-135M", "Llama-3.2-1B", "Llama-3.1-8B"
    profile = {"what": "kernels", "shape": large, "precision": "bf16", "context": 128, "steps": 6}
    return [
        ours(large, "bf16", 1, 4.5),
        Job(f"{large} kernels", profile, 2.5),
        ours(middle, "bf16", 1, 2.0),
        ours(large, "int8", 1, 4.0),
        ours(large, "int4", 1, 4.0),
        ours(small, "bf16", 1, 1.5),
        ours(large, "bf16", 8, 3.0, dependent=(False,)),
        peer("gpt-fast-like", middle, 8, 12),
        peer("transformers", middle, 3, 0),
        peer("gpt-fast-like", large, 14, 20),
        *(ours(shape, precision, 1, 1.8) for precision in ("int8", "int4") for shape in (middle, small)),
        *(ours(shape, p, 8, 1.2, dependent=(False,)) for p in BITS for shape in (middle, small)),
        peer("gpt-fast-like, tuned", large, 14, 45),
        peer("transformers, compiled", middle, 14, 20),
        peer("transformers", large, 3, 0),
        peer("transformers, compiled", large, 24, 40),
    ]


def run(what, **work):
    with torch.no_grad():
        yield from {"ours": ours, "kernels": kernels}[what](**work) if what not in PEERS else peer(what, **work)


def warm(what, shape, steps, precision="bf16", batch=1, contexts=(), context=0, dependent=()):
    from ...kernels.dispatch import dependent_launch

    with torch.no_grad():
        if what in PEERS:
            PEERS[what](random_model(shape, layers=1), shape, context, steps, SHAPES[shape].layers)()
        for on in dependent:
            for context in contexts:
                with dependent_launch(on), torch.inference_mode():
                    Ours(random_model(shape, precision, 1), batch, context, steps).step.work()
        torch.cuda.synchronize()
        random_model.cache_clear()


# --- the model and its step ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def random_model(shape, precision="bf16", layers=None):
    """A Llama of that shape on the GPU, in bfloat16 or quantised as a checkpoint would be. layers: fewer of them."""
    from ...model import Llama

    config = SHAPES[shape].config()
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    quantize = None if precision == "bf16" else precision
    return Llama.random(config, device="cuda", dtype=torch.bfloat16, quantize=quantize).requires_grad_(False)


def room(context, steps):
    """Tokens of the caches: some steps come before what is measured, and the masks of others' want rows of whole loads."""
    return -(-(context + steps + 4) // 64) * 64


class Ours:
    """The step of `generate` around `context` tokens, for so many steps; the first call runs it, the second captures it, the others
    replay it."""

    def __init__(self, model, batch, context, steps):
        from ...kernels.sampling import start
        from ...model import KVCache
        from ...model.generation import Step

        self.begin = context - steps // 2  # the context is the mean
        self.cache = KVCache(model.config, batch, room(context, steps), torch.bfloat16, "cuda")
        for t in (*self.cache.k, *self.cache.v):
            t.normal_()
        prompt = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
        ends = torch.zeros(0, dtype=torch.int64, device="cuda")
        self.step = Step(model, self.cache, prompt, start(0, batch, prompt.device), ends, GREEDY, False)
        self.rewind()

    def rewind(self):
        self.cache.filled = self.begin
        self.cache.lengths.fill_(self.begin)

    def __call__(self):
        try:
            self.step(self.cache.filled)
        except Exception as error:  # in most cases the capture, after which this process can do no other
            timing.Captures.broken = one_line(error)
            raise


def ours(shape, precision, batch, contexts, dependent, steps):
    from ...kernels.decode import counters
    from ...kernels.dispatch import dependent_launch

    model = random_model(shape, precision)
    for context in contexts:
        for on in dependent:
            with dependent_launch(on), torch.inference_mode(), counters("cuda"):
                step = Ours(model, batch, context, steps)
                eager = each(step.step.work, step.rewind, steps, 1) if not on else None
                step.rewind()
                step()
                step()
                seconds = each(step, step.rewind, steps)
            yield {
                "engine": "trillama", "shape": shape, "precision": precision, "batch": batch, "context": context,
                "pdl": on, "uncaptured_us": eager and eager * 1e6, **figures(model, batch, context, seconds),
            }  # fmt: skip


def each(step, rewind, steps, rounds=3):
    """Median over rounds, after one more, of the mean seconds of a step: in a stream of steps, as tokens are made. To rewind takes
    no part in it: of transformers' caches it is a call a layer."""

    def round():
        for _ in range(steps):
            step()

    times = []
    for _ in range(1 + min(rounds, steps)):
        rewind()
        times.append(timing.elapsed(round, 1, 0))
    return statistics.median(times[1:]) / steps


def figures(model, batch, context, seconds):
    weights = decode.weight_bytes(model, batch)[0]
    cache = batch * context * decode.cache_bytes(model, torch.bfloat16)
    return {"us": seconds * 1e6, "tokens_per_s": batch / seconds, "weight_bytes": weights, "cache_bytes": cache}


# --- others ----------------------------------------------------------------------------------------------------------


class GptFast:
    """peers.Decoder, compiled with `options`; `layers` as there."""

    def __init__(self, model, shape, context, steps, layers=None, **options):
        self.decoder = peers.Decoder(model, 1, room(context, steps), layers)
        self.next, self.begin = peers.compiled(self.decoder, **options), context - steps // 2
        self.ids = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.position = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.caches = [(layer.keys, layer.values) for layer in self.decoder.layers]
        self.rewind()

    def rewind(self):
        self.position.fill_(self.begin)

    def __call__(self):
        torch.compiler.cudagraph_mark_step_begin()
        ids, logits = self.next(self.ids, self.position)
        self.ids.copy_(ids)
        self.position.add_(1)
        return logits


class Transformers:
    """transformers' model with the cache that `generate` takes by default, call after call."""

    def __init__(self, model, shape, context, steps, layers=None):
        self.twin, self.begin = peers.twin(model, SHAPES[shape].config(), layers), context - steps // 2
        self.model, self.cache = self.prepare(SHAPES[shape], room(context, steps))
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        self.rewind()

    def prepare(self, shape, length):
        from transformers import DynamicCache

        cache = DynamicCache(config=self.twin.config)
        one = [torch.zeros(1, shape.kv_heads, length, shape.head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        for layer in range(self.twin.config.num_hidden_layers):
            cache.update(*one, layer)
        self.caches = [(layer.keys, layer.values) for layer in cache.layers]
        return self.twin, cache

    def rewind(self):
        for layer, tensors in zip(self.cache.layers, self.caches):
            layer.keys, layer.values = (t[:, :, : self.begin] for t in tensors)

    def __call__(self):
        logits = self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        return logits


class CompiledTransformers(Transformers):
    """transformers' model with a static cache, its call compiled."""

    def prepare(self, shape, length):
        from transformers import StaticCache

        cache = StaticCache(config=self.twin.config, max_cache_len=length)
        cache.early_initialization(1, shape.kv_heads, shape.head_dim, torch.bfloat16, torch.device("cuda"))
        self.caches = [(layer.keys, layer.values) for layer in cache.layers]
        return peers.compiled(self.twin.__call__, mode="reduce-overhead"), cache

    def rewind(self):
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.begin)

    def __call__(self):
        torch.compiler.cudagraph_mark_step_begin()
        return super().__call__()


PEERS = {
    "gpt-fast-like": functools.partial(GptFast, mode="reduce-overhead"),
    "gpt-fast-like, tuned": functools.partial(GptFast, options=TUNED),
    "transformers": Transformers,
    "transformers, compiled": CompiledTransformers,
}


def peer(engine, shape, context, steps):
    from ...kernels.decode import counters

    model = random_model(shape)
    theirs = PEERS[engine](model, shape, context, steps)
    with counters("cuda"):
        mine = Ours(model, 1, context, steps)
        for cache, tensors in zip(zip(mine.cache.k, mine.cache.v), theirs.caches):
            for source, target in zip(cache, tensors):
                target.copy_(source[:, :, : target.shape[2]])
        theirs.rewind()
        logits = model.step(mine.step.ids, mine.cache).float()
    begin = time.perf_counter()
    difference = (theirs().float() - logits).norm() / logits.norm()
    first = time.perf_counter() - begin
    theirs()
    seconds = each(theirs, theirs.rewind, steps)
    yield {
        "engine": engine, "shape": shape, "precision": "bf16", "batch": 1, "context": context, "first_s": first,
        "difference": difference.item(), **figures(model, 1, context, seconds),
    }  # fmt: skip


# --- where the time goes ---------------------------------------------------------------------------------------------


def kernels(shape, precision, context, steps):
    """Each kernel of a replayed step: how often, for how long, by the weights that it reads."""
    from ...kernels.decode import counters
    from ...kernels.dispatch import observe

    model, launched = random_model(shape, precision), []
    with torch.inference_mode(), counters("cuda"):
        step = Ours(model, 1, context, steps)
        with observe(lambda *launch: launched.append(label(*launch))):
            step()
        step()
        step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spent = [(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in events]
    if not spent:
        raise RuntimeError("the profiler saw no kernel: it has no CUPTI, or may not use it")
    yield {"shape": shape, "precision": precision, "context": context, "launches": len(launched), **table(spent, launched, steps)}


def label(kernel, grid, arguments, options):
    """The kernel's name and, where it reads a weight, its shape."""
    name = kernel.__name__.strip("_")
    weight = arguments[1]
    if name == "linear_kernel":
        return f"{name} {weight.shape[0]} x {options['K']}{', gated' if options['SWIGLU'] else ''}"
    return name


def table(spent, launched, steps):
    """{"kernels": [[name, calls a step, us a step]], "busy_us", "span_us"} of (name, start, us) of everything on the device. Ours
    are called as in `launched`, which has those of a step, if they came in its order."""
    spent = sorted(spent, key=lambda e: e[1])
    own = [name.split()[0] for name in launched] * steps
    places = [i for i, (name, _, _) in enumerate(spent) if name.strip("_") in own]
    if [spent[i][0].strip("_") for i in places] == own:
        for i, name in zip(places, launched * steps):
            spent[i] = (name, *spent[i][1:])
    sums = {}
    for name, _, us in spent:
        calls, total = sums.get(name, (0, 0.0))
        sums[name] = calls + 1, total + us
    rows = [[name[:80], calls / steps, us / steps] for name, (calls, us) in sums.items()]
    span = spent[-1][1] + spent[-1][2] - spent[0][1]
    return {"kernels": sorted(rows, key=lambda r: -r[2])[:20], "busy_us": sum(r[2] for r in rows), "span_us": span / steps}


# --- the tables ------------------------------------------------------------------------------------------------------


def show(results, known=()):
    """known: the results of `facts`, for the fractions of what the card can do."""
    steps = [r for r in results if "tokens_per_s" in r]
    bandwidths = [facts.ceilings(known)[0], getattr(facts.datasheet(known), "bandwidth", None)]
    mine, theirs, rows = {}, {}, []
    for r in steps:
        key = r["shape"], r["precision"], r["batch"], r["context"]
        if r["engine"] == "trillama":
            mine.setdefault(key, {})[r["pdl"]] = r
        else:
            theirs.setdefault(key, []).append(r)
    for key, runs in mine.items():
        best = min(runs.values(), key=lambda r: r["us"])
        read = best["weight_bytes"] + best["cache_bytes"]
        fractions = [f"{read / best['us'] * 1e6 / b:.0%}" if b else "-" for b in bandwidths]
        times = [f"{runs[on]['us'] / 1e3:.3f}" if on in runs else "-" for on in (False, True)]
        rows.append((*key, *times, f"{best['tokens_per_s']:,.0f}", f"{read / 1e9:.2f}", *fractions))
    header = ("model", "", "batch", "context", "ms", "PDL", "tok/s", "GB", "of copy", "of sheet")
    lines = plots.table(header, rows, left=2) if rows else []
    for key, others in theirs.items():
        best = min((r["us"] for r in mine.get(key, {}).values()), default=None)
        texts = [f"{r['engine']} {r['us'] / 1e3:.3f} ms" + (f" = {r['us'] / best:.2f}x" if best else "") for r in others]
        off = max(r["difference"] for r in others)
        lines.append(f"{key[0]} {key[1]} x{key[2]} at {key[3]}: {'; '.join(texts)} (logits {off:.0e} from ours)")
    for r in results:
        if "kernels" in r:
            lines.append(f"{r['shape']} {r['precision']}, context {r['context']}: {r['busy_us']:.0f} us of kernels in "
                         f"{r['span_us']:.0f} us a step, while profiled")  # fmt: skip
            lines += plots.table(
                ("kernel", "calls", "us", "share"),
                [(name, f"{calls:g}", f"{us:.1f}", f"{us / r['busy_us']:.0%}") for name, calls, us in r["kernels"][:9]],
            )
    return lines
