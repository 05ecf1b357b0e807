"""How closely each arm's answer follows the full cache's own answer to the same sample; computed from records alone.

Scores need hundreds of samples to tell methods apart; tokens that differ from the full cache's do it with a handful.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from kvbench.metrics.fidelity import equal_share, first_divergence, rouge_l_to_full
from kvbench.results.summary import RecordDict

REFERENCE_METHOD = "full"


@dataclass(frozen=True)
class Agreement:
    """One arm against the full cache on the samples both answered.

    Attributes:
        n: samples compared.
        identical_share: share of samples whose answers are token for token the same.
        first_divergence_tokens: median number of shared tokens before the first difference, over the samples that
            differ; None if none does.
        equal_share: mean share of equal tokens, position by position.
        rouge_l: mean ROUGE-L to the full cache's text.
    """

    n: int
    identical_share: float
    first_divergence_tokens: float | None
    equal_share: float
    rouge_l: float


def reference_records(records: Iterable[RecordDict]) -> dict[tuple[str, str], RecordDict]:
    """The full cache's successful records by (dataset, sample)."""
    return {
        (row["dataset"], row["sample"]): row
        for row in records
        if row["method"] == REFERENCE_METHOD and row["status"] == "ok"
    }


def agreement(rows: Sequence[RecordDict], reference: dict[tuple[str, str], RecordDict]) -> Agreement | None:
    """Agreement of one arm's records with the full cache's.

    Args:
        rows: records of one arm.
        reference: see `reference_records`.

    Returns:
        The means; None if no sample was answered by both.
    """
    pairs = [
        (row, reference[row["dataset"], row["sample"]])
        for row in rows
        if row["status"] == "ok" and (row["dataset"], row["sample"]) in reference
    ]
    if not pairs:
        return None
    first = [first_divergence(arm["token_ids"], full["token_ids"]) for arm, full in pairs]
    differing = [position for position in first if position is not None]
    return Agreement(
        n=len(pairs),
        identical_share=1 - len(differing) / len(pairs),
        first_divergence_tokens=float(median(differing)) if differing else None,
        equal_share=mean(equal_share(arm["token_ids"], full["token_ids"]) for arm, full in pairs),
        rouge_l=mean(rouge_l_to_full(arm["prediction"], full["prediction"]) for arm, full in pairs),
    )
