"""Looking inside a model: `trillama inspect` (its modules, their sizes; what a head attends to) and `trillama next` (what it would
say next, and how sure it is).
"""

import json
import math
from itertools import groupby

from ..bench import plots
from . import cli
from .later import later

torch = later("torch")

# --- what a model is made of: from its files' headers, nothing is loaded ---------------------------------------------


def anatomy(source, dtype=None, device=None):
    """(model on the meta device, report) of a model's files.

    report: what `trillama inspect --json` prints: the sizes of all, of every layer and of every tensor, in parameters and in bytes
    of memory, beside what the tensor is in its file. dtype and device: as for `Llama.from_pretrained`.
    """
    from .checkpoint import open_checkpoint
    from .llama import Llama, unpacked

    with open_checkpoint(source) as checkpoint:
        with torch.device("meta"):
            model = Llama(checkpoint.config)
        names = checkpoint.names()
        if dtype is None:
            on_cpu = device.type == "cpu" if device else not torch.cuda.is_available()
            dtype = torch.float32 if on_cpu else checkpoint.dtype("model.embed_tokens.weight")
        rows = []
        for name, parameter in model.named_parameters():
            count = parameter.numel()
            parts = [part for part in (name, *(part for part, _ in unpacked(name, model.config))) if part in names]
            kinds = ", ".join(dict.fromkeys(checkpoint.kind(part) for part in parts)) or "missing"
            row = {"name": name, "shape": [*parameter.shape], "parameters": count, "bytes": count * dtype.itemsize}
            rows.append({**row, "file": kinds})
    config, layers = model.config, []
    for layer, (window, rotary) in enumerate(zip(config.windows, config.rotary)):
        own = [row for row in rows if row["name"].startswith(f"model.layers.{layer}.")]
        sums = {key: sum(row[key] for row in own) for key in ("parameters", "bytes")}
        layers.append({"layer": layer, **sums, "window": window, "rotary": rotary})
    total = sum(row["parameters"] for row in rows)
    return model, {
        "model": str(source),
        "model_type": config.model_type,
        "parameters": total,
        "dtype": str(dtype)[6:],
        "bytes": total * dtype.itemsize,
        "cache_bytes_per_token": 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize,
        "config": dict(sorted(vars(config).items())),
        "layers": layers,
        "tensors": rows,
    }


def show_anatomy(model, report):
    config, dtype = model.config, report["dtype"]
    print(model)
    kinds = ", ".join(dict.fromkeys(kind for row in report["tensors"] for kind in row["file"].split(", ")))
    print(f"\n{report['model']}: a {report['model_type']} of {report['parameters']:,} parameters, {kinds} in the file, ", end="")
    print(f"{size(report['bytes'])} in memory as {dtype}")
    cache = report["cache_bytes_per_token"]
    print(f"the cache takes {size(cache)} a token, {size(cache * config.context_length)} at {config.context_length:,} positions\n")
    print(f"{'':<42} {'shape':>16} {'parameters':>15} {'in memory':>10}  in the file")
    for layers, rows in groupby(report["tensors"], key=lambda row: run_of_layers(row, report)):
        rows = list(rows)
        if layers:
            first, last = layers
            rows = [row for row in rows if row["name"].startswith(f"model.layers.{first}.")]
            show_row(f"layers {first} to {last}, each" if last > first else f"layer {first}", None, rows, "")
        for row in rows:
            show_row(f"  {row['name'].split('.', 3)[3]}" if layers else row["name"], row["shape"], [row], row["file"])
    if config.tie_word_embeddings:
        print("lm_head.weight is model.embed_tokens.weight")


def run_of_layers(row, report):
    """(first, last) of the neighbouring layers that are made like the one of this tensor; None for one outside the layers."""
    if not row["name"].startswith("model.layers."):
        return None
    layers, layer = report["layers"], int(row["name"].split(".")[2])

    def alike(other):
        return all(layers[other][key] == layers[layer][key] for key in ("parameters", "window", "rotary"))

    first = last = layer
    while first > 0 and alike(first - 1):
        first -= 1
    while last + 1 < len(layers) and alike(last + 1):
        last += 1
    return first, last


def show_row(name, shape, rows, kind):
    count, taken = (sum(row[key] for row in rows) for key in ("parameters", "bytes"))
    shape = " x ".join(map(str, shape or ()))
    print(f"{name:<42} {shape:>16} {count:>15,} {size(taken):>10}  {kind}".rstrip())


def size(count):
    """Bytes in words."""
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(len(units) - 1, (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.{min(power, 1)}f} {units[power]}"


# --- what a head attends to ------------------------------------------------------------------------------------------


def attention_map(model, ids, layer):
    """(weights float32 [Hq, S, S], angles float64 [S, R/2]) of a layer for one sequence of S ids.

    weights[h, i, j]: how much of key j is in the output of query i, softmax(scale q_i k_j) over the keys that it sees: computed
    anew from q and k, which no kernel of attention ever writes down as a whole. angles: by how much the layer rotates the pairs of
    features at each position, in radians from 0 to 2 pi.
    """
    from ..kernels import apply_rope

    with torch.inference_mode():
        inputs = []
        attention = model.model.layers[layer].self_attn
        hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args))
        try:
            model.hidden_states(torch.tensor([ids], device=model.lm_head.weight.device))
        finally:
            hook.remove()
        qkv, rope, _, _ = inputs[0]
        q, k, _ = qkv.view(1, len(ids), -1, attention.head_dim).transpose(1, 2).split(attention.heads, 1)
        if attention.q_norm is not None:
            q, k = attention.q_norm(q)[0], attention.k_norm(k)[0]
        cos, sin = rope[attention.rotary]
        q, k = apply_rope(q, k, cos, sin, interleaved=attention.interleaved)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q.float() @ k.float().mT)[0] * attention.head_dim**-0.5
        behind = torch.arange(len(ids), device=scores.device)
        behind = behind[:, None] - behind  # how far a key lies behind the query
        seen = (behind >= 0) & (behind < (attention.window or len(ids)))
        angles = torch.atan2(sin[: len(ids)].double(), cos[: len(ids)].double()) % (2 * torch.pi)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1), angles


