"""Renders a model's chat template, a program from a stranger, in a process of its own: sandboxed, and bounded in time and memory.

The sandbox keeps a template from reaching Python, but not from looping or from filling the memory with one expression; only a
process that can be ended does. Its start takes about a tenth of a second, once a turn of a dialogue.
"""

import contextlib
import json
import subprocess
import sys

try:
    import resource
except ImportError:  # no POSIX
    resource = None

SECONDS = 10  # of processor time, where the system can limit it: a busy machine, which takes longer, is given PATIENCE times that
PATIENCE = 10
BYTES = 1 << 30  # address space of the process, where the system can limit it
LONGEST = 16 << 20  # characters of a rendered dialogue


def render(template, variables):
    """The text that the Jinja template makes of `variables` (a dict of JSON values).

    ValueError of one line if the template is wrong, refuses the dialogue, tries to leave its sandbox, or does not come to an end.
    """
    try:
        request = json.dumps({"template": template, "variables": variables})
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages cannot be handed to the chat template: {error}") from None
    command = [sys.executable, "-I", __file__, str(SECONDS), *filter(None, sys.path)]
    patience = SECONDS * (PATIENCE if resource else 1)
    try:
        done = subprocess.run(command, input=request, capture_output=True, encoding="utf-8", timeout=patience)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template does not come to an end within {patience} seconds") from None
    try:
        reply = json.loads(done.stdout)
    except ValueError:  # the process was ended by its limits, or it could not even start
        reason = (done.stderr.strip() or "it needs more memory or time than it is given").splitlines()[-1]
        raise ValueError(f"the chat template cannot be rendered: {reason}") from None
    if "error" in reply:
        raise ValueError(f"the chat template fails: {reply['error']}")
    return reply["text"]


def _serve():
    """Reads one request from standard input and answers on standard output. What transformers gives its templates is here too."""
    import datetime

    import jinja2.ext
    import jinja2.sandbox
    from jinja2.exceptions import SecurityError, TemplateError

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}, which marks the assistant's words for training: here just its body."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"attribute {name} of a namespace is not to be set")
            super().__setitem__(name, value)

    def namespace(**attributes):
        made = Namespace()
        for name, value in attributes.items():
            made[name] = value
        return made

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals.update(
        namespace=namespace,
        dict=lambda *args, **fields: dict(*args, **fields),
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
    )
    request = json.load(sys.stdin)
    try:
        text = environment.from_string(request["template"]).render(**request["variables"])
        if len(text) > LONGEST:
            raise TemplateError(f"it made a text of {len(text)} characters, expected at most {LONGEST}")
        return {"text": text}
    except Exception as error:  # whatever the template brought about
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


if __name__ == "__main__":
    seconds, sys.path[:] = int(sys.argv[1]), sys.argv[2:]
    if resource:
        with contextlib.suppress(ValueError, OSError):  # what the system does not limit: the caller's patience ends
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    print(json.dumps(_serve()))
