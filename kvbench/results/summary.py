"""From records to one line of numbers per arm.

Scores need hundreds of samples to tell methods apart; tokens that differ from the full cache's own answer do it with a
handful, so each arm's answers are compared with those as well. The only input is records.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import mean, median
from typing import Any

from kvbench.metrics import get_metric
from kvbench.metrics.text import equal_share, first_divergence, rouge_l_to_full

RecordDict = dict[str, Any]
REFERENCE_METHOD = "full"
DEFAULT_GATE = 60.0
"""Score of the full cache (0..100) below which a data set of a gated metric ranks no methods."""


@dataclass(frozen=True)
class ArmSummary:
    """What the records of one arm say, over a set of samples."""

    arm: str
    method: str
    budget: float  # requested, a fraction of the full cache
    n: int  # samples that succeeded
    n_failed: int
    score: float | None  # the metric's aggregate, 0..100; over several data sets the unweighted mean of their scores
    gold_nll: float | None  # mean over samples of the gold answer's mean NLL per token, nats
    kl: float | None  # mean over samples of the mean KL to the full cache per gold token, nats
    budget_measured: float | None  # kept slots over slots of the full cache, summed over the samples
    cache_bytes: float | None  # mean bytes allocated for the kept slots

    def to_dict(self) -> dict[str, Any]:
        """The line as plain JSON types, as in the last line of standard output."""
        return dict(vars(self))


def grouped(rows: Iterable[RecordDict], *fields: str) -> dict[Any, list[RecordDict]]:
    """The rows by the value of a field (of several: by the tuple of their values), in order of first occurrence."""
    groups: dict[Hashable, list[RecordDict]] = {}
    for row in rows:
        groups.setdefault(itemgetter(*fields)(row), []).append(row)
    return groups


def summarise(records: Iterable[RecordDict]) -> list[ArmSummary]:
    """One summary per arm, over any number of data sets, in `arm_order`."""
    return sorted((_summary(arm, rows) for arm, rows in grouped(records, "arm").items()), key=arm_order)


def arm_order(summary: ArmSummary) -> tuple[bool, str, float, str]:
    """Sorts arms: the full cache first, then by method and falling budget."""
    return summary.method != REFERENCE_METHOD, summary.method, -summary.budget, summary.arm


def _summary(arm: str, rows: Sequence[RecordDict]) -> ArmSummary:
    good = [row for row in rows if row["status"] == "ok"]
    full_slots = sum(row["full_slots"] for row in good)
    measured = sum(sum(row["slots_per_layer"]) for row in good) / full_slots if full_slots else None
    means = {name: _mean(row[name] for row in good) for name in ("gold_nll", "kl", "cache_bytes")}
    return ArmSummary(
        arm=arm, method=rows[0]["method"], budget=rows[0]["budget"], n=len(good), n_failed=len(rows) - len(good),
        score=aggregate_score(good), budget_measured=measured, **means,
    )  # fmt: skip


def aggregate_score(rows: Iterable[RecordDict]) -> float | None:
    """The score of successful records on the 0..100 scale: each data set by its own metric, then their plain mean."""
    scored = grouped((row for row in rows if row["parts"]), "dataset", "metric")
    return _mean(get_metric(metric).aggregate([row["parts"] for row in own]) for (_, metric), own in scored.items())


def agreements(records: Sequence[RecordDict]) -> dict[str, dict[str, float | None]]:
    """How closely each arm follows the full cache's answers, over the samples that both answered.

    By arm: `identical_share` of the samples whose answers are token for token the same; `first_divergence_tokens`, the
    median number of shared tokens before the first difference over the samples that differ, None if none does;
    `equal_share`, the mean share of equal tokens, position by position; `rouge_l`, the mean ROUGE-L of the texts.
    """
    good = [row for row in records if row["status"] == "ok"]
    full = {(row["dataset"], row["sample"]): row for row in good if row["method"] == REFERENCE_METHOD}
    found: dict[str, dict[str, float | None]] = {}
    for arm, rows in grouped((row for row in good if (row["dataset"], row["sample"]) in full), "arm").items():
        pairs = [(row, full[row["dataset"], row["sample"]]) for row in rows]
        tokens = [(row["token_ids"], other["token_ids"]) for row, other in pairs]
        differing = [place for place in (first_divergence(*pair) for pair in tokens) if place is not None]
        found[arm] = {
            "identical_share": 1 - len(differing) / len(pairs),
            "equal_share": mean(equal_share(*pair) for pair in tokens),
            "first_divergence_tokens": float(median(differing)) if differing else None,
            "rouge_l": mean(rouge_l_to_full(row["prediction"], other["prediction"]) for row, other in pairs),
        }
    return found


def fails_gate(metric: str, full_score: float | None, gate: float) -> bool:
    """Whether the metric is gated and the full cache itself scores below the gate."""
    return full_score is not None and full_score < gate and getattr(get_metric(metric), "gated", False)


def number(value: float | None, spec: str, missing: str = "–") -> str:
    """The formatted value, or a dash for none."""
    return missing if value is None else format(value, spec)


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
