"""A dialogue as a user has it: turns that see each other, a cache that is kept, commands, interrupts, an end."""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from trillama.model import Llama, Tokenizer, cli, generate
from trillama.model.chat import HELP, Dialogue

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.host

CHAT = [sys.executable, "-m", "trillama.model.cli", "chat"]


@pytest.fixture(scope="module")
def parts(tiny_folder):
    return Llama.from_pretrained(tiny_folder, device="cpu"), Tokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def chat(capsys, monkeypatch, tiny_folder):
    """Runs `trillama chat` in this process with these lines on standard input: (status, stdout, stderr)."""
    monkeypatch.setenv("TRILLAMA_BACKEND", "reference")

    def call(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        try:
            status = cli.main(["chat", "--model", str(tiny_folder), *map(str, options)])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return call


def replies(parts, *turns, system=None, new=9):
    """What a model says in a dialogue that is computed anew at each turn."""
    model, tokenizer = parts
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = generate(model, [tokenizer.apply_chat_template(messages)], max_new_tokens=new)[0].tolist()
        messages.append({"role": "assistant", "content": tokenizer.decode(ids)})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def lines(texts):
    return "".join(text + "\n" * (not text.endswith("\n")) for text in texts)


# --- turns and the cache ---------------------------------------------------------------------------------------------


def test_turns_see_each_other(chat, parts):
    turns = ["a b", "the other", " and 1 2 3"]
    expected = replies(parts, *turns)
    assert chat(*turns, options=["--max-new-tokens", 9]) == (0, lines(expected), "")
    assert expected[2] != replies(parts, turns[2])[0]


def test_only_new_tokens_are_computed(parts):
    """Each token of a dialogue once: what a turn computes is what it has beyond the beginning that it shares with the last."""
    model, tokenizer = parts
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}
    dialogue, computed, held, anew = Dialogue(model, tokenizer, **options), [], [], 0
    hook = model.model.layers[0].register_forward_hook(lambda _, args, out: computed.append(args[0].shape[1]))
    try:
        for text in ("the capital", "of France", "is Paris", "a b c"):
            computed.clear()
            ids = tokenizer.apply_chat_template([*dialogue.messages, {"role": "user", "content": text}])
            shared = next((i for i, (a, b) in enumerate(zip(held, ids)) if a != b), len(held))
            answer = dialogue.answer(text, lambda piece: None)
            assert computed[0] == len(ids) - shared
            assert computed[1:] == [1] * (len(answer.ids) - 1)
            held = (ids + answer.ids)[:-1]
            anew += computed[0]
            # the ids are those of a cache that starts empty
            other = Dialogue(model, tokenizer, **options)
            other.messages = dialogue.messages[:-2]
            assert other.answer(text, lambda piece: None).ids == answer.ids
    finally:
        hook.remove()
    assert anew < len(ids)  # and not the sum of four dialogues that grow


def test_cache_grows(parts, monkeypatch):
    model, tokenizer = parts
    monkeypatch.setattr("trillama.model.chat.ROOMY", 1)
    dialogue, sizes = Dialogue(model, tokenizer, max_new_tokens=5), []
    for text in ("a", "b " * 30, "c " * 60):
        answer = dialogue.answer(text, lambda piece: None)
        sizes.append(dialogue._cache.max_length)
        other = Dialogue(model, tokenizer, max_new_tokens=5)
        other.messages = dialogue.messages[:-2]
        assert other.answer(text, lambda piece: None).ids == answer.ids
    assert sizes == sorted(set(sizes))


def test_seed_holds_for_a_dialogue(chat):
    options = ["--max-new-tokens", 9, "--temperature", 2, "--seed", 5]
    first = chat("a b", "/reset", "a b", options=options)
    half = first[1][: len(first[1]) // 2]
    assert first[1] == half * 2  # it begins anew with the dialogue
    assert chat("a b", options=[*options[:-1], 6])[1] != half


def test_stop_string(chat, parts):
    text = replies(parts, "a b")[0]
    stop = text[3:5]
    cut = text[: text.index(stop)]
    assert chat("a b", options=["--max-new-tokens", 9, "--stop", stop]) == (0, lines([cut]), "")


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands(chat, parts):
    typed = ("a b", "/reset", "the other", "/help", "", "/dance", "/exit", "never read")
    status, out, err = chat(*typed, options=["--max-new-tokens", 9])
    assert (status, out) == (0, lines([replies(parts, "a b")[0], replies(parts, "the other")[0], HELP]))
    assert err == "/dance is no command: /help lists them; a message may begin with a space\n"


def test_system_prompt(chat, parts):
    expected = replies(parts, "a b", system="Be brief.")
    assert expected != replies(parts, "a b")
    assert chat("a b", options=["--max-new-tokens", 9, "--system", "Be brief."])[1] == lines(expected)
    told = chat("/system Be brief.", "a b", "/reset", "/system", "a b", options=["--max-new-tokens", 9])
    assert told == (0, lines([*expected, *replies(parts, "a b")]), "")


def test_line_that_only_looks_like_a_command(chat, parts):
    assert chat(" /exit now", options=["--max-new-tokens", 9])[1] == lines(replies(parts, " /exit now"))


def test_a_dialogue_that_gets_too_long(chat, parts):
    """One line says so, the message is dropped, and the dialogue goes on."""
    status, out, err = chat("a b", "x " * 600, "the other", options=["--max-new-tokens", 9])
    assert status == 0
    assert out == lines(replies(parts, "a b", "the other"))
    assert re.fullmatch(r"trillama: with this message the dialogue has \d+ tokens, but the model has 512 .*/reset\n", err)


def test_answer_that_fills_the_model(chat, parts):
    status, _, err = chat("x" * 460, "a b", options=["--max-new-tokens", 500])
    assert status == 0
    assert err.startswith("trillama: the model's positions are all in use: /reset begins anew\n")
    assert err.count("\n") == 2  # and the next message does not fit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-p", 7], "top_p"), (["--temperature", -1], "temperature"), (["--max-new-tokens", -1], "max_new_tokens"),
        (["--stop", ""], "stop"), (["--system"], "--system"), (["--model", "/nowhere"], "/nowhere"),
    ],
)  # fmt: skip
def test_mistakes(chat, options, words):
    status, out, err = chat("a b", options=options)
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("trillama: error: ")
    assert err.count("\n") == 1


