"""DefensiveKV and LayerDefensiveKV in plain loops and fp64: R is a token's risk, tau the mass of the first stage.

Source: arXiv 2510.13334 and the authors' `efficient_defensivekv_press.py`, read line by line.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kvbench.reference.criticalkv import best, projected_norms


def pooled_row(row: list[float], kernel: int) -> list[float]:
    """A row averaged over a window of `kernel` tokens, zeros outside it, scaled back to its own sum."""
    half, n = kernel // 2, len(row)
    near = [sum(row[i] for i in range(j - half, j + half + 1) if 0 <= i < n) / kernel for j in range(n)]
    return [x * sum(row) / max(sum(near), 1e-38) for x in near]


def ranks(policy: Any, layer: Any) -> list[list[float]]:
    """Weighed risks of every head's tokens, infinity for the window and the first stage."""
    W, T, H_k = policy.observation_tokens, layer.n_tokens, layer.n_kv_heads
    rows = layer.window_attention[:, -W:, : T - W].double().tolist()
    norms = projected_norms(layer.values, layer.extras["output_weight"])
    group, P = len(rows) // H_k, T - W
    if policy.window_mass == "before":
        inside = sum(sum(row[-W:]) for head in rows for row in head) / (len(rows) * W)
    else:
        inside = 1 - sum(sum(row) for head in rows for row in head) / (len(rows) * W)
    found = []
    for h in range(H_k):
        mine = [row for head in rows[h * group : (h + 1) * group] for row in head]
        pooled = [pooled_row(row, policy.kernel_tokens) for row in mine]
        highest = [max(row[j] for row in pooled) for j in range(P)]
        prior = sum(highest) / P
        mean = [sum(row[j] for row in mine) for j in range(P)]
        order, mass, first = sorted(range(P), key=lambda j: (-mean[j], j)), 0.0, []
        for j in order:
            mass += mean[j] / max(sum(mean), 1e-38)
            if mass >= policy.first_stage_mass - inside:
                break
            first.append(j)
        else:
            first = []  # as there: a mass that is never reached leaves the stage empty
        first = first[: max(0, math.floor(policy.budget * P + 1e-9) - W)]
        shares = [norms[h][j] / max(sum(norms[i][j] for i in range(H_k)), 1e-38) for j in range(P)]
        R = [math.inf if j in first else max(highest[j], prior) * shares[j] for j in range(P)]
        found.append(R + [math.inf] * W)
    return found


def twin(policy: Any, layer: Any, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """What a layer keeps, head by head; `n_slots` of the whole layer if the policy allocates, else per head."""
    return keep_of_all(ranks(policy, layer), layer, n_slots if policy.allocates else n_slots * layer.n_kv_heads)


def keep_of_all(R: list[list[float]], layer: Any, total: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """The best of all heads together; ties: the more recent token, then the lower head."""
    H_k, T = len(R), layer.n_tokens
    by_recency = [R[H_k - 1 - i % H_k][i // H_k] for i in range(H_k * T)]  # later is better in a tie
    kept: list[list[int]] = [[] for _ in R]
    for i in sorted(best(by_recency, total)):
        kept[H_k - 1 - i % H_k].append(i // H_k)
    return [(p, layer.keys[h, p], layer.values[h, p], None) for h, p in enumerate(kept)]
