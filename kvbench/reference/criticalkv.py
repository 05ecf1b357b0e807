"""CriticalKV and CriticalAdaKV in loops and fp64, in the paper's symbols: budget b, alpha the first stage's share.

Source: arXiv 2502.03805, algorithm 1; the division among heads is that of CriticalAdaKVPress in NVIDIA/kvpress.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def projected_norms(values: Tensor, W_O: Tensor) -> list[list[float]]:
    """`|v W_O|_1` of `(H_k, T, D)` values, mean over the query heads of a group of `(H, D, hidden)` projections."""
    group = W_O.shape[0] // values.shape[0]
    norms = []
    for h, head in enumerate(values.double()):
        projections = W_O.double()[h * group : (h + 1) * group]
        norms.append([sum(float((v @ W).abs().sum()) for W in projections) / group for v in head])
    return norms


def best(scores: list[float], n: int) -> list[int]:
    """Indices of the n highest scores; ties: the higher index."""
    return sorted(range(len(scores)), key=lambda j: (scores[j], j), reverse=True)[:n]


def two_stages(s: list[float], norms: list[float], b: int, alpha: float, eps: float, certain: set[int]) -> list[int]:
    """Positions that one head keeps, ascending: `certain`, the best by s, then the best by (s + eps) norm."""
    ranked = [math.inf if j in certain else score for j, score in enumerate(s)]
    first = certain | set(best(ranked, max(math.floor(alpha * b + 1e-9), len(certain))))
    second = [math.inf if j in first else (s[j] + eps) * norms[j] for j in range(len(s))]
    return sorted(best(second, b))


def twin(policy: Any, layer: Any, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """What both methods keep, head by head: positions, keys, values, no bias."""
    base, T = policy.base, layer.n_tokens
    s = base.scores(layer).tolist()  # of the base method, which has a twin of its own
    norms = projected_norms(layer.values, layer.extras["output_weight"])
    protected = {*range(base.first_tokens), *range(T - base.last_tokens, T)}
    b, certain = [n_slots] * len(s), [protected] * len(s)
    if policy.name == "critical_adakv":
        n_safe = max(math.floor(policy.floor_share * n_slots + 1e-9), len(protected))
        ranked = [[math.inf if j in protected else score for j, score in enumerate(head)] for head in s]
        certain = [set(best(head, n_safe)) for head in ranked]
        pool = [(math.inf if j in certain[h] else s[h][j], j, -h) for h in range(len(s)) for j in range(T)]
        pooled = sorted(pool, reverse=True)[: n_slots * len(s)]
        b = [sum(1 for *_, minus in pooled if minus == -h) for h in range(len(s))]
    kept = []
    for h, head in enumerate(s):
        options = (policy.first_stage_share, policy.epsilon, certain[h])
        positions = two_stages(head, norms[h], b[h], *options)
        kept.append((positions, layer.keys[h, positions], layer.values[h, positions], None))
    return kept
