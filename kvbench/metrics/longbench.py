"""LongBench v1 scorers, equal to LongBench/metrics.py and eval.py of THUDM/LongBench at commit 2e00731f.

Upstream oddities are kept where they change published numbers (the classification list that shrinks while it is
walked, whitespace-only code lines, two empty answers that score 0); they are named at the function that has them. Where
upstream would crash on a malformed reference the score is 0.0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from kvbench.metrics.base import BestAnswerMetric
from kvbench.metrics.lcs import check_pairs, lcs_length
from kvbench.metrics.rouge_l import rouge_l
from kvbench.metrics.text import (
    chinese_words,
    first_code_line,
    first_line,
    multiset_f1,
    normalize_answer,
    normalize_chinese_token,
)

# Data sets whose prediction is cut to its first line before scoring (eval.py): few-shot prompts invite a next example.
FIRST_LINE_DATASETS = frozenset({"trec", "triviaqa", "samsum", "lsht"})

# eval.py, dataset2metric: data set -> (metric, rows of the official test split).
DATASETS: dict[str, tuple[str, int]] = {
    "narrativeqa": ("qa_f1", 200),
    "qasper": ("qa_f1", 200),
    "multifieldqa_en": ("qa_f1", 150),
    "multifieldqa_zh": ("qa_f1_zh", 200),
    "hotpotqa": ("qa_f1", 200),
    "2wikimqa": ("qa_f1", 200),
    "musique": ("qa_f1", 200),
    "dureader": ("rouge_l_zh", 200),
    "gov_report": ("rouge_l", 200),
    "qmsum": ("rouge_l", 200),
    "multi_news": ("rouge_l", 200),
    "vcsum": ("rouge_l_zh", 200),
    "trec": ("classification", 200),
    "triviaqa": ("qa_f1", 200),
    "samsum": ("rouge_l", 200),
    "lsht": ("classification", 200),
    "passage_count": ("count", 200),
    "passage_retrieval_en": ("retrieval", 200),
    "passage_retrieval_zh": ("retrieval_zh", 200),
    "lcc": ("code_sim", 500),
    "repobench-p": ("code_sim", 500),
}


def base_dataset(dataset: str) -> str:
    """Name without LongBench-E's suffix: rules, prompts and metrics are looked up by it."""
    return dataset.removesuffix("_e")


def prepare_prediction(prediction: str, dataset: str) -> str:
    """First line only for the few-shot data sets, everything for the others."""
    return first_line(prediction) if base_dataset(dataset) in FIRST_LINE_DATASETS else prediction


def qa_f1(prediction: str, answer: str) -> float:
    """F1 over normalised English words."""
    return multiset_f1(normalize_answer(prediction).split(), normalize_answer(answer).split())


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 over jieba's words of the raw texts, each normalised afterwards; words that vanish are dropped."""
    predicted, referenced = (
        [token for word in chinese_words(text) if (token := normalize_chinese_token(word))]
        for text in (prediction, answer)
    )
    return multiset_f1(predicted, referenced)


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L over jieba's words; the Chinese full stop does not end a sentence, so texts are mostly one sentence."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(answer)))


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """One over the number of class names found in the prediction if the gold class is among them, else 0.

    Found names that are substrings of the gold class are removed, but from the list that is being walked: of two such
    names in a row the second survives. Published numbers contain this, so it stays.

    Args:
        prediction: first line of the generated text.
        answer: gold class.
        all_classes: class names in the order of the data set.

    Returns:
        Score in [0, 1].
    """
    found = [name for name in all_classes if name in prediction]
    for name in found:
        if name in answer and name != answer:
            found.remove(name)  # from the list being walked, as upstream does
    return 1.0 / len(found) if answer in found else 0.0


def _share_equal(prediction: str, number: str) -> float:
    """Share of the prediction's numbers that are this number, compared as strings."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that equal the answer as strings ("17.0" holds two numbers)."""
    return _share_equal(prediction, answer)


def _retrieval(prediction: str, answer: str, pattern: str) -> float:
    gold = re.search(pattern, answer)
    return _share_equal(prediction, gold.group(1)) if gold else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that equal N of the answer "Paragraph N"."""
    return _retrieval(prediction, answer, r"Paragraph (\d+)")


def retrieval_zh(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that equal N of the answer "段落N"."""
    return _retrieval(prediction, answer, r"段落(\d+)")


def _whole_percent(first: str, second: str, ratio: float) -> float:
    """Ratio as fuzzywuzzy reports it: 1 for equal strings, 0 if either is empty, else whole percent, halves to even."""
    if first == second:
        return 1.0
    if not first or not second:
        return 0.0
    return round(100 * ratio) / 100


def code_sim(prediction: str, answer: str) -> float:
    """Similarity of the first code line by `difflib`, as fuzzywuzzy 0.18.0 without python-Levenshtein computes it.

    Pinned to `difflib`: fuzzywuzzy itself switches to another measure when python-Levenshtein can be imported, which
    moves lcc and repobench-p by about two points. Asymmetric, and its junk heuristic acts on answers of 200 characters
    and more.

    Args:
        prediction: generated code.
        answer: gold line.

    Returns:
        Score in [0, 1], a whole percentage.
    """
    line = first_code_line(prediction)
    check_pairs(len(line) * len(answer))  # difflib looks at up to so many, and again in the gaps of what it finds
    return _whole_percent(line, answer, difflib.SequenceMatcher(None, line, answer).ratio())


def code_sim_levenshtein(prediction: str, answer: str) -> float:
    """Similarity of the first code line as fuzzywuzzy computes it with python-Levenshtein 0.27.

    The indel ratio: 1 - (deletions and insertions) / (both lengths) = 2 LCS / (both lengths); the first form is the one
    that package rounds.

    Args:
        prediction: generated code.
        answer: gold line.

    Returns:
        Score in [0, 1], a whole percentage.
    """
    line = first_code_line(prediction)
    total = len(line) + len(answer)
    edits = total - 2 * lcs_length(line, answer)
    return _whole_percent(line, answer, 1.0 - edits / total if total else 1.0)


_OFFICIAL = "LongBench@2e00731f"

METRICS: tuple[BestAnswerMetric, ...] = tuple(
    BestAnswerMetric(name, f"{definition} ({_OFFICIAL})", compare, prepare_prediction)
    for name, definition, compare in (
        ("qa_f1", "token F1", lambda p, a, c: qa_f1(p, a)),
        ("qa_f1_zh", "token F1, jieba words", lambda p, a, c: qa_f1_zh(p, a)),
        ("rouge_l", "ROUGE-L of rouge 1.0.1", lambda p, a, c: rouge_l(p, a)),
        ("rouge_l_zh", "ROUGE-L of rouge 1.0.1, jieba words", lambda p, a, c: rouge_l_zh(p, a)),
        ("classification", "class name found in the text", classification),
        ("count", "share of numbers equal to the count", lambda p, a, c: count(p, a)),
        ("retrieval", "share of numbers equal to the paragraph", lambda p, a, c: retrieval(p, a)),
        ("retrieval_zh", "share of numbers equal to the paragraph", lambda p, a, c: retrieval_zh(p, a)),
        ("code_sim", "line similarity, difflib", lambda p, a, c: code_sim(p, a)),
        ("code_sim_levenshtein", "line similarity, indel", lambda p, a, c: code_sim_levenshtein(p, a)),
    )
)
