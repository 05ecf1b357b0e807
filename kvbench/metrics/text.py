"""Text normalisation shared by the official scorers: answers, Chinese words, first lines, first lines of code."""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

# Punctuation that LongBench/metrics.py deletes from Chinese answers, in its own order; "《" and "·" are not in it.
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_DELETE_ASCII = str.maketrans("", "", string.punctuation)
_DELETE_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, ASCII punctuation deleted, articles blanked, white space collapsed.

    Non-ASCII punctuation (curly quotes, dashes) stays.

    Args:
        text: an answer.

    Returns:
        Words separated by single spaces.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_ASCII)).split())


def normalize_chinese_token(token: str) -> str:
    """Lower case, ASCII and Chinese punctuation deleted, all white space deleted."""
    return "".join(token.lower().translate(_DELETE_CHINESE).split())


@cache
def _chinese_tokenizer() -> Any:
    """A tokenizer of our own over jieba's dictionary, loaded on first use and without messages on stderr.

    jieba reads the dictionary in its package (no network) and caches the parsed form in the temporary folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42.1 has invalid escapes and asks for pkg_resources
        import jieba
    logger = logging.getLogger("jieba")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        tokenizer = jieba.Tokenizer()
        tokenizer.initialize()
    finally:
        logger.setLevel(level)
    return tokenizer


def chinese_words(text: str) -> list[str]:
    """Words of a Chinese text as jieba 0.42.1 cuts them (precise mode, hidden Markov model on).

    Args:
        text: raw text; white space and punctuation come back as words of their own.

    Returns:
        Words whose concatenation is the text.
    """
    return list(_chinese_tokenizer().cut(text, cut_all=False))


def multiset_f1(predicted: Sequence[str], referenced: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over multisets of tokens.

    Args:
        predicted: tokens of the prediction.
        referenced: tokens of the reference.

    Returns:
        F1 in [0, 1]; 0.0 without a common token, also if both are empty.
    """
    common = sum((Counter(predicted) & Counter(referenced)).values())
    if common == 0:
        return 0.0
    precision = common / len(predicted)
    recall = common / len(referenced)
    return (2 * precision * recall) / (precision + recall)


def first_line(text: str) -> str:
    """The first line after leading newlines; only newlines are skipped, a line of spaces counts."""
    return text.lstrip("\n").split("\n")[0]


def first_code_line(text: str) -> str:
    """The first line that holds no backtick, no "#" and no "//"; empty if there is none.

    Lines of white space qualify, and so a prediction that opens with one is scored on it.

    Args:
        text: generated code.

    Returns:
        One line, with its indentation.
    """
    for line in text.lstrip("\n").split("\n"):
        if "`" not in line and "#" not in line and "//" not in line:
            return line
    return ""
