"""Tables as Markdown, CSV and LaTeX: every cell with its interval, every published number with its source.

Nothing here depends on the clock or on the order of files: the same records give the same bytes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvbench.report.agreement import Agreement
from kvbench.report.cells import AVERAGE_OF_NINE, Cell, Column, Table
from kvbench.report.published import Published
from kvbench.report.summary import ArmSummary

MISSING = "no records"
READING = (
    "Scores are on the 0 to 100 scale, each data set by its own metric, with the 95 % bootstrap interval over samples "
    "(percentile, 10,000 resamples, fixed seed; averages resample within each data set). **Bold**: the best arm of its "
    "budget, only where it is separated from every other one: paired bootstrap and exact sign test both below 0.05 "
    "after Holm's correction over all pairs of arms in the column. \"all equal\": all samples score the same, so the "
    "bootstrap sees no spread; that is a sign of few samples, not of certainty."
)  # fmt: skip


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `<name>.md`, `.csv`, `-pairs.csv` and `.tex`; returns their paths.

    Args:
        table: the table.
        folder: created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".md": markdown(table), ".csv": cells_csv(table), "-pairs.csv": pairs_csv(table), ".tex": latex(table)}
    paths = []
    for suffix, text in texts.items():
        path = folder / f"{table.spec.name}-{table.spec.model}{suffix}"
        path.write_text(text, encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def markdown(table: Table) -> str:
    """The table with everything a reader needs to judge it."""
    columns = table_columns(table)
    footnotes: dict[str, str] = {}
    lines = [f"# {table.spec.title} · {table.spec.model}", "", READING, ""]
    lines += _pipe(
        ["arm", *(heading(table, column) for column in columns)],
        _score_rows(table, columns, footnotes),
    )
    lines += _missing_commands(table) + _details(table) + _sources(table, footnotes) + _provenance(table)
    return "\n".join(lines).rstrip() + "\n"


def table_columns(table: Table) -> list[Column]:
    """The data sets and, if there is one, their average."""
    return [*table.columns, *([table.average] if table.average else [])]


def heading(table: Table, column: Column) -> str:
    """A column's name with its number of samples where all arms have the same."""
    if column is table.average:
        return f"average of {len(table.averaged) or len(table.columns)} of {len(table.columns)}"
    sizes = {cell.n for cell in column.cells.values() if cell.score is not None}
    return f"{column.name}, n = {min(sizes)}" if len(sizes) == 1 else column.name


def _score_rows(table: Table, columns: Sequence[Column], footnotes: dict[str, str]) -> list[list[str]]:
    rows = []
    for arm in table.spec.arms:
        cells = [column.cells.get(arm.key, Cell()) for column in columns]
        sizes = [len({c.n for c in column.cells.values() if c.score is not None}) for column in columns]
        rows.append([f"`{arm.key}`", *(_cell(cell, size > 1) for cell, size in zip(cells, sizes, strict=True))])
        numbers = table.published.get(arm.key, [])
        if numbers:
            found = [[p for p in numbers if p.dataset in _published_names(table, column)] for column in columns]
            rows.append(["published", *(" / ".join(_cite(p, footnotes) for p in group) for group in found)])
    return rows


def _published_names(table: Table, column: Column) -> tuple[str, ...]:
    if column is not table.average:
        return (column.name,)
    return (AVERAGE_OF_NINE,) if len(table.averaged) in (0, len(table.columns)) else ()


def _cite(number: Published, footnotes: dict[str, str]) -> str:
    label = footnotes.setdefault(number.source, _letters(len(footnotes)))
    return f"{number.score} [{label}]"


