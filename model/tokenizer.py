"""Text to token ids and back, for every kind of file that a vocabulary comes in.

Encoding is the work of Hugging Face's `tokenizers`, into which the vocabularies of GGUF and Meta files are translated. Decoding
goes by bytes: every token stands for some, and a character is shown once it is complete.
"""

import base64
import codecs
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from . import chat_template
from .files import CheckpointError, brief, read_json
from .gguf_file import read_gguf
from .limits import check_stop
from .presets import locate

# What a pre-tokenizer named in GGUF files cuts out of the text, expression by expression, before byte-level BPE: llama.cpp's
# llama-vocab.cpp, spelt as in the tokenizer.json of the models that they are named after.
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "smollm": [r"\p{N}", _GPT_2],
    "gpt-2": [_GPT_2],
    "llama-bpe": [_LLAMA_3],
    "llama3": [_LLAMA_3],
    "llama-v3": [_LLAMA_3],
    "falcon3": [_LLAMA_3],
    "dbrx": [_LLAMA_3],
    "tekken": [_TEKKEN],
    "qwen2": [_QWEN_2],
    "deepseek-r1-qwen": [_QWEN_2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
# Of these, a word that stands in the vocabulary is one token whatever the merges say, and a text begins with bos.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}

# Meta's Llama 3: 256 special tokens follow the vocabulary, and a dialogue is made of headers and turns.
LLAMA_3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
]  # fmt: skip
LLAMA_3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of tokens in sentencepiece and GGUF
LARGEST_VOCABULARY = 1 << 24  # tokens
LARGEST_MODEL = 64 << 20  # bytes of a tokenizer.model; Llama 3's has 2 MB


