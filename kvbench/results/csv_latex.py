"""A table's cells and pairs as CSV, and its scores as LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from kvbench.results.cells import Cell, Table
from kvbench.results.text import MISSING, field_text, heading, interval_text, number, table_columns

TEX_ESCAPES = {character: "\\" + character for character in "&%$#_{}"}
TEX_ESCAPES |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def cells_csv(table: Table) -> str:
    """One line per arm and data set, ours and published, in full precision."""
    header = (
        "model", "arm", "method", "budget_requested", "budget_measured", "dataset", "metric", "n", "n_failed", "score",
        "low", "high", "best", "source", "note",
    )  # fmt: skip
    rows: list[Sequence[object]] = []
    for arm in table.spec.arms:
        summary = table.summaries.get(arm.key)
        measured = field_text(summary, "budget_measured", ".4f")
        for column in table_columns(table):
            cell = column.cells.get(arm.key, Cell())
            low, high = (cell.interval.low, cell.interval.high) if cell.interval else (None, None)
            note = f"{MISSING}; fill with: {column.command}" if cell.score is None and column.command else ""
            name = f"average of {', '.join(table.averaged)}" if column is table.average else column.name
            rows.append((
                table.spec.model, arm.key, arm.method, f"{arm.budget:g}", measured, name, column.metric, cell.n,
                cell.n_failed, *(number(v, ".4f") for v in (cell.score, low, high)), int(cell.best), "records", note,
            ))  # fmt: skip
        rows += [
            (p.model, arm.key, p.method, p.budget, "", p.dataset, "", "", "", p.score, "", "", "", p.source, p.note)
            for p in table.published.get(arm.key, [])
        ]
    rows += [
        (p.model, "", p.method, p.budget, "", p.dataset, "", "", "", p.score, "", "", "", p.source, p.note)
        for p in table.unplaced
    ]
    return _csv(header, rows)


def pairs_csv(table: Table) -> str:
    """One line per data set and pair of arms: the paired difference and both tests."""
    header = (
        "dataset", "first", "second", "n", "difference", "low", "high", "wins", "losses", "p_bootstrap", "p_sign",
        "p_bootstrap_holm", "p_sign_holm", "separated",
    )  # fmt: skip
    rows = [
        (
            column.name, c.first, c.second, c.n, f"{c.difference:.4f}",
            *(number(end, ".4f") for end in ((c.interval.low, c.interval.high) if c.interval else (None, None))),
            c.wins, c.losses, *(f"{p:.5f}" for p in (c.p_bootstrap, c.p_sign, c.p_bootstrap_holm, c.p_sign_holm)),
            int(c.separated),
        )
        for column in table_columns(table) for c in column.comparisons
    ]  # fmt: skip
    return _csv(header, rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def _harmless(cell: object) -> object:
    """The cell; a text that a spreadsheet would run as a formula gets an apostrophe before it.

    Names of arms and data sets come from records, which anyone may have written. Numbers stay numbers.
    """
    if not isinstance(cell, str) or not cell.startswith(FORMULA_STARTS):
        return cell
    try:
        float(cell)
    except ValueError:
        return "'" + cell
    return cell


def latex(table: Table) -> str:
    """The scores as a `tabular` for the booktabs package."""
    columns = table_columns(table)
    lines = [
        f"% {_tex(table.spec.title)}; needs \\usepackage{{booktabs}}",
        "\\begin{tabular}{l" + "r" * len(columns) + "}",
        "\\toprule",
        " & ".join(["arm", *(_tex(heading(table, column)) for column in columns)]) + " \\\\",
        "\\midrule",
    ]
    for arm in table.spec.arms:
        cells = [_tex_cell(column.cells.get(arm.key, Cell())) for column in columns]
        lines.append(" & ".join([_tex(arm.key), *cells]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex_cell(cell: Cell) -> str:
    if cell.score is None:
        return f"\\emph{{{MISSING}}}"
    score = f"\\textbf{{{cell.score:.2f}}}" if cell.best else f"{cell.score:.2f}"
    interval = interval_text(cell)
    return f"{score} {{\\scriptsize {interval}}}" if interval else score


def _tex(text: str) -> str:
    return " ".join("".join(TEX_ESCAPES.get(character, character) for character in text).split())
