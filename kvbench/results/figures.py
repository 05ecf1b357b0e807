"""Figures from a table's records: PNG and SVG, the same bytes for the same records.

Colours are Okabe and Ito's, which stay apart under the common forms of colour blindness; methods differ in marker and
line style too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kvbench.paths import file_stem
from kvbench.results.cells import Table
from kvbench.results.summary import REFERENCE_METHOD, ArmSummary, aggregate_score, grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe, Ito: "Color Universal Design" (2008).
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = "oDs^vPX*"
LINES = ("-", "--", "-.", ":")
SEQUENTIAL = "cividis"  # made to look the same with and without colour blindness (Nuñez et al. 2018)
DPI = 150
METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def style() -> AbstractContextManager[None]:
    """A context in which matplotlib draws without a display and reproducibly."""
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(
        {"svg.hashsalt": "kvbench", "svg.fonttype": "path", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
         "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": DPI, "font.family": "DejaVu Sans"}
    )  # fmt: skip


def save(figure: Figure, target: Path | IO[bytes], kind: str) -> None:
    """Write a figure as "png" or "svg" without dates."""
    figure.savefig(target, format=kind, metadata=METADATA[kind])


def save_both(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`; returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in METADATA}
    for kind, path in paths.items():
        save(figure, path, kind)
    return list(paths.values())


def drawn(table: Table) -> Iterator[tuple[str, Figure]]:
    """The figures that the records of a table allow, by name."""
    with style():
        for name, (_, draw) in FIGURES.items():
            if table.records and (figure := draw(table)) is not None:
                yield name, figure


def write_figures(table: Table, folder: Path) -> list[Path]:
    """Write what the records of a table allow into a folder, created if needed; returns the files."""
    stem = f"{table.spec.name}-{file_stem(table.spec.model)}"
    return [path for name, figure in drawn(table) for path in save_both(figure, folder / f"{stem}-{name}")]


def subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, `(rows, columns)`; no pyplot, so nothing global is left behind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _methods(summaries: Iterable[ArmSummary]) -> dict[str, int]:
    """Methods in fixed order with the number that gives colour, marker and line."""
    names = sorted({s.method for s in summaries}, key=lambda name: (name != REFERENCE_METHOD, name))
    return {name: index for index, name in enumerate(names)}


def budget_figure(table: Table) -> Figure | None:
    """Score and KL to the full cache against the measured budget, one line per method with its default options."""
    plain = {arm.key for arm in table.spec.arms if arm.plain}
    summaries = [s for s in table.summaries.values() if s.n and s.arm in plain]
    methods = _methods(summaries)
    points = {name: sorted((s for s in summaries if s.method == name), key=lambda s: s.budget) for name in methods}
    if max(map(len, points.values()), default=0) < 2:
        return None
    figure, axes = subplots(1, 2, (9.0, 3.4))
    for axis, label, value in (
        (axes[0][0], "score (mean over data sets)", lambda s: s.score),
        (axes[0][1], "KL to the full cache, nats a token", lambda s: s.kl),
    ):
        for name, index in methods.items():
            line = [(100 * (s.budget_measured or 0), value(s)) for s in points[name] if value(s) is not None]
            if line and name == REFERENCE_METHOD:
                axis.axhline(line[0][1], color=PALETTE[0], linewidth=1, label=name)
            elif line:
                axis.plot(*zip(*line, strict=True), color=PALETTE[index % len(PALETTE)], marker=MARKERS[index % 8],
                          linestyle=LINES[index % 4], label=name)  # fmt: skip
        axis.set(xlabel="slots kept, % of the full cache", ylabel=label, xlim=(0, 103))
        axis.margins(y=0.1)
    axes[0][1].set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8)
    return figure


def needle_figure(table: Table) -> Figure | None:
    """Heat maps of the score over prompt length and depth of the needle, one per arm."""
    rows = [r for r in table.records if {"length_tokens", "depth"} <= set(r["meta"]) and r["status"] == "ok"]
    by_arm = grouped(rows, "arm")
    arms = [arm.key for arm in table.spec.arms if arm.key in by_arm]
    lengths, depths = (sorted({r["meta"][name] for r in rows}) for name in ("length_tokens", "depth"))
    if not arms or len(depths) < 2:
        return None
    n_columns, n_rows = min(3, len(arms)), -(-len(arms) // 3)
    figure, axes = subplots(n_rows, n_columns, (3.0 * n_columns, 0.9 + 1.9 * n_rows))
    image: Any = None
    for axis in list(axes.flat)[len(arms) :]:
        axis.axis("off")
    for axis, arm in zip(axes.flat, arms, strict=False):
        cells = grouped(({**r["meta"], **r} for r in by_arm[arm]), "depth", "length_tokens")
        scores = [[aggregate_score(cells.get((depth, length), [])) for length in lengths] for depth in depths]
        grid = np.array(scores, dtype=float)  # nan for None
        image = axis.imshow(grid, vmin=0, vmax=100, cmap=SEQUENTIAL, aspect="auto")
        axis.grid(False)
        axis.set_title(arm, fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
        for (i, j), value in np.ndenumerate(grid):
            text = "–" if np.isnan(value) else f"{value:.0f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if value < 55 else "black")
    figure.supxlabel("prompt length, tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=axes, label="score", shrink=0.8)
    return figure


def cost_figure(table: Table) -> Figure | None:
    """Cache memory and seconds a sample for each arm."""
    order = {arm.key: index for index, arm in enumerate(table.spec.arms)}
    summaries = sorted((s for s in table.summaries.values() if s.n), key=lambda s: order.get(s.arm, len(order)))
    if not summaries:
        return None
    methods, names = _methods(summaries), [s.arm for s in summaries]
    figure, axes = subplots(1, 2, (9.0, 1.2 + 0.28 * len(names)))
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


FIGURES: dict[str, tuple[str, Callable[[Table], Figure | None]]] = {
    "budget": ("Score and KL to the full cache against the measured budget", budget_figure),
    "needle": ("Score over prompt length and depth of the needle", needle_figure),
    "cost": ("Cache memory and time for each arm (the arms of a fused batch share its time equally)", cost_figure),
}
"""Name -> caption, and the function that draws it or returns None where the records do not carry it."""
