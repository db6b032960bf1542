"""The command line: `trillama generate`, `convert` and `doctor`, and the way to all other commands.

A user's mistake ends in one line on stderr and exit status 2. What can be refused from the arguments alone is refused before torch
is imported: imports that take long happen within the commands, after that.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import os
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path

from .limits import check_sampling, check_stop

BACKENDS = ("auto", "triton", "reference")
DTYPES = ("float32", "bfloat16", "float16")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets for the processes that it starts


def main(argv=None):
    """Runs one command line (default: the process's own) and returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return status(lambda: _in_ranks(argv) if under_torchrun() else _dispatch(argv))


def status(command):
    """What command() returns, or the exit status of how it ended: that of `python -m trillama.bench.NAME` too."""
    _open_streams()
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone: `trillama ... | head`
        _drop(sys.stdout)
        return 141
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        reason = _reason(error)
        try:
            print(f"trillama: error: {reason}", file=sys.stderr)
        except OSError:  # the status must do
            _drop(sys.stderr)
        return 2


def _reason(error):
    """An exception in one line: of a file, its name and what the system says."""
    try:
        sys.stdout.flush()
    except OSError as full:  # what has been printed cannot be written: that is what went wrong
        _drop(sys.stdout)
        return f"standard output: {full.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _drop(stream):
    """What is still to be printed goes nowhere: Python would complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_streams():
    """A standard stream that is closed leads nowhere: else the next file that is opened takes its number, and what is printed."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)
        for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - as long as the process


def under_torchrun():
    """Whether torchrun has started this process."""
    return all(name in os.environ for name in TORCHRUN)


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
    name = argv[0] if argv else "--help"
    if name in ELSEWHERE:
        module, function, _ = ELSEWHERE[name]
        return getattr(importlib.import_module(module), function)(argv[1:])
    if name in HERE:
        run, add_arguments, text = HERE[name]
        parser = Parser(prog=f"trillama {name}", description=text)
        add_arguments(parser)
        return run(parser.parse_args(argv[1:]))
    parser = Parser(prog="trillama", description="Llama-style language models on Triton kernels or on plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"trillama {_version('trillama')}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for command, (*_, text) in (HERE | ELSEWHERE).items():
        commands.add_parser(command, help=text, add_help=False)
    if not name.startswith("-"):
        parser.error(f"there is no command {name}{nearest(name, commands.choices)}")
    parser.parse_args([name, *argv[1:]])
    return 0


class Parser(argparse.ArgumentParser):
    """One command's. Options are written out: an abbreviation would mean something else as soon as there is another option."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def parse_args(self, arguments=None, namespace=None):
        options, rest = self.parse_known_args(arguments, namespace)
        unknown = [text.split("=")[0] for text in rest if text.startswith("-")] or rest
        if unknown:
            hint = nearest(unknown[0], self._option_string_actions)
            self.error(f"there is no option {unknown[0]}{hint}" if unknown[0].startswith("-") else f"unexpected: {' '.join(rest)}")
        return options

    def _print_message(self, message, file=None):  # argparse's own says nothing where it cannot be written
        (file or sys.stderr).write(message or "")

    def error(self, message):
        self.exit(2, f"trillama: error: {message} (see {self.prog} --help)\n")


def nearest(name, known):
    """The one of the known names that may have been meant, as the end of a sentence."""
    words = {other.lstrip("-"): other for other in known}  # two dashes are not what names have in common
    close = [other for other in known if other.startswith(name)]
    close += [words[word] for word in difflib.get_close_matches(name.lstrip("-"), words, 1)]
    return f", did you mean {close[0]}?" if close else ""


def known(what, given, names):
    """The given names; a ValueError for the first that is none of those there are."""
    for name in given:
        if name not in names:
            raise ValueError(f"{what} is {name!r}, expected one of {', '.join(names)}{nearest(name, names)}")
    return list(given)


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
    """The arguments of `generate` that the command line has, checked; so is what belongs to the sampling options besides."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    arguments = {name: getattr(options, name) for name in names}
    check_sampling(**arguments)
    check_stop(options.stop)
    for name in ("top_k", "top_p", "min_p"):
        if arguments[name] is not None and options.temperature == 0:
            raise ValueError(f"--{name.replace('_', '-')} is {arguments[name]} at temperature 0, expected a --temperature above 0")
    return arguments


def check_model(options):
    """Raises a ValueError where what names the model or the backend cannot be right; nothing is loaded for that."""
    from .presets import check_source

    check_source(options.model)
    if not options.backend:
        known("TRILLAMA_BACKEND", [os.environ.get("TRILLAMA_BACKEND") or "auto"], BACKENDS)


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
    team = importlib.import_module(".parallel", __package__).ranks() if under_torchrun() else None
    if prompt == "-":
        prompt = team.first(sys.stdin.read) if team else sys.stdin.read()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    if not ids:
        raise ValueError("PROMPT is empty, expected at least one token")
    if team:
        team.agree(prompt=ids)
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
    arguments = sampling(options)
    check_model(options)
    tolerant_output()
    tokenizer = load_tokenizer(options)
    ids = encoded(tokenizer, options.prompt, options.chat)
    with backend(options):
        from .generation import generate

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

        generate(model, [ids] * samples, use_cache=not options.no_cache, stream=show, **arguments)
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


# --- convert ---------------------------------------------------------------------------------------------------------


def _convert_arguments(parser):
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder, a .gguf file, a hub id or a preset")
    add("target", metavar="TARGET", help="the folder to make")
    add("--to", choices=("hf", "meta"), required=True, help="safetensors as Hugging Face has them, or Meta's files")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they are; float32 for quantised ones)")
    add("--shard-size", type=_size, metavar="SIZE", help="with --to hf: of a .safetensors file (default: 5GB)")


def _size(text):
    """Bytes of a number with a unit: 5GB, 500MB."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) *([kKMGT]?)B?", text)
    count = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB")
    return count


def _convert(options):
    from .files import check_new_folder
    from .presets import check_source, locate

    check_source(options.source)
    check_new_folder(options.target)
    if options.shard_size and options.to != "hf":
        raise ValueError(f"--shard-size is given with --to {options.to}, expected --to hf: Meta's files are not sharded by size")
    source = locate(options.source)

    import torch

    from .convert import convert

    given = {"dtype": options.dtype and getattr(torch, options.dtype), "shard_size": options.shard_size}
    files = convert(source, options.target, options.to, **{name: value for name, value in given.items() if value})
    total = sum((Path(options.target) / file).stat().st_size for file in files)
    print(f"{options.target}: {len(files)} files, {total / 1e6:.1f} MB")


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
    "convert": (_convert, _convert_arguments, "a model's files in Hugging Face's or Meta's layout"),
    "doctor": (_doctor, _doctor_arguments, "what is installed, which backend each op takes and why, whether its kernels are right"),
}
ELSEWHERE = {
    "chat": ("trillama.model.chat", "main", "a dialogue, turn by turn"),
    "next": ("trillama.model.inspection", "show_next", "the likeliest next tokens and their probabilities"),
    "inspect": ("trillama.model.inspection", "inspect", "the modules of a model and their sizes; what a head attends to"),
    "bench": ("trillama.bench.decode", "main", "prefill and decode throughput, beside the bound that memory sets"),
    "xray": ("trillama.bench.xray", "main", "what the compiled kernels are made of, with no GPU"),
}

if __name__ == "__main__":
    sys.exit(main())
