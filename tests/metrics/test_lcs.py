import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.metrics.lcs import lcs_items, lcs_length, match_masks


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


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_same_items_as_the_table(first, second):
    expected = table_lcs(first, second)
    assert lcs_items(first, second) == expected
    assert lcs_items(first, second, match_masks(second)) == expected
    assert lcs_length(first, second) == len(expected)


@pytest.mark.parametrize("width", [63, 64, 65, 200])
def test_wide_rows(width):
    generator = random.Random(width)
    first = [generator.randrange(9) for _ in range(150)]
    second = [generator.randrange(9) for _ in range(width)]
    assert lcs_items(first, second) == table_lcs(first, second)


def test_ties_drop_the_second_sequence():
    # Both "a" and "b" are longest; dropping from the second sequence first leaves "b".
    assert lcs_items("ab", "ba") == ["b"]
    assert lcs_items("ba", "ab") == ["a"]
