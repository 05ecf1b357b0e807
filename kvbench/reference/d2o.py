"""D2O token by token, in plain loops and fp32: the yardstick for `kvbench.methods.d2o`.

Symbols of the paper: u the cosine of an evicted key with its nearest kept key, tau the threshold of recall.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.reference.evict_and_merge import keep_and_evict, most_similar


def reference_d2o(
    keys: Tensor, values: Tensor, column_sums: Tensor, n_slots: int, n_start: int = 4, recent_share: float = 0.5
) -> tuple[list[list[int]], Tensor, Tensor]:
    """Compress one layer.

    Args:
        keys: `(H_k, T, D)`.
        values: `(H_k, T, D)`.
        column_sums: `(H_k, T)`, attention summed over all queries.
        n_slots: slots per head.
        n_start: first tokens kept.
        recent_share: share of the slots for the most recent tokens.

    Returns:
        The positions each head keeps, and the keys and values `(H_k, m, D)` there.
    """
    positions, merged_keys, merged_values = [], [], []
    for h in range(keys.shape[0]):
        k, v = keys[h].float(), values[h].float()
        kept, evicted = keep_and_evict(column_sums[h].tolist(), n_slots, n_start, recent_share)
        nearest = {e: most_similar(k, e, kept) for e in evicted}
        tau = sum(u for _, u in nearest.values()) / len(evicted)
        group_k, group_v = {c: [k[c]] for c in kept}, {c: [v[c]] for c in kept}
        for e, (c, u) in nearest.items():
            if u >= tau:
                group_k[c].append(u * k[e])
                group_v[c].append(u * v[e])
        positions.append(kept)
        merged_keys.append(torch.stack([torch.stack(group_k[c]).mean(0) for c in kept]))
        merged_values.append(torch.stack([torch.stack(group_v[c]).mean(0) for c in kept]))
    return positions, torch.stack(merged_keys), torch.stack(merged_values)