def _letters(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else _letters(index // 26 - 1) + _letters(index % 26)


def _cell(cell: Cell, show_n: bool) -> str:
    if cell.score is None:
        return f"{cell.n_failed} failed" if cell.n_failed else MISSING
    score = f"**{cell.score:.2f}**" if cell.best else f"{cell.score:.2f}"
    notes = ([f"n = {cell.n}"] if show_n else []) + ([f"{cell.n_failed} failed"] if cell.n_failed else [])
    return " ".join([score, interval_text(cell), *(f"({note})" for note in notes)]).strip()


def interval_text(cell: Cell) -> str:
    """The interval in square brackets, or why there is none."""
    if cell.interval is None:
        return "[one sample]" if cell.n == 1 else ""
    return "[all equal]" if cell.interval.flat else f"[{cell.interval.low:.1f}, {cell.interval.high:.1f}]"


def _missing_commands(table: Table) -> list[str]:
    gaps = [column for column in table.columns if any(cell.score is None for cell in column.cells.values())]
    if not gaps:
        return []
    return ["", f"Cells with {MISSING} (or failed samples) are filled by:", ""] + [
        f"- {column.name}: `{column.command}`" for column in gaps
    ]


DETAIL_HEADER = (
    "arm", "kept", "cache MiB", "KL to full", "gold NLL", "same answer", "equal tokens", "first difference",
    "ROUGE-L to full", "s a sample",
)  # fmt: skip


def detail_rows(table: Table) -> list[list[str]]:
    """Budgets, bytes, closeness to the full cache and time of every arm, as text, after `DETAIL_HEADER`."""
    rows = []
    for arm in table.spec.arms:
        s, a = table.summaries.get(arm.key), table.agreements.get(arm.key)
        if s is not None and s.n:
            rows.append([
                arm.key, _number(s.budget_measured, ".2%"), _number(_mib(s.cache_bytes), ".2f"), _number(s.kl, ".4f"),
                _number(s.gold_nll, ".3f"), _field(a, "identical_share", ".0%"), _field(a, "equal_share", ".1%"),
                _field(a, "first_divergence_tokens", ".1f"), _field(a, "rouge_l", ".3f"),
                _number(s.seconds / s.n, ".2f"),
            ])  # fmt: skip
    return rows


def _details(table: Table) -> list[str]:
    rows = [[f"`{row[0]}`", *row[1:]] for row in detail_rows(table)]
    if not rows:
        return []
    note = (
        "Means over all samples. Kept: slots over slots of the full cache. KL and NLL: nats a gold token. The last "
        "columns compare each arm's own answer with the full cache's; first difference: median over the answers that "
        "differ, in tokens. Seconds: the arm's share of the wall time of prefill, compression and decoding."
    )
    return ["", "## Budgets, closeness to the full cache, time", "", *_pipe(DETAIL_HEADER, rows), "", note]


def _sources(table: Table, footnotes: dict[str, str]) -> list[str]:
    for p in table.unplaced:
        _cite(p, footnotes)
    if not footnotes:
        return []
    lines = ["", "## Published numbers", ""]
    lines += [f"- [{label}] {source}" for source, label in footnotes.items()]
    notes = [
        f"- {p.method} at {p.budget}, {p.dataset}, {p.score}: {p.note}"
        for arm in table.spec.arms for p in table.published.get(arm.key, []) if p.note
    ]  # fmt: skip
    if table.unplaced:
        lines += ["", "Not comparable cell by cell, as the source does not state the model:", ""]
        lines += [
            f"- {p.method} at {p.budget}, {p.dataset}: {_cite(p, footnotes)}" + (f" ({p.note})" if p.note else "")
            for p in table.unplaced
        ]
    return lines + (["", "Doubts and conflicts:", "", *notes] if notes else [])


def _provenance(table: Table) -> list[str]:
    if not table.runs:
        return []
    lines = ["", "## Runs", ""]
    for name, (_, environment) in sorted(table.runs.items()):
        packages = environment.get("packages", {})
        devices = ", ".join(environment.get("devices") or []) or f"CPU, {environment.get('torch_threads')} threads"
        lines.append(
            f"- `{name}`: kvbench {environment.get('kvbench')} at {environment.get('commit')}, "
            f"torch {packages.get('torch')}, transformers {packages.get('transformers')}, {devices}"
        )
    return lines


def _pipe(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (header, align, *rows)]


def _mib(size: float | None) -> float | None:
    return None if size is None else size / 2**20


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _field(source: Agreement | ArmSummary | None, name: str, spec: str) -> str:
    return _number(getattr(source, name, None), spec)


def cells_csv(table: Table) -> str:
    """One line per arm and data set, ours and published, in full precision."""
    header = (
        "model", "arm", "method", "budget_requested", "budget_measured", "dataset", "metric", "n", "n_failed", "score",
        "low", "high", "best", "source", "note",
    )  # fmt: skip
    rows: list[Sequence[object]] = []
    for arm in table.spec.arms:
        summary = table.summaries.get(arm.key)
        measured = _field(summary, "budget_measured", ".4f")
        for column in table_columns(table):
            cell = column.cells.get(arm.key, Cell())
            low, high = (cell.interval.low, cell.interval.high) if cell.interval else (None, None)
            note = f"{MISSING}; fill with: {column.command}" if cell.score is None and column.command else ""
            name = f"average of {', '.join(table.averaged)}" if column is table.average else column.name
            rows.append((
                table.spec.model, arm.key, arm.method, f"{arm.budget:g}", measured, name, column.metric, cell.n,
                cell.n_failed, *(_number(v, ".4f") for v in (cell.score, low, high)), int(cell.best), "records", note,
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
            *(_number(end, ".4f") for end in ((c.interval.low, c.interval.high) if c.interval else (None, None))),
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
    writer.writerows(rows)
    return buffer.getvalue()


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
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text
