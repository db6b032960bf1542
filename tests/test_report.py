"""Tables, plots and comparisons of results: of lines as `bench.hardware` writes them."""

import json

import pytest
from trillama.bench import report
from trillama.bench.hardware import PRETENDED

pytestmark = pytest.mark.host

CARD = {
    "section": "facts", "job": "card", "status": "ok", "gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory": 85899345920,
    "l2": 52428800, "multiprocessors": 132, "driver": "580.1", "cuda": "13.0", "python": "3.12.3", "cpus": 16,
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "liger-kernel": None}, "date": "2026-11-29T10:00:00", "clocks": {},
}  # fmt: skip


def results(scale=1.0):
    norm = {"section": "rows", "status": "ok", "op": "rms_norm", "hidden": 4096, "backward": False}
    return [
        CARD,
        {"section": "facts", "job": "copy", "status": "ok", "bytes_per_s": 3.0e12},
        {**norm, "job": "rms_norm 4096 trillama", "engine": "trillama", "us": 50.0 * scale, "gb_s": 2800.0 / scale},
        {**norm, "job": "rms_norm 4096 eager", "engine": "eager", "us": 200.0, "gb_s": 700.0},
        {**norm, "job": "rms_norm 4096 liger", "engine": "liger", "us": 55.0, "gb_s": 2545.0},
        {"section": "rows", "job": "swiglu", "status": "crashed", "error": "signal SIGSEGV"},
    ]


