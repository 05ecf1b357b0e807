"""From run folders to the cells of a table: arms x data sets, each with its score, samples, interval and doubts.

The only input are records (and what was expected, so that a missing cell can say how to fill it), and published
numbers to show beside ours; one without a source is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kvbench.errors import DataError
from kvbench.metrics.longbench import KVMERGER_DATASETS
from kvbench.records.environment import doubts, environments, refuse_mixture
from kvbench.records.read import read_answers, read_calls, read_config, read_environments
from kvbench.results.statistics import (
    KL,
    Comparison,
    Interval,
    Scores,
    against,
    best_arm,
    compare_arms,
    score_interval,
)
from kvbench.results.summary import (
    DEFAULT_GATE,
    REFERENCE_METHOD,
    ArmSummary,
    RecordDict,
    agreements,
    fails_gate,
    grouped,
    summarise,
)

MIX_REMEDY = "say that it may with --mix-environments (kvbench tables: --override mix_environments=true)"
AVERAGE = "average"
AVERAGE_OF_NINE = "average of 9"  # the KVMerger paper's, as the reference files call it
BUDGET_TOLERANCE = 0.02  # arms that keep more or less than they were asked to compete with nobody
NOT_STATED = "not stated"
PUBLISHED = ("model", "method", "budget", "dataset", "score", "source", "note")
"""Columns of published numbers, all text: model name as in `configs/model` or "not stated"; method, with options after
a comma where it is an ablation; budget as a fraction or "not stated"; data set or what was averaged; score as printed;
where it was read; conflicts and doubts. `file` is the stem of the file it stands in."""


class ExpectedArm(NamedTuple):
    """An arm the table has a row for, whether or not it has records."""

    key: str
    method: str
    budget: float
    plain: bool  # default options, so that published numbers of the method apply


class ExpectedColumn(NamedTuple):
    """A task the table has a column for."""

    name: str
    run: Path
    command: str  # fills the column


@dataclass(frozen=True)
class TableSpec:
    """What a table should hold."""

    name: str
    model: str
    title: str
    arms: tuple[ExpectedArm, ...]
    columns: tuple[ExpectedColumn, ...]
    mix_environments: bool = False  # whether answers of several environments may stand side by side
    gate: float = DEFAULT_GATE  # score of the full cache (0..100) below which a gated metric's column ranks no arms
    merging: tuple[tuple[str, str], ...] = ()  # keys of arms that merge, each with that of its base


@dataclass(frozen=True)
class Cell:
    """One arm on one data set, or the average over several."""

    score: float | None = None  # 0..100
    n: int = 0  # scored samples
    n_failed: int = 0
    interval: Interval | None = None
    best: bool = False  # whether the arm is separated from all others of its budget
    kl: float | None = None  # to the full cache, nats a gold token; None for the full cache itself
    kl_interval: Interval | None = None
    closest: bool = False  # whether it has the lowest KL of its budget
    kl_above: Comparison | None = None  # with the closest arm of its budget; None for the closest itself


@dataclass
class Column:
    """One data set: its cells, scores and KL by arm key, pairs of arms, and the command that fills what is missing."""

    name: str
    metric: str = ""
    command: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    below_gate: bool = False  # then it has no comparisons, no winner and no part in the average
    distances: dict[str, Scores] = field(default_factory=dict)  # KL to the full cache, without the full cache itself
    kl_comparisons: list[Comparison] = field(default_factory=list)  # pairs of one budget
    contests: dict[float, list[str]] = field(default_factory=dict)  # the arms that compete, by budget


@dataclass
class Table:
    """Everything the writers need; what is said by arm has the arm's key."""

    spec: TableSpec
    columns: list[Column] = field(default_factory=list)  # data sets, in the order expected
    average: Column | None = None  # over the data sets above the gate that every arm with records has; None below two
    averaged: tuple[str, ...] = ()  # their names
    summaries: dict[str, ArmSummary] = field(default_factory=dict)
    agreements: dict[str, dict[str, float | None]] = field(default_factory=dict)
    published: dict[str, list[Any]] = field(default_factory=dict)  # "average of 9" too where the columns are those nine
    unplaced: list[Any] = field(default_factory=list)  # published on this experiment, but the source states no model
    runs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = field(default_factory=dict)  # config, environments
    doubts: list[str] = field(default_factory=list)  # what has to be known of the records' making, a line each
    records: list[RecordDict] = field(default_factory=list)

    @property
    def all_columns(self) -> list[Column]:
        """The data sets and, if there is one, their average."""
        return [*self.columns, *([self.average] if self.average else [])]

    @property
    def overall(self) -> Column | None:
        """What a verdict is about: the average, or the only data set above the gate; None if arms share too little."""
        able = [column for column in self.columns if not column.below_gate]
        return self.average or (able[0] if len(able) == 1 else None)

    @property
    def batch_s(self) -> float:
        """Seconds of prefill, compression and decoding of all answers; an arm's share of a batch says nothing."""
        return sum(float(row["seconds"]) for row in self.records)


