"""KeepKV merge by merge, in plain loops and fp32: the yardstick for `kvbench.methods.keepkv`.

Symbols of the paper: p electoral votes, s estimated attention of a token, w = p s its weight in a merge, e the evicted
and c the kept token. Merges follow one another: the slot of c has the votes and the s of those that joined before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.reference.evict_and_merge import keep_and_evict, most_similar


@dataclass
class Slot:
    """One kept token."""

    position: int
    k: Tensor
    v: Tensor
    p: float
    s: float


def reference_keepkv(
    keys: Tensor,
    values: Tensor,
    window: Tensor,
    n_slots: int,
    *,
    n_start: int = 4,
    recent_share: float = 0.5,
    T_sim: float = 0.8,
    distance_weight: float = 1.2,
    merge_keys: bool = True,
) -> list[list[Slot]]:
    """Compress one layer.

    Args:
        keys: `(H_k, T, D)`.
        values: `(H_k, T, D)`.
        window: `(H_k, W, T)`, attention of the last W queries, one row per KV head.
        n_slots: slots per head.
        n_start: first tokens kept.
        recent_share: share of the slots for the most recent tokens.
        T_sim: similarity threshold.
        distance_weight: weight of the last query in the scores.
        merge_keys: whether keys are mixed.
    """
    n_kv_heads, W, n_tokens = window.shape
    layer = []
    for h in range(n_kv_heads):
        k, v, rows = keys[h].float(), values[h].float(), window[h].tolist()
        by_distance = [1.0 + (distance_weight - 1.0) * i / max(W - 1, 1) for i in range(W)]
        scores = [sum(by_distance[i] * rows[i][j] for i in range(W)) for j in range(n_tokens)]
        kept, evicted = keep_and_evict(scores, n_slots, n_start, recent_share)
        s = [sum(row[j] for row in rows) / min(W, n_tokens - j) for j in range(n_tokens)]
        slots = {c: Slot(c, k[c], v[c], 1.0, s[c]) for c in kept}
        for e in evicted:
            c, similarity = most_similar(k, e, kept)
            if similarity < T_sim:
                continue
            slot = slots[c]
            w_e, w_c = s[e], slot.p * slot.s
            slot.v = (w_e * v[e] + w_c * slot.v) / (w_e + w_c)
            if merge_keys:
                slot.k = (w_e * k[e] + w_c * slot.k) / (w_e + w_c)
            slot.p += 1.0
            slot.s = (w_e + w_c) / slot.p
        layer.append([slots[c] for c in kept])
    return layer


def stacked(layer: list[list[Slot]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys `(H_k, m, D)`, values `(H_k, m, D)`, positions `(H_k, m)` and biases log p `(H_k, m)`."""
    return (
        torch.stack([torch.stack([slot.k for slot in head]) for head in layer]),
        torch.stack([torch.stack([slot.v for slot in head]) for head in layer]),
        torch.tensor([[slot.position for slot in head] for head in layer]),
        torch.tensor([[math.log(slot.p) for slot in head] for head in layer]),
    )
