"""Metrics by name."""

from __future__ import annotations

from functools import cache

from kvbench.errors import ConfigError
from kvbench.metrics import longbench, zeroscrolls
from kvbench.metrics.base import BestAnswerMetric, Metric
from kvbench.metrics.synthetic import first_word_score, needle_score

_SYNTHETIC = (
    BestAnswerMetric("needle", "answer in the first line, as whole words", lambda p, a, c: needle_score(p, a)),
    BestAnswerMetric("first_word", "first word equals the answer", lambda p, a, c: first_word_score(p, a)),
)


@cache
def _metrics() -> dict[str, Metric]:
    metrics: tuple[Metric, ...] = (*longbench.METRICS, *zeroscrolls.METRICS, *_SYNTHETIC)
    return {metric.name: metric for metric in metrics}


def metric_names() -> tuple[str, ...]:
    """Names of all metrics."""
    return tuple(_metrics())


def get_metric(name: str) -> Metric:
    """The metric of this name.

    Args:
        name: a name of `metric_names`.

    Returns:
        The metric; one object per name.

    Raises:
        ConfigError: if there is none.
    """
    metrics = _metrics()
    if name not in metrics:
        raise ConfigError(f"metric {name!r} is unknown; known are {', '.join(metrics)}")
    return metrics[name]