class Tokenizer:
    """A model's vocabulary. `bos` and `eos` are token ids or None; `vocab_size` counts all tokens, special ones included."""

    def __init__(self, backend: "tokenizers.Tokenizer", tokens: dict[str, str], template: str | None = None) -> None:
        """backend: a `tokenizers.Tokenizer`. tokens: special tokens by role ("bos_token": "<s>"). template: Jinja source."""
        self._backend, self._tokens, self._template = backend, tokens, template
        self._special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._bytes_of, self._strip = _byte_reader(backend)
        self._known = {}
        self.bos, self.eos = (backend.token_to_id(tokens.get(role, "")) for role in ("bos_token", "eos_token"))
        self.vocab_size = backend.get_vocab_size()

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a folder (tokenizer.json, or Meta's tokenizer.model), a .gguf file, a hub id or a preset."""
        path = locate(source)
        if path.is_file():
            return cls(*_from_gguf(path))
        if (path / "tokenizer.json").is_file():
            return cls(*_from_folder(path))
        if (path / "tokenizer.model").is_file():
            return cls(*_from_meta(path / "tokenizer.model"))
        raise CheckpointError(f"{path}: holds neither tokenizer.json nor tokenizer.model, one of them is expected")

    def encode(self, text: str, *, special: bool = False, bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        special: whether the name of a special token in the text ("<|im_end|>") stands for that token; else it is text as any
        other, so that what a user types cannot end a turn. bos: whether the ids begin with bos, None for the model's custom.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected a str")
        if bos and self.bos is None:
            raise ValueError("bos is True, but this vocabulary has no token for the beginning of a text")
        self._backend.encode_special_tokens = not special
        try:
            ids = self._backend.encode(text, add_special_tokens=bos is None).ids
        except TypeError:  # what tokenizers makes of a str that is not Unicode
            raise ValueError("text holds half of a surrogate pair, expected whole characters") from None
        return [self.bos, *ids] if bos else ids

    def decode(self, ids: Iterable[Any], skip_special: bool = True) -> str:
        """The text of token ids. Bytes that make no character become U+FFFD; ids beyond the vocabulary stand for nothing."""
        stream = self.stream(skip_special)
        return "".join([stream.put(id) for id in getattr(ids, "tolist", lambda: ids)()]) + stream.end()

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, from which transformers and this class read it."""
        self._backend.encode_special_tokens = False
        self._backend.save(str(folder / "tokenizer.json"))
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self._tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")
        if self._template is not None:
            (folder / "chat_template.jinja").write_text(self._template, encoding="utf-8")

    def token(self, id: int) -> str:
        """What one id stands for: its text, or the name of a special token."""
        return self._bytes(id, skip_special=False).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True, stop: Sequence[str] = ()) -> "Stream":
        """A Stream, which decodes ids one by one up to the first of the texts in `stop`."""
        return Stream(self, skip_special, stop)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, *, special: bool = False
    ) -> list[int]:
        """Token ids of a dialogue, a list of {"role": ..., "content": ...}, in the form that the model was trained on.

        add_generation_prompt: whether the ids end with the beginning of the model's answer. special: whether the name of a special
        token within a message stands for that token, as it does in transformers; else it is text as any other, and nobody can end
        a turn from within.
        """
        if self._template is None:
            raise ValueError("this model has no chat template: it continues texts, it does not hold dialogues")
        if not isinstance(messages, (list, tuple)) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError(f"messages is {brief(messages)}, expected a list of dicts with role and content")
        disguised, reveal = (messages, None) if special else self._disguised(messages)
        variables = {**self._tokens, "messages": list(disguised), "add_generation_prompt": bool(add_generation_prompt)}
        text = chat_template.render(self._template, variables)
        if reveal is None:
            return self.encode(text, special=True, bos=False)
        ids = []
        for i, piece in enumerate(re.split(f"({self._names()})", text)):
            if i % 2:
                id = self._backend.token_to_id(piece)
                ids.append(self._backend.token_to_id(piece.strip()) if id is None else id)
            elif piece:
                ids += self.encode(reveal(piece), bos=False)
        return ids

    def _names(self):
        """An expression for the names of the special tokens, with the white space that they swallow, long ones first."""
        tokens = [token for token in self._backend.get_added_tokens_decoder().values() if token.special]
        tokens.sort(key=lambda token: -len(token.content))
        space = r"\s*"
        return "|".join(space * t.lstrip + re.escape(t.content) + space * t.rstrip for t in tokens) or "(?!)"

    def _disguised(self, messages):
        """(the messages with a mark for every name of a special token in them, the function that puts the names back); the
        messages themselves and None where there is no such name."""
        names = re.compile(self._names())
        found, used = [], {*json.dumps(messages, ensure_ascii=False, default=str)}
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)

        def hide(match):
            found.append(match[0])
            return f"{mark}{len(found) - 1}{mark}"

        def walk(value):
            if isinstance(value, str):
                return names.sub(hide, value)
            if isinstance(value, (list, tuple)):
                return [walk(item) for item in value]
            return {key: walk(item) for key, item in value.items()} if isinstance(value, dict) else value

        def reveal(text):
            return re.sub(f"{mark}([0-9]+){mark}", lambda match: found[int(match[1])], text)

        disguised = walk(messages)
        return (disguised, reveal) if found else (messages, None)

    def _bytes(self, id, skip_special):
        if skip_special and id in self._special:
            return b""
        if id not in self._known:
            token = self._backend.id_to_token(id) if 0 <= id < 1 << 32 else None
            self._known[id] = b"" if token is None else self._bytes_of(token)
        return self._known[id]


class Stream:
    """Decodes ids one by one: `put` returns the characters that the id completes, `end` what is left.

    stop: texts that end the stream, however the tokens cut them. Neither they nor what follows is returned, and what may be the
    beginning of one is held back until it is known not to be. stopped: whether one was met.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, stop: Sequence[str] = ()) -> None:
        check_stop(stop)
        self._tokenizer, self._skip_special, self._stop = tokenizer, skip_special, tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer._strip
        self._held, self.stopped = "", False

    def put(self, id: int) -> str:
        data = self._tokenizer._bytes(int(id), self._skip_special)
        if self._strip and data:  # sentencepiece puts a space before the first word
            data, self._strip = data.removeprefix(b" "), False
        return self._until_stop(self._utf8.decode(data))

    def end(self) -> str:
        rest = self._until_stop(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _until_stop(self, text):
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        text, self._held = self._held + text, ""
        met = [(begin + len(stop), begin) for stop in self._stop if (begin := text.find(stop)) >= 0]
        if met:  # the one that was complete first
            self.stopped = True
            return text[: min(met)[1]]
        tails = (text[begin:] for begin in range(max(0, len(text) + 1 - max(map(len, self._stop))), len(text)))
        self._held = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stop)), "")
        return text.removesuffix(self._held)


# --- tokens and bytes ------------------------------------------------------------------------------------------------


