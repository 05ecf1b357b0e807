"""Merging sets as runs of adjacent tokens: which neighbours are linked, and where the runs begin.

A run is written as links: `links[h, t]` says that token t is in the same set as token t - 1. Everything is vectorised
over heads and tokens; with sizes known beforehand nothing is read back to the host. Where heads share their sets,
scores, protection and links have one row for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvbench.ops.selection import largest_by_recency

BISECTIONS = 12
CACHED_OFFSETS = 256  # bounds the memory of repeated scans; sets rarely reach that far


def protected_tokens(scores: Tensor, n_recent: int, n_top: int) -> Tensor:
    """Mark the last `n_recent` tokens and the `n_top` older ones of highest score (ties: the more recent); `(H, T)`."""
    older = scores.shape[1] - n_recent
    protected = torch.ones_like(scores, dtype=torch.bool)
    protected[:, :older] = largest_by_recency(scores[:, :older], n_top)
    return protected


def unit_keys(keys: Tensor) -> Tensor:
    """Scale keys `(H, T, D)` to length 1, in fp32; a zero key stays zero."""
    return torch.nn.functional.normalize(keys.float(), dim=-1, eps=1e-12)


def cosines_at(units: Tensor, offset: int, share_heads: bool) -> Tensor:
    """Cosine of every token with the one `offset` before it: `(H, T - offset)`, heads averaged to one row if shared."""
    cosines = (units[:, offset:] * units[:, :-offset]).sum(-1)
    return cosines.mean(0, keepdim=True) if share_heads else cosines


def mergeable_cosines(units: Tensor, protected: Tensor, share_heads: bool) -> Tensor:
    """Cosine of every token with its predecessor, -inf where either is protected or there is none; as `protected`."""
    cosines = torch.full(protected.shape, float("-inf"), device=units.device)
    cosines[:, 1:] = cosines_at(units, 1, share_heads)
    cosines[:, 1:].masked_fill_(protected[:, 1:] | protected[:, :-1], float("-inf"))
    return cosines


def cosine_table(units: Tensor, share_heads: bool) -> Callable[[int], Tensor]:
    """Return `cosines_at` as a function of the offset that remembers the first `CACHED_OFFSETS` results."""
    table: list[Tensor] = []

    def cosines(offset: int) -> Tensor:
        if offset <= len(table):
            return table[offset - 1]
        result = cosines_at(units, offset, share_heads)
        if offset == len(table) + 1 <= CACHED_OFFSETS:
            table.append(result)
        return result

    return cosines


def anchored_links(cosines: Callable[[int], Tensor], protected: Tensor, threshold: float | Tensor) -> Tensor:
    """Link each token to its set's anchor while it is similar to it; links of `protected`'s shape.

    The scan runs from the last token to the first: a token joins the current set if its cosine with the token the set
    started from exceeds the threshold, otherwise it starts the next set; a protected token is a set of its own.

    For every token it is first found how far a set would reach that started there (offset by offset, until no set
    grows, which takes a host synchronisation each); the sets that do occur are those on the path from the last token,
    which pointer doubling marks in log2(T) rounds.
    """
    n_tokens = protected.shape[1]
    growing = ~protected
    reach = torch.zeros(protected.shape, dtype=torch.int64, device=protected.device)
    for offset in range(1, n_tokens):
        growing[:, :offset] = False
        growing[:, offset:] &= (cosines(offset) > threshold) & ~protected[:, :-offset]
        if not growing.any():
            break
        reach += growing
    tokens = torch.arange(n_tokens, device=protected.device)
    following = torch.nn.functional.pad(tokens - reach, (1, 0))  # node t + 1 is token t, node 0 the end of the path
    anchors = torch.zeros_like(following, dtype=torch.bool)
    anchors[:, n_tokens] = True
    for _ in range(n_tokens.bit_length()):
        anchors.scatter_(1, torch.where(anchors, following, 0), True)
        following = following.gather(1, following)
    links = torch.zeros_like(protected)
    links[:, 1:] = ~anchors[:, 1:n_tokens]
    return links


def exact_anchored_links(units: Tensor, protected: Tensor, n_slots: int, share_heads: bool) -> Tensor:
    """Anchored sets that are exactly `n_slots` per head.

    Twelve bisections of [-1, 1] find, per head, the lowest threshold that still gives at least `n_slots` sets; of those
    too many, neighbours are joined where the adjacent cosine is highest (ties: the later).
    """
    cosines = cosine_table(units, share_heads)
    low = torch.full((protected.shape[0], 1), -1.0, device=protected.device)
    high = torch.ones_like(low)
    links = torch.zeros_like(protected)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = anchored_links(cosines, protected, middle)
        enough = (~tried).sum(1, keepdim=True) >= n_slots
        links = torch.where(enough, tried, links)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    boundaries = mergeable_cosines(units, protected, share_heads).masked_fill_(links, float("-inf"))
    return links | largest_by_recency(boundaries, (~links).sum(1, keepdim=True) - n_slots)


def segment_starts(links: Tensor, n_slots: int) -> Tensor:
    """Index of the first token of every set, from `(H, T)` bool links, false in column 0.

    `(H, n_slots + 1)` int64, ascending, `n_slots` being the sets of the head that has most; set s of a head is the
    tokens `starts[s] .. starts[s + 1] - 1`; columns beyond its last set hold T, so that missing sets are empty.
    """
    n_heads, n_tokens = links.shape
    tokens = torch.arange(n_tokens, device=links.device)
    columns = torch.where(links, n_slots, (~links).cumsum(1) - 1)
    starts = torch.full((n_heads, n_slots + 1), n_tokens, device=links.device)
    return starts.scatter_(1, columns, torch.where(links, n_tokens, tokens))


def exact_chain_starts(
    keys: Tensor, scores: Tensor, n_recent: int, n_top: int, n_slots: int, share_heads: bool, kernels: str = "torch"
) -> Tensor:
    """Chained sets that are exactly `n_slots` per head: the closest adjacent pairs are linked (ties: the later pair).

    Args:
        keys: `(H, T, D)`.
        scores: `(H, T)` fp32, aggregated attention; `(1, T)` if heads share.
        n_recent: protected last tokens.
        n_top: protected tokens of highest score among the older ones.
        n_slots: sets per head; at least `n_recent + 2 n_top + 1`, or T, so that enough pairs may be linked.
        share_heads: one division for all heads, from cosines averaged over them.
        kernels: "torch" or "triton"; both give `(H, n_slots + 1)` int64, as from `segment_starts`.
    """
    if kernels == "triton":
        from kvbench.ops import compress_triton  # imports triton, which a CPU may lack

        return compress_triton.exact_chain_starts(keys, scores, n_recent, n_top, n_slots, share_heads)
    protected = protected_tokens(scores, n_recent, n_top)
    cosines = mergeable_cosines(unit_keys(keys), protected, share_heads)
    links = largest_by_recency(cosines, keys.shape[1] - n_slots)
    return segment_starts(links, n_slots).expand(keys.shape[0], -1)
