"""WeightedKV eviction by eviction, in plain loops and fp32: the yardstick for `kvbench.methods.weightedkv`.

Symbols of the paper: abar average attention, v values. Every evicted token hands value and weight to its neighbour in
the sequence, which hands both on if it is evicted too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.reference.evict_and_merge import keep_and_evict


def reference_weightedkv(
    values: Tensor, column_sums: Tensor, n_slots: int, n_start: int = 4, recent_share: float = 0.5
) -> tuple[list[list[int]], Tensor]:
    """Compress one layer.

    Args:
        values: `(H_k, T, D)`.
        column_sums: `(H_k, T)`, attention summed over all queries.
        n_slots: slots per head.
        n_start: first tokens kept.
        recent_share: share of the slots for the most recent tokens.

    Returns:
        The positions each head keeps, and the values `(H_k, m, D)` there.
    """
    n_kv_heads, n_tokens, _ = values.shape
    positions, merged = [], []
    for h in range(n_kv_heads):
        abar = [float(column_sums[h, j]) / (n_tokens - j) for j in range(n_tokens)]
        kept, evicted = keep_and_evict(abar, n_slots, n_start, recent_share)
        v, weight = list(values[h].float()), list(abar)
        for j in evicted:
            v[j + 1] = (weight[j] * v[j] + weight[j + 1] * v[j + 1]) / (weight[j] + weight[j + 1])
            weight[j + 1] += weight[j]
        positions.append(kept)
        merged.append(torch.stack([v[c] for c in kept]))
    return positions, torch.stack(merged)
