"""What a command line answers before torch is loaded: help, and what is wrong with the arguments alone; and standard streams."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

pytestmark = pytest.mark.host

# Runs command lines, each as `python -m MODULE ARGUMENT...` does; what they end with, print and have loaded, as JSON.
RUNNER = """
import contextlib, io, json, os, runpy, sys
ends = []
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv, out, err = [module, *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.modules.pop(module, None)  # runpy would warn
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code
    ends.append([status, out.getvalue(), err.getvalue(), sorted({"torch", "triton", "transformers", "numba"} & {*sys.modules})])
print(json.dumps([ends, sum(os.times()[:2])]))
"""


def answers(*lines):
    """([status, stdout, stderr, what was loaded of packages that take long] of each command line, the process's CPU seconds)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRILLAMA_")}
    command = [sys.executable, "-c", RUNNER, json.dumps([list(map(str, line)) for line in lines])]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def line(text):
    """A command line as it is typed: `trillama ...`, or `NAME ...` for `python -m trillama.bench.NAME`."""
    name, *arguments = (word for word in text.split(" ") if word)
    return ["trillama.model.cli" if name == "trillama" else f"trillama.bench.{name}", *(a.strip("'") for a in arguments)]


HELP = ["trillama", "trillama --help", "trillama --version", "decode --help", "hardware --help", "host --help", "report --help"]
HELP += ["roofline --help", "traffic --help", "tune --help", "xray --help"]
HELP += [f"trillama {name} --help" for name in ("generate", "chat", "next", "inspect", "convert", "bench", "xray", "doctor")]
MISTAKES = {
    "trillama genrate": "there is no command genrate, did you mean generate? (see trillama --help)",
    "trillama --versoin": "there is no option --versoin, did you mean --version? (see trillama --help)",
    "trillama generate": "PROMPT (see trillama generate --help)",
    "trillama generate x --temprature 1": "no option --temprature, did you mean --temperature? (see trillama generate --help)",
    "trillama generate x --temp=1": "there is no option --temp, did you mean --temperature? (see trillama generate --help)",
    "trillama generate x --nonsense": "there is no option --nonsense (see trillama generate --help)",
    "trillama generate x y": "unexpected: y (see trillama generate --help)",
    "trillama generate x --temperature -1": "temperature is -1.0, expected a number from 0 on",
    "trillama generate x --temperature nan": "temperature is nan, expected",
    "trillama generate x --top-p 2": "top_p is 2.0, expected",
    "trillama generate x --top-p 0.5": "--top-p is 0.5 at temperature 0, expected a --temperature above 0",
    "trillama generate x --top-k 4": "--top-k is 4 at temperature 0, expected a --temperature above 0",
    "trillama generate x --max-new-tokens -1": "max_new_tokens is -1, expected",
    "trillama generate x --seed -1": "seed is -1, expected",
    "trillama generate x --stop ''": "stop is [''], expected",
    "trillama generate x --samples 3": "--samples is 3, expected 1, or a temperature above 0",
    "trillama generate x --backend nonsense": "'nonsense'",
    "trillama generate x --dtype foo": "'foo'",
    "trillama generate x --quantize int3": "'int3'",
    "trillama generate x --model /no/where": "/no/where",
    "trillama chat --min-p 3": "min_p is 3.0, expected",
    "trillama chat --model /no/where": "/no/where",
    "trillama next x --top-k 0": "--top-k is 0, expected at least 1",
    "trillama next x --model /no/where": "/no/where",
    "trillama inspect --head 3": "--head is of an attention map, expected --attention PROMPT with it",
    "trillama inspect --layer 0": "--layer is of an attention map, expected --attention PROMPT with it",
    "trillama inspect --plot x.png": "--plot is of an attention map, expected --attention PROMPT with it",
    "trillama inspect --quantize int8": "--quantize is of an attention map, expected --attention PROMPT with it",
    "trillama inspect --backend triton": "--backend is of an attention map, expected --attention PROMPT with it",
    "trillama inspect --attention x --layer -1": "--layer is -1, expected a number from 0 on",
    "trillama inspect --layer x": "invalid int value: 'x' (see trillama inspect --help)",
    "trillama inspect --model /no/where": "/no/where",
    "trillama convert": "SOURCE, TARGET, --to (see trillama convert --help)",
    "trillama convert smollm2 x": "--to (see trillama convert --help)",
    "trillama convert /no/where x --to hf": "/no/where",
    f"trillama convert smollm2 {os.path.dirname(__file__)} --to hf": "exists, expected the name of a new folder",
    f"trillama convert smollm2 {__file__}/x --to hf": "x: cannot be made, ",
    "trillama convert smollm2 x --to meta --shard-size 1GB": "--shard-size is given with --to meta, expected --to hf",
    "trillama bench --batch x": "'x': expected positive integers separated by commas (see trillama bench --help)",
    "trillama bench --shape nosuch": "shape is 'nosuch', expected one of smollm2-135m, ",
    "trillama bench --shape smollm2-135m --layers 0": "--layers is 0, expected at least 1",
    "trillama bench --layers 2": "--layers is 2 without --shape",
    "trillama bench --new 1": "--new is 1",
    "trillama bench --threads 0": "--threads is 0, expected at least 1",
    "trillama bench --model /no/where": "/no/where",
    "trillama bench --backend nonsense": "'nonsense'",
    "trillama bench --json /none/x.json": "--json is /none/x.json, expected a file that can be written",
    "trillama xray nosuchop": "OP is 'nosuchop', expected one of rms_norm, ",
    "trillama xray flash_atention": ", did you mean flash_attention?",
    "trillama xray flash_attention --arch sm_1": "--arch is 'sm_1', expected one of sm_80, ",
    "trillama xray --dtype int8": "--dtype is 'int8', expected one of bf16, ",
    "trillama xray --model nosuch": "--model is 'nosuch', expected one of SmolLM2-135M, ",
    "trillama doctor --foo": "there is no option --foo (see trillama doctor --help)",
    "hardware --only nosuch": "'nosuch'",
    "hardware --minutes 0": "--minutes is 0.0, expected a number above 0",
    "hardware --lsit": "there is no option --lsit, did you mean --list? (see python -m trillama.bench.hardware --help)",
    "host nosuch": "OP is 'nosuch', expected one of rms_norm, ",
    "report nofile": "nofile: No such file or directory",
    "traffic nosuch": "OP is 'nosuch', expected one of rms_norm, ",
    "traffic --step --model Gemma-2-9B": "--model is Gemma-2-9B, of which only some shapes are known here",
    "tune nosuch": "ENTRY is 'nosuch', expected one of attention, ",
    "tune --arch sm_90": "--arch is 'sm_90' without --list",
    "tune --limit 0": "--limit is 0, expected",
    "tune --output /none/x.json": "--output is /none/x.json, expected a file that can be written",
}


def test_help_and_mistakes_are_answered_before_torch_is_loaded():
    ends, _ = answers(*map(line, [*HELP, *MISTAKES]))
    for text, (status, out, err, loaded) in zip(HELP, ends):
        assert (status, err, loaded) == (0, "", []), text
        assert out.startswith("trillama 0." if "--version" in text else "usage: "), text
    for (text, words), (status, out, err, loaded) in zip(MISTAKES.items(), ends[len(HELP) :]):
        assert (status, out, loaded) == (2, "", []), (text, err)
        assert err.startswith("trillama: error: "), text
        assert err.count("\n") == 1, text
        assert words in err, (text, err)


@pytest.fixture(scope="module")
def torch_takes():
    """CPU seconds that a process takes to load torch, here and now."""
    code = "import os, torch; print(sum(os.times()[:2]))"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    "text", ["trillama --help", "trillama generate x --temperature -1", "trillama xray nosuchop", "tune --help"]
)
def test_an_answer_takes_little_time(text, torch_takes):
    """A tenth of what loading torch does, of the processor's time: how much others have of it is not our affair."""
    _, seconds = answers(line(text))
    assert seconds < torch_takes / 3


def test_unknown_backend_of_the_environment(monkeypatch, trillama):
    monkeypatch.setitem(sys.modules, "torch", None)  # who imports it fails
    monkeypatch.setenv("TRILLAMA_BACKEND", "magic")
    for command in (["generate", "x"], ["chat"], ["next", "x"], ["inspect"], ["bench"]):
        assert trillama(*command) == (
            2,
            "",
            "trillama: error: TRILLAMA_BACKEND is 'magic', expected one of auto, triton, reference\n",
        )


def test_one_list_of_backends():
    dispatch = pytest.importorskip("trillama.kernels.dispatch")
    from trillama.model import cli

    assert tuple(dispatch.BACKENDS) == cli.BACKENDS


def test_model_loads_its_names_when_they_are_used():
    """The package alone brings neither torch nor a tokenizer; all names of it can be imported, and are what a type checker sees."""
    code = (
        "import sys, typing\nimport trillama.model as package\n"
        "assert not {'torch', 'tokenizers', 'numpy'} & {*sys.modules}\n"
        "from trillama.model import KVCache, Llama, Tokenizer, generate, warmup\n"
        "assert sorted(package.__all__) == sorted(dir(package)) == ['KVCache', 'Llama', 'Tokenizer', 'generate', 'warmup']\n"
        "assert all(getattr(package, name).__name__ == name for name in package.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_later():
    from trillama.model.later import later

    late = later("json.decoder")
    assert late.JSONDecoder is json.JSONDecoder
    with pytest.raises(AttributeError, match="nothing"):
        _ = late.nothing
    with pytest.raises(AttributeError):
        late.JSONDecoder = None  # it would not be the module's
    with pytest.raises(ModuleNotFoundError):
        _ = later("no_such_module").name


# --- standard streams ------------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def buffered(request, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


def shell(arguments, redirection):
    """(status, stdout, stderr) of `trillama ARGUMENTS REDIRECTION` in a shell."""
    command = f'"{sys.executable}" -m trillama.model.cli {arguments} {redirection}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


@posix
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(closed):
    """A mistake's line does not go to the other stream, and nothing crashes."""
    status, out, err = shell("--version", closed)
    assert (status, err) == (0, "")
    assert out.startswith("trillama 0.") == (">&-" not in closed.split())
    status, out, err = shell("generate x --temperature -1", closed)
    assert (status, out) == (2, "")
    assert err.startswith("trillama: error: temperature is -1.0") == ("2>&-" not in closed.split())
    assert "Traceback" not in err


@posix
def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    """Else what a library writes to stderr would get into it."""
    file = tmp_path / "x"
    code = (
        "import os, subprocess, sys\nfrom trillama.model import cli\n"
        "def command():\n"
        f"    with open({str(file)!r}, 'w') as file:\n"
        "        os.write(2, b'of a library')\n"
        "        subprocess.run(['sh', '-c', 'echo of a child >&2'], check=True)\n"
        "        print('to stderr', file=sys.stderr)\n"
        "        file.write(f'{file.fileno() > 2}')\n"
        "sys.exit(cli.status(command))\n"
    )
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$0" <&- >&- 2>&-', code])
    assert done.returncode == 0
    assert file.read_text() == "True"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.usefixtures("buffered")
def test_output_that_cannot_be_written_is_one_line():
    for arguments in ("", "--version"):
        status, out, err = shell(arguments, ">/dev/full")
        assert (status, out) == (2, "")
        assert err.replace("standard output: ", "") == "trillama: error: No space left on device\n"
    assert shell("generate x --temperature -1", "2>/dev/full") == (2, "", "")
    assert shell("--version", ">/dev/full 2>/dev/full") == (2, "", "")