def read_published(folder: Path) -> pd.DataFrame:
    """All published numbers of a folder's CSV files, as text; columns `PUBLISHED` and "file"."""
    frames = []
    if not (paths := sorted(folder.glob("*.csv"))):
        raise DataError(f"{folder} holds 0 CSV files of published numbers: install kvbench again")
    for path in paths:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        if tuple(frame.columns) != PUBLISHED:
            raise DataError(f"{path} has columns {list(frame.columns)}: give {','.join(PUBLISHED)}")
        frame = frame.fillna("").apply(lambda column: column.str.strip())
        for number, row in enumerate(frame.to_dict("records"), 2):
            if empty := [name for name in PUBLISHED if name != "note" and not row[name]]:
                raise DataError(f"{path} line {number} has no {empty[0]}: no number is shown without one")
        frames.append(frame.assign(file=path.stem))
    return pd.concat(frames)


def build_table(spec: TableSpec, published: pd.DataFrame | None = None) -> Table:
    """Read the expected runs and compute every cell; a run folder that does not exist leaves its column empty.

    `published` numbers stand beside ours. Answers of several environments are refused unless `spec` allows them.
    """
    table, wanted, n_left_out = Table(spec), {arm.key for arm in spec.arms}, 0
    calls: list[dict[str, Any]] = []
    for name, run, command in spec.columns:
        rows: list[RecordDict] = []
        if (run / "records").is_dir():
            answers, left_out = read_answers(run)
            n_left_out += left_out
            rows = sorted((r for r in answers if r["arm"] in wanted), key=itemgetter("dataset", "sample", "arm"))
        if rows:
            table.runs[run.name] = (read_config(run), read_environments(run))
            table.records += rows
            calls += read_calls(run)
        by_dataset = grouped(rows, "dataset") or {name: []}
        table.columns += [_column(dataset, own, spec, command) for dataset, own in by_dataset.items()]
    if not spec.mix_environments:
        refuse_mixture(environments(table.records, calls), f"table {spec.name} of {spec.model}", MIX_REMEDY)
    table.doubts = doubts(table.records, calls, n_left_out)
    _sum_up(table)
    table.agreements = agreements(table.records)
    names = {column.name for column in table.columns}
    if names == set(KVMERGER_DATASETS):
        names.add(AVERAGE_OF_NINE)
        table.average = table.average or Column(AVERAGE)
    if published is not None:
        table.unplaced = _rows(published, model=NOT_STATED, file=spec.name)
        for arm in (arm for arm in spec.arms if arm.plain):
            found = _rows(published, model=spec.model, method=arm.method, budget=f"{arm.budget:g}")
            table.published[arm.key] = [row for row in found if row.dataset in names]
    return table


def table_of(records: Sequence[RecordDict], model: str, gate: float = DEFAULT_GATE) -> Table:
    """The table of some records, of whatever arms and data sets are in them, as a run shows it at its end."""
    arms = tuple(ExpectedArm(s.arm, s.method, s.budget, "," not in s.arm) for s in summarise(records))
    table = Table(TableSpec("run", model, model, arms, (), gate=gate), records=list(records))
    table.columns = [_column(dataset, rows, table.spec, "") for dataset, rows in grouped(records, "dataset").items()]
    _sum_up(table)
    return table


def _sum_up(table: Table) -> None:
    table.summaries = {summary.arm: summary for summary in summarise(table.records)}
    _average(table)


def _rows(published: pd.DataFrame, **values: str) -> list[Any]:
    return list(published[(published[list(values)] == list(values.values())).all(axis=1)].itertuples(index=False))