def show_attention(names, weights):
    width = max(map(len, names))
    for i, row in enumerate(weights):
        strongest = sorted(range(i + 1), key=lambda j: -row[j])[:4]
        print(f"{names[i]:<{width}}  " + "  ".join(f"{row[j]:.2f} {names[j]}" for j in strongest))


def plot_attention(names, weights, angles, title, path):
    figure, subplots = plots.figure((12, 5.5))
    left, right = subplots(1, 2)
    image = left.imshow(weights, vmin=0, vmax=1, cmap="magma")
    left.set(title=title, xlabel="key", ylabel="query")
    if len(names) <= 64:
        left.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        left.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=left, label="softmax weight", shrink=0.8)
    image = right.imshow(angles, vmin=0, vmax=2 * math.pi, cmap="twilight", aspect="auto", interpolation="nearest")
    right.set(title="rotary angles", xlabel="pair of features", ylabel="position")
    figure.colorbar(image, ax=right, label="radians", shrink=0.8)
    plots.save(figure, path)


def inspect_parser():
    p = cli.Parser(prog="trillama inspect", description="The modules of a model and their sizes, or what a head attends to.")
    p.add_argument("--attention", metavar="PROMPT", help="the attention map of this text, - for standard input")
    p.add_argument("--layer", type=int, metavar="L", help="of this layer (default: 0)")
    p.add_argument("--head", type=int, metavar="H", help="and this query head (default: 0)")
    p.add_argument("--plot", metavar="FILE", help="draw the map and the rotary angles")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    cli.add_model_options(p)
    return p


def inspect(argv=None):
    options = inspect_parser().parse_args(argv)
    if options.attention is None:
        for name in ("layer", "head", "plot", "backend", "quantize"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} is of an attention map, expected --attention PROMPT with it")
    for name in ("layer", "head"):
        if (getattr(options, name) or 0) < 0:
            raise ValueError(f"--{name} is {getattr(options, name)}, expected a number from 0 on")
    cli.check_model(options)
    if options.plot:
        plots.check("--plot", options.plot)
    cli.tolerant_output()
    if options.attention is None:
        dtype = getattr(torch, options.dtype) if options.dtype else None
        model, report = anatomy(options.model, dtype, cli.device(options.device))
        print(json.dumps(report)) if options.json else show_anatomy(model, report)
        return 0
    tokenizer = cli.load_tokenizer(options)
    ids = cli.encoded(tokenizer, options.attention)
    layer, head = options.layer or 0, options.head or 0
    with cli.backend(options):
        model = cli.load_model(options)
        config = model.config
        for name, value, limit in (("layer", layer, config.num_hidden_layers), ("head", head, config.num_attention_heads)):
            if value >= limit:
                raise ValueError(f"--{name} is {value}, expected 0 to {limit - 1}")
        weights, angles = attention_map(model, ids, layer)
    names, weights, angles = [repr(tokenizer.token(id)) for id in ids], weights[head].tolist(), angles.tolist()
    where = {"layer": layer, "head": head}
    if options.plot:
        plot_attention(names, weights, angles, f"{options.model}: layer {layer}, head {head}", options.plot)
    if options.json:
        tokens = [tokenizer.token(id) for id in ids]
        print(json.dumps({"model": options.model, **where, "ids": ids, "tokens": tokens, "weights": weights, "angles": angles}))
    elif not options.plot:
        show_attention(names, weights)
    return 0


# --- what comes next -------------------------------------------------------------------------------------------------


def next_tokens(model, ids, count):
    """[(id, probability), ...]: the likeliest tokens after one sequence of ids, the likeliest first."""
    with torch.inference_mode():
        hidden = model.hidden_states(torch.tensor([ids], device=model.lm_head.weight.device))[:, -1]
        best = model.head(hidden)[0].softmax(-1).topk(min(count, model.config.vocab_size))
    return list(zip(best.indices.tolist(), best.values.tolist()))


def next_parser():
    p = cli.Parser(prog="trillama next", description="The likeliest next tokens of a text and their probabilities.")
    p.add_argument("prompt", metavar="PROMPT", help="the text to continue, or - to read it from standard input")
    p.add_argument("--top-k", type=int, default=10, metavar="K", help="so many (default: 10)")
    p.add_argument("--chat", action="store_true", help="the prompt is a message to answer, not a text to continue")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    cli.add_model_options(p)
    return p


def show_next(argv=None):
    options = next_parser().parse_args(argv)
    if options.top_k < 1:
        raise ValueError(f"--top-k is {options.top_k}, expected at least 1")
    cli.check_model(options)
    cli.tolerant_output()
    tokenizer = cli.load_tokenizer(options)
    ids = cli.encoded(tokenizer, options.prompt, options.chat)
    with cli.backend(options):
        best = next_tokens(cli.load_model(options), ids, options.top_k)
    best = [{"id": id, "token": tokenizer.token(id), "probability": p} for id, p in best]
    if options.json:
        print(json.dumps({"model": options.model, "prompt_ids": ids, "next": best}, ensure_ascii=False))
        return 0
    for row in best:
        print(f"{row['probability']:8.4f}  {row['id']:>7}  {row['token']!r}")
    return 0
