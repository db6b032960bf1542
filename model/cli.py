"""The command line: `trillama generate` and `doctor`, and the way to all other commands.

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
    return status(lambda: _in_ranks(argv) if all(name in os.environ for name in TORCHRUN) else _dispatch(argv))


def status(command):
    """What command() returns, or the exit status of how it ended: that of `python -m trillama.bench.NAME` too."""
    try:
        return command() or 0
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
        if ranks.size > 1 and argv[:1] in (["chat"], ["inspect"], ["convert"]):
            raise ValueError(f"{argv[0]} runs in one process, expected no torchrun before it")
        if ranks.rank > 0:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        return _dispatch(argv)


def _dispatch(argv):
    if argv and argv[0] in ELSEWHERE:
        module, function, _ = ELSEWHERE[argv[0]]
        return getattr(importlib.import_module(module), function)(argv[1:])
    parser = Parser(prog="trillama", description="Llama-style language models on Triton kernels or on plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"trillama {_version('trillama')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, add_arguments, text) in HERE.items():
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        command.set_defaults(run=run)
    for name, (_, _, text) in ELSEWHERE.items():
        commands.add_parser(name, help=text, add_help=False)
    options = parser.parse_args(argv)
    return options.run(options)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"trillama: error: {message} (see {self.prog} --help)\n")


# --- what several commands share -------------------------------------------------------------------------------------


def add_model_options(parser):
    add = parser.add_argument_group("model").add_argument
    add("--model", default="smollm2", metavar="SOURCE", help="a folder, a .gguf file, a hub id or a preset (default: smollm2)")
    add("--backend", choices=BACKENDS, help="default: auto, Triton on a GPU and PyTorch on a CPU")
    add("--dtype", choices=DTYPES, help="of weights and arithmetic (default: chosen for the device)")
    add("--quantize", choices=("int8", "int4"), help="weights in 8 bits, a scale a row, or 4, a scale and a minimum for 32 columns")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


def add_sampling_options(parser, new=64):
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=int, default=new, metavar="N", help=f"the longest answer, in tokens (default: {new})")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token each time")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens only")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that together have probability P")
    add("--min-p", type=float, metavar="P", help="sample among tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="divide the logits of tokens that are there already: 1.1 or so")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")


def sampling(options):
    """The arguments of `generate` that the command line has."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(options, name) for name in names}


def backend(options):
    """The context in which a command runs its model."""
    from ..kernels import use_backend

    return use_backend(options.backend or os.environ.get("TRILLAMA_BACKEND") or "auto")


def device(name):
    """A torch.device for --device, None where none is given; ValueError where this machine has no such thing."""
    import torch

    from .parallel import ALONE, ranks

    if ranks() is not ALONE:
        return ranks().device(name)
    if name is None:
        return None
    try:
        return torch.empty(1, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}, which torch cannot use: {str(error).splitlines()[0]}") from None


def load_tokenizer(options):
    from .presets import locate
    from .tokenizer import Tokenizer

    return Tokenizer.from_pretrained(locate(options.model))


def load_model(options):
    import torch

    from .llama import Llama
    from .parallel import ranks
    from .presets import locate

    dtype = getattr(torch, options.dtype) if options.dtype else None
    return Llama.from_pretrained(
        locate(options.model), device=device(options.device), dtype=dtype, quantize=options.quantize, ranks=ranks()
    )


def encoded(tokenizer, prompt, chat=False):
    """The ids of the command line's PROMPT, or of a dialogue that it begins."""
    from .parallel import ranks

    prompt = ranks().first(sys.stdin.read) if prompt == "-" else prompt
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    if not ids:
        raise ValueError("PROMPT is empty, expected at least one token")
    ranks().agree(prompt=ids)
    return ids


