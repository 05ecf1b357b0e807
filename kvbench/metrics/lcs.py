"""Longest common subsequence, bit-parallel and exact, including which one is chosen among equals.

One row of the usual length table T is one integer. Bit j-1 of row i is 0 exactly where T[i, j] = T[i, j-1] + 1, so a
whole row is updated by four operations on integers as wide as the second sequence (Hyyrö 2004, "Bit-parallel LCS-length
computation revisited"). The rows are also all that walking back needs: where the items differ,
T[i-1, j] > T[i, j-1] holds exactly if T[i, j] = T[i, j-1] + 1, that is if the bit is 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence


def match_masks(sequence: Sequence[Hashable]) -> dict[Hashable, int]:
    """Positions of every distinct item as bits: bit k is set where `sequence[k]` is the item."""
    masks: dict[Hashable, int] = {}
    for position, item in enumerate(sequence):
        masks[item] = masks.get(item, 0) | (1 << position)
    return masks


def _rows(first: Sequence[Hashable], masks: Mapping[Hashable, int], second_length: int) -> list[int]:
    """Difference rows of the table, row 0 (nothing read of `first`) included."""
    everything = (1 << second_length) - 1
    row = everything
    rows = [row]
    for item in first:
        matches = row & masks.get(item, 0)
        if matches:
            row = ((row + matches) | (row - matches)) & everything
        rows.append(row)
    return rows


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence.

    Args:
        first: items (characters of a string, words of a list).
        second: items.

    Returns:
        Number of items in the longest common subsequence.
    """
    row = _rows(first, match_masks(second), len(second))[-1]
    return len(second) - row.bit_count()


def lcs_items(
    first: Sequence[Hashable], second: Sequence[Hashable], masks: Mapping[Hashable, int] | None = None
) -> list[Hashable]:
    """Items of one longest common subsequence, with the tie rule of the package `rouge` 1.0.1.

    Walking back from both ends: equal items are taken; otherwise the item of `first` is dropped if that keeps a longer
    subsequence than dropping the item of `second`; in every other case, ties included, the item of `second` is dropped.

    Args:
        first: items.
        second: items.
        masks: `match_masks(second)`, if the caller has it already.

    Returns:
        The items in order.
    """
    rows = _rows(first, match_masks(second) if masks is None else masks, len(second))
    taken = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            taken.append(first[i])
        elif rows[i] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
    return taken[::-1]
