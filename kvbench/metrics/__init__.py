"""Official scorers as pure functions of strings, and fidelity to the full cache."""

from kvbench.metrics.base import BestAnswerMetric, Metric, mean_times_100
from kvbench.metrics.registry import get_metric, metric_names

__all__ = ["BestAnswerMetric", "Metric", "get_metric", "mean_times_100", "metric_names"]
