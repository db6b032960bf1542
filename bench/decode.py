"""End-to-end throughput: `trillama bench`, or `python -m trillama.bench.decode`.

First a card (what a token costs at least: the bytes of weights and cache that have to be read), then prefill and decode apart, each
beside its bound. Two numbers are never mixed here: the time to the first token is not part of tokens/s, and no bound is a timing.
"""

import argparse
import importlib.util
import itertools
import json
import math
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

from .. import model as package
from ..model import cli
from ..model.later import later
from ..model.shapes import SHAPES, config
from . import files, plots
from .roofline import datasheet

NEEDED = "--against hf needs transformers: pip install 'trillama[transformers]'"

torch, parallel = later("torch"), later("..model.parallel", __package__)


# --- what has to be moved --------------------------------------------------------------------------------------------


def weight_bytes(model, batch=1):
    """(Bytes of weights that one decode step reads, those of their values in the model's dtype): of all but the input embedding, of
    which it reads a row (a tied embedding is read once, as the head). The first are fewer where a step reads copies."""
    table = model.model.embed_tokens.weight
    unique = {id(p): p.nbytes for p in model.parameters()}
    unique |= {id(m.weight): m.weight.nbytes for m in model.modules() if getattr(m, "quantized", False)}
    total = sum(unique.values()) - (0 if model.lm_head.weight is table else table.nbytes)
    return total - sum(w.nbytes - copy.nbytes for w, copy in model.streamed(batch)), total


def cache_bytes(model, dtype):
    """Bytes of keys and values that one position of one sequence takes."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize


def streaming_bandwidth(device, size=1 << 28):
    """Bytes a second at which this machine moves memory. A CPU: in one long read, the best of several, with all threads. A GPU: in
    one long copy, read and written, on its own clock."""
    if device.type == "cuda":
        from .timing import copy_bandwidth

        return copy_bandwidth(device)
    x, best = torch.ones(size // 4), math.inf
    for _ in range(8):
        start = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


# --- the two engines -------------------------------------------------------------------------------------------------


class Clock:
    """Time stamps of generated tokens: the host's clock on a CPU, events on a GPU, so that the device is never waited for."""

    def __init__(self, device):
        self.device, self.cuda = device, device.type == "cuda"
        self.stamps = []
        self.tick()

    def tick(self, *_):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))  # not of the current device, which may be another
            self.stamps.append(event)
        else:
            self.stamps.append(time.perf_counter())

    def intervals(self):
        """Seconds between ticks: the first is the prefill with the first token, each other one a decode step."""
        if not self.cuda:
            return [b - a for a, b in zip(self.stamps, self.stamps[1:])]
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.stamps, self.stamps[1:])]


def ours(model, ids, new):
    clock = Clock(ids.device)
    package.generate(model, ids, max_new_tokens=new, eos=[], stream=clock.tick)
    return clock.intervals()


def transformers_twin(config, weights, device):
    """transformers' model of a config.json's dict on the weights {name: tensor}, and a function that times it like `ours`."""
    try:
        import transformers
    except ImportError:
        raise ValueError(NEEDED) from None

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    # Buffers (the rotary frequencies) are computed, not stored: a fresh module on the right device has them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    missing = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if missing:
        raise ValueError(f"--against hf: there is no {missing[0]}")
    model.eval()

    def run(ids, new):
        clock = Clock(ids.device)

        class Streamer:
            started = False

            def put(self, _):
                if self.started:  # the first call hands over the prompt
                    clock.tick()
                self.started = True

            def end(self):
                pass

        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        if ids.shape[0] == 1:
            model.generate(ids, max_new_tokens=new, streamer=Streamer(), **options)
        else:  # transformers streams one sequence only: step by step, with its cache
            step_by_step(model, ids, new, clock)
        return clock.intervals()

    return model, run


def stored(source, dtype, device):
    """(config, weights) of a checkpoint, as `transformers_twin` takes them."""
    from ..model.checkpoint import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        weights = {name: checkpoint.load(name).to(device=device, dtype=dtype, copy=True) for name in checkpoint.names()}
        return checkpoint.config, weights


def lent(model):
    """The weights of our model under Hugging Face's names, where they are; those of quantised ones in the model's dtype."""
    from ..model.llama import unpacked

    weights, dtype = {}, model.model.norm.weight.dtype
    packed = model.config.model_type == "phi3"  # which has q, k, v and gate, up in one matrix itself
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole |= {f"{n}.weight": m.weight.dequantize(dtype) for n, m in model.named_modules() if getattr(m, "quantized", False)}
    for name, weight in whole.items():
        parts = [] if packed else unpacked(name, model.config)
        weights |= zip((part for part, _ in parts), weight.split([rows for _, rows in parts])) if parts else [(name, weight)]
    return weights


