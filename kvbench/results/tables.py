"""Tables as Markdown, CSV and LaTeX: every cell with its interval, every published number with its source.

Nothing here depends on the clock or on the order of files: the same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvbench.paths import file_stem
from kvbench.results.cells import AVERAGE_OF_NINE, Cell, Column, Table
from kvbench.results.csv_latex import cells_csv, latex, pairs_csv
from kvbench.results.published import Published
from kvbench.results.text import (
    DETAIL_HEADER,
    MISSING,
    READING,
    detail_rows,
    environment_text,
    heading,
    interval_text,
    table_columns,
)


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
        path = folder / f"{table.spec.name}-{file_stem(table.spec.model)}{suffix}"
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


def _missing_commands(table: Table) -> list[str]:
    gaps = [column for column in table.columns if any(cell.score is None for cell in column.cells.values())]
    if not gaps:
        return []
    return ["", f"Cells with {MISSING} (or failed samples) are filled by:", ""] + [
        f"- {column.name}: `{column.command}`" for column in gaps
    ]


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
    for name, (config, environments) in sorted(table.runs.items()):
        made_in = "; ".join(dict.fromkeys(map(environment_text, environments)))
        lines.append(f"- `{name}`: {made_in or 'environment unknown'}{_limits(config)}")
    return lines + (["", *(f"**{line}**" for line in table.doubts)] if table.doubts else [])


def _limits(config: dict[str, Any]) -> str:
    """Settings that make a run differ from the published protocol, as the end of a sentence."""
    model, protocol = config.get("model", {}), config.get("protocol", {})
    prompt, answer = model.get("max_prompt_tokens"), protocol.get("max_new_tokens")
    cut = f", prompts of at most {prompt} tokens" if prompt else ""
    return cut + (f", answers of at most {answer} tokens" if answer else "")


def _pipe(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (header, align, *rows)]
