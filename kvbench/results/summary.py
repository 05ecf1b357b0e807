"""From records to one line of numbers per arm; pure, and the only input is records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvbench.metrics import get_metric

RecordDict = dict[str, Any]


@dataclass(frozen=True)
class ArmSummary:
    """What the records of one arm say, over a set of samples.

    Attributes:
        arm: arm key.
        method: policy name.
        budget: requested fraction of the full cache.
        n: samples that succeeded.
        n_failed: samples that failed.
        score: the metric's aggregate on the 0..100 scale; None if nothing succeeded. Over several data sets: the
            unweighted mean of their scores.
        gold_nll: mean over samples of the gold answer's mean NLL per token, nats.
        kl: mean over samples of the mean KL to the full cache per gold token, nats.
        budget_measured: kept slots over slots of the full cache, summed over the samples.
        cache_bytes: mean bytes allocated for the kept slots.
        seconds: total of the arm's share of wall time.
    """

    arm: str
    method: str
    budget: float
    n: int
    n_failed: int
    score: float | None
    gold_nll: float | None
    kl: float | None
    budget_measured: float | None
    cache_bytes: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The line as plain JSON types, as in the last line of standard output."""
        return dict(vars(self))


def summarise(records: Iterable[RecordDict]) -> list[ArmSummary]:
    """One summary per arm: the full cache first, then by method and falling budget.

    Args:
        records: records of any number of arms and data sets (see `kvbench.records.schema`).
    """
    by_arm: dict[str, list[RecordDict]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], []).append(record)
    summaries = [_summary(arm, rows) for arm, rows in by_arm.items()]
    return sorted(summaries, key=lambda s: (s.method != "full", s.method, -s.budget, s.arm))


def _summary(arm: str, rows: Sequence[RecordDict]) -> ArmSummary:
    good = [row for row in rows if row["status"] == "ok"]
    return ArmSummary(
        arm=arm,
        method=rows[0]["method"],
        budget=rows[0]["budget"],
        n=len(good),
        n_failed=len(rows) - len(good),
        score=aggregate_score(good),
        gold_nll=_mean([row["gold_nll"] for row in good]),
        kl=_mean([row["kl"] for row in good]),
        budget_measured=_ratio(good),
        cache_bytes=_mean([row["cache_bytes"] for row in good]),
        seconds=sum(row["seconds"] for row in good),
    )


def aggregate_score(rows: Sequence[RecordDict]) -> float | None:
    """The score of successful records on the 0..100 scale: each data set by its own metric, then their plain mean."""
    by_dataset: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in rows:
        if row["parts"]:
            by_dataset.setdefault((row["dataset"], row["metric"]), []).append(row["parts"])
    return _mean([get_metric(metric).aggregate(parts) for (_, metric), parts in by_dataset.items()])


def _ratio(rows: Sequence[RecordDict]) -> float | None:
    full = sum(row["full_slots"] for row in rows)
    return sum(sum(row["slots_per_layer"]) for row in rows) / full if full else None


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
