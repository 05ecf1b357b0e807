"""Exact-match scores of the synthetic tasks, pure functions of two strings.

Both look at the first line of the prediction only (after leading newlines, the first-line rule of LongBench's
few-shot tasks): a model that answers and then rambles on is not rewarded for what comes later.
"""

from __future__ import annotations

import re
import string

_EDGES = string.punctuation + string.whitespace


def first_line(prediction: str) -> str:
    """The prediction up to its first newline, leading newlines ignored."""
    return prediction.lstrip("\n").split("\n")[0]


def needle_score(prediction: str, answer: str) -> float:
    """1.0 if `answer` stands in the first line of `prediction` as whole words, else 0.0; letter case is ignored.

    Whole words: the key 4711 is not found in 47112.
    """
    pattern = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    return float(re.search(pattern, first_line(prediction), flags=re.IGNORECASE) is not None)


def first_word_score(prediction: str, answer: str) -> float:
    """1.0 if the first word of `prediction` equals `answer`, else 0.0.

    Letter case and punctuation around the word ('"birds",' is birds) are ignored; an empty first line scores 0.
    """
    words = first_line(prediction).split()
    return float(bool(words) and words[0].strip(_EDGES).lower() == answer.strip(_EDGES).lower())