def step_by_step(model, ids, new, clock):
    cache, step = None, ids
    with torch.inference_mode():
        for _ in range(new):
            result = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
            clock.tick()


# --- measuring -------------------------------------------------------------------------------------------------------


def summary(intervals, batch, prompt):
    steps = sorted(intervals[1:])
    median = statistics.median(steps)
    return {
        "prefill_s": intervals[0],
        "prefill_tokens_per_s": batch * prompt / intervals[0],
        "decode_ms_median": median * 1e3,
        "decode_ms_p95": steps[min(len(steps) - 1, int(0.95 * len(steps)))] * 1e3,
        "decode_tokens_per_s": batch / median,
    }


def measure(model, rival, batch, prompt, new, rounds, bandwidth, peak, dtype):
    """One row of the table: the best prefill and the median decode step over `rounds` runs, alternating with the rival.

    bandwidth: as measured. peak: the datasheet's, or None."""
    device = next(model.parameters()).device
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    ours(model, ids, 4)
    if rival:
        rival(ids, 4)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runs, rivals = [], []
    for _ in range(rounds):
        runs.append(summary(ours(model, ids, new), batch, prompt))
        if rival:
            rivals.append(summary(rival(ids, new), batch, prompt))
    row = {"batch": batch, "prompt": prompt, "new": new, **typical(runs)}
    context = prompt + new / 2
    read = weight_bytes(model, batch)[0] + batch * context * cache_bytes(model, dtype)
    row["bytes_per_step"] = int(read)
    row["bound_tokens_per_s"] = batch * bandwidth / read
    row["fraction_of_bound"] = row["decode_tokens_per_s"] / row["bound_tokens_per_s"]
    if peak is not None:
        row["fraction_of_datasheet"] = row["decode_tokens_per_s"] * read / batch / peak
    row["peak_memory_bytes"] = peak_memory(device)
    if rival:
        row["hf"] = typical(rivals)
        row["decode_against_hf"] = statistics.median(
            a["decode_tokens_per_s"] / b["decode_tokens_per_s"] for a, b in zip(runs, rivals)
        )
        row["prefill_against_hf"] = statistics.median(b["prefill_s"] / a["prefill_s"] for a, b in zip(runs, rivals))
    return row


def typical(runs):
    return {key: statistics.median(r[key] for r in runs) for key in runs[0]}


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- presenting ------------------------------------------------------------------------------------------------------


def card(model, source, dtype, device, bandwidth):
    from ..kernels.dispatch import backend, why_not_triton

    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    triton = backend() == "triton" or (backend() == "auto" and cuda and why_not_triton(device) is None)
    sheet = datasheet(name) if cuda else None
    (weights, values), cache = weight_bytes(model), cache_bytes(model, dtype)
    head = model.lm_head
    parameters = sum(p.numel() for p in model.parameters()) + sum(
        m.weight.shape.numel()
        for m in model.modules()
        if getattr(m, "quantized", False) and not (m is head and model.config.tie_word_embeddings)
    )
    return {
        "model": str(source),
        "parameters": parameters,
        "ranks": model.ranks.size,
        "dtype": str(dtype)[6:],
        "quantize": f"int{model.model.layers[0].mlp.down_proj.weight.bits}" if head.quantized else None,
        "device": name,
        "device_type": device.type,
        "path": "Triton" if triton else "reference",
        "torch": torch.__version__,
        "weight_bytes_per_step": weights,
        "weight_bytes": values,
        "cache_bytes_per_position": cache,
        "streaming_bandwidth": bandwidth,
        "datasheet_bandwidth": None if sheet is None else sheet.bandwidth,
        "bound_tokens_per_s": bandwidth / weights,
    }


