"""How results are shown: text tables, and figures where matplotlib is installed."""

import contextlib
from pathlib import Path

from ..model.files import naming
from . import files


def table(header, rows, left=1):
    """Lines of an aligned text table; the first `left` columns are flushed left, the others right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in cells
    ]


def check(option, file):
    """Raises ValueError where no figure could be saved under the name that the option gives; makes its folder."""
    drawn, _ = figure((1, 1))
    kinds, kind = drawn.canvas.get_supported_filetypes(), Path(file).suffix[1:].lower()
    if kind not in kinds:
        raise ValueError(f"{option} is {file}, expected a name that ends in one of {', '.join(f'.{k}' for k in sorted(kinds))}")
    with contextlib.suppress(OSError):  # the file cannot be written either
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    files.check(option, file)


def figure(size):
    """(matplotlib figure, axes) drawn without a display; a clear error where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'trillama[plot]'") from None
    drawn = Figure(figsize=size, layout="constrained")
    return drawn, drawn.subplots


def save(drawn, file):
    with naming(file):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(file, dpi=150)


COLOURS = {
    "tensor": "#4c72b0", "mufu": "#dd8452", "fma": "#55a868", "alu": "#c44e52", "lsu": "#8172b3", "shuffle": "#937860",
    "uniform": "#8c8c8c", "control": "#cccccc", "issue": "#222222",
}  # fmt: skip


def xray(reports, file):
    """Two panels. Kernels bound by matrix work: cycles of every pipe in their hottest loop, in units of the cycles which the matrix
    work takes at its peak rate. Kernels bound by memory: their instructions for every 16 bytes they move."""
    rows = [r for r in reports if r["mix"] and r["issue_at_full_bandwidth"] is not None]
    loops = [r for r in reports if r["loop"] and r["loop"]["flops"] and r["issue_at_full_bandwidth"] is None]
    panels = [p for p in (loops, rows) if p]
    if not panels:
        raise ValueError("--plot: nothing to draw, no kernel for an NVIDIA architecture was examined")
    drawn, subplots = figure((11, 1.2 + sum(0.34 * len(p) + 1.0 for p in panels)))
    axes = subplots(len(panels), 1, squeeze=False, height_ratios=[len(p) + 2 for p in panels])[:, 0]
    for panel, ax in zip(panels, axes):
        ax.set_yticks(range(len(panel)), [_label(r, panel) for r in panel], fontsize=8)
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    if loops:
        ax = axes[0]
        for i, r in enumerate(loops):
            loop = r["loop"]
            peak = loop["no_overlap"] * (loop["cycles"]["tensor"] + loop["cycles"]["issue"])
            pipes = [p for p in ("tensor", "issue", "lsu", "fma", "alu", "mufu") if loop["cycles"][p]]
            for j, pipe in enumerate(pipes):
                height = 0.8 / len(pipes)
                label = pipe if i == 0 else None
                ax.barh(i - 0.4 + (j + 0.5) * height, loop["cycles"][pipe] / peak, height, color=COLOURS[pipe], label=label)
            ax.text(ax.get_xlim()[1], i, f"  {loop['no_overlap']:.2f} … {loop['perfect_overlap']:.2f}", va="center", fontsize=8)
        for text in ax.texts:
            text.set_x(ax.get_xlim()[1])
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_xlabel("cycles of a pipe in the hottest loop / cycles of its matrix work at peak rate")
        ax.set_title("Ceiling, fraction of tensor peak: no overlap … perfect overlap (compiled code, not a timing)", fontsize=9)
        ax.legend(fontsize=8, ncols=6, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.06))
    if rows:
        ax = axes[-1]
        used = [p for p in COLOURS if any(_share(r).get(p) for r in rows)]
        for pipe in used:
            before = [sum(_share(r).get(p, 0) for p in used[: used.index(pipe)]) for r in rows]
            ax.barh(range(len(rows)), [_share(r).get(pipe, 0) for r in rows], 0.7, before, color=COLOURS[pipe], label=pipe)
        ax.set_xlabel("warp instructions for every 16 bytes moved")
        ax.set_title("Kernels bound by memory (compiled code, not a timing)", fontsize=9)
        ax.legend(fontsize=8, frameon=False, loc="lower right")
    save(drawn, file)


def _label(report, reports):
    """Op, case and architecture; the kernel too where the op has launched several."""
    alike = [r for r in reports if all(r[key] == report[key] for key in ("op", "case", "dtype", "arch", "engine"))]
    kernel = f" ({report['kernel'].removesuffix('_kernel')})" if len(alike) > 1 else ""
    return f"{report['op']}{kernel}  {report['case']}  {report['arch']}"


def _share(report):
    """Instructions by pipe for every 16 bytes."""
    source = report["loop"] or report
    per = (report["per_16_bytes"] or 0) / source["instructions"]
    return {pipe: n * per for pipe, n in source["mix"].items()}


def speedups(results, folder):
    """One figure an op: the time of every engine over ours, by model. Returns the files."""
    files = []
    for name in dict.fromkeys(r["name"] for r in results):
        times = {}  # by engine, then by case
        for r in results:
            if r["name"] == name:
                times.setdefault(r["engine"], {})[f"{r['model']}  {r['shape']}"] = r["us"]
        ours = times.pop("trillama", {})
        if not ours or not times:
            continue
        drawn, subplots = figure((7, 1.2 + 0.5 * len(ours)))
        ax = subplots()
        height = 0.8 / len(times)
        for j, (engine, theirs) in enumerate(times.items()):
            at = {i: theirs[case] / ours[case] for i, case in enumerate(ours) if case in theirs}
            ax.barh([i - 0.4 + (j + 0.5) * height for i in at], list(at.values()), height, label=engine)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_yticks(range(len(ours)), list(ours), fontsize=8)
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
        on_cpu = next(r["device"] for r in results if r["name"] == name) == "cpu"
        ax.set_xlabel("time / time of trillama" + ("'s reference path, on a CPU" if on_cpu else ""))
        ax.set_title(name, fontsize=10)
        ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        files.append(folder / f"{name.replace(' ', '_')}.png")
        save(drawn, files[-1])
    return files