def _column(name: str, rows: Sequence[RecordDict], spec: TableSpec, command: str) -> Column:
    column = Column(name, next((row["metric"] for row in rows if row["metric"]), ""), command)
    for arm, own in grouped((row for row in rows if row["status"] == "ok" and row["parts"]), "arm").items():
        column.scores[arm] = Scores(column.metric, {row["sample"]: row["parts"] for row in own})
    for arm, own in grouped((row for row in rows if row["status"] == "ok" and row["kl"] is not None), "arm").items():
        if own[0]["method"] != REFERENCE_METHOD:
            column.distances[arm] = Scores(KL, {row["sample"]: {"score": row["kl"]} for row in own})
    for arm in spec.arms:
        cell = Cell(n_failed=sum(r["arm"] == arm.key and r["status"] != "ok" for r in rows))
        if scores := column.scores.get(arm.key):
            score, interval = scores.aggregate(list(scores.parts)), score_interval({name: scores})
            cell = replace(cell, score=score, n=len(scores.parts), interval=interval)
        column.cells[arm.key] = cell
    full = (column.cells[arm.key].score for arm in spec.arms if arm.method == REFERENCE_METHOD)
    column.below_gate = fails_gate(column.metric, next(full, None), spec.gate)
    if not column.below_gate:
        column.comparisons = compare_arms({name: column.scores})
    _judge(column, {name: column.distances}, spec.arms, summarise(rows))
    return column


def _judge(
    column: Column, distances: Mapping[str, Mapping[str, Scores]], arms: Sequence[ExpectedArm],
    summaries: Sequence[ArmSummary],
) -> None:  # fmt: skip
    """One contest for each budget: mark its separated winner, and compare all KL with the closest arm's.

    The full cache is the yardstick, not a contestant.
    """
    measured = {s.arm: s.budget_measured for s in summaries}
    for key, method, budget, _ in arms:
        kept = measured.get(key)
        if (
            method != REFERENCE_METHOD
            and not column.below_gate
            and (kept is None or abs(kept - budget) <= BUDGET_TOLERANCE)
        ):
            column.contests.setdefault(budget, []).append(key)
    column.kl_comparisons = compare_arms(distances, column.contests.values())
    for arm in set.intersection(*map(set, distances.values())) if distances else ():
        own = {name: data_set[arm] for name, data_set in distances.items()}
        kl = sum(scores.aggregate(list(scores.parts)) for scores in own.values()) / len(own)
        column.cells[arm] = replace(column.cells.get(arm, Cell()), kl=kl, kl_interval=score_interval(own))
    for contest in column.contests.values():
        scores = {key: s for key in contest if (s := column.cells.get(key, Cell()).score) is not None}
        if winner := best_arm(scores, column.comparisons):
            column.cells[winner] = replace(column.cells[winner], best=True)
        if closest := closest_arm(column, contest):
            column.cells[closest] = replace(column.cells[closest], closest=True)
        for comparison in against(closest, column.kl_comparisons):
            column.cells[comparison.second] = replace(column.cells[comparison.second], kl_above=comparison.turned())


def closest_arm(column: Column, contest: Iterable[str]) -> str | None:
    """The contestant with the lowest KL to the full cache; None if no two have one."""
    known = {key: kl for key in sorted(contest) if (kl := column.cells.get(key, Cell()).kl) is not None}
    return min(known, key=lambda key: known[key]) if len(known) > 1 else None


def _average(table: Table) -> None:
    """The unweighted mean over the data sets above the gate that all arms with any records share."""
    present = {arm for column in table.columns for arm in column.scores}
    able = [column for column in table.columns if column.scores and not column.below_gate]
    shared = {column.name: column for column in able if set(column.scores) == present}
    if len(shared) < 2:
        return
    average = Column(AVERAGE)
    if all(column.cells[arm].n > 1 for column in shared.values() for arm in present):  # one sample has no spread
        average.comparisons = compare_arms({name: column.scores for name, column in shared.items()})
    for arm in sorted(present):
        cells = [column.cells[arm] for column in shared.values()]
        score = sum(cell.score for cell in cells if cell.score is not None) / len(cells)
        interval = score_interval({name: column.scores[arm] for name, column in shared.items()})
        average.cells[arm] = Cell(score, sum(c.n for c in cells), sum(c.n_failed for c in cells), interval)
    distances = {name: column.distances for name, column in shared.items() if column.distances}
    _judge(average, distances, table.spec.arms, list(table.summaries.values()))
    table.average, table.averaged = average, tuple(shared)
