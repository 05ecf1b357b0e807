"""Averages over data sets, each with a label that says what went in and what is missing.

Papers average "LongBench" over 21, 16 or 9 data sets, and the leaderboard over six categories; the numbers differ by
several points, so no average here goes without its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvbench.metrics.zeroscrolls import TASKS as ZEROSCROLLS_TASKS

# Categories of the LongBench leaderboard; code counts in both languages.
_CODE = ("lcc", "repobench-p")
ENGLISH_CATEGORIES: dict[str, tuple[str, ...]] = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique"),
    "summarization": ("gov_report", "qmsum", "multi_news"),
    "few-shot": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_count", "passage_retrieval_en"),
    "code": _CODE,
}
CHINESE_CATEGORIES: dict[str, tuple[str, ...]] = {
    "single-document QA": ("multifieldqa_zh",),
    "multi-document QA": ("dureader",),
    "summarization": ("vcsum",),
    "few-shot": ("lsht",),
    "synthetic": ("passage_retrieval_zh",),
    "code": _CODE,
}

# The nine LongBench data sets of the KVMerger paper (arXiv 2407.08454).
KVMERGER_DATASETS = (
    "gov_report",
    "multi_news",
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "trec",
    "2wikimqa",
    "triviaqa",
    "passage_retrieval_en",
)


@dataclass(frozen=True)
class Average:
    """One average and what it is an average of.

    Attributes:
        name: short name for a table's column.
        value: the mean on the 0..100 scale over those parts that are there, unrounded; None if none is.
        parts: names of the averaged parts that are there.
        missing: names of the data sets that should be in and are not.
    """

    name: str
    value: float | None
    parts: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, so that the value can be compared with published ones."""
        return not self.missing

    @property
    def label(self) -> str:
        """What the value averages, in words."""
        label = f"{self.name}: mean of {', '.join(self.parts) or 'nothing'}"
        return f"{label}; INCOMPLETE, missing {', '.join(self.missing)}" if self.missing else label


def mean_of(name: str, scores: Mapping[str, float], datasets: Sequence[str]) -> Average:
    """Unweighted mean of the named data sets.

    Args:
        name: name of the average.
        scores: data set -> score on the 0..100 scale, unrounded.
        datasets: the data sets that belong to the average.

    Returns:
        The average over those that are there, with the others named.
    """
    present = tuple(dataset for dataset in datasets if dataset in scores)
    missing = tuple(dataset for dataset in datasets if dataset not in scores)
    value = sum(scores[dataset] for dataset in present) / len(present) if present else None
    return Average(name, value, present, missing)


def _language_averages(
    language: str, scores: Mapping[str, float], categories: Mapping[str, tuple[str, ...]]
) -> tuple[Average, ...]:
    averages = tuple(mean_of(f"{language} {name}", scores, datasets) for name, datasets in categories.items())
    present = [average for average in averages if average.value is not None]
    values = [average.value for average in present if average.value is not None]
    overall = Average(
        f"{language} overall",
        sum(values) / len(values) if values else None,
        tuple(average.name.removeprefix(f"{language} ") for average in present),
        tuple(dataset for average in averages for dataset in average.missing),
    )
    return (*averages, overall)


def longbench_averages(scores: Mapping[str, float]) -> tuple[Average, ...]:
    """Category averages and overall scores of the LongBench leaderboard, English then Chinese.

    A category is the unweighted mean of its data sets, a language's overall score the unweighted mean of its six
    categories. Languages without any data set of their own (code counts in both) are left out.

    Args:
        scores: data set -> score on the 0..100 scale, unrounded.

    Returns:
        Seven averages for each language that has results.
    """
    averages: tuple[Average, ...] = ()
    for language, categories in (("English", ENGLISH_CATEGORIES), ("Chinese", CHINESE_CATEGORIES)):
        own = [dataset for name, datasets in categories.items() if name != "code" for dataset in datasets]
        if any(dataset in scores for dataset in own):
            averages += _language_averages(language, scores, categories)
    return averages


def kvmerger_average(scores: Mapping[str, float]) -> Average:
    """Mean of the nine LongBench data sets that the KVMerger paper reports."""
    return mean_of("KVMerger paper's nine", scores, KVMERGER_DATASETS)


def zeroscrolls_average(scores: Mapping[str, float]) -> Average:
    """Mean of the ten ZeroSCROLLS tasks: the benchmark's own score."""
    return mean_of("ZeroSCROLLS", scores, tuple(ZEROSCROLLS_TASKS))
