"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbench.errors import printable
from kvbench.results.summary import ArmSummary, RecordDict, summarise

COLUMNS = ("arm", "budget", "measured", "cache MiB", "n", "score", "gold NLL", "KL to full", "seconds")


def print_tables(records: Iterable[RecordDict], title: str, console: Console) -> None:
    """Print one table per data set.

    Args:
        records: records of one run.
        title: what the run was: model, protocol.
        console: where to print.
    """
    by_dataset: dict[str, list[RecordDict]] = {}
    for record in records:
        by_dataset.setdefault(record["dataset"], []).append(record)
    for dataset, rows in by_dataset.items():
        heading = printable(f"{dataset} · {rows[0]['metric']} · {title}")
        console.print(_table(heading, summarise(rows)))


def _table(title: str, summaries: list[ArmSummary]) -> Table:
    table = Table(title=Text(title), title_justify="left")  # a Text: square brackets in names are no markup
    table.add_column(COLUMNS[0], overflow="fold")
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for s in summaries:
        failed = f" ({s.n_failed} failed)" if s.n_failed else ""
        table.add_row(
            Text(printable(s.arm)),
            f"{s.budget:.0%}",
            _number(s.budget_measured, ".2%"),
            _number(None if s.cache_bytes is None else s.cache_bytes / 2**20, ".2f"),
            f"{s.n}{failed}",
            _number(s.score, ".2f"),
            _number(s.gold_nll, ".3f"),
            _number(s.kl, ".4f"),
            f"{s.seconds:.1f}",
        )
    return table


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