def show_card(c):
    shared = f"; this is rank 0 of {c['ranks']}, all-reduces are in no bound" if c["ranks"] > 1 else ""
    fewer = c["weight_bytes_per_step"] < c["weight_bytes"]
    narrowed = f", copies with exactly the values of {c['weight_bytes'] / 1e6:.1f} MB" if fewer else ""
    peak, how = c["datasheet_bandwidth"], "a copy, read and written" if c["device_type"] == "cuda" else "one long read"
    sheet = f"; {c['streaming_bandwidth'] / peak:.0%} of the datasheet's {peak / 1e9:.0f}" if peak else ""
    lines = (
        ("model", f"{c['model']}, {c['parameters'] / 1e6:.1f} M parameters, {c['quantize'] or c['dtype']}"),
        ("machine", f"{c['device']}; {c['path']} path; torch {c['torch']}{shared}"),
        ("weights read per step", f"{c['weight_bytes_per_step'] / 1e6:.1f} MB{narrowed}"),
        ("cache per position", f"{c['cache_bytes_per_position'] / 1e3:.1f} kB"),
        ("streaming bandwidth", f"{c['streaming_bandwidth'] / 1e9:.1f} GB/s (measured: {how}){sheet}"),
        ("bound at batch 1", f"{c['bound_tokens_per_s']:.1f} tokens/s (bandwidth / weights; not a timing)"),
    )
    for label, text in lines:
        print(f"{label:22s}  {text}")
    print()


def show_header(against, sheet):
    columns = "batch prompt  new |      TTFT  tokens/s |  ms/step      p95  tokens/s    bound  of it"
    columns += ("  of datasheet" if sheet else "") + " |  peak MB"
    print(columns + (" |  hf tok/s  decode prefill" if against else ""))


def show_row(r):
    sheet = f" {r['fraction_of_datasheet']:13.0%}" if "fraction_of_datasheet" in r else ""
    text = (
        f"{r['batch']:5d} {r['prompt']:6d} {r['new']:4d} | {r['prefill_s'] * 1e3:7.1f}ms {r['prefill_tokens_per_s']:9.1f} | "
        f"{r['decode_ms_median']:8.2f} {r['decode_ms_p95']:8.2f} {r['decode_tokens_per_s']:9.1f} "
        f"{r['bound_tokens_per_s']:8.1f} {r['fraction_of_bound']:6.0%}{sheet} | {r['peak_memory_bytes'] / 1e6:8.0f}"
    )
    if "hf" in r:
        text += f" | {r['hf']['decode_tokens_per_s']:9.1f} {r['decode_against_hf']:6.2f}x {r['prefill_against_hf']:6.2f}x"
    print(text, flush=True)


def written(file, about, rows):
    """Yields the rows, each when it is in the file (None: nowhere) beside those before it and `about`: whatever ends the command
    leaves what there is. What cannot be rewritten, a pipe or a device, gets all of it at the end."""
    done = []
    again = file and first() and (Path(file).is_file() or not Path(file).exists())
    try:
        for row in rows:
            done.append(row)
            if again:
                files.rewrite(file, json.dumps({**about, "rows": done}, indent=2))
            yield row
    finally:
        if file and first() and not again:
            files.rewrite(file, json.dumps({**about, "rows": done}, indent=2))


def plot(rows, path, against):
    drawn, subplots = plots.figure((7, 4))
    axes = subplots()
    names = [f"batch {r['batch']}\nprompt {r['prompt']}" for r in rows]
    series = [("trillama", [r["decode_tokens_per_s"] for r in rows])]
    if against:
        series.append(("transformers", [r["hf"]["decode_tokens_per_s"] for r in rows]))
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series):
        axes.bar([x + i * width for x in range(len(rows))], values, width, label=label)
    centre = width * (len(series) - 1) / 2
    for x, r in enumerate(rows):
        label = "bandwidth bound" if x == 0 else None
        axes.plot([x - 0.4 + centre, x + 0.4 + centre], [r["bound_tokens_per_s"]] * 2, "k--", label=label)
    axes.set_xticks([x + centre for x in range(len(rows))], names)
    axes.set_ylabel("decode, tokens/s")
    axes.legend(frameon=False)
    plots.save(drawn, path)


# --- the command -----------------------------------------------------------------------------------------------------


def integers(text):
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive integers separated by commas")
    return values


