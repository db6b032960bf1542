"""`trillama chat`: a dialogue at the terminal, or piped through. The keys and values of what was said stay in the cache, so that
a turn computes its new tokens only.
"""

import contextlib
import math
import sys

from . import cli

HELP = """\
/reset           forget the dialogue; the system prompt stays
/system TEXT     set the system prompt; without TEXT: take it away
/help            this list
/exit            leave, as Ctrl-D does
Ctrl-C interrupts an answer; what was said until then stays in the dialogue. A line that begins with a space is never a command."""
ROOMY = 1024  # tokens that a cache holds at least; it doubles when the dialogue outgrows it


class Dialogue:
    """Turns of a user and a model, `messages`, and the cache of what they have in common with the next turn.

    stop: texts that end an answer. options: the sampling arguments of `generate`; a seed holds for the whole dialogue.
    """

    def __init__(self, model, tokenizer, *, system=None, stop=(), max_new_tokens=512, seed=None, **options):
        self.model, self.tokenizer, self.stop = model, tokenizer, stop
        self.max_new_tokens, self.seed, self.options = max_new_tokens, seed, options
        self.system, self.messages = system, []
        self._cache, self._held = None, []  # the ids whose keys and values the cache holds

    def answer(self, text, show):
        """Asks the model; show(piece) is called with the text of its Answer as it comes, which is returned in the end.

        An interrupt (KeyboardInterrupt) ends the answer, whose `end` is "interrupt" then. ValueError where the dialogue does not
        fit the model; it stays as it was before.
        """
        from ..kernels.frequencies import same_frequencies
        from .generation import generate

        turn = [*self.messages, {"role": "user", "content": text}]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = self.tokenizer.apply_chat_template([*system, *turn])
        room = self.model.config.context_length - len(ids)
        if room < 1:
            raise ValueError(
                f"with this message the dialogue has {len(ids)} tokens, but the model has {self.model.config.context_length} "
                "positions: shorten it, or begin anew with /reset"
            )
        answer = cli.Answer(self.tokenizer, self.model, self.stop)
        new = min(self.max_new_tokens, room)
        seed = None if self.seed is None else (self.seed + len(self.messages)) % 2**63
        cache = self._prepared(ids, len(ids) + new)

        def stream(step):
            show(answer.put(int(step[0])))
            return [answer.end is not None]

        try:
            generate(self.model, [ids], max_new_tokens=new, seed=seed, cache=cache, stream=stream, **self.options)
            show(answer.close())
        except KeyboardInterrupt:
            answer.end = "interrupt"
        # A scaling that depends on the length may have begun to compute the cache anew when the interrupt came.
        trusted = answer.end != "interrupt" or same_frequencies(self.model.config.rope_parameters, 1)[1] == math.inf
        self._held = (ids + answer.ids)[:-1] if answer.ids and trusted else []
        if answer.text or answer.end != "interrupt":
            self.messages = [*turn, {"role": "assistant", "content": answer.text}]
        return answer

    def reset(self):
        """Forgets what was said."""
        self.messages = []

    def _prepared(self, ids, length):
        """The cache, with room for so many tokens, holding the longest beginning of the ids that it has; not the last of them,
        whose logits are wanted. Until the turn has ended nothing is known to be in it."""
        from ..kernels.frequencies import same_frequencies
        from .llama import KVCache

        held, self._held, rope = self._held, [], self.model.config.rope_parameters
        same = next((i for i, (a, b) in enumerate(zip(held, ids[:-1])) if a != b), min(len(held), len(ids) - 1))
        if same and same_frequencies(rope, same) != same_frequencies(rope, len(held)):
            same = 0  # those keys were rotated by other angles
        if self._cache is None or self._cache.max_length < length:
            config, weight = self.model.config, self.model.model.embed_tokens.weight
            roomier = KVCache(config, 1, min(max(2 * length, ROOMY), config.context_length), weight.dtype, weight.device)
            if self._cache is not None:
                for old, new in zip(self._cache.k + self._cache.v, roomier.k + roomier.v):
                    new[:, :, :same] = old[:, :, :same]
            self._cache = roomier
        self._cache.lengths.fill_(same)
        self._cache.filled = same
        return self._cache


# --- the terminal ----------------------------------------------------------------------------------------------------


def parser():
    p = cli.Parser(prog="trillama chat", description="A dialogue with a model; /help lists what can be typed besides messages.")
    p.add_argument("--system", metavar="TEXT", help="the system prompt")
    cli.add_sampling_options(p, new=512)
    cli.add_model_options(p)
    return p


def main(argv=None):
    options = parser().parse_args(argv)
    arguments = cli.sampling(options)
    cli.check_model(options)
    cli.tolerant_output()
    tokenizer = cli.load_tokenizer(options)
    tokenizer.apply_chat_template([{"role": "user", "content": "."}])  # a mistake is told before anything is loaded
    with cli.backend(options):
        model = cli.load_model(options)
        model.prepare()  # what has to be compiled is compiled while the first line is written
        converse(Dialogue(model, tokenizer, system=options.system, stop=options.stop, **arguments))
    return 0


def converse(dialogue):
    """Reads lines from standard input until it ends, and answers them."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history
        print("/help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = _line(terminal)
            if line is None or line.split() == ["/exit"]:
                return
            if line.startswith("/"):
                _obey(dialogue, *line.split(maxsplit=1))
            elif line.strip():
                _reply(dialogue, line)
        except KeyboardInterrupt:
            print(flush=True)


def _line(terminal):
    """The next line without its end, None after the last."""
    if not terminal:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _obey(dialogue, command, argument=None):
    if command == "/reset":
        dialogue.reset()
    elif command == "/system":
        dialogue.system = argument
    elif command == "/help":
        print(HELP, flush=True)
    else:
        print(f"{command} is no command: /help lists them; a message may begin with a space", file=sys.stderr)


def _reply(dialogue, text):
    try:
        answer = dialogue.answer(text, lambda piece: print(piece, end="", flush=True))
    except ValueError as error:
        print(f"trillama: {error}", file=sys.stderr)
        return
    print("" if answer.text.endswith("\n") else "\n", end="", flush=True)
    if answer.end == "length" and len(answer.ids) < dialogue.max_new_tokens:
        print("trillama: the model's positions are all in use: /reset begins anew", file=sys.stderr)