def _byte_alphabet():
    """The characters in which GPT-2's byte-level BPE writes the bytes 0 to 255: printable ones stay, the rest are from U+0100."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in plain else next(rest)) for byte in range(256)]


ALPHABET = _byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def _byte_level(token):
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


def _sentencepiece(token):
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_reader(backend):
    """(the function from a token to its bytes, whether a text loses its first space), as the decoder of the vocabulary says."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        return _byte_level, False
    if "Metaspace" in steps:
        return _sentencepiece, steps["Metaspace"].get("prepend_scheme", "always") != "never"
    if steps.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Replace" in steps:
        return _sentencepiece, steps.get("Strip", {}).get("start", 0) > 0
    raise CheckpointError(f"tokenizer.json: decoder is {brief(decoder.get('type'))}, expected ByteLevel or sentencepiece's steps")


# --- tokenizer.json --------------------------------------------------------------------------------------------------


def _from_folder(folder):
    path = folder / "tokenizer.json"
    text = json.dumps(read_json(path))
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{path}: is not a tokenizer: {brief(str(error))}") from None
    token, id = max(backend.get_vocab().items(), key=lambda entry: entry[1], default=("", 0))
    if id >= LARGEST_VOCABULARY:  # tokenizers counts up to it
        raise CheckpointError(f"{path}: token {brief(token)} has the id {id}, expected less than {LARGEST_VOCABULARY}")
    backend.no_truncation()
    backend.no_padding()
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config.update({key: value for key, value in read_json(folder / name).items() if value is not None})
    where = folder / "tokenizer_config.json"
    tokens = {role: _content(where, role, value) for role, value in config.items() if role in ROLES}
    missing = [AddedToken(token, special=True, normalized=False) for token in tokens.values() if backend.token_to_id(token) is None]
    backend.add_special_tokens(missing)
    return backend, tokens, _chat_template(folder, config)


ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _content(where, role, token):
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or not token:
        raise CheckpointError(f"{where}: {role} is {brief(token)}, expected a token")
    return token


def _chat_template(folder, config):
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    template, where = config.get("chat_template"), folder / "tokenizer_config.json"
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{where}: chat_template is {brief(template)}, expected text")
    return template


def _text(path):
    if path.stat().st_size > LARGEST_MODEL:
        raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, expected at most {LARGEST_MODEL}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: byte {error.start} is not UTF-8") from None


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _from_gguf(path):
    metadata, _ = read_gguf(path)

    def field(name, kind, default=None):
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, kind):
            raise CheckpointError(f"{path}: tokenizer.ggml.{name} is {brief(value)}, expected {kind.__name__}")
        return value

    pieces, model = field("tokens", list), field("model", str)
    if len(set(pieces)) < len(pieces):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens has {len(pieces) - len(set(pieces))} tokens twice")
    types = field("token_type", list, [NORMAL] * len(pieces))
    if len(types) != len(pieces):
        raise CheckpointError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries, expected {len(pieces)}")
    tokens = {}
    for role, name in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        id = field(f"{name}_token_id", int, -1)
        if id >= len(pieces):
            raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id is {id}, expected less than {len(pieces)}")
        if id >= 0:
            tokens[role] = pieces[id]
    if model == "gpt2":
        kind = field("pre", str, "default")
        if kind not in SPLITS:
            raise CheckpointError(f"{path}: tokenizer.ggml.pre is {brief(kind)}, expected one of {', '.join(SPLITS)}")
        merges = [tuple(merge.split(" ", 1)) for merge in field("merges", list)]
        backend = _byte_level_bpe(path, pieces, merges, kind)
        begins = kind in WHOLE_WORDS
    elif model == "llama":
        scores = field("scores", list)
        if len(scores) != len(pieces):
            raise CheckpointError(f"{path}: tokenizer.ggml.scores has {len(scores)} entries, expected {len(pieces)}")
        backend = _sentencepiece_bpe(path, pieces, scores, types, field("add_space_prefix", bool, True))
        begins = True
    else:
        raise CheckpointError(f"{path}: tokenizer.ggml.model is {brief(model)}, expected gpt2 or llama")
    added = {piece: kind == CONTROL for piece, kind in zip(pieces, types) if kind in (CONTROL, USER_DEFINED)}
    _finish(backend, added, tokens, field("add_bos_token", bool, begins), field("add_eos_token", bool, False))
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: tokenizer.chat_template is {brief(template)}, expected text")
    return backend, tokens, template


