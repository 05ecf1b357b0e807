"""Methods that merge evicted tokens into kept ones, in plain loops and fp32: D2O, KeepKV and WeightedKV.

Symbols of the papers: e an evicted and c a kept token; D2O's u is the cosine of an evicted key with its nearest kept
key, tau the threshold of recall; KeepKV's p are electoral votes, s the estimated attention of a token, w = p s its
weight in a merge; WeightedKV's abar is the average attention. Every twin takes keys and values `(H_k, T, D)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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


def reference_d2o(
    keys: Tensor, values: Tensor, column_sums: Tensor, n_slots: int, n_start: int = 4, recent_share: float = 0.5
) -> tuple[list[list[int]], Tensor, Tensor]:
    """D2O by `(H_k, T)` summed attention: the positions each head keeps, and keys and values `(H_k, m, D)` there."""
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


def reference_weightedkv(
    values: Tensor, column_sums: Tensor, n_slots: int, n_start: int = 4, recent_share: float = 0.5
) -> tuple[list[list[int]], Tensor]:
    """WeightedKV: the positions each head keeps, and values `(H_k, m, D)` there.

    Every evicted token hands value and weight to its neighbour in the sequence, which hands both on if evicted too.
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


@dataclass
class Slot:
    """One kept token of KeepKV."""

    position: int
    k: Tensor
    v: Tensor
    p: float
    s: float


def reference_keepkv(
    keys: Tensor, values: Tensor, window: Tensor, n_slots: int, *, n_start: int = 4, recent_share: float = 0.5,
    T_sim: float = 0.8, distance_weight: float = 1.2, merge_keys: bool = True, epsilon: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """KeepKV merge by merge: the slot of c has the votes and the s of those that joined before.

    `window` is `(H_k, W, T)`, attention of the last W queries or exp(q.k) not normalised, `T_sim` the threshold of
    similarity, `epsilon` what is added to s. Gives keys `(H_k, m, D)`, values `(H_k, m, D)`, positions `(H_k, m)` and
    biases log p `(H_k, m)`.
    """
    n_kv_heads, W, n_tokens = window.shape
    layer = []
    for h in range(n_kv_heads):
        k, v, rows = keys[h].float(), values[h].float(), window[h].tolist()
        by_distance = [1.0 + (distance_weight - 1.0) * i / max(W - 1, 1) for i in range(W)]
        scores = [sum(by_distance[i] * rows[i][j] for i in range(W)) for j in range(n_tokens)]
        kept, evicted = keep_and_evict(scores, n_slots, n_start, recent_share)
        s = [sum(row[j] for row in rows) / min(W, n_tokens - j) + epsilon for j in range(n_tokens)]
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
    return (
        torch.stack([torch.stack([slot.k for slot in head]) for head in layer]),
        torch.stack([torch.stack([slot.v for slot in head]) for head in layer]),
        torch.tensor([[slot.position for slot in head] for head in layer]),
        torch.tensor([[math.log(slot.p) for slot in head] for head in layer]),
    )
