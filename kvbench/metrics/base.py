"""What a metric is, where it is found, and whether the packages below it are what they claim to be.

    from kvbench.metrics import get_metric

    metric = get_metric("qa_f1")
    scores = [metric.score("in Paris", ["Paris", "Paris, France"], (), "hotpotqa")]   # [{"score": 0.666...}]
    metric.aggregate(scores)                                                          # 66.66...

A metric is two pure functions. Scores of one prediction lie in [0, 1] and never raise, whatever the strings; a data
set's score lies on the usual 0..100 scale and is not rounded unless the official scorer of that metric rounds. Ours are
in the tuple `METRICS` of any module of this package; other distributions register one each as an entry point of the
group `kvbench.metrics`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, entry_points, version
from pathlib import Path
from pkgutil import iter_modules
from typing import ClassVar, Protocol, runtime_checkable

from kvbench.errors import ConfigError, MetricError

Scores = dict[str, float]
"""Of one prediction: "score" in [0, 1], and further parts in [0, 1] where the metric has some."""


@runtime_checkable
class Metric(Protocol):
    """A named scorer."""

    @property
    def name(self) -> str:
        """Name in configuration, records and tables."""

    @property
    def definition(self) -> str:
        """One line saying what exactly is computed, and after which official scorer."""

    def score(self, prediction: str, answers: Sequence[str], all_classes: Sequence[str], dataset: str) -> Scores:
        """Score a generated text, unstripped, against the answer that suits it best.

        `all_classes` is the label set of classification data sets, else empty; rules may depend on `dataset`'s name.
        """

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> float:
        """Score of a data set on the 0..100 scale; `MetricError` if there are no scores."""


def mean_times_100(scores: Sequence[Mapping[str, float]], part: str = "score") -> float:
    """The official mean of one part: 100 times the sum, then divided by the number of rows, in this order."""
    if not scores:
        raise MetricError("0 scored predictions have no mean: score at least 1")
    return 100 * sum(row[part] for row in scores) / len(scores)


@dataclass(frozen=True)
class BestAnswerMetric:
    """A metric that compares the prediction with every answer and keeps the best result."""

    name: str
    averaged_parts: ClassVar[tuple[str, ...]] = ("score",)  # `aggregate`: the geometric mean of these parts' means
    definition: str
    compare: Callable[[str, str, Sequence[str]], float]  # (prediction, answer, all_classes) -> score in [0, 1]
    prepare: Callable[[str, str], str] = lambda prediction, dataset: prediction  # -> the text that is scored
    gated: bool = False  # whether a full cache that fails itself ranks no methods (`output.gate`)

    def score(self, prediction: str, answers: Sequence[str], all_classes: Sequence[str], dataset: str) -> Scores:
        """Best score over the answers; 0 without answers, NaN if any comparison gives NaN."""
        prepared = self.prepare(prediction, dataset)
        scores = [self.compare(prepared, answer, all_classes) for answer in answers]
        # `max` may pass over a NaN, and a defect would look like a score of 0.
        return {"score": math.nan if any(map(math.isnan, scores)) else max([0.0, *scores])}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> float:
        """Mean on the 0..100 scale."""
        return mean_times_100(scores)


@cache
def _metrics() -> dict[str, Metric]:
    package = importlib.import_module(__package__)
    modules = [importlib.import_module(f"{__package__}.{found.name}") for found in iter_modules(package.__path__)]
    metrics: dict[str, Metric] = {m.name: m for module in modules for m in getattr(module, "METRICS", ())}
    for entry_point in entry_points(group="kvbench.metrics"):
        origin = f"entry point {entry_point.name} = {entry_point.value}"
        try:
            metric = entry_point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{origin} cannot be loaded ({error}): mend or uninstall the package") from error
        if isinstance(metric, type) or not isinstance(metric, Metric) or metric.name != entry_point.name:
            raise ConfigError(f"{origin} is no metric of that name (kvbench.metrics.Metric): correct the entry point")
        if metrics.setdefault(metric.name, metric) is not metric:
            raise ConfigError(f"{origin} claims a name that another metric has: uninstall one of them")
    return metrics


def metric_names() -> tuple[str, ...]:
    """Names of all metrics."""
    return tuple(_metrics())


def get_metric(name: str) -> Metric:
    """The metric of this name, one object per name; `ConfigError` if there is none."""
    if name not in _metrics():
        raise ConfigError(f"metric {name!r} is unknown; known are {', '.join(_metrics())}")
    return _metrics()[name]


def check_environment(search_path: list[str] | None = None) -> None:
    """Refuse (`MetricError`) an environment in which files of the package `rouge` are not those that were installed.

    `rouge-chinese` 1.0.3 installs files over those of `rouge` and so silently changes every ROUGE score computed with
    it (gov_report 26.63 becomes 15.77 on the same predictions). Our own ROUGE-L does not use the package, but no other
    tool can reproduce published scores in such an environment. `search_path` replaces `sys.path`.
    """
    places = sys.path if search_path is None else search_path
    rouge, chinese = (next(iter(distributions(name=name, path=places)), None) for name in ("rouge", "rouge-chinese"))
    for file in (rouge and rouge.files) or []:
        if file.parts[0] != "rouge" or file.suffix != ".py" or file.hash is None:
            continue
        path, state = Path(str(file.locate())), "missing"
        if path.is_file():
            digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, path.read_bytes()).digest()).rstrip(b"=")
            if digest.decode() == file.hash.value:
                continue
            state = "overwritten by rouge-chinese" if chinese else "overwritten"
        remedy = "pip uninstall -y rouge rouge-chinese && pip install rouge==1.0.1"
        raise MetricError(f"{file} of the installed package rouge is {state}; run: {remedy}")


def scorer_versions() -> dict[str, str]:
    """Versions of the packages that scores depend on, for records; "missing" where one is not installed."""
    versions = {}
    for name in ("jieba", "rouge_score", "Unidecode"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions
