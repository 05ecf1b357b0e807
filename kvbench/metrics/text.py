"""Text normalisation that the official scorers share, exact matches of our own tasks, agreement of two answers."""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from kvbench.metrics.base import BestAnswerMetric

# Punctuation that LongBench/metrics.py deletes from Chinese answers, in its own order; "《" and "·" are not in it.
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_DELETE_ASCII = str.maketrans("", "", string.punctuation)
_DELETE_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_EDGES = string.punctuation + string.whitespace


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, ASCII punctuation alone deleted, articles blanked, spaces collapsed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_ASCII)).split())


def normalize_chinese_token(token: str) -> str:
    """Lower case, ASCII and Chinese punctuation deleted, all white space deleted."""
    return "".join(token.lower().translate(_DELETE_CHINESE).split())


@cache
def _chinese_tokenizer() -> Any:
    """A tokenizer over the dictionary in jieba's package, which caches its parsed form in the temporary folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42.1 has invalid escapes and asks for pkg_resources
        import jieba
    logger = logging.getLogger("jieba")  # tells on stderr what it loads
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        tokenizer = jieba.Tokenizer()
        tokenizer.initialize()
    finally:
        logger.setLevel(level)
    return tokenizer


def chinese_words(text: str) -> list[str]:
    """Words of a raw text as jieba 0.42.1 cuts it (precise mode, hidden Markov model on); joined they are the text."""
    return list(_chinese_tokenizer().cut(text, cut_all=False))


def multiset_f1(predicted: Sequence[str], referenced: Sequence[str]) -> float:
    """F1 over multisets of tokens; 0.0 without a common token, also if both are empty."""
    common = sum((Counter(predicted) & Counter(referenced)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(referenced)
    return (2 * precision * recall) / (precision + recall)


def first_line(text: str) -> str:
    """The first line after leading newlines; only newlines are skipped, a line of spaces counts."""
    return text.lstrip("\n").split("\n")[0]


def needle(prediction: str, answer: str) -> float:
    """1.0 if `answer` stands in the first line as whole words (4711 is not in 47112), else 0.0; case is ignored."""
    pattern = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    return float(re.search(pattern, first_line(prediction), flags=re.IGNORECASE) is not None)


def first_word(prediction: str, answer: str) -> float:
    """1.0 if the first line's first word is `answer`, else 0.0; case and punctuation around it are ignored."""
    words = first_line(prediction).split()
    return float(bool(words) and words[0].strip(_EDGES).lower() == answer.strip(_EDGES).lower())


def first_divergence(ids_a: Sequence[int], ids_b: Sequence[int]) -> int | None:
    """Number of tokens two generations share before they differ (or one ends); None if they are equal."""
    differing = (position for position, (a, b) in enumerate(zip(ids_a, ids_b, strict=False)) if a != b)
    return next(differing, None if len(ids_a) == len(ids_b) else min(len(ids_a), len(ids_b)))


def equal_share(ids_a: Sequence[int], ids_b: Sequence[int]) -> float:
    """Share of the longer generation's positions at which both hold the same token; 1.0 if both are empty."""
    longer = max(len(ids_a), len(ids_b))
    return sum(a == b for a, b in zip(ids_a, ids_b, strict=False)) / longer if longer else 1.0


# Of the synthetic tasks. Both look at the first line alone: a model that answers and then rambles on gains nothing.
METRICS = (
    BestAnswerMetric("needle", "answer in the first line, as whole words", lambda p, a, c: needle(p, a)),
    BestAnswerMetric("first_word", "first word equals the answer", lambda p, a, c: first_word(p, a)),
)
