"""Tables and plots of what `bench.hardware` measured: `python -m trillama.bench.report FILE [OTHER]`.

    FILE                 results.jsonl of a run, or a file of bench/results/
    OTHER                a second run: every measurement of both beside the other's, and their ratio
    --save DIR           the run as one document, DIR/CARD-DATE.json: what bench/results/ holds
    --plots DIR          speed-up over each peer, a bar a case
    --tuning FILE        adds the tile sizes that were faster than the tables' to a file of bench.tune, for TRILLAMA_TUNING
    --readme FILE        puts the tables between the two marks `<!-- measured -->` of a Markdown file

Each option is of one run.

A result is a line of plain values. Its words and whole numbers say what was measured (`engine`: whose), its fractional numbers are
the measurements: lines that differ in `engine` alone are of peers, lines of two runs that agree in all words are of one thing.
"""

import contextlib
import itertools
import json
import re
import sys
from pathlib import Path
from types import NoneType

from ..model import cli
from . import files, plots
from .apart import one_line
from .hardware import SECTIONS, section, table

MARK = "<!-- measured -->"
FASTER = {"us": -1, "ms": -1, "seconds": -1, "tokens_per_s": 1, "tflop_s": 1, "gb_s": 1, "bytes_per_s": 1, "flop_per_s": 1}
OTHERS = ("status", "error", "why", "engine", "job", "peak_bytes", "parameters")  # say nothing of what was measured


def load(file):
    """The lines of a run: of results.jsonl, or of a document that `save` wrote."""
    text = read(file)
    try:
        whole = json.loads(text)
        lines = whole.get("results") if isinstance(whole, dict) and "section" not in whole else [whole]
    except ValueError as error:
        lines = separate(file, text, error)
    if not isinstance(lines, list) or not lines:
        raise ValueError(f"{file}: expected results of trillama.bench.hardware, lines with section, job and status")
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in ("section", "job", "status")):
            raise ValueError(f"{file}: expected results of trillama.bench.hardware, result {number} lacks section, job or status")
        if not isinstance(line.get("engine"), (str, NoneType)):
            raise ValueError(f"{file}: expected the name of an engine, or none, in result {number}, not {line['engine']!r}")
    for name, kind in (("gpu", str), ("date", str), ("versions", dict)):
        if not isinstance(card(lines).get(name), kind):
            raise ValueError(f"{file}: expected of its card gpu, date and versions, {name} is {card(lines).get(name)!r}")
    return lines


def read(file):
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, byte {error.start} is none") from None


def separate(file, text, error):
    """The results of a text that is a line of JSON for each. error: what it is as one document."""
    lines = []
    rows = [(number, row) for number, row in enumerate(text.split("\n"), 1) if row.strip()]
    for i, (number, row) in enumerate(rows):
        try:
            lines.append(json.loads(row))
        except ValueError as own:
            if 0 < i == len(rows) - 1:  # a run that was cut short may have cut its last line
                print(f"trillama: {file}: the last line is cut short and left out", file=sys.stderr)
                break
            number, own = (number, own) if i else (error.lineno, error)  # it may be a document
            reason = f"line {number} is not ({own.msg}, column {own.colno})"
            raise ValueError(f"{file}: expected a line of JSON for each result, {reason}") from None
    return lines


def of(lines, name):
    return [line for line in lines if line["section"] == name and line["status"] == "ok"]


def card(lines):
    unknown = {"gpu": "an unknown GPU", "date": "undated", "versions": {}}
    return next((line for line in of(lines, "facts") if "gpu" in line), unknown)


def provenance(lines):
    """Card, versions and date of a run in one line."""
    c = card(lines)
    versions = ", ".join(f"{name} {v}" for name, v in c["versions"].items() if v)
    return f"{c['gpu']}, driver {c.get('driver')}, {versions}, Python {c.get('python')}; {c['date'][:10]}"


