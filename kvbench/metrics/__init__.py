"""Official scorers as pure functions of strings."""

from kvbench.metrics.base import BestAnswerMetric, Metric, get_metric, mean_times_100, metric_names

__all__ = ["BestAnswerMetric", "Metric", "get_metric", "mean_times_100", "metric_names"]
