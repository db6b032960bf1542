"""docs/kernels.md, held to the code: every example runs, every signature and every link is the code's, the bytes are counted."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from trillama import kernels
from trillama.bench import traffic
from trillama.bench.cases import OPS, case
from trillama.kernels import dispatch
from trillama.kernels.compat import flash_attn

pytestmark = pytest.mark.host
PAGE = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text(encoding="utf-8")
SECTIONS = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])


def blocks(language):
    """(title of the section, text) of each block of code."""
    return [(title, code) for title, text in SECTIONS.items() for code in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


COMPILER = pytest.mark.slow  # starts inductor's processes, as README.md's example does
EXAMPLES = [pytest.param(*block, id=block[0], marks=COMPILER if block[0] == "torch.compile" else ()) for block in blocks("python")]
SIGNATURES = [line for _, code in blocks("text") for line in code.splitlines()]


@pytest.mark.parametrize(("title", "code"), EXAMPLES)
def test_examples(title, code):
    if "transformers" in title:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    torch._dynamo.reset()
    exec(compile(code, f"docs/kernels.md, {title}", "exec"), {})


def public():
    """Every public name with what it is; compat.transformers' where transformers is."""
    named = {name: getattr(module, name) for module in (kernels, flash_attn) for name in module.__all__}
    try:
        from trillama.kernels.compat import transformers
    except ImportError:
        return named
    return named | {name: getattr(transformers, name) for name in transformers.__all__}


def test_every_public_name_is_there():
    lacking = [name for name in public() if not re.search(rf"(^|\W){name}\W", PAGE)]
    assert not lacking
    stated = {line.partition("(")[0] for line in SIGNATURES}
    called_by_transformers = {"attention", "attention_mask"}
    assert {name for name, what in public().items() if callable(what)} - called_by_transformers <= stated


@pytest.mark.parametrize("line", SIGNATURES, ids=lambda line: line.partition("(")[0])
def test_signatures(line):
    if (name := line.partition("(")[0]) not in public():
        pytest.skip("transformers is not installed")
    stated = {}
    exec(f"def {line}: pass", stated)
    on_the_page, in_the_code = (inspect.signature(what).parameters.values() for what in (stated[name], public()[name]))
    on_the_page, in_the_code = ([(p.name, p.kind, p.default) for p in those] for those in (on_the_page, in_the_code))
    assert on_the_page == in_the_code


def test_links():
    """Within the page, as GitHub makes anchors of titles; and to files."""
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in SECTIONS}
    linked = set(re.findall(r"\]\(#(.*?)\)", PAGE))
    assert linked <= anchors
    for file in re.findall(r"`((?:kernels|bench|tests|docs)/[\w/]+\.\w+)`", PAGE):
        assert (Path(__file__).parent.parent / file).is_file(), file


BYTES = [[cell.strip() for cell in line.split("|")[1:-1]] for line in SECTIONS["Bytes"].splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize(
    ("op", "backward", "stated"),
    [(row[0], backward, row[1 + backward]) for row in BYTES for backward in (False, True) if row[1 + backward]],
)
def test_least_bytes(op, backward, stated):
    """The formulas of the table are those that the benchmarks count by."""
    c = case(op, "Llama-3.1-8B", backward=backward)
    a = c.inputs("meta", empty=True)
    sizes = {name: t.nbytes for name, t in a.items() if isinstance(t, torch.Tensor)}
    if "cos" in a:
        sizes["rows"] = 2 * 4 * a["q"].shape[2] * a["cos"].shape[1]
    if "q" in a:
        sizes["lse"] = 4 * a["q"].shape[:3].numel()
    if op in ("decode_linear", "embed_next_"):
        columns = a["weight"].shape[0] if op == "decode_linear" else a["table"].shape[1]
        sizes["out"] = c.rows * columns * c.itemsize
    assert eval(stated.strip("`"), {}, sizes) == c.moved


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="accesses are counted in Triton's interpreter")
def test_counted_bytes_of_attentions_backward():
    (stated,) = (row[4] for row in BYTES if row[0] == "flash_attention")
    c = case("flash_attention", "SmolLM2-135M", tokens=32, dtype="fp16", backward=True)
    a = c.inputs("meta", empty=True)
    sizes = {**{name: t.nbytes for name, t in a.items()}, "lse": 4 * a["q"].shape[:3].numel()}
    assert sum(launch.hbm for launch in traffic.count(c)) == eval(stated.strip("`"), {}, sizes)


def test_every_op_of_the_table_is_one():
    assert {row[0] for row in BYTES} == {op for op in OPS if " " not in op and op in kernels.__all__}
