"""Methods that keep the best-scored tokens, in plain loops and fp32: SnapKV, PyramidKV, Knorm and AdaKV.

Symbols of the papers: SnapKV's C are the votes per key of the prefix (the first L_prefix keys) by the last L_obs
queries; PyramidKV's m layers keep alpha window tokens each and beta is the steepness; AdaKV's B is the budget of a
layer, B_i* a head's count among the layer's best scores, B_i its budget, alpha the share every head gets for certain.
"""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor


def pooled_votes(
    window_attention: Tensor, n_kv_heads: int, L_obs: int, kernel: int = 7, pooling: str = "max", reduce: str = "mean"
) -> list[list[float]]:
    """Mean votes per key of the prefix and KV head, pooled, from `(H, L, T)` rows of the last L >= L_obs queries."""
    n_query_heads, n_rows, n_tokens = window_attention.shape
    group, L_prefix = n_query_heads // n_kv_heads, n_tokens - L_obs
    rows = window_attention.float().tolist()
    pooled = []
    for h in range(n_kv_heads):
        C = []
        for j in range(L_prefix):
            mine = rows[h * group : (h + 1) * group]
            votes = [sum(head[i][j] for i in range(n_rows - L_obs, n_rows)) / L_obs for head in mine]
            C.append({"mean": sum(votes) / group, "max": max(votes), "first": votes[0]}[reduce])
        half = kernel // 2
        head = []
        for j in range(L_prefix):
            near = [C[i] for i in range(j - half, j + half + 1) if 0 <= i < L_prefix]
            head.append(max(near) if pooling == "max" else sum(near) / kernel)
        pooled.append(head)
    return pooled


def keep_best(scores: list[list[float]], n_tokens: int, n_slots: int, n_first: int, n_last: int) -> list[list[int]]:
    """Positions each head keeps: the first and last tokens, and the best others (ties: the more recent), ascending."""
    kept = []
    for head in scores:
        others = range(n_first, n_tokens - n_last)
        best = sorted(others, key=lambda j: (head[j], j), reverse=True)[: n_slots - n_first - n_last]
        kept.append([*range(n_first), *sorted(best), *range(n_tokens - n_last, n_tokens)])
    return kept


def reference_snapkv(
    window_attention: Tensor, n_kv_heads: int, n_slots: int,
    L_obs: int = 32, kernel: int = 7, pooling: str = "max", reduce: str = "mean",
) -> list[list[int]]:  # fmt: skip
    """SnapKV: positions each KV head keeps; arguments as for `pooled_votes`, and the slots per KV head."""
    C = pooled_votes(window_attention, n_kv_heads, L_obs, kernel, pooling, reduce)
    return keep_best(C, window_attention.shape[-1], n_slots, 0, L_obs)


def budget_line(n_tokens: int, m: int, k_average: int, alpha: int, beta: int) -> list[Fraction]:
    """PyramidKV: slots of the m layers before rounding, window included; their mean is `k_average`."""
    b = k_average - alpha
    if n_tokens < 2 * b:
        return [Fraction(k_average)] * m
    k_last = b // beta
    k_first = 2 * b - k_last
    if k_first >= n_tokens - alpha:
        k_first = n_tokens - alpha
        k_last = 2 * b - k_first
    return [alpha + k_first - Fraction(k_first - k_last, max(m - 1, 1)) * layer for layer in range(m)]


def reference_knorm(keys: Tensor, n_slots: int, n_recent: int = 0) -> list[list[int]]:
    """Knorm: positions each KV head keeps of `(H_k, T, D)` keys, the recent ones and the others of smallest norm."""
    norms = [[math.sqrt(sum(x * x for x in k)) for k in head] for head in keys.float().tolist()]
    return keep_best([[-norm for norm in head] for head in norms], keys.shape[1], n_slots, 0, n_recent)


def head_budgets(scores: list[list[float]], average: int, alpha: float) -> list[int]:
    """AdaKV: slots of each of the h heads, summing to `h * average`, by the scores of the competing tokens."""
    h, B = len(scores), len(scores) * average
    everyone = [(scores[i][j], j, -i) for i in range(h) for j in range(len(scores[i]))]
    best = sorted(everyone, reverse=True)[:B]  # ties: the more recent token, then the lower head
    B_star = [sum(1 for _, _, minus_head in best if minus_head == -i) for i in range(h)]
    floor = math.floor(alpha * average + 1e-9)
    exact = [floor + Fraction(B_star[i] * (B - h * floor), max(B, 1)) for i in range(h)]
    B_i = [math.floor(x) for x in exact]
    by_remainder = sorted(range(h), key=lambda i: (B_i[i] - exact[i], i))
    for i in by_remainder[: B - sum(B_i)]:
        B_i[i] += 1
    return B_i


def reference_adakv(
    scores: list[list[float]], n_slots: int, n_first: int, n_last: int, alpha: float = 0.2
) -> list[list[int]]:
    """AdaKV: positions each head keeps, `n_slots` on average, protected ones included (their scores are not read)."""
    n_tokens = len(scores[0])
    others = range(n_first, n_tokens - n_last)
    B_i = head_budgets([[head[j] for j in others] for head in scores], n_slots - n_first - n_last, alpha)
    kept = []
    for head, slots in zip(scores, B_i, strict=True):
        best = sorted(((head[j], j) for j in others), reverse=True)[:slots]
        kept.append([*range(n_first), *sorted(j for _, j in best), *range(n_tokens - n_last, n_tokens)])
    return kept