def parser():
    p = cli.Parser(prog="trillama bench", description="Prefill and decode throughput beside their bounds.")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="SOURCE", help="folder, GGUF file, hub id or preset (default: smollm2)")
    source.add_argument("--shape", metavar="NAME", help=f"random weights, nothing is fetched: {', '.join(SHAPES)}")
    p.add_argument("--layers", type=int, metavar="N", help="with --shape: so many layers of it")
    p.add_argument("--batch", type=integers, default=[1], metavar="1,8", help="batch sizes")
    p.add_argument("--prompt", type=integers, default=[64], metavar="64,512", help="prompt lengths in tokens")
    p.add_argument("--new", type=int, default=128, help="tokens to generate in each run")
    p.add_argument("--rounds", type=int, default=3, help="runs of each row")
    p.add_argument("--dtype", choices=cli.DTYPES, help="default: float32 on a CPU, else the checkpoint's, bfloat16 with --shape")
    p.add_argument("--backend", choices=cli.BACKENDS, help="default: auto, Triton on a GPU and PyTorch on a CPU")
    p.add_argument("--quantize", choices=["int8", "int4"], help="weights in 8 or 4 bits")
    p.add_argument("--device", default=None, help="cuda, cuda:1, cpu (default: the GPU if there is one)")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--against", choices=["hf"], help="alternate with transformers on the same weights")
    p.add_argument("--cache-study", action="store_true", help="the same tokens with and without the KV cache, batch 1")
    p.add_argument("--json", metavar="FILE", help="write card and rows here, again after each row")
    p.add_argument("--plot", metavar="FILE", help="draw the rows here")
    return p


def first():
    """Whether this is the process that writes files, of those that torchrun started, if it did."""
    return not cli.under_torchrun() or parallel.ranks().rank == 0


def main(argv=None):
    args = parser().parse_args(argv)
    if args.new < 2 or args.rounds < 1:
        raise ValueError(f"--new is {args.new} and --rounds {args.rounds}, expected at least 2 and 1")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads is {args.threads}, expected at least 1")
    if args.cache_study and (args.against or args.plot or args.batch != [1]):
        raise ValueError("--cache-study is of batch 1, against nobody and drawn nowhere: expected no --batch, --against or --plot")
    if args.layers is not None and not args.shape:
        raise ValueError(f"--layers is {args.layers} without --shape, expected both or none: a checkpoint has all of its layers")
    if args.layers is not None and args.layers < 1:
        raise ValueError(f"--layers is {args.layers}, expected at least 1")
    if args.shape:
        config(args.shape)
    args.model = args.model or "smollm2"
    cli.check_model(args)
    if cli.under_torchrun() and (size := parallel.ranks().size) > 1:
        if args.against:
            raise ValueError(f"--against is {args.against} on {size} ranks, expected one: transformers would run on each")
        if args.shape:
            raise ValueError(f"--shape is {args.shape} on {size} ranks, expected one: a name with -shard is one GPU's part")
    if first():
        if args.json:
            files.check("--json", args.json)
        if args.plot:
            plots.check("--plot", args.plot)
    if args.against and importlib.util.find_spec("transformers") is None:
        raise ValueError(NEEDED)
    with cli.backend(args):
        return run(args)


def run(args):
    ranks, dtype = parallel.ranks(), getattr(torch, args.dtype) if args.dtype else None
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(ranks.device(args.device) or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"device": device, "dtype": dtype, "quantize": args.quantize}
    if args.shape:
        source = f"{args.shape}, random weights" + ("" if args.layers is None else f" of {args.layers} layers")
        model = package.Llama.random(args.shape, layers=args.layers, **options)
    else:
        source = args.model
        model = package.Llama.from_pretrained(source, ranks=ranks, **options)
    model.prepare(wait=True)
    dtype = model.model.norm.weight.dtype
    longest = max(args.prompt) + args.new
    if longest > model.config.context_length:
        raise ValueError(f"--prompt and --new add up to {longest}, expected at most {model.config.context_length}")
    if args.cache_study:
        from . import cache_study

        about = {"model": source, "dtype": str(dtype)[6:], "device": str(device)}
        for row in written(args.json, about, (cache_study.study(model, prompt, args.new, Clock) for prompt in args.prompt)):
            cache_study.show(row)
        return 0
    bandwidth = streaming_bandwidth(device)
    facts = card(model, source, dtype, device, bandwidth)
    show_card(facts)
    rival, peak = None, facts["datasheet_bandwidth"]
    if args.against:
        twin = (config(args.shape, args.layers), lent(model)) if args.shape else stored(source, dtype, device)
        _, rival = transformers_twin(*twin, device)
    show_header(args.against, peak)
    measured = (
        measure(model, rival, batch, prompt, args.new, args.rounds, bandwidth, peak, dtype)
        for batch, prompt in itertools.product(args.batch, args.prompt)
    )
    rows = []
    for row in written(args.json, {"card": facts}, measured):
        show_row(row)
        rows.append(row)
    if args.plot and first():
        plot(rows, args.plot, args.against)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["bench", *sys.argv[1:]]))
