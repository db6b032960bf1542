"""The command line as a user meets it: text on stdout, speeds on stderr, one line and status 2 for a mistake."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trillama.model import cli

pytestmark = pytest.mark.host

TRILLAMA = [sys.executable, "-m", "trillama.model.cli"]


def run(*arguments, **options):
    command = [*TRILLAMA, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, **options)


def mistake(result, *words):
    status, out, err = result
    assert status == 2, err
    assert err.startswith("trillama: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err
    return out


# --- generate --------------------------------------------------------------------------------------------------------


def expected_ids(folder, ids, count):
    """Greedy ids of transformers on the same files, in float32."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    new = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return new[0, len(ids) :].tolist()


def test_generate(trillama, tiny_folder):
    from trillama.model import Tokenizer

    tokenizer = Tokenizer.from_pretrained(tiny_folder)
    status, out, err = trillama("generate", "the capital of", "--model", tiny_folder, "--max-new-tokens", 12)
    assert status == 0
    ids = expected_ids(tiny_folder, tokenizer.encode("the capital of"), 12)
    text = tokenizer.decode(ids)
    assert out == text + ("" if text.endswith("\n") else "\n")
    assert re.search(r"prefill \d+ tokens in [\d.]+ s, [\d.]+ tokens/s; decode 11 tokens in [\d.]+ s, [\d.]+ tokens/s\n$", err)


@pytest.mark.parametrize("option", [[], ["--no-cache"], ["--dtype", "float32"], ["--device", "cpu"], ["--backend", "reference"]])
def test_json_holds_the_same_text(trillama, tiny_folder, option):
    _, text, _ = trillama("generate", "the other", "--model", tiny_folder, "--max-new-tokens", 9)
    status, out, err = trillama("generate", "the other", "--model", tiny_folder, "--max-new-tokens", 9, "--json", *option)
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert answer["text"].rstrip("\n") == text.rstrip("\n")
    assert answer["new_tokens"] == len(answer["ids"]) == 9
    assert answer["prompt_tokens"] == len(answer["prompt_ids"]) == answer["prefill"]["tokens"]
    assert answer["decode"]["tokens"] == 8
    assert answer["decode"]["tokens_per_second"] == pytest.approx(8 / answer["decode"]["seconds"])


def test_chat_applies_the_template(trillama, tiny_folder):
    from trillama.model import Tokenizer

    _, out, _ = trillama("generate", "a b", "--model", tiny_folder, "--max-new-tokens", 3, "--chat", "--json")
    dialogue = Tokenizer.from_pretrained(tiny_folder).apply_chat_template([{"role": "user", "content": "a b"}])
    assert json.loads(out)["prompt_ids"] == dialogue


def test_sampling_options_reach_the_model(trillama, tiny_folder):
    def ids(*options):
        _, out, err = trillama("generate", "a", "--model", tiny_folder, "--max-new-tokens", 20, "--json", *options)
        assert err == ""
        return json.loads(out)["ids"]

    greedy = ids()
    hot = ids("--temperature", 5, "--seed", 1)
    assert hot == ids("--temperature", 5, "--seed", 1)
    assert len({tuple(greedy), tuple(hot), tuple(ids("--temperature", 5, "--seed", 2))}) == 3
    assert ids("--temperature", 5, "--top-k", 1) == greedy
    assert ids("--temperature", 5, "--top-p", 0.000001) == greedy


def test_more_sampling_options(trillama, tiny_folder):
    def ids(*options):
        status, out, err = trillama("generate", "a", "--model", tiny_folder, "--max-new-tokens", 20, "--json", *options)
        assert (status, err) == (0, "")
        return json.loads(out)["ids"]

    greedy = ids()
    assert ids("--temperature", 5, "--min-p", 1) == greedy
    assert ids("--repetition-penalty", 1.0) == greedy
    penalised = ids("--repetition-penalty", 1e6)
    assert len(set(penalised)) == 20  # nothing is said twice


