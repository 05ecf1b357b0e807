"""Longest common subsequence, bit-parallel and exact, including which one is chosen among equals.

One row of the usual length table T is one integer. Bit j-1 of row i is 0 exactly where T[i, j] = T[i, j-1] + 1, so a
whole row is updated by four operations on integers as wide as the second sequence (Hyyrö 2004, "Bit-parallel LCS-length
computation revisited"). The rows are also all that walking back needs: where the items differ,
T[i-1, j] > T[i, j-1] holds exactly if T[i, j] = T[i, j-1] + 1, that is if the bit is 0.

No exact algorithm is known that needs much less than the product of both lengths, so that product has a bound here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from kvbench.errors import MetricError

MAX_PAIRS = 10**10
"""Pairs of items that one comparison may look at: 100,000 words or characters on either side, some seconds."""


def check_pairs(n_pairs: int) -> None:
    """Refuse a comparison that would take minutes or more.

    Args:
        n_pairs: pairs of items (words or characters) that have to be looked at.

    Raises:
        MetricError: if they are more than `MAX_PAIRS`.
    """
    if n_pairs > MAX_PAIRS:
        raise MetricError(
            f"scoring one prediction against one answer takes {n_pairs:,} pairs of words or characters, more than the "
            f"limit of {MAX_PAIRS:,}: shorten the prediction (fewer new tokens) or leave the row out"
        )


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence.

    Args:
        first: items (characters of a string, words of a list).
        second: items.

    Returns:
        Number of items in the longest common subsequence.

    Raises:
        MetricError: if the sequences are too long (`check_pairs`).
    """
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
    all of them in a few operations, also on the way back.

    Args:
        first: sentences, each a list of words.
        second: sentences, each a list of words.

    Returns:
        The words.

    Raises:
        MetricError: if the texts are too long (`check_pairs`); what is no longer needed does not count.
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
    """The integer that has these bits set."""
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
