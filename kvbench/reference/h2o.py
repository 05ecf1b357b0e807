"""H2O token by token, in plain loops and fp32: the yardstick for `kvbench.methods.h2o`.

Symbols of the paper: S_j is the accumulated attention score of key j, A[i, j] the softmax attention of query i. The
cache is a list of entries in the order of their positions, as in the official real_drop code, so it needs no ring
buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Entry:
    """One cached token of one KV head."""

    position: int
    k: Tensor
    v: Tensor
    S: float
    n_queries: int

    def rank(self, normalise_by_count: bool) -> float:
        """Score used for the ranking."""
        return self.S / self.n_queries if normalise_by_count else self.S


def reduce_group(scores: list[float], reduce: str) -> float:
    """One score for the query heads of one KV head."""
    return {"mean": sum(scores) / len(scores), "max": max(scores), "first": scores[0]}[reduce]


class ReferenceH2O:
    """The cache of one layer: built from the prompt, then updated once per new token."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        column_sums: Tensor,
        budget_tokens: int,
        recent_share: float = 0.5,
        normalise_by_count: bool = False,
        group_reduce: str = "mean",
    ):
        n_kv_heads, n_tokens, _ = keys.shape
        self.group = column_sums.shape[0] // n_kv_heads
        self.normalise, self.reduce = normalise_by_count, group_reduce
        self.recent = max(1, math.floor(recent_share * budget_tokens + 1e-9))
        self.heavy = budget_tokens - self.recent
        self.heads: list[list[Entry]] = []
        for h in range(n_kv_heads):
            entries = []
            for j in range(n_tokens):
                S = reduce_group([float(column_sums[h * self.group + g, j]) for g in range(self.group)], group_reduce)
                entries.append(Entry(j, keys[h, j].float(), values[h, j].float(), S, n_tokens - j))
            self.heads.append(self.select(entries))

    def select(self, entries: list[Entry]) -> list[Entry]:
        """Keep the `heavy` best of the older entries (ties: the more recent) and the last `recent`, in order."""
        older, last = entries[: -self.recent], entries[-self.recent :]
        best = sorted(older, key=lambda e: (e.rank(self.normalise), e.position), reverse=True)[: self.heavy]
        return sorted(best, key=lambda e: e.position) + last

    def step(self, h: int, position: int, k: Tensor, v: Tensor, attention_by_position: dict[int, list[float]]) -> None:
        """Append the new token of KV head h, add its attention row to S, evict one entry."""
        entries = [*self.heads[h], Entry(position, k.float(), v.float(), 0.0, 0)]
        for entry in entries:
            entry.S += reduce_group(attention_by_position[entry.position], self.reduce)
            entry.n_queries += 1
        self.heads[h] = self.select(entries)

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `(H_k, m, D)`, values `(H_k, m, D)` and positions `(H_k, m)`, in the order of positions."""
        keys = torch.stack([torch.stack([e.k for e in entries]) for entries in self.heads])
        values = torch.stack([torch.stack([e.v for e in entries]) for entries in self.heads])
        return keys, values, torch.tensor([[e.position for e in entries] for entries in self.heads])