def test_samples(trillama, tiny_folder):
    """Each with its own text; the first are the same however many there are."""
    options = ("generate", "a b", "--model", tiny_folder, "--max-new-tokens", 15, "--temperature", 2, "--seed", 4)
    three = json.loads(trillama(*options, "--samples", 3, "--json")[1])
    texts = [sample["text"] for sample in three["samples"]]
    assert len(set(texts)) == 3
    assert three["decode"]["tokens"] == 3 * (three["new_tokens"] - 1)
    one = json.loads(trillama(*options, "--json")[1])
    assert {key: one[key] for key in ("ids", "text", "end")} == three["samples"][0]
    assert json.loads(trillama(*options, "--samples", 2, "--json")[1])["samples"] == three["samples"][:2]
    status, out, _ = trillama(*options, "--samples", 3)
    assert status == 0
    assert out == "".join(f"--- {n} of 3\n{text}" + "\n" * (not text.endswith("\n")) for n, text in enumerate(texts, 1))


def test_stop(trillama, tiny_folder):
    """Text ends before the stop string, which two tokens bring about between them; so does generating."""
    options = ("generate", "a b", "--model", tiny_folder, "--max-new-tokens", 40, "--temperature", 3, "--seed", 8)
    free = json.loads(trillama(*options, "--json")[1])
    from trillama.model import Tokenizer

    tokenizer = Tokenizer.from_pretrained(tiny_folder)
    pieces = [tokenizer.decode([id]) for id in free["ids"]]
    at = next(i for i in range(8, 38) if pieces[i].isascii() and pieces[i + 1].isascii() and pieces[i] and pieces[i + 1])
    stop = pieces[at][-1] + pieces[at + 1][0]
    end = free["text"].index(stop)
    got = json.loads(trillama(*options, "--stop", "not there", "--stop", stop, "--json")[1])
    assert (got["text"], got["end"]) == (free["text"][:end], "stop")
    assert got["ids"] == free["ids"][: len(got["ids"])]
    assert len(got["ids"]) <= at + 2
    _, out, _ = trillama(*options, "--stop", stop)
    assert out.removesuffix("\n") == free["text"][:end].removesuffix("\n")
    assert free["end"] == "length"


def test_what_may_become_a_stop_string_is_shown_in_the_end(trillama, tiny_folder):
    options = ("generate", "a b", "--model", tiny_folder, "--max-new-tokens", 6)
    text = trillama(*options)[1]
    last = text.removesuffix("\n")[-1]
    assert trillama(*options, "--stop", last + "never")[1] == text


def test_prompt_from_standard_input(trillama, tiny_folder, monkeypatch):
    arguments = ("--model", tiny_folder, "--max-new-tokens", 5, "--json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two"))
    status, piped, _ = trillama("generate", "-", *arguments)
    assert status == 0
    assert json.loads(piped)["ids"] == json.loads(trillama("generate", "one two", *arguments)[1])["ids"]


def test_no_new_tokens(trillama, tiny_folder):
    status, out, err = trillama("generate", "a", "--model", tiny_folder, "--max-new-tokens", 0)
    assert (status, out) == (0, "\n")
    assert "no new tokens" in err


def test_text_that_the_terminal_cannot_show(tiny_folder):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "TRILLAMA_BACKEND": "reference"}
    arguments = ("generate", "日本", "--model", tiny_folder, "--max-new-tokens", 40, "--temperature", 9, "--seed", 3)
    done = run(*arguments, env=environment)
    assert done.returncode == 0, done.stderr


MISTAKES = {
    "no such model": (["--model", "/nowhere"], "/nowhere"),
    "no such hub id": (["--model", "no-one/has-this"], "no-one/has-this"),
    "temperature": (["--temperature", "-1"], "temperature"),
    "temperature is a word": (["--temperature", "hot"], "--temperature"),
    "top-k": (["--top-k", "0"], "top_k"),
    "top-p": (["--top-p", "1.5"], "top_p"),
    "min-p": (["--min-p", "2"], "min_p"),
    "repetition-penalty": (["--repetition-penalty", "0"], "repetition_penalty"),
    "an empty stop string": (["--stop", ""], "stop is ['']"),
    "no samples": (["--samples", "0"], "--samples is 0"),
    "equal samples": (["--samples", "2"], "--samples is 2, expected 1, or a temperature above 0"),
    "too many tokens": (["--max-new-tokens", "100000"], "512"),
    "a negative number of tokens": (["--max-new-tokens", "-3"], "max_new_tokens"),
    "unknown device": (["--device", "toaster"], "--device is 'toaster'"),
    "unknown backend": (["--backend", "magic"], "--backend"),
    "unknown dtype": (["--dtype", "int3"], "--dtype"),
    "unknown option": (["--fast"], "--fast"),
}


