"""The end of a run in a terminal: a table a data set, what they allow to say, and the command to give next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import table as rich_table
from rich.console import Console
from rich.text import Text

from kvbench.errors import printable
from kvbench.results.cells import Cell, Table, table_of
from kvbench.results.summary import DEFAULT_GATE, RecordDict, grouped, number, summarise
from kvbench.results.tables import above_text, kl_text
from kvbench.results.verdict import verdict

COLUMNS = ("arm", "kept", "cache MiB", "n", "score", "gold NLL")
INTERVALS = ("KL to full [95 %]", "above the closest")
LEGEND = (
    "[ ]: 95 % bootstrap interval over the samples. Above the closest: KL beyond that of the closest method of its "
    "budget, paired by sample; *: separated from it (paired bootstrap and sign test, after Holm's correction)."
)
WIDE = 110  # columns of characters that the last column needs
MORE_SAMPLES = 4  # times as many as now


def print_tables(
    records: Sequence[RecordDict], model: str, compress: str, console: Console, gate: float = DEFAULT_GATE
) -> Table:
    """Print one table per data set of a run, dim where the full cache fails the gate; returns the cells."""
    cells = table_of(records, model, gate)
    for column, rows in zip(cells.columns, grouped(records, "dataset").values(), strict=True):
        heading = printable(f"{column.name} · {rows[0]['metric']} · {model} · {compress}")
        shown = rich_table.Table(title=Text(heading), title_justify="left")  # a Text: brackets in names are no markup
        shown.add_column(COLUMNS[0], overflow="fold")
        for name in COLUMNS[1:]:
            shown.add_column(name, justify="right", no_wrap=True, min_width=len(name))
        intervals = INTERVALS if console.width >= WIDE else INTERVALS[:1]
        for name in intervals:
            shown.add_column(name, justify="right")
        for s in summarise(rows):
            cell = column.cells.get(s.arm, Cell())
            shown.add_row(
                Text(printable(s.arm)), number(s.budget_measured, ".2%", "-"),
                number(None if s.cache_bytes is None else s.cache_bytes / 2**20, ".2f", "-"),
                f"{s.n} ({s.n_failed} failed)" if s.n_failed else str(s.n), number(s.score, ".2f", "-"),
                number(s.gold_nll, ".3f", "-"), *map(Text, (kl_text(cell), above_text(cell))[: len(intervals)]),
                style="dim" if column.below_gate else None,
            )  # fmt: skip
        console.print(shown)
        if column.below_gate:
            console.print(f"the full cache scores below {gate:g} (output.gate): this ranks no methods", highlight=False)
    return cells


def print_verdict(table: Table, next_commands: Mapping[str, str], console: Console) -> None:
    """Print the sentences, each on lines of its own, and the commands by what they are for."""
    console.print(LEGEND, highlight=False, markup=False, style="dim")
    console.print()
    for sentence in verdict(table):
        console.print(Text(printable(sentence)))
    for purpose, command in next_commands.items():
        console.print(Text(f"{purpose}: {printable(command)}"), soft_wrap=True)


def next_commands(arguments: Sequence[str], run: Path, limits: Mapping[str, int]) -> dict[str, str]:
    """What to do after a run that these words started: see the answers, and ask more samples where a limit was set."""
    words = [word for word in arguments if word.partition("=")[0] not in limits]
    more = ["python", "-m", "kvbench", *words, *(f"{name}={MORE_SAMPLES * limit}" for name, limit in limits.items())]
    return {
        "Every answer, on a page to share": shlex.join(["python", "-m", "kvbench.report", str(run)]),
        **({"More samples separate more": shlex.join(more)} if limits else {}),
    }


def limits_of(node: Any, path: str = "task") -> dict[str, int]:
    """The numbers of samples that a task's configuration allows, by the words that set them."""
    found: dict[str, int] = {}
    for name, value in node.items() if isinstance(node, Mapping) else ():
        found |= {f"{path}.{name}": value} if name == "limit" and isinstance(value, int) else {}
        found |= limits_of(value, f"{path}.{name}")
    return found
