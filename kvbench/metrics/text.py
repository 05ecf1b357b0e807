"""Text normalisation that the official scorers share, exact matches of our own tasks, agreement of two answers.

ROUGE-L as LongBench reports it, and the longest common subsequences under it: bit-parallel, exact, of any length.

Equal bit for bit to `Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]` of the package `rouge`
1.0.1 (PyPI, pltrdy/rouge), which LongBench/metrics.py calls. It is our own code because the package recurses once a
word (two texts of 1,200 words overflow, which LongBench's bare except turns into 0.0) and fills a table for every pair
of sentences. Where the package raises because a text has no sentence, the score is 0.0, as LongBench says. It is not
the ROUGE-L of `rouge_score`: no lower-casing, no stemming, punctuation sticks to the words.

One row of the usual length table T is one integer. Bit j-1 of row i is 0 exactly where T[i, j] = T[i, j-1] + 1, so a
whole row is updated by four operations on integers as wide as the second sequence (Hyyrö 2004, "Bit-parallel LCS-length
computation revisited"). The rows are also all that walking back needs: where the items differ,
T[i-1, j] > T[i, j-1] holds exactly if T[i, j] = T[i, j-1] + 1, that is if the bit is 0.

No exact algorithm is known that needs much less than the product of both lengths, so that product has a bound here.
"""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from kvbench.errors import MetricError
from kvbench.metrics.base import BestAnswerMetric

# Punctuation that LongBench/metrics.py deletes from Chinese answers, in its own order; "《" and "·" are not in it.
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_DELETE_ASCII = str.maketrans("", "", string.punctuation)
_DELETE_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(  # a dollar sign, in LaTeX with a backslash, may stand on either side of the minus
    r"(?:(?<![\w)])\\?\$?(?P<sign>[-−]))?\\?\$?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]++)?|(?<!\w)\.[0-9]++)"
)
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


def final_number(text: str) -> Decimal | None:
    """The last number of a text, None if it has none.

    "$1,234.50", "18.00" and "**-5**" are one number each; the hyphen of "16-3" is no sign, a full stop at the end no
    point, and commas join groups of three digits only.
    """
    if not (found := deque(_NUMBER.finditer(text), maxlen=1)):
        return None
    (match,) = found
    return Decimal(("-" if match["sign"] else "") + match["digits"].replace(",", ""))


def last_number(prediction: str, answer: str) -> float:
    """1.0 if the last numbers of both texts are equal, else 0.0; of the answer, GSM8K's, that is the one after ####."""
    gold = final_number(answer)
    return float(gold is not None and final_number(prediction) == gold)


def first_divergence(ids_a: Sequence[int], ids_b: Sequence[int]) -> int | None:
    """Number of tokens two generations share before they differ (or one ends); None if they are equal."""
    differing = (position for position, (a, b) in enumerate(zip(ids_a, ids_b, strict=False)) if a != b)
    return next(differing, None if len(ids_a) == len(ids_b) else min(len(ids_a), len(ids_b)))


def equal_share(ids_a: Sequence[int], ids_b: Sequence[int]) -> float:
    """Share of the longer generation's positions at which both hold the same token; 1.0 if both are empty."""
    longer = max(len(ids_a), len(ids_b))
    return sum(a == b for a, b in zip(ids_a, ids_b, strict=False)) / longer if longer else 1.0


# The synthetic tasks' look at the first line alone: a model that answers and then rambles on gains nothing.
METRICS = (
    BestAnswerMetric("needle", "answer in the first line, as whole words", lambda p, a, c: needle(p, a)),
    BestAnswerMetric("first_word", "first word equals the answer", lambda p, a, c: first_word(p, a)),
    BestAnswerMetric(
        "last_number", "last number equals that after ####", lambda p, a, c: last_number(p, a), gated=True
    ),
)


MAX_PAIRS = 10**10
"""Pairs of items that one comparison may look at: 100,000 words or characters on either side, some seconds."""


