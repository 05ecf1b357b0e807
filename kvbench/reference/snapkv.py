"""SnapKV in plain loops and fp32: the yardstick for `kvbench.methods.snapkv` and of methods that build on its votes.

Symbols of the paper: W the attention weights of the observation window (its last L_obs queries), C the votes per key of
the prefix (its first L_prefix keys).
"""

from __future__ import annotations

from torch import Tensor


def pooled_votes(
    window_attention: Tensor, n_kv_heads: int, L_obs: int, kernel: int = 7, pooling: str = "max", reduce: str = "mean"
) -> list[list[float]]:
    """Votes for each key of the prefix, pooled, per KV head.

    Args:
        window_attention: `(H, L, T)`, softmax rows of the last L >= L_obs queries.
        n_kv_heads: H_k.
        L_obs: queries that vote.
        kernel: width of the pooling.
        pooling: "max" or "avg".
        reduce: "mean", "max" or "first" over the query heads of a KV head.
    """
    n_query_heads, n_rows, n_tokens = window_attention.shape
    group, L_prefix = n_query_heads // n_kv_heads, n_tokens - L_obs
    rows = window_attention.float().tolist()
    pooled = []
    for h in range(n_kv_heads):
        C = []
        for j in range(L_prefix):
            votes = [sum(rows[h * group + g][i][j] for i in range(n_rows - L_obs, n_rows)) for g in range(group)]
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
    window_attention: Tensor,
    n_kv_heads: int,
    n_slots: int,
    L_obs: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    reduce: str = "mean",
) -> list[list[int]]:
    """Positions each KV head keeps; arguments as for `pooled_votes`, and the slots per KV head."""
    C = pooled_votes(window_attention, n_kv_heads, L_obs, kernel, pooling, reduce)
    return keep_best(C, window_attention.shape[-1], n_slots, 0, L_obs)
