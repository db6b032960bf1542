"""The command line: `trillama generate`, `doctor`, `bench`, `xray`.

A user's mistake ends in one line on stderr and exit status 2. Imports that take long happen within the commands.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import sys
import time
from importlib import metadata

BACKENDS = ("auto", "triton", "reference")
DTYPES = ("float32", "bfloat16", "float16")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets for the processes that it starts


def main(argv=None):
    """Runs one command line (default: the process's own) and returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return (_in_ranks(argv) if all(name in os.environ for name in TORCHRUN) else _dispatch(argv)) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone: `trillama ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"trillama: error: {reason}", file=sys.stderr)
        return 2


def _in_ranks(argv):
    """The command on every process that torchrun started; only the first has something to say."""
    from . import parallel

    with parallel.join() as ranks, contextlib.ExitStack() as silence:
        if ranks.rank > 0:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        return _dispatch(argv)


def _dispatch(argv):
    if argv and argv[0] in ELSEWHERE:
        module, _ = ELSEWHERE[argv[0]]
        return importlib.import_module(module).main(argv[1:])
    parser = Parser(prog="trillama", description="Llama-style language models on Triton kernels or on plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"trillama {_version('trillama')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, add_arguments, text) in HERE.items():
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        command.set_defaults(run=run)
    for name, (_, text) in ELSEWHERE.items():
        commands.add_parser(name, help=text, add_help=False)
    options = parser.parse_args(argv)
    return options.run(options)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"trillama: error: {message} (see {self.prog} --help)\n")


# --- generate --------------------------------------------------------------------------------------------------------


def _generate_arguments(parser):
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the text to continue, or - to read it from standard input")
    add("--model", default="smollm2", metavar="SOURCE", help="a folder, a .gguf file, a hub id or a preset (default: smollm2)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="the longest answer, in tokens (default: 64)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token each time")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens only")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that together have probability P")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--chat", action="store_true", help="the prompt is a message to answer, not a text to continue")
    add("--backend", choices=BACKENDS, help="default: auto, Triton on a GPU and PyTorch on a CPU")
    add("--dtype", choices=DTYPES, help="of weights and arithmetic (default: chosen for the device)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    add("--no-cache", action="store_true", help="compute the whole text anew for every token, to see what the cache is worth")
    add("--json", action="store_true", help="print one JSON object at the end instead of the text as it comes")


def _generate(options):
    from .presets import locate

    source = locate(options.model)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    import torch

    from ..kernels import use_backend
    from .generation import generate
    from .llama import Llama
    from .parallel import ranks
    from .tokenizer import Tokenizer

    prompt = ranks().first(sys.stdin.read) if options.prompt == "-" else options.prompt
    with use_backend(options.backend or os.environ.get("TRILLAMA_BACKEND") or "auto"):
        tokenizer = Tokenizer.from_pretrained(source)
        if options.chat:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        else:
            ids = tokenizer.encode(prompt)
        if not ids:
            raise ValueError("PROMPT is empty, expected at least one token")
        dtype = getattr(torch, options.dtype) if options.dtype else None
        ranks().agree(prompt=ids)
        model = Llama.from_pretrained(source, device=_device(options.device), dtype=dtype, ranks=ranks())

        text, stream, clock = [], tokenizer.stream(), [time.perf_counter()]

        def show(new):
            piece = stream.put(new[0])
            clock.append(time.perf_counter())
            text.append(piece)
            if not options.json:
                print(piece, end="", flush=True)

        new = generate(
            model, [ids], max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, seed=options.seed, use_cache=not options.no_cache, stream=show,
        )  # fmt: skip
    text.append(stream.end())
    report = _speeds(len(ids), clock)
    if options.json:
        answer = {"model": options.model, "prompt_ids": ids, "ids": new[0].tolist(), "text": "".join(text), **report}
        print(json.dumps(answer, ensure_ascii=False))
        return
    print(text[-1], end="" if "".join(text).endswith("\n") else "\n", flush=True)
    print(_in_words(report), file=sys.stderr)


def _device(name):
    """A torch.device for --device, None where none is given; ValueError where this machine has no such thing."""
    import torch

    from .parallel import ALONE, ranks

    if ranks() is not ALONE:
        return ranks().device(name)
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}, which torch cannot use: {str(error).splitlines()[0]}") from None
    return device