def check_pairs(n_pairs: int) -> None:
    """Refuse a comparison that looks at more than `MAX_PAIRS` pairs of items and so takes minutes or more."""
    if n_pairs > MAX_PAIRS:
        raise MetricError(
            f"scoring one prediction against one answer takes {n_pairs:,} pairs of words or characters, more than the "
            f"limit of {MAX_PAIRS:,}: shorten the prediction (fewer new tokens) or leave the row out"
        )


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence of two sequences of items (characters or words); see `check_pairs`."""
    check_pairs(len(first) * len(second))
    places: dict[Hashable, list[int]] = {}
    for place, item in enumerate(second):
        places.setdefault(item, []).append(place)
    everything = (1 << len(second)) - 1
    masks = {item: _bits(places[item], len(second)) for item in places.keys() & set(first)}
    row = everything
    for item in first:
        row = _next_row(row, masks.get(item, 0), everything)
    return len(second) - row.bit_count()


def lcs_words(first: Iterable[Sequence[str]], second: Iterable[Sequence[str]]) -> set[str]:
    """Words in the longest common subsequence of any sentence of one text and any of another.

    Of several longest ones the package `rouge` 1.0.1 takes that of walking back from both ends: equal words are taken;
    otherwise the word of the first sentence is dropped if that keeps a longer subsequence than dropping the word of the
    second; in every other case, ties included, the word of the second sentence is dropped.

    The sentences of `second` lie side by side in one integer, a guard bit between them, so that a word of `first` meets
    all of them in a few operations, also on the way back. What is no longer needed does not count in `check_pairs`.
    """
    sentences, others = dict.fromkeys(map(tuple, first)), dict.fromkeys(map(tuple, second))
    common = {word for sentence in sentences for word in sentence} & {word for other in others for word in other}
    places: dict[str, list[int]] = {word: [] for word in common}
    tops, guards, width = [], [0], 1
    # The walk always drops a word of `second` that `first` lacks.
    for other in dict.fromkeys(tuple(word for word in other if word in common) for other in others):
        for place, word in enumerate(other, start=width):
            places[word].append(place)
        width += len(other) + 1
        guards.append(width - 1)
        if other:
            tops.append(width - 2)
    everything = ((1 << width) - 1) ^ _bits(guards, width)
    ends = _bits(tops, width)
    taken: set[str] = set()
    n_pairs = 0
    for sentence in sentences:
        if (common & set(sentence)) <= taken:
            continue  # nothing that this sentence could add
        n_pairs += len(sentence) * width
        check_pairs(n_pairs)
        masks = {word: _bits(places[word], width) for word in common & set(sentence)}
        rows = [everything]
        for word in sentence:
            rows.append(_next_row(rows[-1], masks.get(word, 0), everything))
        walkers = ends
        for word, row in zip(reversed(sentence), reversed(rows), strict=False):
            matches = masks.get(word, 0)
            walkers = _drop(walkers, row & ~matches) & everything
            if found := walkers & matches:
                taken.add(word)
                walkers = ((walkers ^ found) | (found >> 1)) & everything
            if not walkers:
                break
    return taken


def _next_row(row: int, matches: int, everything: int) -> int:
    matches &= row
    return ((row + matches) | (row - matches)) & everything if matches else row


def _bits(places: Iterable[int], width: int) -> int:
    octets = bytearray(width // 8 + 1)
    for place in places:
        octets[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(octets, "little")


def _drop(walkers: int, passable: int) -> int:
    """Let every walker go down, one bit at a time, as long as the bit it stands on is passable; by doubled strides."""
    reached, open_, stride = walkers, passable, 1
    while moving := reached & open_:
        reached |= moving >> stride
        open_ &= open_ << stride
        stride *= 2
    return reached & ~passable


def _sentences(text: str) -> list[list[str]]:
    """Words between full stops (that in 12.5, too); empty pieces are dropped, blank ones hold one empty word."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of `lcs_words`, counted in distinct words; equal texts score 0.999999995 (see the last line)."""
    predicted, referenced = _sentences(prediction), _sentences(reference)
    if not predicted or not referenced:
        return 0.0
    hits = lcs_words(referenced, predicted)
    recall = len(hits) / len({word for sentence in referenced for word in sentence})
    precision = len(hits) / len({word for sentence in predicted for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def rouge_l_to_full(text: str, full_text: str) -> float:
    """ROUGE-L of an arm's text against the full cache's; exactly 1.0 for equal texts, also empty ones."""
    return 1.0 if text == full_text else rouge_l(text, full_text)
