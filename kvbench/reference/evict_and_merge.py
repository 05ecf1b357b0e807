"""Sinks, best and recent tokens, and the most similar kept key, in plain loops: for the merging methods' twins."""

from __future__ import annotations

import math

from torch import Tensor


def keep_and_evict(scores: list[float], n_slots: int, n_start: int, recent_share: float) -> tuple[list[int], list[int]]:
    """Positions one head keeps (ties: the more recent token) and the ones it evicts, both ascending."""
    n_tokens = len(scores)
    n_recent = max(1, min(math.floor(recent_share * n_slots + 1e-9), n_slots - n_start - 1))
    between = range(n_start, n_tokens - n_recent)
    best = sorted(between, key=lambda j: (scores[j], j), reverse=True)[: n_slots - n_start - n_recent]
    kept = [*range(n_start), *sorted(best), *range(n_tokens - n_recent, n_tokens)]
    return kept, [j for j in range(n_tokens) if j not in set(kept)]


def most_similar(k: Tensor, e: int, kept: list[int]) -> tuple[int, float]:
    """The kept token whose key `k[c]` has the highest cosine with key e, and that cosine."""
    units = k / k.norm(dim=-1, keepdim=True)
    cosines = {c: float(units[e] @ units[c]) for c in kept}
    best = max(cosines, key=lambda c: cosines[c])
    return best, cosines[best]