def save(lines, folder):
    """Writes CARD-DATE.json, once; another run of the day gets a number."""
    c = card(lines)
    name = f"{re.sub('[^A-Za-z0-9]+', '-', c['gpu']).strip('-')}-{c['date'][:10]}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(line) for line in lines)
    head = f'"gpu": {json.dumps(c["gpu"])}, "date": {json.dumps(c["date"])}'
    kept = [file for file in folder.glob(f"{name}*.json") if load(file) == lines]
    if kept:
        return kept[0]
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            with open(folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json"), "x", encoding="utf-8") as file:
                file.write(f'{{{head}, "results": [\n{rows}\n]}}\n')
            return Path(file.name)


def tables(lines):
    """The lines of all tables, each section under its title, and what went wrong."""
    yield provenance(lines)
    for name in SECTIONS:
        if any(line["section"] == name for line in lines):
            yield from ("", f"{name}: {section(name).__doc__.splitlines()[0]}")
            try:
                yield from table(lines, name)
            except Exception as error:  # of another version's run, or a file that was edited
                yield f"no table: {one_line(error)}"
    wrong = [line for line in lines if line["status"] != "ok"]
    if wrong:
        yield from ("", "not measured, or wrong:")
        yield from (f"{line['section']}: {line['job']}: {line['status']}: {line.get('error')}" for line in wrong)


def into_readme(lines, file):
    """Puts the tables between the two marks of a Markdown file."""
    before, _, behind = marked(file)
    block = "\n".join(tables(lines))
    files.rewrite(file, f"{before}{MARK}\n\n```\n{block}\n```\n\n{MARK}{behind}")


def marked(file):
    """The text of a Markdown file before, between and behind its two marks."""
    parts = read(file).split(MARK)
    if len(parts) != 3:
        raise ValueError(f"{file} has {len(parts) - 1} lines {MARK!r}, expected two, with the tables between them")
    return parts


# --- peers, and two runs ---------------------------------------------------------------------------------------------------


def identity(line):
    """What a line is of: its words and whole numbers. A flag that is not set is as one that is not there."""
    return tuple((k, v) for k, v in sorted(line.items()) if k not in OTHERS and isinstance(v, (str, int)) and v is not False)


def rate(line):
    """(a measurement, larger is better) of a line, or None."""
    for name, direction in FASTER.items():
        value = line.get(name)
        if isinstance(value, (int, float)) and value > 0:
            return value if direction > 0 else 1 / value
    return None


def speedups(lines):
    """{name: [(what, {peer: our rate over the peer's})]} of the lines that differ in their engine alone."""
    found = {}
    for line in lines:
        if "engine" in line and line["status"] == "ok" and rate(line):
            found.setdefault((line["section"], identity(line)), {})[line["engine"]] = rate(line)
    result = {}
    for (name, what), engines in found.items():
        ours = engines.pop("trillama", None)
        if ours and engines:
            words = " ".join(f"{v}" if isinstance(v, str) else f"{k} {v}" for k, v in what if v is not None and k != "section")
            result.setdefault(name, []).append((words, {peer: ours / other for peer, other in engines.items()}))
    return result


def compare(a, b):
    """The lines of a table: the measurements that both runs have, and b's over a's."""
    yield f"A: {provenance(a)}"
    yield f"B: {provenance(b)}"
    before = {(identity(line), line.get("engine")): line for line in a if line["status"] == "ok"}
    rows = []
    for line in (line for line in b if line["status"] == "ok"):
        other = before.get((identity(line), line.get("engine")), {})
        for name, value in line.items():
            if isinstance(value, float) and isinstance(other.get(name), float) and name not in OTHERS and other[name]:
                what = f"{line['section']}: {line['job']}" + (f", {line['engine']}" if line.get("engine") else "")
                rows.append((what, name, f"{other[name]:.4g}", f"{value:.4g}", f"{value / other[name]:.2f}"))
    yield from ("", *plots.table(("", "measured", "A", "B", "B / A"), rows, left=2)) if rows else ("", "nothing in common")


def draw(lines, folder):
    """A file for each section that has peers: how many times as fast as each of them. Returns the files."""
    drawings = []
    for name, cases in speedups(lines).items():
        peers = sorted({peer for _, engines in cases for peer in engines})
        drawn, subplots = plots.figure((10, 1.5 + 0.22 * len(cases) * (len(peers) + 1)))
        axes = subplots()
        height = 0.8 / len(peers)
        for j, peer in enumerate(peers):
            at = [i - 0.4 + (j + 0.5) * height for i, (_, engines) in enumerate(cases) if peer in engines]
            axes.barh(at, [engines[peer] for _, engines in cases if peer in engines], height, label=peer)
        axes.set_yticks(range(len(cases)), [what[:70] for what, _ in cases], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("times as fast as the peer")
        axes.set_title(f"{name}: {provenance(lines)}", fontsize=7)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        drawings.append(Path(folder) / f"{name}.png")
        plots.save(drawn, drawings[-1])
    return drawings


def main(argv=None):
    parser = cli.Parser(prog="python -m trillama.bench.report", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("file", metavar="FILE", help="results.jsonl of a run, or a file of bench/results/")
    add("other", metavar="OTHER", nargs="?", help="a second run, to be compared with the first")
    add("--save", metavar="DIR", help="write the run as DIR/CARD-DATE.json")
    add("--plots", metavar="DIR", help="draw the speed-up over each peer into DIR")
    add("--tuning", metavar="FILE", help="add the tile sizes that were faster to a file of bench.tune, for TRILLAMA_TUNING")
    add("--readme", metavar="FILE", help=f"put the tables between two lines {MARK}")
    options = parser.parse_args(argv)
    if options.other:
        for name in ("save", "plots", "tuning", "readme"):
            if getattr(options, name):
                raise ValueError(f"--{name} is of one run: expected no OTHER beside it, which is {options.other}")
    lines = load(options.file)
    if options.readme:
        marked(options.readme)
    if options.other:
        print("\n".join(compare(lines, load(options.other))))
        return 0
    print("\n".join(tables(lines)))
    from .hardware import facts, tune
    from .tune import Record

    if facts.rehearsed(lines) and (options.save or options.readme or options.tuning):
        raise ValueError(f"{options.file} is of a rehearsal: nothing in it was measured")
    if options.save:
        print(f"saved: {save(lines, options.save)}")
    if options.plots:
        print(f"plots: {', '.join(map(str, draw(lines, options.plots))) or 'nothing has a peer'}")
    if options.tuning:
        c = card(lines)
        tune.keep(of(lines, "tune"), Record(options.tuning, c["gpu"], c["versions"].get("torch")))
    if options.readme:
        into_readme(lines, options.readme)
    return 0


if __name__ == "__main__":
    sys.exit(cli.status(main))
