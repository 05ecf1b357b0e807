"""From run folders to the cells of a table: arms x data sets, each with its score, samples, interval and doubts.

The only input are records (and what was expected, so that a missing cell can say how to fill it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.metrics import get_metric
from kvbench.metrics.averages import KVMERGER_DATASETS
from kvbench.records.environment import doubts, environments, refuse_mixture
from kvbench.records.read import read_answers, read_calls, read_config, read_environments
from kvbench.results.agreement import Agreement, agreement, reference_records
from kvbench.results.comparisons import Comparison, best_arm, compare_arms
from kvbench.results.published import Published, lookup, unplaced
from kvbench.results.statistics import Interval, Scores, average_interval, cell_interval
from kvbench.results.summary import ArmSummary, RecordDict, summarise

MIX_REMEDY = 'say that it may with --mix-environments (make paper-tables: SET="mix_environments=true")'
AVERAGE = "average"
AVERAGE_OF_NINE = "average of 9"  # the KVMerger paper's, as the reference files call it
BUDGET_TOLERANCE = 0.02  # arms that keep more or less than they were asked to compete with nobody


@dataclass(frozen=True)
class ExpectedArm:
    """An arm the table has a row for, whether or not it has records."""

    key: str
    method: str
    budget: float
    plain: bool  # default options, so that published numbers of the method apply


@dataclass(frozen=True)
class ExpectedColumn:
    """A task the table has a column for: its name, its run folder, and the command that fills it."""

    name: str
    run: Path
    command: str


@dataclass(frozen=True)
class TableSpec:
    """What a table should hold."""

    name: str
    model: str
    title: str
    arms: tuple[ExpectedArm, ...]
    columns: tuple[ExpectedColumn, ...]
    mix_environments: bool = False  # whether answers of several environments may stand side by side


@dataclass(frozen=True)
class Cell:
    """One arm on one data set (or the average over several).

    Attributes:
        score: on the 0..100 scale; None without scored records.
        n: scored samples.
        n_failed: failed samples.
        interval: bootstrap interval of the score.
        best: whether the arm is separated from all others of its budget.
    """

    score: float | None = None
    n: int = 0
    n_failed: int = 0
    interval: Interval | None = None
    best: bool = False


@dataclass
class Column:
    """One data set: its cells by arm key, all pairs of arms, and the command that fills what is missing."""

    name: str
    metric: str = ""
    command: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)


@dataclass
class Table:
    """Everything the writers need.

    Attributes:
        spec: what was expected.
        columns: data sets, in the order expected.
        average: mean over the data sets that every arm with records has; None below two of them.
        averaged: their names.
        summaries: per arm key: budgets, bytes, KL, NLL, seconds over all records.
        agreements: per arm key: closeness to the full cache's answers.
        published: per arm key: published numbers, "average of 9" included where the columns are those nine.
        unplaced: published numbers on this experiment whose source does not state the model.
        runs: run folder name -> (config, environments of its calls).
        doubts: what has to be known of the records' making, a line each.
        records: all records, for figures.
    """

    spec: TableSpec
    columns: list[Column]
    average: Column | None = None
    averaged: tuple[str, ...] = ()
    summaries: dict[str, ArmSummary] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    published: dict[str, list[Published]] = field(default_factory=dict)
    unplaced: list[Published] = field(default_factory=list)
    runs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    records: list[RecordDict] = field(default_factory=list)


def build_table(spec: TableSpec, published: Sequence[Published] = ()) -> Table:
    """Read the expected runs and compute every cell.

    Args:
        spec: what the table should hold; a run folder that does not exist leaves its column empty.
        published: numbers to show beside ours.

    Raises:
        RecordError: if a run folder cannot be read, or answers of several environments would stand side by side and
            `spec` does not allow it.
    """
    arm_keys = [arm.key for arm in spec.arms]
    calls: list[dict[str, Any]] = []
    n_left_out = 0
    table = Table(spec, [])
    scores: dict[str, dict[str, Scores]] = {}
    for expected in spec.columns:
        records, left_out = _records(expected.run, arm_keys)
        n_left_out += left_out
        if records:
            table.runs[expected.run.name] = (read_config(expected.run), read_environments(expected.run))
            table.records += records
            calls += read_calls(expected.run)
        by_dataset: dict[str, list[RecordDict]] = {}
        for row in records:
            by_dataset.setdefault(row["dataset"], []).append(row)
        for name, rows in by_dataset.items() or [(expected.name, [])]:
            scores[name] = _scores(rows)
            table.columns.append(_column(name, rows, scores[name], spec.arms, expected.command, _measured(rows)))
    if not spec.mix_environments:
        refuse_mixture(environments(table.records, calls), f"table {spec.name} of {spec.model}", MIX_REMEDY)
    table.doubts = doubts(table.records, calls, n_left_out)
    _average(table, scores)
    reference = reference_records(table.records)
    for summary in summarise(table.records):
        table.summaries[summary.arm] = summary
        found = agreement([row for row in table.records if row["arm"] == summary.arm], reference)
        if found is not None:
            table.agreements[summary.arm] = found
    names = [column.name for column in table.columns]
    if set(names) == set(KVMERGER_DATASETS):
        names.append(AVERAGE_OF_NINE)
        table.average = table.average or Column(AVERAGE)
    table.unplaced = unplaced(published, spec.name)
    for arm in spec.arms:
        if arm.plain:
            table.published[arm.key] = lookup(published, spec.model, arm.method, arm.budget, names)
    return table


def _records(run: Path, arm_keys: Sequence[str]) -> tuple[list[RecordDict], int]:
    if not (run / "records").is_dir():
        return [], 0
    wanted = set(arm_keys)
    records, n_left_out = read_answers(run)
    rows = [row for row in records if row["arm"] in wanted]
    return sorted(rows, key=lambda row: (row["dataset"], row["sample"], row["arm"])), n_left_out


def _scores(rows: Sequence[RecordDict]) -> dict[str, Scores]:
    by_arm: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["parts"]:
            by_arm.setdefault(row["arm"], {})[row["sample"]] = row["parts"]
    return {arm: Scores(rows[0]["metric"], parts) for arm, parts in by_arm.items()}


def _measured(rows: Sequence[RecordDict]) -> dict[str, float]:
    return {s.arm: s.budget_measured for s in summarise(rows) if s.budget_measured is not None}


def _column(
    name: str,
    rows: Sequence[RecordDict],
    scores: dict[str, Scores],
    arms: Sequence[ExpectedArm],
    command: str,
    measured: dict[str, float],
) -> Column:
    column = Column(name, rows[0]["metric"] if rows else "", command, comparisons=compare_arms({name: scores}))
    values = {arm: get_metric(s.metric).aggregate(list(s.parts.values())) for arm, s in scores.items()}
    best = _best(values, arms, column.comparisons, measured)
    failed = {arm.key: sum(row["arm"] == arm.key and row["status"] != "ok" for row in rows) for arm in arms}
    for arm in arms:
        if arm.key in scores:
            interval = cell_interval(name, scores[arm.key])
            n = len(scores[arm.key].parts)
            column.cells[arm.key] = Cell(values[arm.key], n, failed[arm.key], interval, arm.key in best)
        else:
            column.cells[arm.key] = Cell(n_failed=failed[arm.key])
    return column


def _best(
    values: dict[str, float],
    arms: Sequence[ExpectedArm],
    comparisons: Sequence[Comparison],
    measured: dict[str, float],
) -> set[str]:
    """The separated winners, one contest for each budget; the full cache is the yardstick, not a contestant."""
    contests: dict[float, dict[str, float]] = {}
    for arm in arms:
        kept = measured.get(arm.key, arm.budget)
        if arm.method != "full" and arm.key in values and abs(kept - arm.budget) <= BUDGET_TOLERANCE:
            contests.setdefault(arm.budget, {})[arm.key] = values[arm.key]
    winners = (best_arm(contest, comparisons) for contest in contests.values())
    return {winner for winner in winners if winner is not None}


def _average(table: Table, scores: dict[str, dict[str, Scores]]) -> None:
    """The unweighted mean over the data sets that all arms with any records share."""
    present = {arm for by_arm in scores.values() for arm in by_arm}
    shared = {name: by_arm for name, by_arm in scores.items() if by_arm and set(by_arm) == present}
    if len(shared) < 2:
        return
    comparisons = compare_arms(shared)
    average = Column(AVERAGE, comparisons=comparisons)
    values: dict[str, float] = {}
    by_name = {column.name: column for column in table.columns}
    for arm in sorted(present):
        cells = [by_name[name].cells[arm] for name in shared]
        values[arm] = sum(cell.score for cell in cells if cell.score is not None) / len(cells)
        interval = average_interval({name: by_arm[arm] for name, by_arm in shared.items()})
        average.cells[arm] = Cell(values[arm], sum(c.n for c in cells), sum(c.n_failed for c in cells), interval)
    for winner in _best(values, table.spec.arms, comparisons, _measured(table.records)):
        average.cells[winner] = Cell(**{**vars(average.cells[winner]), "best": True})
    table.average, table.averaged = average, tuple(shared)
