"""Pieces of text that every form of a table shares: headings, intervals, the line of details of an arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbench.results.agreement import Agreement
from kvbench.results.cells import Cell, Column, Table
from kvbench.results.summary import ArmSummary

MISSING = "no records"
READING = (
    "Scores are on the 0 to 100 scale, each data set by its own metric, with the 95 % bootstrap interval over samples "
    "(percentile, 10,000 resamples, fixed seed; averages resample within each data set). **Bold**: the best arm of its "
    "budget, only where it is separated from every other one: paired bootstrap and exact sign test both below 0.05 "
    "after Holm's correction over all pairs of arms in the column. \"all equal\": all samples score the same, so the "
    "bootstrap sees no spread; that is a sign of few samples, not of certainty."
)  # fmt: skip
DETAIL_HEADER = (
    "arm", "kept", "cache MiB", "KL to full", "gold NLL", "same answer", "equal tokens", "first difference",
    "ROUGE-L to full", "s a sample",
)  # fmt: skip


def table_columns(table: Table) -> list[Column]:
    """The data sets and, if there is one, their average."""
    return [*table.columns, *([table.average] if table.average else [])]


def heading(table: Table, column: Column) -> str:
    """A column's name with its number of samples where all arms have the same."""
    if column is table.average:
        return f"average of {len(table.averaged) or len(table.columns)} of {len(table.columns)}"
    sizes = {cell.n for cell in column.cells.values() if cell.score is not None}
    return f"{column.name}, n = {min(sizes)}" if len(sizes) == 1 else column.name


def interval_text(cell: Cell) -> str:
    """The interval in square brackets, or why there is none."""
    if cell.interval is None:
        return "[one sample]" if cell.n == 1 else ""
    return "[all equal]" if cell.interval.flat else f"[{cell.interval.low:.1f}, {cell.interval.high:.1f}]"


def detail_rows(table: Table) -> list[list[str]]:
    """Budgets, bytes, closeness to the full cache and time of every arm, as text, after `DETAIL_HEADER`."""
    rows = []
    for arm in table.spec.arms:
        s, a = table.summaries.get(arm.key), table.agreements.get(arm.key)
        if s is not None and s.n:
            rows.append([
                arm.key, number(s.budget_measured, ".2%"), number(mib(s.cache_bytes), ".2f"), number(s.kl, ".4f"),
                number(s.gold_nll, ".3f"), field_text(a, "identical_share", ".0%"), field_text(a, "equal_share", ".1%"),
                field_text(a, "first_divergence_tokens", ".1f"), field_text(a, "rouge_l", ".3f"),
                number(s.seconds / s.n, ".2f"),
            ])  # fmt: skip
    return rows


def environment_text(environment: Mapping[str, Any]) -> str:
    """Versions, commit and device of one environment."""
    packages = environment.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    devices = environment.get("devices")
    device = environment.get("device") or ", ".join(map(str, devices if isinstance(devices, list) else []))
    return (
        f"kvbench {environment.get('kvbench')} at {environment.get('commit')}, torch {packages.get('torch')}, "
        f"transformers {packages.get('transformers')}, {device or 'CPU'}, {environment.get('torch_threads')} threads"
    )


def mib(size: float | None) -> float | None:
    """Bytes in MiB."""
    return None if size is None else size / 2**20


def number(value: float | None, spec: str) -> str:
    """The formatted value, or a dash for none."""
    return "–" if value is None else format(value, spec)


def field_text(source: Agreement | ArmSummary | None, name: str, spec: str) -> str:
    """A field of a summary that may be missing, formatted."""
    return number(getattr(source, name, None), spec)