# --- a terminal ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("signals")
@pytest.mark.skipif(os.name == "nt", reason="terminals of POSIX")
def test_terminal(tiny_folder, parts):
    """Ctrl-C at a terminal ends an answer and leaves the dialogue; Ctrl-C at the prompt leaves all as it is; Ctrl-D leaves."""
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TRILLAMA_BACKEND": "reference", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    options = ["--model", str(tiny_folder), "--max-new-tokens", "480"]
    process = subprocess.Popen(
        [*CHAT, *options], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True, close_fds=True
    )
    os.close(theirs)
    seen = ""

    def until(condition, again=lambda: None):
        nonlocal seen
        deadline = time.monotonic() + 600
        while not condition(seen):
            assert time.monotonic() < deadline, seen
            if not select.select([ours], [], [], 0.5)[0]:
                again()
                continue
            try:
                seen += os.read(ours, 4096).decode(errors="replace")
            except OSError:  # the terminal's other end is closed
                return

    def prompts(count):
        return lambda text: text.count("> ") >= count and text.endswith("> ")

    try:
        until(prompts(1))
        os.write(ours, b"a b\n")
        until(lambda text: len(text.rpartition("> ")[2]) > 30)  # it answers
        process.send_signal(signal.SIGINT)
        until(prompts(2))
        until(prompts(3), again=lambda: process.send_signal(signal.SIGINT))  # readline misses one that comes too early
        os.write(ours, b"\x04")
        until(lambda text: False)
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "Traceback" not in seen
    partial = seen.replace("\r\n", "\n").split("> ")[1].removeprefix("a b\n")
    whole = replies(parts, "a b", new=480)[0]
    assert 25 < len(partial.rstrip("\n")) < len(whole)
    assert whole.startswith(partial.rstrip("\n"))


@pytest.mark.usefixtures("signals")
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupted_answer_stays_in_the_dialogue(parts):
    """A real SIGINT in the middle of a step; the next turn knows what was said and computes none of it again."""
    model, tokenizer = parts
    dialogue, shown, computed = Dialogue(model, tokenizer, max_new_tokens=400), [], []

    def show(piece):
        shown.append(piece)
        if len(shown) == 11:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    answer = dialogue.answer("a b", show)
    assert (answer.end, len(answer.ids)) == ("interrupt", 11)
    assert dialogue.messages[-1] == {"role": "assistant", "content": "".join(shown)}
    ids = tokenizer.apply_chat_template([*dialogue.messages, {"role": "user", "content": "the other"}])
    hook = model.model.layers[0].register_forward_hook(lambda _, args, out: computed.append(args[0].shape[1]))
    dialogue.max_new_tokens = 9
    try:
        after = dialogue.answer("the other", lambda piece: None)
    finally:
        hook.remove()
    assert computed[0] < len(ids) - 10
    wanted = generate(model, [ids], max_new_tokens=9)[0].tolist()
    assert after.ids == wanted[: len(after.ids)]


@pytest.mark.parametrize("first", [20, 60])
def test_longrope_changes_the_angles_of_a_dialogue(parts, first):
    """Turns on both sides of the length at which all keys change, and back to a short dialogue."""
    _, tokenizer = parts
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 7.0]}
    torch.manual_seed(2)
    model = Llama({
        "model_type": "phi3", "vocab_size": tokenizer.vocab_size, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "original_max_position_embeddings": 64, "rope_scaling": {"rope_type": "longrope", **factors}, "initializer_range": 0.3,
        "eos_token_id": 2,
    }).eval()  # fmt: skip
    dialogue = Dialogue(model, tokenizer, max_new_tokens=8)
    for text in ("x" * first, "y" * 30, None, "x" * first):
        if text is None:
            dialogue.reset()
            continue
        answer = dialogue.answer(text, lambda piece: None)
        ids = tokenizer.apply_chat_template(dialogue.messages[:-1])
        assert answer.ids == generate(model, [ids], max_new_tokens=8)[0].tolist()[: len(answer.ids)]


def test_interrupt_before_the_first_token(parts, monkeypatch):
    """Nothing was said, so nothing is kept; the next turn starts with an empty cache and is right."""
    model, tokenizer = parts
    dialogue = Dialogue(model, tokenizer, max_new_tokens=9)
    first = dialogue.answer("a b", lambda piece: None)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    try:
        assert dialogue.answer("the other", lambda piece: None).end == "interrupt"
    finally:
        hook.remove()
    assert [message["content"] for message in dialogue.messages] == ["a b", first.text]
    assert dialogue.answer("the other", lambda piece: None).text == replies(parts, "a b", "the other")[1]
