"""LongBench v1: the table of its data sets, its scorers, and averages over data sets.

Scorers equal LongBench/metrics.py and eval.py of THUDM/LongBench at commit 2e00731f. Upstream oddities that change
published numbers are kept, and named at the function that has them. Where upstream would crash on a malformed reference
the score is 0.0.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from fuzzywuzzy import utils

from kvbench.metrics.base import BestAnswerMetric
from kvbench.metrics.text import (
    check_pairs,
    chinese_words,
    first_line,
    lcs_length,
    multiset_f1,
    normalize_answer,
    normalize_chinese_token,
    rouge_l,
)

CATEGORIES = ("single-document QA", "multi-document QA", "summarization", "few-shot", "synthetic", "code")
"""Those of the leaderboard."""


class DataSet(NamedTuple):
    """What all rows of a data set share; its prompt and length are in the official files (`tasks.longbench`)."""

    category: str
    language: str  # "en" or "zh"; code is "en" and counts in the averages of both
    metric: str  # eval.py, dataset2metric
    rows: int  # of the official test split
    rows_e: int = 0  # of its LongBench-E sample

    @property
    def first_line_only(self) -> bool:
        """Whether a prediction is cut to its first line before scoring (eval.py): few-shot prompts invite another."""
        return self.category == "few-shot"

    @property
    def chat(self) -> bool:
        """Whether pred.py puts the model's chat wrapper around the prompt."""
        return self.category not in ("few-shot", "code")


# fmt: off
DATASETS: dict[str, DataSet] = {
    "narrativeqa":          DataSet("single-document QA", "en", "qa_f1", 200),       # about a book or film script
    "qasper":               DataSet("single-document QA", "en", "qa_f1", 200, 224),  # about a scientific article
    "multifieldqa_en":      DataSet("single-document QA", "en", "qa_f1", 150, 150),  # about one long document
    "multifieldqa_zh":      DataSet("single-document QA", "zh", "qa_f1_zh", 200),    # about one long document
    "hotpotqa":             DataSet("multi-document QA", "en", "qa_f1", 200, 300),   # two hops in Wikipedia
    "2wikimqa":             DataSet("multi-document QA", "en", "qa_f1", 200, 300),   # up to five hops in Wikipedia
    "musique":              DataSet("multi-document QA", "en", "qa_f1", 200),        # up to four hops in Wikipedia
    "dureader":             DataSet("multi-document QA", "zh", "rouge_l_zh", 200),   # search questions, web pages
    "gov_report":           DataSet("summarization", "en", "rouge_l", 200, 300),     # reports of US agencies
    "qmsum":                DataSet("summarization", "en", "rouge_l", 200),          # meetings, by a query
    "multi_news":           DataSet("summarization", "en", "rouge_l", 200, 294),     # several news articles
    "vcsum":                DataSet("summarization", "zh", "rouge_l_zh", 200),       # meetings
    "trec":                 DataSet("few-shot", "en", "classification", 200, 300),   # a question's type, of 50
    "triviaqa":             DataSet("few-shot", "en", "qa_f1", 200, 300),            # trivia with a passage
    "samsum":               DataSet("few-shot", "en", "rouge_l", 200, 300),          # summaries of chats
    "lsht":                 DataSet("few-shot", "zh", "classification", 200),        # the topic of news, of 24
    "passage_count":        DataSet("synthetic", "en", "count", 200, 300),           # how many differ
    "passage_retrieval_en": DataSet("synthetic", "en", "retrieval", 200, 300),       # which of 30 this sums up
    "passage_retrieval_zh": DataSet("synthetic", "zh", "retrieval_zh", 200),         # which one this sums up
    "lcc":                  DataSet("code", "en", "code_sim", 500, 300),             # the next line of code
    "repobench-p":          DataSet("code", "en", "code_sim", 500, 300),             # the same, with other files
}
# fmt: on
ROWS = {
    **{name: data_set.rows for name, data_set in DATASETS.items()},
    **{f"{name}_e": data_set.rows_e for name, data_set in DATASETS.items() if data_set.rows_e},
}
"""Official rows of every data set and, by its name with `_e`, of its LongBench-E sample."""

