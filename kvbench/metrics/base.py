"""What a metric is: two pure functions, one for a single prediction and one for a data set.

    from kvbench.metrics import get_metric

    metric = get_metric("qa_f1")
    scores = [metric.score("in Paris", ["Paris", "Paris, France"], (), "hotpotqa")]   # [{"score": 0.666...}]
    metric.aggregate(scores)                                                          # 66.66...

Scores of one prediction lie in [0, 1] and never raise, whatever the strings; a data set's score lies on the usual
0..100 scale and is not rounded unless the official scorer of that metric rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbench.errors import MetricError


class Metric(Protocol):
    """A named scorer."""

    @property
    def name(self) -> str:
        """Name in configuration, records and tables."""
        ...

    @property
    def definition(self) -> str:
        """One line for records and tables: what exactly is computed, and after which official scorer."""
        ...

    def score(
        self, prediction: str, answers: Sequence[str], all_classes: Sequence[str], dataset: str
    ) -> dict[str, float]:
        """Score one prediction.

        Args:
            prediction: generated text, unstripped.
            answers: reference answers; the best one counts.
            all_classes: label set of classification data sets, else empty.
            dataset: name of the data set, for rules that depend on it.

        Returns:
            "score" in [0, 1], and further parts in [0, 1] where the metric has some.
        """
        ...

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> float:
        """Score of a data set on the 0..100 scale.

        Raises:
            MetricError: if there are no scores.
        """
        ...


def mean_times_100(scores: Sequence[Mapping[str, float]], part: str = "score") -> float:
    """The official mean: 100 times the sum, then divided by the number of rows, in this order of operations.

    Args:
        scores: results of `Metric.score`.
        part: the key to average.

    Returns:
        The mean on the 0..100 scale, unrounded.

    Raises:
        MetricError: if there are no scores.
    """
    if not scores:
        raise MetricError("0 scored predictions have no mean: score at least 1")
    return 100 * sum(row[part] for row in scores) / len(scores)


def keep_prediction(prediction: str, dataset: str) -> str:
    """Prepare nothing: the prediction is scored as it was generated."""
    del dataset
    return prediction


@dataclass(frozen=True)
class BestAnswerMetric:
    """A metric that compares the prediction with every answer and keeps the best result.

    Attributes:
        name: name in configuration, records and tables.
        definition: one line saying what exactly is computed.
        compare: (prediction, answer, all_classes) -> score in [0, 1].
        prepare: (prediction, dataset) -> the text that is scored.
    """

    name: str
    definition: str
    compare: Callable[[str, str, Sequence[str]], float]
    prepare: Callable[[str, str], str] = keep_prediction

    def score(
        self, prediction: str, answers: Sequence[str], all_classes: Sequence[str], dataset: str
    ) -> dict[str, float]:
        """Best score over the answers; 0 without answers, NaN if any comparison gives NaN (see `Metric.score`)."""
        prepared = self.prepare(prediction, dataset)
        scores = [self.compare(prepared, answer, all_classes) for answer in answers]
        # `max` may pass over a NaN, and a defect would look like a score of 0.
        return {"score": math.nan if any(map(math.isnan, scores)) else max([0.0, *scores])}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> float:
        """Mean on the 0..100 scale (see `Metric.aggregate`)."""
        return mean_times_100(scores)
