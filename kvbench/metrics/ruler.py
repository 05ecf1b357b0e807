"""RULER: the table of its tasks, and its two scorers.

They equal `long_context_eval/eval` of nvidia-long-context-eval 26.3: a prediction is stripped, its control characters
become line feeds (`evaluate.py`), and an answer counts where it occurs in it, whatever the case
(`synthetic/constants.py`). Hsieh et al. 2024, arXiv:2404.06654, scores alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvbench.metrics.base import Metric, Scores, mean_times_100

# fmt: off
TASKS = {
    "niah_single_1":   "string_match_all",   # one word's number in a sentence that repeats itself
    "niah_single_2":   "string_match_all",   # one word's number in essays
    "niah_single_3":   "string_match_all",   # one word's UUID in essays
    "niah_multikey_1": "string_match_all",   # the same with three needles that are not asked for
    "niah_multikey_2": "string_match_all",   # the hay is needles
    "niah_multikey_3": "string_match_all",   # the hay is needles, keys and values are UUIDs
    "niah_multivalue": "string_match_all",   # four numbers of one word
    "niah_multiquery": "string_match_all",   # the numbers of four words
    "vt":              "string_match_all",   # the five variables of a chain of assignments
    "cwe":             "string_match_all",   # the ten most common words of a list
    "fwe":             "string_match_all",   # the three most common words of a Zipf text
    "qa_1":            "string_match_part",  # a SQuAD question among other questions' passages
    "qa_2":            "string_match_part",  # the same with HotpotQA
}
# fmt: on
"""The metric of each of the 13 tasks, in the official order; RULER's own score is the unweighted mean of all."""

_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class StringMatch:
    """A share of the answers that occur in the prediction; `join` says of the single ones (0 or 1) which."""

    name: str
    definition: str
    join: Callable[[Sequence[float]], float]
    averaged_parts: ClassVar[tuple[str, ...]] = ("score",)
    gated: ClassVar[bool] = True  # where the full cache fails, a difference between methods says nothing

    def score(self, prediction: str, answers: Sequence[str], all_classes: Sequence[str], dataset: str) -> Scores:
        """The share; 0 without answers."""
        text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
        found = [float(answer.lower() in text) for answer in answers]
        return {"score": self.join(found) if found else 0.0}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> float:
        """Mean on the 0..100 scale as officially: divided before it is multiplied, rounded to 2 decimals."""
        mean_times_100(scores)  # refuses an empty list
        return round(sum(row["score"] for row in scores) / len(scores) * 100, 2)


METRICS: tuple[Metric, ...] = (
    StringMatch("string_match_all", "share of the answers found (RULER 26.3)", lambda found: sum(found) / len(found)),
    StringMatch("string_match_part", "whether any answer is found (RULER 26.3)", max),
)