def _speeds(prompt, clock):
    """Seconds and tokens a second, prefill and decode apart: the first new token comes out of the prefill."""
    report = {"prompt_tokens": prompt, "new_tokens": len(clock) - 1}
    for name, tokens, span in (("prefill", prompt, clock[:2]), ("decode", len(clock) - 2, clock[1:])):
        if len(span) > 1:
            seconds = span[-1] - span[0]
            report[name] = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return report


def _in_words(report):
    parts = [
        f"{name} {part['tokens']} tokens in {part['seconds']:.2f} s, {part['tokens_per_second']:.1f} tokens/s"
        for name, part in ((name, report.get(name)) for name in ("prefill", "decode"))
        if part
    ]
    return "; ".join(parts) or "no new tokens"


# --- doctor ----------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "gguf", "jinja2", "huggingface_hub")
OPTIONAL = {
    "transformers": "transformers", "liger-kernel": "peers", "matplotlib": "plot", "sentencepiece": "meta", "pytest": "test",
}  # fmt: skip


def _doctor_arguments(parser):
    pass


def _doctor(options):
    import torch

    from ..kernels import dispatch, reference
    from .presets import cache_folder

    def row(title, text):
        print(f"{title:<10} {text}")

    row("trillama", _version("trillama"))
    row("python", f"{platform.python_version()} at {sys.executable}")
    row("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, torch uses {torch.get_num_threads()} threads")
    for line in _gpus(torch):
        row("gpu", line)
    row("packages", ", ".join(f"{name} {_version(name) or 'MISSING'}" for name in PACKAGES))
    row("optional", ", ".join(f"{name} {_version(name) or f'absent (extra {extra})'}" for name, extra in OPTIONAL.items()))
    row("cache", cache_folder())
    row("backend", dispatch.backend())
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        choice, reason = _choice(dispatch, torch.device(device))
        row(device, f"{choice}: {reason}")
        for op in reference.__all__:
            if op != "rope_tables":  # computed once, the same way everywhere
                row("", f"{op:<22} {choice}")


def _choice(dispatch, device):
    """(the implementation that an op takes for a tensor on the device, the reason)."""
    name, obstacle = dispatch.backend(), dispatch.why_not_triton(device)
    if name == "reference":
        return "reference", "it was asked for"
    if name == "triton":
        return ("an error", f"the backend triton was asked for, but {obstacle}") if obstacle else ("triton", "it was asked for")
    if device.type == "cuda" and not obstacle:
        return "triton", "a GPU"
    return "reference", obstacle or "tensors on a CPU go to Triton only where the backend triton is asked for"


def _gpus(torch):
    if torch.version.cuda is None and torch.version.hip is None:
        return ["none: this torch is built for CPUs only"]
    if not torch.cuda.is_available():
        return [f"none: torch (built for CUDA {torch.version.cuda}) finds no GPU or no driver"]
    lines = []
    for i in range(torch.cuda.device_count()):
        gpu, memory = torch.cuda.get_device_properties(i), torch.cuda.get_device_properties(i).total_memory / 2**30
        toolkit = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
        lines.append(f"cuda:{i} {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory:.0f} GiB, {toolkit}")
    return lines


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Commands of this file: function, its arguments, its help. Commands that live elsewhere read their own arguments.
HERE = {
    "generate": (_generate, _generate_arguments, "continue a text, or answer a message"),
    "doctor": (_doctor, _doctor_arguments, "what is installed, and which backend each op takes and why"),
}
ELSEWHERE = {
    "bench": ("trillama.bench.decode", "prefill and decode throughput, beside the bound that memory sets"),
    "xray": ("trillama.bench.xray", "what the compiled kernels are made of, with no GPU"),
}

if __name__ == "__main__":
    sys.exit(main())