def tolerant_output():
    """A terminal that lacks a character is no reason to stop."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


class Answer:
    """A row of `generate` as it comes: `ids` and `text` up to its end, and what the end was: "eos", "stop" or "length"."""

    def __init__(self, tokenizer, model, stop=()):
        self.ids, self.text, self.end = [], "", None
        self._stream, self._eos = tokenizer.stream(stop=stop), model.config.eos_token_id

    def put(self, id):
        """Takes the next id and returns the text that is certain by now and was not before."""
        if self.end is not None:
            return ""
        self.ids.append(id)
        piece = self._stream.put(id)
        self.end = "stop" if self._stream.stopped else "eos" if id in self._eos else None
        return self._add(piece)

    def close(self):
        """The text that was held back: what might have become a character or a stop string."""
        piece = self._add(self._stream.end())
        self.end = "stop" if self._stream.stopped else self.end or "length"
        return piece

    def _add(self, piece):
        self.text += piece
        return piece


# --- generate --------------------------------------------------------------------------------------------------------


def _generate_arguments(parser):
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the text to continue, or - to read it from standard input")
    add("--chat", action="store_true", help="the prompt is a message to answer, not a text to continue")
    add("--samples", type=int, default=1, metavar="N", help="so many texts of one prompt, each drawn for itself")
    add("--no-cache", action="store_true", help="compute the whole text anew for every token, to see what the cache is worth")
    add("--json", action="store_true", help="print one JSON object at the end instead of the text as it comes")
    add_sampling_options(parser)
    add_model_options(parser)


def _generate(options):
    samples = options.samples
    if samples < 1 or (samples > 1 and options.temperature == 0):
        reason = "at least 1" if samples < 1 else "1, or a temperature above 0: at 0 all samples are the same"
        raise ValueError(f"--samples is {samples}, expected {reason}")
    tolerant_output()
    tokenizer = load_tokenizer(options)
    tokenizer.stream(stop=options.stop)  # a mistake is told before anything is loaded
    with backend(options):
        from .generation import generate

        ids = encoded(tokenizer, options.prompt, options.chat)
        model = load_model(options)
        if not options.no_cache:
            model.prepare()
        answers, clock = [Answer(tokenizer, model, options.stop) for _ in range(samples)], [time.perf_counter()]

        def show(new):
            pieces = [answer.put(id) for answer, id in zip(answers, new.tolist())]
            clock.append(time.perf_counter())
            if samples == 1 and not options.json:
                print(pieces[0], end="", flush=True)
            return [answer.end is not None for answer in answers]

        generate(model, [ids] * samples, use_cache=not options.no_cache, stream=show, **sampling(options))
    rest, *_ = [answer.close() for answer in answers]
    report = _speeds(len(ids), clock, samples)
    if options.json:
        texts = [{"ids": answer.ids, "text": answer.text, "end": answer.end} for answer in answers]
        texts = texts[0] if samples == 1 else {"samples": texts}
        print(json.dumps({"model": options.model, "prompt_ids": ids, **texts, **report}, ensure_ascii=False))
        return
    for number, answer in enumerate(answers, 1):
        if samples > 1:
            print(f"--- {number} of {samples}")
        end = "" if answer.text.endswith("\n") else "\n"
        print(rest if samples == 1 else answer.text, end=end, flush=True)
    print(_in_words(report), file=sys.stderr)


def _speeds(prompt, clock, samples=1):
    """Seconds and tokens a second, prefill and decode apart: the first new token comes out of the prefill."""
    report = {"prompt_tokens": prompt, "new_tokens": len(clock) - 1}
    for name, tokens, span in (("prefill", prompt, clock[:2]), ("decode", len(clock) - 2, clock[1:])):
        if len(span) > 1:
            seconds = span[-1] - span[0]
            report[name] = {"tokens": tokens * samples, "seconds": seconds, "tokens_per_second": tokens * samples / seconds}
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
CHECK_SECONDS = 300  # for one op, whose kernels may have to be compiled first
OPTIONAL = {
    "transformers": "transformers", "liger-kernel": "peers", "matplotlib": "plot", "sentencepiece": "meta", "pytest": "test",
}  # fmt: skip


def _doctor_arguments(parser):
    pass


def _doctor(options):
    import torch

    from ..bench.check import ops
    from ..kernels import dispatch
    from .presets import cache_folder

    def row(title, text):
        print(f"{title:<10} {text}")

    wrong = 0
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
        verdicts = _checked(ops(), device) if choice == "triton" else dict.fromkeys(ops())
        for op, verdict in verdicts.items():
            row("", f"{op:<22} {choice}{f': {verdict}' if verdict else ''}")
            wrong += verdict not in (None, "ok")
    if wrong:
        row("", f"{wrong} of the kernels above fail here")
    return int(wrong > 0)


def _checked(ops, device):
    """{op: "ok" or what is wrong} of every op launched on the device and compared with its reference, each in a process of its own:
    one that crashes or hangs takes no other's line."""
    from concurrent.futures import ThreadPoolExecutor

    from ..bench import apart, check

    def verdict(op):
        try:
            (answer,) = apart.apart(check.check, op, device, limit=CHECK_SECONDS)
        except apart.Died as error:
            return str(error)
        return answer

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # most of the time is the compiler's
        return dict(zip(ops, pool.map(verdict, ops)))


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
    "doctor": (_doctor, _doctor_arguments, "what is installed, which backend each op takes and why, whether its kernels are right"),
}
ELSEWHERE = {
    "chat": ("trillama.model.chat", "main", "a dialogue, turn by turn"),
    "next": ("trillama.model.inspection", "show_next", "the likeliest next tokens and their probabilities"),
    "inspect": ("trillama.model.inspection", "inspect", "the modules of a model and their sizes; what a head attends to"),
    "convert": ("trillama.model.convert", "main", "a model's files in Hugging Face's or Meta's layout"),
    "bench": ("trillama.bench.decode", "main", "prefill and decode throughput, beside the bound that memory sets"),
    "xray": ("trillama.bench.xray", "main", "what the compiled kernels are made of, with no GPU"),
}

if __name__ == "__main__":
    sys.exit(main())
