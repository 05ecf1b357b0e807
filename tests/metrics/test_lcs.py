import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.errors import MetricError
from kvbench.metrics import lcs
from kvbench.metrics.lcs import lcs_length, lcs_words


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
        else:
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


def test_ties_drop_the_second_sequence():
    # Both "a" and "b" are longest; dropping from the second sequence first leaves "b".
    assert lcs_words(["ab"], ["ba"]) == {"b"}
    assert lcs_words(["ba"], ["ab"]) == {"a"}


def test_a_text_of_many_sentences_is_one_integer(monkeypatch):
    """Work is counted in rows: one a word of the first text, however many sentences the second has."""
    n_rows, next_row = 0, lcs._next_row

    def counted(*arguments):
        nonlocal n_rows
        n_rows += 1
        return next_row(*arguments)

    monkeypatch.setattr(lcs, "_next_row", counted)
    first = [("x", "y", "w", str(n)) for n in range(200)]
    second = [("w", "x", "y", str(n)) for n in range(200)]  # "w" is never taken, so no sentence can be left out early
    assert lcs_words(first, second) == {"x", "y", *map(str, range(200))}
    assert n_rows <= 4 * 200


def test_too_long_texts_are_refused_unless_they_are_done_early(monkeypatch):
    monkeypatch.setattr(lcs, "MAX_PAIRS", 1000)
    for compare in (lambda: lcs_length("a" * 100, "b" * 100), lambda: lcs_words(["ab" * 50], ["ba" * 50])):
        with pytest.raises(MetricError, match=r"^scoring one .* takes 10,\d+ pairs .* limit of 1,000: shorten"):
            compare()
    assert lcs_words([("a",)] * 1000, [("a",)] * 1000) == {"a"}
    assert lcs_words([(str(n), "a") for n in range(1000)], [("a",)]) == {"a"}
