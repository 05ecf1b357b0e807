"""Figures from a table's records: PNG and SVG, the same bytes for the same records.

Colours are Okabe and Ito's, which stay apart under the common forms of colour blindness; methods differ in marker and
line style too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.paths import file_stem
from kvbench.results.cells import Table
from kvbench.results.summary import ArmSummary, RecordDict, aggregate_score, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe, Ito: "Color Universal Design" (2008).
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = "oDs^vPX*"
LINES = ("-", "--", "-.", ":")
SEQUENTIAL = "cividis"  # made to look the same with and without colour blindness (Nuñez et al. 2018)
DPI = 150


def style() -> AbstractContextManager[None]:
    """A context in which matplotlib draws without a display and reproducibly."""
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(
        {"svg.hashsalt": "kvbench", "svg.fonttype": "path", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
         "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": DPI, "font.family": "DejaVu Sans"}
    )  # fmt: skip


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg` without dates; returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    figure.savefig(paths[0], metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def figure_functions() -> dict[str, Callable[[Table], Figure | None]]:
    """Name of each figure -> function that draws it, or returns None where the records do not carry it."""
    return {"budget": budget_figure, "needle": needle_figure, "cost": cost_figure}


def write_figures(table: Table, folder: Path) -> list[Path]:
    """Draw what the records of a table allow; returns the files.

    Args:
        table: the table.
        folder: created if needed.
    """
    if not table.records:
        return []
    paths = []
    with style():
        for name, draw in figure_functions().items():
            figure = draw(table)
            if figure is not None:
                paths += save(figure, folder / f"{table.spec.name}-{file_stem(table.spec.model)}-{name}")
    return paths


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")  # no pyplot: nothing global is left behind
    return figure, figure.subplots(rows, columns, squeeze=False)


def _methods(summaries: Iterable[ArmSummary]) -> dict[str, int]:
    """Methods in fixed order with the number that gives colour, marker and line."""
    names = sorted({s.method for s in summaries}, key=lambda name: (name != "full", name))
    return {name: index for index, name in enumerate(names)}


def budget_figure(table: Table) -> Figure | None:
    """Score and KL to the full cache against the measured budget, one line per method with its default options."""
    plain = {arm.key for arm in table.spec.arms if arm.plain}
    summaries = [s for s in table.summaries.values() if s.n and s.arm in plain]
    methods = _methods(summaries)
    points = {name: sorted((s for s in summaries if s.method == name), key=lambda s: s.budget) for name in methods}
    if max((len(line) for line in points.values()), default=0) < 2:
        return None
    figure, axes = _subplots(1, 2, (9.0, 3.4))
    for axis, label, value in (
        (axes[0][0], "score (mean over data sets)", lambda s: s.score),
        (axes[0][1], "KL to the full cache, nats a token", lambda s: s.kl),
    ):
        for name, index in methods.items():
            line = [(100 * (s.budget_measured or 0), value(s)) for s in points[name] if value(s) is not None]
            if not line:
                continue
            if name == "full":
                axis.axhline(line[0][1], color=PALETTE[0], linewidth=1, label="full")
                continue
            axis.plot(*zip(*line, strict=True), color=PALETTE[index % len(PALETTE)], marker=MARKERS[index % 8],
                      linestyle=LINES[index % 4], label=name)  # fmt: skip
        axis.set_xlabel("slots kept, % of the full cache")
        axis.set_ylabel(label)
        axis.set_xlim(0, 103)
        axis.margins(y=0.1)
    axes[0][1].set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8)
    return figure


def needle_figure(table: Table) -> Figure | None:
    """Heat maps of the score over prompt length and depth of the needle, one per arm."""
    rows = [r for r in table.records if {"length_tokens", "depth"} <= set(r["meta"]) and r["status"] == "ok"]
    arms = [arm.key for arm in table.spec.arms if any(r["arm"] == arm.key for r in rows)]
    lengths = sorted({r["meta"]["length_tokens"] for r in rows})
    depths = sorted({r["meta"]["depth"] for r in rows})
    if not arms or len(depths) < 2:
        return None
    n_columns = min(3, len(arms))
    n_rows = -(-len(arms) // n_columns)
    figure, axes = _subplots(n_rows, n_columns, (3.0 * n_columns, 0.9 + 1.9 * n_rows))
    image: Any = None
    for place, axis in enumerate(axes.flat):
        if place >= len(arms):
            axis.axis("off")
            continue
        grid = _needle_grid([r for r in rows if r["arm"] == arms[place]], lengths, depths)
        image = axis.imshow(grid, vmin=0, vmax=100, cmap=SEQUENTIAL, aspect="auto")
        axis.grid(False)
        axis.set_title(arms[place], fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                text = "–" if value != value else f"{value:.0f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if value < 55 else "black")
    figure.supxlabel("prompt length, tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=axes, label="score", shrink=0.8)
    return figure


def _needle_grid(rows: Sequence[RecordDict], lengths: Sequence[int], depths: Sequence[float]) -> list[list[float]]:
    cells: dict[tuple[float, int], list[RecordDict]] = {}
    for row in rows:
        cells.setdefault((row["meta"]["depth"], row["meta"]["length_tokens"]), []).append(row)

    def score(depth: float, length: int) -> float:
        found = aggregate_score(cells.get((depth, length), []))
        return float("nan") if found is None else found

    return [[score(depth, length) for length in lengths] for depth in depths]


def cost_figure(table: Table) -> Figure | None:
    """Cache memory and seconds a sample for each arm."""
    order = {arm.key: index for index, arm in enumerate(table.spec.arms)}
    summaries = sorted((s for s in summarise(table.records) if s.n), key=lambda s: order.get(s.arm, len(order)))
    if not summaries:
        return None
    methods = _methods(summaries)
    names = [s.arm for s in summaries]
    figure, axes = _subplots(1, 2, (9.0, 1.2 + 0.28 * len(names)))
    for axis, label, values in (
        (axes[0][0], "cache after compression, MiB a sample", [(s.cache_bytes or 0) / 2**20 for s in summaries]),
        (axes[0][1], "share of wall time, s a sample", [s.seconds / s.n for s in summaries]),
    ):
        bars = axis.barh(range(len(names)), values, color=[PALETTE[methods[s.method] % 8] for s in summaries])
        axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel(label)
        axis.grid(False, axis="y")
    axes[0][1].set_yticklabels([])
    return figure