@pytest.mark.parametrize("how", MISTAKES)
def test_mistakes(trillama, tiny_folder, monkeypatch, how):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options, words = MISTAKES[how]
    model = [] if "--model" in options else ["--model", tiny_folder]
    assert mistake(trillama("generate", "a", *model, *options), words) == ""


def test_a_device_that_is_not_here(trillama, tiny_folder):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    mistake(trillama("generate", "a", "--model", tiny_folder, "--device", "cuda"), "--device is 'cuda'")


def test_backend_of_the_environment(trillama, tiny_folder, monkeypatch):
    monkeypatch.setenv("TRILLAMA_BACKEND", "magic")
    mistake(trillama("generate", "a", "--model", tiny_folder), "magic")


def test_empty_prompt(trillama, tiny_folder):
    mistake(trillama("generate", "", "--model", tiny_folder), "PROMPT is empty")


def test_model_without_a_chat_template(trillama, tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        if "template" not in file.name:
            os.link(file, tmp_path / file.name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mistake(trillama("generate", "a", "--model", tmp_path, "--chat"), "no chat template")


def damaged(folder, target, name, change):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / name).write_bytes(change((target / name).read_bytes()))
    return target


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda data: data[:-100]),
        ("model.safetensors", lambda data: b""),
        ("model.safetensors", lambda data: data.replace(b"model.norm.weight", b"model.morn.weight")),
        ("config.json", lambda data: data[:-10]),
        ("config.json", lambda data: data.replace(b'"hidden_size": 48', b'"hidden_size": -8')),
        ("tokenizer.json", lambda data: data[:-10]),
    ],
    ids=["cut weights", "no weights", "renamed tensor", "cut config", "negative size", "cut vocabulary"],
)
def test_broken_files(trillama, tiny_folder, tmp_path, name, change):
    folder = damaged(tiny_folder, tmp_path, name, change)
    assert mistake(trillama("generate", "a", "--model", folder), str(folder)) == ""


