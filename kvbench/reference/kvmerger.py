"""KVMerger set by set, in plain loops and fp32: the yardstick for `kvbench.methods.kvmerger`.

Symbols of the paper: a_i aggregated attention of token i, epsilon the similarity threshold, S a merging set, p its
pivot, g Gaussian weights, w normalised weights. Sets are lists of token indices, found by the scan of algorithm 1 from
the last token to the first; with a budget, by joining neighbours one pair after another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ReferenceSlot:
    """One merged set of one head."""

    S: list[int]
    p: int
    key: Tensor
    value: Tensor


def cosine(k: Tensor, i: int, j: int) -> float:
    """Cosine of keys i and j, mean over the heads of `k` `(heads, T, D)`."""
    return sum(float(h[i] @ h[j]) / (float(h[i].norm()) * float(h[j].norm())) for h in k) / len(k)


def protected_set(a: list[float], n_recent: int, n_top: int) -> set[int]:
    """Indices of the last tokens, and of the most-attended among the older ones (ties: the more recent)."""
    older = len(a) - n_recent
    best = sorted(range(older), key=lambda i: (a[i], i), reverse=True)[:n_top]
    return set(range(older, len(a))) | set(best)


def scan_sets(k: Tensor, protected: set[int], epsilon: float, linkage: str) -> list[list[int]]:
    """Algorithm 1: from the last token back, join the predecessor while it is similar."""
    sets = [[k.shape[1] - 1]]
    for i in range(k.shape[1] - 2, -1, -1):
        S = sets[-1]
        compared = S[-1] if linkage == "chain" else S[0]
        if i not in protected and S[0] not in protected and cosine(k, compared, i) > epsilon:
            S.append(i)
        else:
            sets.append([i])
    return [sorted(S) for S in reversed(sets)]


def join_closest(k: Tensor, sets: list[list[int]], protected: set[int], n_slots: int) -> list[list[int]]:
    """Join neighbouring sets at the highest adjacent cosine (ties: the later) until `n_slots` are left."""
    pairs = [(cosine(k, S[0] - 1, S[0]), S[0]) for S in sets[1:] if S[0] not in protected and S[0] - 1 not in protected]
    joined = {i for _, i in sorted(pairs, reverse=True)[: len(sets) - n_slots]}
    result: list[list[int]] = []
    for S in sets:
        if S[0] in joined:
            result[-1] = result[-1] + S
        else:
            result.append(list(S))
    return result


def exact_sets(k: Tensor, protected: set[int], n_slots: int, linkage: str) -> list[list[int]]:
    """Sets that are exactly `n_slots`: from single tokens (chain) or from a bisected threshold (anchor)."""
    sets = [[i] for i in range(k.shape[1])]
    if linkage == "anchor":
        low, high = -1.0, 1.0
        for _ in range(12):
            epsilon = (low + high) / 2
            tried = scan_sets(k, protected, epsilon, "anchor")
            if len(tried) >= n_slots:
                sets, high = tried, epsilon
            else:
                low = epsilon
    return join_closest(k, sets, protected, n_slots)


def merge_set(
    k: Tensor, v: Tensor, S: list[int], p: int, sigma: float | None, value_scale: str, merge: bool
) -> ReferenceSlot:
    """Algorithm 2 for one head: Gaussian weights around the pivot; sigma None takes the mean distance / sqrt(2)."""
    if not merge:
        return ReferenceSlot(S, p, k[p], v[p])
    d = [float((k[p] - k[i]).norm()) for i in S]
    if sigma is None:
        sigma = sum(d) / (math.sqrt(2) * len(S))
    g = [1.0 if d_i == 0 else math.exp(-(d_i**2) / (2 * sigma**2)) for d_i in d]
    w = [g_i / sum(g) for g_i in g]
    key, value = torch.zeros_like(k[p]), torch.zeros_like(v[p])
    for w_i, i in zip(w, S, strict=True):
        key += w_i * k[i]
        value += w_i * v[i] * (len(S) if value_scale == "count" else 1)
    return ReferenceSlot(S, p, key, value)


def reference_kvmerger(
    keys: Tensor, values: Tensor, a: Tensor, n_recent: int, n_top: int, *,
    n_slots: int | None = None, epsilon: float = 0.75, linkage: str = "chain", scope: str = "head",
    pivot_scores: Tensor | None = None, sigma: float | None = 5.0, value_scale: str = "count", merge: bool = True,
) -> list[list[ReferenceSlot]]:  # fmt: skip
    """Merge one layer, keys and values `(H_k, T, D)`, by attention `a` `(H_k, T)`; the slots of each head, in order.

    `n_slots` None uses the fixed threshold `epsilon`, `pivot_scores` `(H_k, T)` None uses `a` (ties: the latest token),
    `sigma` None the mean distance / sqrt(2); a `value_scale` other than "count" is the plain average.
    """
    keys, values, pivot_scores = keys.float(), values.float(), a if pivot_scores is None else pivot_scores
    layer = []
    for h in range(keys.shape[0]):
        k = keys if scope == "layer" else keys[h : h + 1]
        a_h = (a.mean(0) if scope == "layer" else a[h]).tolist()
        protected = protected_set(a_h, n_recent, n_top)
        if n_slots is None:
            sets = scan_sets(k, protected, epsilon, linkage)
        else:
            sets = exact_sets(k, protected, n_slots, linkage)
        scores = pivot_scores[h].tolist()
        pivots = [max(S, key=lambda i: (scores[i], i)) for S in sets]
        layer.append(
            [merge_set(keys[h], values[h], S, p, sigma, value_scale, merge) for S, p in zip(sets, pivots, strict=True)]
        )
    return layer
