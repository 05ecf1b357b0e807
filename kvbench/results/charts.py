"""Places of what the page draws: intervals along an axis, lines with their names; the template makes SVG of them.

Not matplotlib's images: these rows are sorted and filtered with the table they stand in, take the page's colours in the
dark, and stay sharp and selectable. The methods' colours are those of the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from kvbench.results.cells import Cell, Table
from kvbench.results.figures import BUDGET_PANELS, LINES, budget_lines, looks, spread
from kvbench.results.statistics import Interval
from kvbench.results.summary import REFERENCE_METHOD
from kvbench.results.tables import above_text, interval_text, kl_text

DECADES = 6  # a logarithmic axis shows at most so many; what is smaller stands at its end
DASHES = dict(zip(LINES, ("", "7 4", "9 3 2 3", "2 3"), strict=True))
NEAR = 4.0  # per cent: shares of slots that are nearer to each other count as one budget
WIDTH, LEFT, RIGHT, TOP, BOTTOM, LABEL_HEIGHT = 640, 52, 150, 12, 40, 15  # of a line chart, in its own units


@dataclass(frozen=True)
class Axis:
    """From values to per cent of the drawing's width (or height), with ticks."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]  # place in per cent, text

    def place(self, value: float) -> float:
        """Per cent from the low end; what lies outside stands at the end."""
        return round(100 * _share(value, self.low, self.high, self.log), 2)


def axis_of(values: Iterable[float], log: bool) -> Axis:
    """An axis over all values: whole decades of the positive ones, or round numbers."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not known:
        return Axis(0.1 if log else 0.0, 1.0, log, ())
    if log:
        top = math.ceil(math.log10(max(known)) + 1e-9)
        bottom = max(min(math.floor(math.log10(min(known))), top - 1), top - DECADES)
        marks = [10.0**power for power in range(bottom, top + 1)]
    else:
        low, high = min(known), max(known)
        marks = [float(mark) for mark in MaxNLocator(4).tick_values(low, high if high > low else low + 1)]
    low, high = marks[0], marks[-1]
    return Axis(low, high, log, tuple((round(100 * _share(m, low, high, log), 2), f"{m:g}") for m in marks))


def _share(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def panel(table: Table) -> dict[str, Any] | None:
    """The first thing a reader sees: each arm's KL on a logarithmic axis and score on a linear one, with intervals."""
    if (column := table.overall) is None:
        return None
    cells = [(arm, column.cells[arm.key]) for arm in table.spec.arms if arm.key in column.cells]
    kl = axis_of((v for _, cell in cells for v in _values(cell.kl, cell.kl_interval)), True)
    score = axis_of((v for _, cell in cells for v in _values(cell.score, cell.interval)), False)
    look = looks(arm.method for arm in table.spec.arms)
    rows = [
        {
            "arm": arm, "cell": cell, "full": arm.method == REFERENCE_METHOD, "colour": look[arm.method][0],
            "kl": _bar(kl, cell.kl, cell.kl_interval), "kl_text": kl_text(cell, ""), "above": above_text(cell),
            "score": _bar(score, cell.score, cell.interval), "interval": interval_text(cell),
        }
        for arm, cell in cells
    ]  # fmt: skip
    return {"kl": kl if any(row["kl"] for row in rows) else None, "score": score, "rows": rows}


def _values(value: float | None, interval: Interval | None) -> list[float]:
    return [v for v in (value, *(interval or ())) if v is not None]


def _bar(axis: Axis, value: float | None, interval: Interval | None) -> dict[str, float] | None:
    if value is None:
        return None
    low, high = interval or (value, value)
    return {"at": axis.place(value), "low": axis.place(low), "high": axis.place(high)}


def line_charts(table: Table) -> list[dict[str, Any]]:
    """KL and score against the share of slots kept, one line for each method, its name at the line's end."""
    look, charts = looks(s.method for s in table.summaries.values()), list[dict[str, Any]]()
    for label, scale, value in BUDGET_PANELS:
        lines = budget_lines(table, value)
        if not lines:
            continue
        height = TOP + BOTTOM + max(260, LABEL_HEIGHT * (len(lines) + 1))
        points = [point for line in lines.values() for point in line]
        values = axis_of((y for _, y in points), scale == "log")
        kept = [x for name, line in lines.items() for x, _ in line if name != REFERENCE_METHOD]
        first, last = max(kept), min(kept)
        inner_width, inner_height = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

        def place(
            x: float, y: float, ends: tuple[float, float] = (first, last), axis: Axis = values,
            inner: tuple[float, float] = (inner_width, inner_height),
        ) -> tuple[float, float]:  # fmt: skip
            share = (ends[0] - x) / ((ends[0] - ends[1]) or 1)
            return round(LEFT + inner[0] * share, 1), round(TOP + inner[1] * (1 - axis.place(y) / 100), 1)

        placed = {
            name: [place(first, line[0][1]), place(last, line[0][1])]
            if name == REFERENCE_METHOD else [place(*point) for point in line]
            for name, line in lines.items()
        }  # fmt: skip
        at = spread((line[-1][1] for line in placed.values()), LABEL_HEIGHT, TOP, height - BOTTOM)
        series = [
            {"name": name, "full": name == REFERENCE_METHOD, "points": line, "label": round(y, 1),
             "colour": look[name][0], "dash": DASHES[look[name][2]]}
            for (name, line), y in zip(placed.items(), at, strict=True)
        ]  # fmt: skip
        charts.append({
            "label": label, "width": WIDTH, "height": height, "left": LEFT, "right": WIDTH - RIGHT, "series": series,
            "bottom": height - BOTTOM, "y_ticks": [(place(first, mark)[1], text) for mark, text in _marks(values)],
            "x_ticks": [(place(x, values.low)[0], f"{x:.3g} %") for x in _apart(kept)],
            "finding": _finding(label, lines, scale == "log"),
        })  # fmt: skip
    return charts


def _marks(axis: Axis) -> list[tuple[float, str]]:
    return [(float(text), text) for _, text in axis.ticks]


def _apart(kept: Sequence[float]) -> list[float]:
    """Shares for ticks: of those that differ by less than a few per cent only the first."""
    found: list[float] = []
    for x in sorted(kept, reverse=True):
        if not found or found[-1] - x >= NEAR:
            found.append(x)
    return found


def _finding(label: str, lines: dict[str, list[tuple[float, float]]], low_is_good: bool) -> str:
    """The chart in a sentence: who is best and worst at the smallest budget that most methods share."""
    points = [(x, y, name) for name, line in lines.items() if name != REFERENCE_METHOD for x, y in line]
    near = {x: sorted((y, name) for other, y, name in points if abs(other - x) < NEAR) for x, *_ in points}
    share = max(near, key=lambda x: (len(near[x]), -x))
    worst, best = (near[share][place] for place in ((-1, 0) if low_is_good else (0, -1)))
    text = f"{label[0].upper()}{label[1:]}: at {share:.3g} % of the slots"
    if len(near[share]) == 1:
        return f"{text}, {best[1]} has {best[0]:.3g}."
    ends = f"{best[1]} is best ({best[0]:.3g}) and {worst[1]} worst ({worst[0]:.3g})"
    return f"{text}, {ends} of {len(near[share])} methods."


def heat(value: float | None, column: Iterable[Cell]) -> int:
    """Shade of a score, 0 (lowest of its column, or unknown) to 5 (highest)."""
    known = [cell.score for cell in column if cell.score is not None]
    if value is None or not known or max(known) - min(known) < 1e-9:
        return 0
    return round(5 * (value - min(known)) / (max(known) - min(known)))