def test_file_that_is_no_gguf(trillama, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    mistake(trillama("generate", "a", "--model", tmp_path / "x.gguf"), "expected b'GGUF'")


# --- the frame -------------------------------------------------------------------------------------------------------


def test_mistakes_leave_no_traceback():
    for arguments in (["dance"], ["generate"], ["generate", "a", "--model", "/nowhere"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("trillama: error: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_trillama_alone_prints_help(trillama):
    status, out, err = trillama()
    assert (status, err) == (0, "")
    for command in ("generate", "chat", "next", "inspect", "convert", "doctor", "bench", "xray"):
        assert f"\n    {command} " in out
    assert trillama("--help") == (0, out, "")


def test_version(trillama):
    status, out, _ = trillama("--version")
    assert status == 0
    assert re.fullmatch(r"trillama \d+\.\d+\.\d+\n", out)


def test_help_of_generate_names_every_option(trillama):
    _, out, _ = trillama("generate", "--help")
    for option in ("PROMPT", "--model", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p",
                   "--repetition-penalty", "--seed", "--stop", "--samples", "--chat", "--backend", "--dtype", "--device",
                   "--no-cache", "--json"):  # fmt: skip
        assert option in out


@pytest.mark.parametrize("command", ["bench", "xray"])
def test_commands_that_live_elsewhere_get_their_arguments(trillama, monkeypatch, command):
    import types

    module, _, _ = cli.ELSEWHERE[command]
    seen = []
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(main=lambda argv: seen.append(argv)))
    assert trillama(command, "--json", "x", "--help")[0] == 0
    assert seen == [["--json", "x", "--help"]]


@pytest.mark.parametrize("command", ["chat", "inspect", "convert"])
def test_commands_of_one_process(trillama, monkeypatch, command):
    import contextlib
    import types

    for name in cli.TORCHRUN:
        monkeypatch.setenv(name, "0")
    two = contextlib.nullcontext(types.SimpleNamespace(rank=0, size=2))
    monkeypatch.setattr("trillama.model.parallel.join", lambda: two)
    mistake(trillama(command, "x"), f"{command} runs in one process, expected no torchrun before it")


@pytest.mark.parametrize("error", [ValueError("first\nsecond"), OSError("first"), RuntimeError("first"), MemoryError("first")])
def test_errors_of_commands_are_one_line(trillama, monkeypatch, error):
    import types

    def fail(argv):
        raise error

    monkeypatch.setitem(sys.modules, cli.ELSEWHERE["bench"][0], types.SimpleNamespace(main=fail))
    assert trillama("bench") == (2, "", "trillama: error: first\n")


def test_a_bug_is_not_hidden(monkeypatch):
    import types

    def fail(argv):
        raise KeyError("a bug")

    monkeypatch.setitem(sys.modules, cli.ELSEWHERE["bench"][0], types.SimpleNamespace(main=fail))
    with pytest.raises(KeyError):
        cli.main(["bench"])


@pytest.mark.usefixtures("signals")
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_text_comes_as_it_is_generated_and_an_interrupt_is_quiet(tiny_folder):
    command = [*TRILLAMA, "generate", "a", "--model", str(tiny_folder), "--max-new-tokens", "500", "--temperature", "1"]
    environment = {**os.environ, "TRILLAMA_BACKEND": "reference"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        process.stdout.read(1)  # it is generating
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_closed_pipe_is_quiet(tiny_folder):
    command = [*TRILLAMA, "generate", "a", "--model", str(tiny_folder), "--max-new-tokens", "400", "--temperature", "1"]
    environment = {**os.environ, "TRILLAMA_BACKEND": "reference"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(timeout=600) == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


# --- doctor ----------------------------------------------------------------------------------------------------------


OPS = {
    "add_rms_norm", "apply_rope", "choose_", "decode_attention", "decode_linear", "embed_next_", "flash_attention",
    "flash_attention_varlen", "rms_norm", "rope_append_", "swiglu",
}  # fmt: skip


def test_doctor_knows_every_op():
    """What torch has registered in our name, which is what has a kernel, and the packed form, which shares one."""
    torch = pytest.importorskip("torch")
    from trillama.bench import check

    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("trillama::")}
    forward = {name.split(".")[0] for name in registered if "_backward" not in name}
    forward -= {"flash_attn_with_kvcache", "packed_attention"}  # the adapters', where another test has imported them
    assert set(check.ops()) == OPS
    assert forward | {"flash_attention_varlen"} == OPS
    for op in OPS:
        forms = check.calls(op, "fp16")
        assert forms
        differentiable = check.OPS[forms[0].op].differentiable
        assert {c.backward for c in forms} == ({False, True} if differentiable else {False})


QUICK = {"add_rms_norm", "embed_next_", "rms_norm", "swiglu"}  # to check in the interpreter


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ops", [QUICK, pytest.param(OPS - QUICK, marks=pytest.mark.slow)], ids=["quick", "others"])
def test_doctor_launches_every_op(trillama, monkeypatch, ops):
    check, dispatch = pytest.importorskip("trillama.bench.check"), pytest.importorskip("trillama.kernels.dispatch")
    if not dispatch.INTERPRETED or dispatch.interpreter_obstacle():
        pytest.skip(dispatch.interpreter_obstacle() if dispatch.INTERPRETED else "launches on the CPU need Triton's interpreter")
    monkeypatch.setenv("TRILLAMA_BACKEND", "triton")
    monkeypatch.setattr(check, "ops", lambda: sorted(ops))
    status, out, err = trillama("doctor")
    assert (status, err) == (0, "")
    for op in ops:
        assert re.search(rf"^ +{op} +triton: ok$", out, re.MULTILINE), op


@pytest.mark.slow
def test_doctor_survives_what_it_checks(trillama, monkeypatch):
    """A crash, a hang and an exception are one line each, the others' lines are there, and the exit status tells."""
    check, apart = pytest.importorskip("trillama.bench.check"), pytest.importorskip("trillama.bench.apart")
    import clocks

    monkeypatch.setattr(cli, "_choice", lambda dispatch, device: ("triton", "a test"))
    monkeypatch.setattr(cli, "CHECK_SECONDS", 10)
    monkeypatch.setattr(check, "check", clocks.check)
    list(apart.apart(clocks.check, "add_rms_norm", "cpu", limit=300))  # the imports, which all share, take none of their time
    status, out, err = trillama("doctor")
    assert (status, err) == (1, "")
    lines = dict(re.findall(r"^ +(\w+) +triton: (.*)$", out, re.MULTILINE))
    assert set(lines) == OPS
    assert lines.pop("rms_norm").startswith("ended by SIGSEGV")
    assert lines.pop("swiglu") == "no answer within 10 s"
    assert lines.pop("apply_rope").startswith("RuntimeError: CUDA error: an illegal memory access was encountered (clocks.py:")
    assert set(lines.values()) == {"ok"}
    assert "3 of the kernels above fail here" in out


def test_doctor_sees_a_wrong_kernel():
    check, apart = pytest.importorskip("trillama.bench.check"), pytest.importorskip("trillama.bench.apart")
    dispatch = pytest.importorskip("trillama.kernels.dispatch")
    if not dispatch.INTERPRETED or dispatch.interpreter_obstacle():
        pytest.skip(dispatch.interpreter_obstacle() if dispatch.INTERPRETED else "launches on the CPU need Triton's interpreter")
    import clocks

    (verdict,) = apart.apart(clocks.check_of_a_wrong_kernel, "swiglu", "cpu", limit=120)
    assert re.match(r"swiglu backward: tensor 0 is 2.0e-03 from float64, allowed \d\S+, twice the reference's in fp16$", verdict)
    assert check.error(torch_of([1.0, float("nan")]), torch_of([1.0, 2.0])) == float("inf")
    assert check.error(torch_of([1, 2]), torch_of([1, 3])) == float("inf")


def torch_of(values):
    return pytest.importorskip("torch").tensor(values)


def test_doctor(trillama):
    torch = pytest.importorskip("torch")
    status, out, err = trillama("doctor")
    assert (status, err) == (0, "")
    version = torch.__version__.split("+")[0]
    for words in (f"torch {version}", "python", "cache", "backend    reference", "transformers", "cpu        reference"):
        assert words in out
    for op in OPS:
        assert re.search(rf"^ +{op} +reference$", out, re.MULTILINE), op
    if not torch.cuda.is_available():
        assert re.search(r"^gpu +none", out, re.MULTILINE)


def test_doctor_says_why(trillama, monkeypatch):
    dispatch = pytest.importorskip("trillama.kernels.dispatch")
    torch = pytest.importorskip("torch")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRILLAMA_BACKEND", "auto")
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: "Triton is not installed")
    assert cli._choice(dispatch, gpu) == ("reference", "Triton is not installed")
    assert "Triton is not installed" in trillama("doctor")[1]
    monkeypatch.setenv("TRILLAMA_BACKEND", "triton")
    assert cli._choice(dispatch, cpu) == ("an error", "the backend triton was asked for, but Triton is not installed")
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: None)
    assert cli._choice(dispatch, cpu) == ("triton", "it was asked for")
    monkeypatch.setenv("TRILLAMA_BACKEND", "auto")
    assert cli._choice(dispatch, gpu) == ("triton", "a GPU")
    assert cli._choice(dispatch, cpu)[0] == "reference"


# --- the default model -----------------------------------------------------------------------------------------------


def test_the_capital_of_france(smollm2_path, monkeypatch):
    """What the README promises, in a process of its own, with the preset out of the cache."""
    done = run("generate", "The capital of France is", "--max-new-tokens", 8, env={**os.environ, "TRILLAMA_BACKEND": "reference"})
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "fetching" not in done.stderr


# --- the manual ------------------------------------------------------------------------------------------------------

MANUAL = Path(__file__).parents[1] / "docs" / "cli.md"


def test_manual_has_every_command():
    text = MANUAL.read_text(encoding="utf-8")
    for command in (*cli.HERE, *cli.ELSEWHERE):
        assert f"\n## {command}: " in text
        assert f"\n$ trillama {command}" in text
    assert "(docs/cli.md)" in (MANUAL.parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_manual_shows_what_is_printed(trillama, smollm2_path, monkeypatch):
    """Every example that depends neither on the machine nor on rounding, against the default model's 4-bit file."""
    if smollm2_path.suffix != ".gguf":
        pytest.skip("the examples are of the GGUF file")
    blocks = re.findall(r"^```\n\$ trillama (.*)\n([^`]*)^```$", MANUAL.read_text(encoding="utf-8"), re.MULTILINE)
    examples = [(shlex.split(line), shown) for line, shown in blocks if re.match("generate|next|inspect", line)]
    examples = [(arguments, shown) for arguments, shown in examples if "--temperature" not in arguments]
    assert len(examples) == 6
    for arguments, shown in examples:
        status, out, err = trillama(*arguments)
        assert status == 0
        wanted = ".*?".join(re.escape(" ".join(part.split())) for part in shown.split("…"))
        wanted = wanted.replace(r"\ ", r"\s*")
        assert re.match(wanted, " ".join((out + err).split())), arguments