# The nine LongBench data sets of the KVMerger paper (arXiv 2407.08454), in its order.
KVMERGER_DATASETS = (
    "gov_report", "multi_news", "narrativeqa", "qasper", "multifieldqa_en", "trec", "2wikimqa", "triviaqa",
    "passage_retrieval_en",
)  # fmt: skip
LENGTH_BUCKETS = ("0-4k", "4-8k", "8k+")


def base_dataset(dataset: str) -> str:
    """Name without LongBench-E's suffix: rules, prompts and metrics are looked up by it."""
    return dataset.removesuffix("_e")


def prepare_prediction(prediction: str, dataset: str) -> str:
    """First line only for the few-shot data sets, everything for the others."""
    known = DATASETS.get(base_dataset(dataset))
    return first_line(prediction) if known is not None and known.first_line_only else prediction


class Average(NamedTuple):
    """One average and what it is an average of: papers average 21, 16 or 9 data sets, or categories, points apart."""

    name: str
    value: float | None  # over those parts that are there
    parts: tuple[str, ...]
    missing: tuple[str, ...]  # data sets that should be in and are not; if empty, it compares with published ones


def _mean_of(name: str, scores: Mapping[str, float], datasets: Sequence[str]) -> Average:
    present, missing = (tuple(d for d in datasets if (d in scores) is there) for there in (True, False))
    value = sum(scores[dataset] for dataset in present) / len(present) if present else None
    return Average(name, value, present, missing)


def averages(scores: Mapping[str, float]) -> tuple[Average, ...]:
    """The LongBench leaderboard's averages, English then Chinese, then the mean of the KVMerger paper's nine data sets.

    Of scores on the 0..100 scale, unrounded. A category is the unweighted mean of its data sets, a language's overall
    score that of its six categories; a language without any data set of its own (code counts in both) is left out.
    """
    found: list[Average] = []
    for language, code in (("English", "en"), ("Chinese", "zh")):
        if not any(d.language == code and d.category != "code" and name in scores for name, d in DATASETS.items()):
            continue
        own = [name for name, known in DATASETS.items() if known.language == code or known.category == "code"]
        members = {category: [name for name in own if DATASETS[name].category == category] for category in CATEGORIES}
        means = [_mean_of(f"{language} {category}", scores, names) for category, names in members.items()]
        of_category = {name: mean.value for name, mean in zip(CATEGORIES, means, strict=True) if mean.value is not None}
        missing = tuple(name for mean in means for name in mean.missing)
        found += [*means, _mean_of(f"{language} overall", of_category, CATEGORIES)._replace(missing=missing)]
    return (*found, _mean_of("KVMerger paper's nine", scores, KVMERGER_DATASETS))


def length_buckets(lengths: Sequence[int], scores: Sequence[float]) -> dict[str, list[float]]:
    """LongBench-E: scores in [0, 1] by the length (words or characters) of their rows."""
    buckets = {bucket: list[float]() for bucket in LENGTH_BUCKETS}
    for length, score in zip(lengths, scores, strict=True):
        buckets[LENGTH_BUCKETS[(length >= 4000) + (length >= 8000)]].append(score)
    return buckets


