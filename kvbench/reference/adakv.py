"""AdaKV in plain loops and exact fractions: the yardstick for `kvbench.methods.adakv`.

Symbols of the paper: B the budget of a layer, h heads, alpha the safeguard (the share every head gets for certain),
B_i* the head's count among the layer's best scores, B_i its budget.
"""

from __future__ import annotations

import math
from fractions import Fraction


def head_budgets(scores: list[list[float]], average: int, alpha: float) -> list[int]:
    """Slots for each head, summing to h * average.

    Args:
        scores: scores of the competing tokens per head.
        average: B / h, slots per head.
        alpha: safeguard.
    """
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
    """Positions each head keeps.

    Args:
        scores: scores of all T tokens per head; those of protected tokens are not read.
        n_slots: slots per head on average.
        n_first: first tokens every head keeps.
        n_last: last tokens every head keeps.
        alpha: safeguard.
    """
    n_tokens = len(scores[0])
    others = range(n_first, n_tokens - n_last)
    B_i = head_budgets([[head[j] for j in others] for head in scores], n_slots - n_first - n_last, alpha)
    kept = []
    for head, slots in zip(scores, B_i, strict=True):
        best = sorted(((head[j], j) for j in others), reverse=True)[:slots]
        kept.append([*range(n_first), *sorted(j for _, j in best), *range(n_tokens - n_last, n_tokens)])
    return kept