def _byte_level_bpe(path, pieces, merges, kind):
    try:
        model = models.BPE({piece: id for id, piece in enumerate(pieces)}, merges, ignore_merges=kind in WHOLE_WORDS)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{path}: tokens and merges make no vocabulary: {brief(str(error))}") from None
    backend = tokenizers.Tokenizer(model)
    if SPLITS[kind] == [_QWEN_2]:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in SPLITS[kind]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(path, pieces, scores, types, prefix):
    """sentencepiece's BPE (Llama 2): of all neighbours whose union is a piece, the union with the highest score comes first."""
    ids = {piece: id for id, piece in enumerate(pieces)}
    mergeable = {piece for piece, kind in zip(pieces, types) if kind == NORMAL}
    merges = []
    for piece, score in zip(pieces, scores):
        if piece in mergeable:
            cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            cuts = [(left, right) for left, right in cuts if left in mergeable and right in mergeable]
            merges += [(score, left, right) for left, right in sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]]))]
    merges = [(left, right) for _, left, right in sorted(merges, key=lambda merge: -merge[0])]
    unknown = next((piece for piece, kind in zip(pieces, types) if kind == UNKNOWN), None)
    try:
        backend = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{path}: tokens and scores make no vocabulary: {brief(str(error))}") from None
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _finish(backend, added, tokens, begins, ends):
    """Adds tokens that are matched before all else (name -> whether it is special) and the custom at both ends of a text."""
    backend.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in added.items()])
    bos, eos = (tokens.get("bos_token") if begins else None, tokens.get("eos_token") if ends else None)
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(filter(None, (bos, "$A", eos))),
        special_tokens=[(token, backend.token_to_id(token)) for token in {bos, eos} if token],
    )


# --- Meta's tokenizer.model ------------------------------------------------------------------------------------------


def _from_meta(path):
    """Llama 3's is text, a token in base64 and its rank a line; Llama 2's is a model of sentencepiece."""
    with open(path, "rb") as file:
        data = file.read(LARGEST_MODEL + 1)
    if len(data) > LARGEST_MODEL:
        raise CheckpointError(f"{path}: has more than {LARGEST_MODEL} bytes")
    return _tiktoken(path, data) if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", data) else _sentencepiece_model(path, data)


def _tiktoken(path, data):
    ranks = []
    for number, line in enumerate(data.splitlines()):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            in_order = int(rank) == number and token
        except ValueError:
            in_order = False
        if not in_order:
            raise CheckpointError(f"{path}: line {number + 1} is {brief(line)}, expected a token in base64 and the rank {number}")
        ranks.append("".join([ALPHABET[byte] for byte in token]))
    ids = {token: rank for rank, token in enumerate(ranks)}
    # tiktoken merges any two neighbours whose union is a token, the lowest rank first: every cut of a token is a merge.
    merges = []
    for token in ranks:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]])) if len(cuts) > 1 else cuts
    tokens = {"bos_token": LLAMA_3_SPECIAL[0], "eos_token": LLAMA_3_SPECIAL[1]}
    backend = _byte_level_bpe(path, ranks, merges, "llama-bpe")
    _finish(backend, dict.fromkeys(LLAMA_3_SPECIAL, True), tokens, begins=True, ends=False)
    return backend, tokens, LLAMA_3_TEMPLATE


def _sentencepiece_model(path, data):
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(f"{path}: needs the package sentencepiece: pip install 'trillama[meta]'") from None
    try:
        model = SentencePieceProcessor(model_proto=data)
    except Exception as error:
        raise CheckpointError(f"{path}: is neither tiktoken's text nor a model of sentencepiece: {brief(str(error))}") from None
    if model.normalize("ﬁ  x") != "▁ﬁ▁▁x":
        raise CheckpointError(f"{path}: normalises text, expected a model of Llama 2's kind, which leaves it as it is")
    ids = range(model.get_piece_size())
    kinds = ((UNKNOWN, model.is_unknown), (CONTROL, model.is_control), (6, model.is_byte), (5, model.is_unused))
    types = [next((kind for kind, test in kinds if test(id)), NORMAL) for id in ids]
    pieces, scores = [model.id_to_piece(id) for id in ids], [model.get_score(id) for id in ids]
    backend = _sentencepiece_bpe(path, pieces, scores, types, prefix=True)
    tokens = {"bos_token": pieces[model.bos_id()], "eos_token": pieces[model.eos_id()]}
    added = {piece: True for piece, kind in zip(pieces, types) if kind == CONTROL}
    _finish(backend, added, tokens, begins=True, ends=False)
    return backend, tokens, None