def bucket_mean(scores: Sequence[float]) -> np.float64:
    """A bucket's score on the 0..100 scale as the official script has it: numpy's mean; NaN for an empty bucket."""
    return np.float64(100 * np.mean(scores) if scores else math.nan)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 over normalised English words."""
    return multiset_f1(normalize_answer(prediction).split(), normalize_answer(answer).split())


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 over jieba's words of the raw texts, each normalised afterwards; words that vanish are dropped."""
    words = (map(normalize_chinese_token, chinese_words(text)) for text in (prediction, answer))
    return multiset_f1(*(list(filter(None, normalized)) for normalized in words))


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L over jieba's words; the Chinese full stop does not end a sentence, so texts are mostly one sentence."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(answer)))


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """One over the number of class names found in the prediction if the gold class is among them, else 0.

    Found names that are substrings of the gold class are removed, but from the list that is being walked: of two such
    names in a row the second survives. Published numbers contain this, so it stays.
    """
    found = [name for name in all_classes if name in prediction]
    for name in found:
        if name in answer and name != answer:
            found.remove(name)  # from the list being walked, as upstream does
    return 1.0 / len(found) if answer in found else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that equal the answer as strings ("17.0" holds two numbers)."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, pattern: str = r"Paragraph (\d+)") -> float:
    """Share of the numbers in the prediction that equal the one which the pattern finds in the answer."""
    gold = re.search(pattern, answer)
    return count(prediction, gold.group(1)) if gold else 0.0


def _first_code_line(text: str) -> str:
    """The first line without backtick, "#" and "//", or nothing; lines of white space qualify."""
    lines = text.lstrip("\n").split("\n")
    return next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")


def _fuzz_ratio(line: str, answer: str, measure: Callable[[str, str], float]) -> float:
    """`fuzz.ratio` of fuzzywuzzy 0.18.0 (its rules for equal and empty texts, its rounding) with this measure."""
    rounded = utils.check_for_equivalence(utils.check_empty_string(lambda a, b: utils.intr(100 * measure(a, b))))
    return float(rounded(line, answer) / 100)


def code_sim(prediction: str, answer: str) -> float:
    """Similarity of the first code line in whole percent by `difflib`, as fuzzywuzzy without python-Levenshtein has it.

    fuzzywuzzy itself switches to another measure when python-Levenshtein can be imported, which moves lcc and
    repobench-p by about two points. Asymmetric; its junk heuristic acts on answers of 200 characters and more.
    """
    line = _first_code_line(prediction)
    check_pairs(len(line) * len(answer))  # difflib looks at up to so many, and again in the gaps of what it finds
    return _fuzz_ratio(line, answer, lambda a, b: difflib.SequenceMatcher(None, a, b).ratio())


def code_sim_levenshtein(prediction: str, answer: str) -> float:
    """Similarity of the first code line as fuzzywuzzy computes it with python-Levenshtein 0.27.

    1 - (deletions and insertions) / (both lengths) = 2 LCS / (both lengths); that package rounds the first form.
    """
    total = len(line := _first_code_line(prediction)) + len(answer)
    return _fuzz_ratio(line, answer, lambda a, b: 1.0 - (total - 2 * lcs_length(a, b)) / total)


METRICS = tuple(
    BestAnswerMetric(name, f"{definition} (LongBench@2e00731f)", compare, prepare_prediction)
    for name, definition, compare in (
        ("qa_f1", "token F1", lambda p, a, c: qa_f1(p, a)),
        ("qa_f1_zh", "token F1, jieba words", lambda p, a, c: qa_f1_zh(p, a)),
        ("rouge_l", "ROUGE-L of rouge 1.0.1", lambda p, a, c: rouge_l(p, a)),
        ("rouge_l_zh", "ROUGE-L of rouge 1.0.1, jieba words", lambda p, a, c: rouge_l_zh(p, a)),
        ("classification", "class name found in the text", classification),
        ("count", "share of numbers equal to the count", lambda p, a, c: count(p, a)),
        ("retrieval", "share of numbers equal to the paragraph", lambda p, a, c: retrieval(p, a)),
        ("retrieval_zh", "share of numbers equal to the paragraph", lambda p, a, c: retrieval(p, a, r"段落(\d+)")),
        ("code_sim", "line similarity, difflib", lambda p, a, c: code_sim(p, a)),
        ("code_sim_levenshtein", "line similarity, indel", lambda p, a, c: code_sim_levenshtein(p, a)),
    )
)
