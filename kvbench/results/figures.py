"""Figures from a table's records: PNG and SVG, the same bytes for the same records.

Every colour has a contrast of at least 3:1 on the paper of the figures and on both backgrounds of the page. Methods
differ in marker and line style too, and their names stand at their lines.
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

# The first four are Okabe and Ito's ("Color Universal Design", 2008), which stay apart under the common forms of colour
# blindness; their yellow, orange and sky blue are too light for white paper.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A87B00", "#7C6FE0", "#A0622D", "#5B7F95")
INK = "#1B1F24"  # the full cache
BACKGROUNDS = ("#FFFFFF", "#14171B")
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


def looks(methods: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of every method, the full cache in ink; no two alike among 64."""
    others = sorted(set(methods) - {REFERENCE_METHOD})
    found = {REFERENCE_METHOD: (INK, MARKERS[0], LINES[0])}
    for i, name in enumerate(others):
        shift = i + i // len(PALETTE)
        found[name] = (PALETTE[i % len(PALETTE)], MARKERS[shift % len(MARKERS)], LINES[shift % len(LINES)])
    return found


def budget_lines(table: Table, value: Callable[[ArmSummary], float | None]) -> dict[str, list[tuple[float, float]]]:
    """By method with its default options, points (share of slots kept in %, value), falling; none below two budgets."""
    plain = {arm.key for arm in table.spec.arms if arm.plain}
    lines: dict[str, list[tuple[float, float]]] = {}
    for s in sorted(table.summaries.values(), key=lambda s: (s.method, -s.budget)):
        if s.n and s.arm in plain and (y := value(s)) is not None:
            lines.setdefault(s.method, []).append((100 * (s.budget_measured or 0), y))
    return lines if max(map(len, lines.values()), default=0) > 1 else {}


def spread(places: Iterable[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """The places moved apart as little as their order allows, so that labels at them do not overlap."""
    order = sorted(range(len(wanted := list(places))), key=lambda i: wanted[i])
    gap, moved = min(gap, (high - low) / max(1, len(order) - 1)), list(wanted)
    for rank, i in enumerate(order):
        moved[i] = max(wanted[i], low if rank == 0 else moved[order[rank - 1]] + gap)
    for rank, i in reversed(list(enumerate(order))):
        moved[i] = min(moved[i], high if rank == len(order) - 1 else moved[order[rank + 1]] - gap)
    return moved


BUDGET_PANELS: tuple[tuple[str, str, Callable[[ArmSummary], float | None]], ...] = (
    ("KL to the full cache, nats a token", "log", lambda s: s.kl or None),
    ("score (mean over data sets)", "linear", lambda s: s.score),
)


def budget_figure(table: Table) -> Figure | None:
    """KL to the full cache and score against the measured budget, one line per method with its default options."""
    panels = [(label, scale, budget_lines(table, value)) for label, scale, value in BUDGET_PANELS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    look = looks(s.method for s in table.summaries.values())
    height = max(3.4, 0.16 * max(len(lines) for *_, lines in panels))
    figure, axes = subplots(1, len(panels), (5.2 * len(panels), height))
    for axis, (label, scale, lines) in zip(axes[0], panels, strict=True):
        for name, points in lines.items():
            colour, marker, line = look[name]
            if name == REFERENCE_METHOD:
                axis.axhline(points[0][1], color=colour, linewidth=1)
            else:
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line)
        axis.set(xlabel="slots kept, % of the full cache", ylabel=label, yscale=scale)
        axis.margins(y=0.1)
        axis.invert_xaxis()
        ends = {name: points[-1] for name, points in lines.items()}
        if REFERENCE_METHOD in ends:
            ends[REFERENCE_METHOD] = (axis.get_xlim()[1], ends[REFERENCE_METHOD][1])
        to_axes = axis.transData + axis.transAxes.inverted()
        places = spread((to_axes.transform(end)[1] for end in ends.values()), 0.045)
        for (name, end), place in zip(ends.items(), places, strict=True):
            axis.annotate(
                name, end, (1.04, place), textcoords=axis.transAxes, color=look[name][0], fontsize=7, va="center",
                arrowprops={"arrowstyle": "-", "color": look[name][0], "linewidth": 0.5, "relpos": (0, 0.5)},
            )  # fmt: skip
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
    """Cache memory of each arm."""
    order = {arm.key: index for index, arm in enumerate(table.spec.arms)}
    summaries = sorted((s for s in table.summaries.values() if s.n), key=lambda s: order.get(s.arm, len(order)))
    if not summaries:
        return None
    look, names = looks(s.method for s in summaries), [s.arm for s in summaries]
    figure, axes = subplots(1, 1, (6.0, 1.2 + 0.28 * len(names)))
    axis, values = axes[0][0], [(s.cache_bytes or 0) / 2**20 for s in summaries]
    bars = axis.barh(range(len(names)), values, color=[look[s.method][0] for s in summaries])
    axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("cache after compression, MiB a sample")
    axis.grid(False, axis="y")
    return figure


def needle_finding(table: Table) -> str:
    """What the needle figure shows, for those who do not see it."""
    rows = [r for r in table.records if {"length_tokens", "depth"} <= set(r["meta"]) and r["status"] == "ok"]
    scores = {arm: aggregate_score(own) for arm, own in grouped(rows, "arm").items()}
    known = sorted((score, arm) for arm, score in scores.items() if score is not None)
    if not known:
        return ""
    (low, worst), (high, best) = known[0], known[-1]
    return f"from {high:.0f} ({best}) down to {low:.0f} ({worst}) over all lengths and depths"


FIGURES: dict[str, tuple[str, Callable[[Table], Figure | None]]] = {
    "budget": ("KL to the full cache and score against the measured budget", budget_figure),
    "needle": ("Score over prompt length and depth of the needle", needle_figure),
    "cost": ("Cache memory of each arm", cost_figure),
}
"""Name -> caption, and the function that draws it or returns None where the records do not carry it."""
