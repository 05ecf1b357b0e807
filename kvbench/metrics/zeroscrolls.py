"""ZeroSCROLLS: the table of its tasks, and its scorers.

They equal the metric files of tau/zero_scrolls on the Hugging Face hub, where the summarisation score is the geometric
mean of three means, not the mean of geometric means (the paper's text). Where upstream would crash on a malformed
reference the score is 0.0.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvbench.metrics.base import BestAnswerMetric, Metric, Scores, mean_times_100
from kvbench.metrics.text import lcs_length, multiset_f1, normalize_answer


class ZeroScrollsTask(NamedTuple):
    """What the paper's table of tasks and the official runners say: metric, tokens to generate, test questions."""

    metric: str
    max_new_tokens: int
    rows: int


# fmt: off
TASKS: dict[str, ZeroScrollsTask] = {
    "gov_report":     ZeroScrollsTask("zs_rouge", 1024, 500),         # reports of US agencies
    "summ_screen_fd": ZeroScrollsTask("zs_rouge", 512, 337),          # television scripts
    "qmsum":          ZeroScrollsTask("zs_rouge", 512, 281),          # meetings, by a query
    "squality":       ZeroScrollsTask("zs_rouge", 512, 260),          # stories, by a question; four references each
    "qasper":         ZeroScrollsTask("zs_f1", 128, 500),             # about a scientific article
    "narrative_qa":   ZeroScrollsTask("zs_f1", 64, 500),              # about a book or film script
    "quality":        ZeroScrollsTask("zs_accuracy", 10, 500),        # multiple choice about a story
    "musique":        ZeroScrollsTask("zs_f1", 32, 500),              # multi-hop questions, some unanswerable
    "space_digest":   ZeroScrollsTask("zs_exp_similarity", 36, 500),  # share of positive hotel reviews
    "book_sum_sort":  ZeroScrollsTask("zs_concordance", 256, 500),    # order of shuffled chapter summaries
}
# fmt: on
"""The ten tasks; ZeroSCROLLS' own score is the unweighted mean of all of them."""

PREFIX = "zeroscrolls_"
"""Before a task's name in records and tables: LongBench has data sets of the same names."""

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
_CHOICE = re.compile(r"\b[A-D]\b")
_PERCENTAGE = re.compile(
    r"(?<!\d)(\d++(?:\.\d*+)?)%"
)  # as upstream's (\d+\.?\d*)%, which takes cubic time on digits alone
_SURROGATES = re.compile("[\ud800-\udfff]")


def f1(prediction: str, answer: str) -> float:
    """F1 over normalised words, transliterated afterwards: curly apostrophes stay as ASCII, capitals can come back."""
    from unidecode import unidecode  # on first use: no other scorer needs it

    return multiset_f1(*(unidecode(_SURROGATES.sub("", normalize_answer(t))).split() for t in (prediction, answer)))


def accuracy(prediction: str, answer: str) -> float:
    """1 if the first single capital A to D of both texts is the same; the article "A" counts as a choice."""
    chosen, gold = _CHOICE.search(prediction), _CHOICE.search(answer)
    return float(chosen is not None and gold is not None and chosen.group() == gold.group())


def exp_similarity(prediction: str, answer: str) -> float:
    """Similarity of the first percentages: halved by every ten points of distance; 0 if either text has none."""
    predicted, gold = _PERCENTAGE.search(prediction), _PERCENTAGE.search(answer)
    if predicted is None or gold is None:
        return 0.0
    first, second = float(gold.group(1)), float(predicted.group(1))
    return 1.0 if first == second else 0.5 ** (abs(first - second) / 10)


def _summary_ids(text: str) -> list[int]:
    """Numbers of a text once everything but digits, white space and commas is deleted; none if one is too long."""
    try:
        return [int(number) for number in re.sub(r"[^0-9\s,]", "", text).replace(",", " ").split()]
    except ValueError:  # more digits than Python converts; upstream gives up on the whole list as well
        return []


def concordance(prediction: str, answer: str) -> float:
    """Share of pairs of ids that both orders place in the same sequence; 0 unless the ids are the same multiset."""
    predicted, gold = _summary_ids(prediction), _summary_ids(answer)
    if not gold or sorted(predicted) != sorted(gold):
        return 0.0
    place = {number: position for position, number in enumerate(predicted)}
    places = [place[number] for number in dict.fromkeys(gold)]
    n_concordant, before = 0, list[int]()
    for position in places:
        n_concordant += (rank := bisect(before, position))
        before.insert(rank, position)
    n_pairs = len(places) * (len(places) - 1) // 2
    return n_concordant / n_pairs if n_pairs else 1.0


def _rouge_l(answer: str, prediction: str) -> float:
    """`rouge_score`'s ROUGE-L without its table of Python lists: the same number from bit-parallel rows."""
    from rouge_score.tokenize import tokenize

    first, second = tokenize(answer, None), tokenize(prediction, None)
    if not (common := lcs_length(first, second)):
        return 0.0
    precision, recall = common / len(second), common / len(first)
    return 2 * precision * recall / (precision + recall)


class GeometricRouge:
    """ROUGE-1, -2 and -L, joined by the geometric mean after averaging over the data set."""

    name = "zs_rouge"
    definition = "geometric mean of mean ROUGE-1, -2, -L, rouge_score without stemming (tau/zero_scrolls)"
    averaged_parts = ROUGE_TYPES

    def score(self, prediction: str, answers: Sequence[str], all_classes: Sequence[str], dataset: str) -> Scores:
        """Best F-measure over the answers, for every ROUGE type by itself.

        "score" is the geometric mean of this example's three values: for comparing examples, not used by `aggregate`.
        """
        from rouge_score.rouge_scorer import RougeScorer  # imports nltk: on first use

        scorer = RougeScorer(ROUGE_TYPES[:2])
        results = [scorer.score(answer, prediction) for answer in answers]
        parts = {kind: max([0.0, *(float(result[kind].fmeasure) for result in results)]) for kind in ROUGE_TYPES[:2]}
        parts["rougeL"] = max([0.0, *(_rouge_l(answer, prediction) for answer in answers)])
        return {"score": geometric_mean(list(parts.values())), **parts}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> float:
        """Geometric mean of the three means on the 0..100 scale, rounded to 4 decimals as upstream does."""
        return round(geometric_mean([mean_times_100(scores, kind) for kind in ROUGE_TYPES]), 4)


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of non-negative numbers."""
    return math.prod(values) ** (1 / len(values))


METRICS: tuple[Metric, ...] = (
    GeometricRouge(),
    *(
        BestAnswerMetric(name, f"{definition} (tau/zero_scrolls)", compare)
        for name, definition, compare in (
            ("zs_f1", "token F1, transliterated", lambda p, a, c: f1(p, a)),
            ("zs_accuracy", "first letter A to D", lambda p, a, c: accuracy(p, a)),
            ("zs_exp_similarity", "0.5 ** (percentage points / 10)", lambda p, a, c: exp_similarity(p, a)),
            ("zs_concordance", "share of concordant pairs of ids", lambda p, a, c: concordance(p, a)),
        )
    ),
)