@pytest.fixture
def file(tmp_path):
    def write(lines, name="results.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def rows(monkeypatch):
    from trillama.bench.hardware import rows

    monkeypatch.setattr(rows, "show", lambda found, known: [f"{len(found)} rows"])


def test_every_table_has_card_versions_and_date(file, capsys, rows):
    assert report.main([str(file(results()))]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "NVIDIA H100 80GB HBM3, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3; 2026-11-29"
    assert "3 rows" in out
    assert "rows: swiglu: crashed: signal SIGSEGV" in out


def test_a_run_is_saved_under_card_and_date_and_never_over_another(file, tmp_path, rows):
    folder = tmp_path / "kept"
    first = report.save(results(), folder)
    assert first.name == "NVIDIA-H100-80GB-HBM3-2026-11-29.json"
    assert report.load(first) == results()
    assert report.save(results(), folder) == first
    second = report.save(results(2.0), folder)
    assert second.name == "NVIDIA-H100-80GB-HBM3-2026-11-29-2.json"
    assert report.save(results(), folder) == first
    assert report.load(first) == results()
    assert report.load(second) == results(2.0)
    assert report.main([str(file(results())), "--save", str(folder)]) == 0
    assert len(list(folder.iterdir())) == 2
    report.save(results(3.0), folder)
    second.unlink()
    assert report.save(results(4.0), folder) == second
    assert [report.load(f) for f in sorted(folder.iterdir())] == [results(4.0), results(3.0), results()]


def test_speedups_are_of_lines_that_differ_in_their_engine_alone():
    ((what, peers),) = report.speedups(results())["rows"]
    assert "rms_norm" in what
    assert "4096" in what
    assert peers == {"eager": pytest.approx(4.0), "liger": pytest.approx(1.1)}


def test_two_runs_are_compared(file, capsys):
    assert report.main([str(file(results())), str(file(results(0.5), "other.jsonl"))]) == 0
    out = capsys.readouterr().out
    rows = {tuple(line.split()[-4:]) for line in out.splitlines() if "rms_norm 4096 trillama" in line}
    assert rows == {("us", "50", "25", "0.50"), ("gb_s", "2800", "5600", "2.00")}


def test_plots(file, tmp_path, capsys, rows):
    pytest.importorskip("matplotlib")
    assert report.main([str(file(results())), "--plots", str(tmp_path / "plots")]) == 0
    assert (tmp_path / "plots" / "rows.png").read_bytes()[:4] == b"\x89PNG"


def test_the_readme_gets_the_tables(file, tmp_path, rows):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARK}\nold\n{report.MARK}\nafter\n")
    assert report.main([str(file(results())), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith(f"{report.MARK}\nafter\n")
    assert "3 rows" in text
    assert report.main([str(file(results())), "--readme", str(readme)]) == 0
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has 0 lines"):
        report.main([str(file(results())), "--readme", str(readme)])


def test_a_rehearsal_is_not_published(file, tmp_path, rows):
    lines = [{**CARD, "gpu": PRETENDED}, *results()[1:]]
    with pytest.raises(ValueError, match="is of a rehearsal: nothing in it was measured"):
        report.main([str(file(lines)), "--save", str(tmp_path)])


@pytest.mark.parametrize("text", ["", "[]", "{}", "hello\nworld\n", '{"results": []}', '{"section": "rows"}\n{"a": 1}\n'])
def test_other_files_are_named(tmp_path, text):
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: expected") as caught:
        report.main([str(path)])
    assert "\n" not in str(caught.value)


LINES, RESULTS = (f"expected results of trillama.bench.hardware, {what}" for what in ("lines", "result"))
BROKEN = "expected a line of JSON for each result, line"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"results": 5}', f"{LINES} with"),
        ('{"results": null}', f"{LINES} with"),
        ('{"results": {"section": "rows"}}', f"{LINES} with"),
        ("5", f"{RESULTS} 1 lacks"),
        ("null", f"{RESULTS} 1 lacks"),
        (f"{json.dumps(CARD)}\n[]\n", f"{RESULTS} 2 lacks"),
        ('{"section": [], "job": "x", "status": "ok"}', f"{RESULTS} 1 lacks"),
        ('{"section": "rows", "job": "x", "status": "ok", "engine": []}', "expected the name of an engine, or none, in result 1"),
        *(
            (json.dumps({**CARD, name: value}), f"expected of its card gpu, date and versions, {name} is {value!r}")
            for name, value in (("versions", None), ("versions", "2.11"), ("date", None), ("gpu", 5))
        ),
        (
            f'{json.dumps(CARD)}\n\n{{"section": \n{json.dumps(CARD)}\n',
            f"{BROKEN} 3 is not (Expec",
        ),
        (
            f"{json.dumps(CARD)}\nx{json.dumps(CARD)}\n{json.dumps(CARD)}\n",
            f"{BROKEN} 2 is not (",
        ),
        ('{"results": [\n{"section": "rows"},\n{"section": }\n]}\n', f"{BROKEN} 3 is not ("),
        ('{"section": "ro', f"{BROKEN} 1 is not ("),
        (b'{"section": "\xff"}', "expected text in UTF-8, byte 13 is none"),
        ("{}".encode("utf-16"), "expected text in UTF-8, byte 0 is none"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, said):
    """Which names the file and where in it."""
    path = tmp_path / "f.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for arguments in ([path], [path, path]):
        with pytest.raises(ValueError) as caught:
            report.main([*map(str, arguments)])
        assert str(caught.value).startswith(f"{path}: {said}")
        assert "\n" not in str(caught.value)


def test_a_readme_in_another_encoding_is_named(file, tmp_path, rows):
    readme = tmp_path / "README.md"
    readme.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=f"{readme}: expected text in UTF-8, byte 3 is none"):
        report.main([str(file(results())), "--readme", str(readme)])


def test_a_table_that_cannot_be_made_takes_no_other_with_it(file, capsys, rows):
    card = {name: value for name, value in CARD.items() if name != "capability"}
    assert report.main([str(file([card, *results()[1:]]))]) == 0
    out = capsys.readouterr().out
    assert "no table: KeyError: 'capability'" in out
    assert "3 rows" in out


@pytest.mark.parametrize("option", ["--save", "--plots", "--tuning", "--readme"])
def test_two_runs_are_compared_and_nothing_else(file, tmp_path, option, capsys):
    a, b = file(results()), file(results(2.0), "other.jsonl")
    with pytest.raises(ValueError, match=f"^{option} is of one run: expected no OTHER beside it, which is {b}$"):
        report.main([str(a), str(b), option, str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
    assert capsys.readouterr().out == ""


def test_lines_end_where_json_says(tmp_path):
    """Not at what else is the end of a line to Python, within a string."""
    path, lines = tmp_path / "f.jsonl", [CARD, {"section": "rows", "job": "a\u2028b", "status": "ok"}]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines), encoding="utf-8", newline="")
    assert report.load(path) == lines


def test_a_run_that_was_cut_short(file, capsys, rows):
    path = file(results())
    path.write_text(path.read_text()[:-30])
    assert report.load(path) == results()[:-1]
    assert "cut short" in capsys.readouterr().err


def test_tile_sizes_that_were_faster_make_a_tuning_file(file, tmp_path, monkeypatch):
    from trillama.bench import tune
    from trillama.kernels import tuning

    def trial(name, function, arguments, fields, gain):
        what = {"section": "tune", "status": "ok", "job": f"{name} {fields}", "name": name, "model": "Llama-3.1-8B"}
        return {
            **what, "shape": "s", "dtype": "bf16", "function": function, "arguments": arguments, "candidate": json.dumps(fields),
            "reason": None, "own_us": 100.0, "us": 100.0 / gain, "gain": gain,
        }  # fmt: skip

    lines = [
        CARD,
        trial("dq", "attention_backward", [90, 128, 2], [{"warps": 4}, {}], 1.2),
        trial("dq", "attention_backward", [90, 128, 2], [{"warps": 2}, {}], 1.1),
        trial("dkv", "attention_backward", [90, 128, 2], [{}, {"stages": 1}], 1.05),
        trial("linear", "linear", [90, 4096, 2, False, 1, None], {"stages": 3}, 1.01),
    ]
    target = tmp_path / "tuning.json"
    assert report.main([str(file(lines)), "--tuning", str(target)]) == 0
    own = tuning.attention_backward.__wrapped__(90, 128, 2)
    monkeypatch.setenv("TRILLAMA_TUNING", str(target))
    tuning.measured.cache_clear()
    tune._forget()
    try:
        dq, dkv = tuning.attention_backward(90, 128, 2)
        assert (dq.warps, dkv.stages) == (4, 1)
        assert (dq.block_m, dkv.warps) == (own[0].block_m, own[1].warps)
        assert len(tuning.measured()) == 1
        kept = json.loads(target.read_text())
        assert (kept["gpu"], kept["torch"]) == (CARD["gpu"], "2.11.0")
        assert [t["fields"] for t in kept["trials"] if t["name"] == "dq"] == [None, [{"warps": 4}, {}], None, [{"warps": 2}, {}]]
    finally:
        monkeypatch.undo()
        tuning.measured.cache_clear()
        tune._forget()


def test_tile_sizes_of_a_second_run_are_added(file, tmp_path):
    """As bench.tune does it: what is of other entries stays, what is of another GPU is refused."""
    target, mine = tmp_path / "tuning.json", {"function": "rows", "arguments": [576, 4], "entry": {"warps": 2}}
    target.write_text(json.dumps({"gpu": CARD["gpu"], "entries": [mine]}))
    assert report.main([str(file([CARD])), "--tuning", str(target)]) == 0
    assert json.loads(target.read_text())["entries"] == [mine]
    text = target.read_text()
    with pytest.raises(ValueError, match="was measured on NVIDIA H100 80GB HBM3; this is NVIDIA H200"):
        report.main([str(file([{**CARD, "gpu": "NVIDIA H200"}])), "--tuning", str(target)])
    assert target.read_text() == text
