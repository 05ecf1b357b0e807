import random
import sys
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge import Rouge

from kvbench.errors import MetricError
from kvbench.metrics import text as module
from kvbench.metrics.text import lcs_length, lcs_words, rouge_l


def package_rouge_l(prediction, reference):
    try:  # as LongBench/metrics.py has it
        return Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
    except ValueError:
        return 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("one two", "one two", 0.999999995),  # 2 / (2 + 1e-8)
        ("One two", "one two", 0.4999999950000001),  # case counts: 1 of 2 words
        ("two two two", "two", 0.999999995),  # distinct words: repetition is free
        ("two, one", "two one", 0.4999999950000001),  # punctuation sticks to words
        ("", "one", 0.0),
        ("one", "", 0.0),
        ("...", "one", 0.0),
        (" ", " ", 0.999999995),  # a blank piece is one empty word
        ("12.5", "12.7", 0.4999999950000001),  # the dot in a number ends a sentence: 12 is shared
    ],
)
def test_hand_computed(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-15)
    assert rouge_l(prediction, reference) == package_rouge_l(prediction, reference)


WORDS = ["to", "be", "or", "not", ".", "that", "is", "the", "question", "\u3000", "\t\n"]
TEXTS = st.one_of(st.text("ab.  c", max_size=40), st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join))


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS)
def test_bit_equal_to_the_package(prediction, reference):
    assert rouge_l(prediction, reference) == package_rouge_l(prediction, reference)


def test_long_sentences_do_not_recurse():
    text, limit = " ".join(f"w{number}" for number in range(1200)), sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; other code of this process may have raised it
    try:
        with pytest.raises(RecursionError):
            Rouge().get_scores([text], [text], avg=True)
    finally:
        sys.setrecursionlimit(limit)
    assert rouge_l(text, text) == 0.999999995


def table_lcs(first, second):
    """The textbook table and walk back, one cell at a time: the slow twin."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, start=1):
        for j, b in enumerate(second, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    items, i, j = [], len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            items.append(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:  # in a tie, too: of "ab" and "ba" the "b" is left
            j -= 1
    return items[::-1]


SENTENCES = st.lists(st.text("abc", max_size=8), max_size=6)


@settings(max_examples=500, deadline=None)
@given(SENTENCES, st.lists(st.text("abcd", max_size=8), max_size=6))
def test_same_words_as_the_tables_of_all_pairs(first, second):
    expected = {item for a in first for b in second for item in table_lcs(a, b)}
    assert lcs_words(first, second) == expected
    assert [lcs_length(a, b) for a in first for b in second] == [len(table_lcs(a, b)) for a in first for b in second]


@pytest.mark.parametrize("width", [63, 64, 65, 200])
def test_wide_rows(width):
    generator = random.Random(width)
    for n_items in (9, 80):
        first = [str(generator.randrange(n_items)) for _ in range(150)]
        second = [str(generator.randrange(n_items)) for _ in range(width)]
        assert lcs_words([first], [second]) == set(table_lcs(first, second))


def test_a_text_of_many_sentences_is_one_integer(monkeypatch):
    """Work is counted in rows: one a word of the first text, however many sentences the second has."""
    next_row = Mock(side_effect=module._next_row)
    monkeypatch.setattr(module, "_next_row", next_row)
    first = [("x", "y", "w", str(n)) for n in range(200)]
    second = [("w", "x", "y", str(n)) for n in range(200)]  # "w" is never taken, so no sentence can be left out early
    assert lcs_words(first, second) == {"x", "y", *map(str, range(200))}
    assert next_row.call_count <= 4 * 200


def test_too_long_texts_are_refused_unless_they_are_done_early(monkeypatch):
    monkeypatch.setattr(module, "MAX_PAIRS", 1000)
    for compare in (lambda: lcs_length("a" * 100, "b" * 100), lambda: lcs_words(["ab" * 50], ["ba" * 50])):
        with pytest.raises(MetricError, match=r"^scoring one .* takes 10,\d+ pairs .* limit of 1,000: shorten"):
            compare()
    assert lcs_words([("a",)] * 1000, [("a",)] * 1000) == {"a"}
    assert lcs_words([(str(n), "a") for n in range(1000)], [("a",)]) == {"a"}
