"""CaM token by token, in plain loops and fp32: the yardstick for `kvbench.methods.cam`.

Symbols of the paper's eq. 14: A_i is the attention accumulated on token i, M_i the Bernoulli mask, m the number of kept
tokens that follow i and take a share of its value v_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Entry:
    """One cached token of one KV head."""

    position: int
    k: Tensor
    v: Tensor
    A: float


class ReferenceCaM:
    """The cache of one layer: first and most recent tokens of the prompt, then updated once per new token."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        column_sums: Tensor,
        budget_tokens: int,
        start_share: float = 0.5,
        merge_tokens: int = 32,
        merge: bool = True,
    ):
        n_kv_heads, n_tokens, _ = keys.shape
        self.group = column_sums.shape[0] // n_kv_heads
        self.merge_tokens, self.merge = merge_tokens, merge
        self.start = min(budget_tokens - 1, math.floor(start_share * budget_tokens + 1e-9))
        self.recent = budget_tokens - self.start
        self.heads: list[list[Entry]] = []
        for h in range(n_kv_heads):
            entries = []
            for j in range(n_tokens):
                if self.start <= j < n_tokens - self.recent:
                    continue
                A = sum(float(column_sums[h * self.group + g, j]) for g in range(self.group)) / self.group
                entries.append(Entry(j, keys[h, j].float(), values[h, j].float(), A))
            self.heads.append(entries)

    def step(
        self,
        h: int,
        position: int,
        k: Tensor,
        v: Tensor,
        attention_by_position: dict[int, list[float]],
        draw: Callable[[], float],
    ) -> bool:
        """Append the new token of KV head h, add its attention row to A, drop the oldest recent token.

        Args:
            h: KV head.
            position: position of the new token.
            k: its key `(D,)`.
            v: its value `(D,)`.
            attention_by_position: for every cached position, the new token's attention in each query head of the group.
            draw: gives a uniform number in [0, 1).

        Returns:
            Whether the dropped token's value was merged.
        """
        entries = [*self.heads[h], Entry(position, k.float(), v.float(), 0.0)]
        for entry in entries:
            row = attention_by_position[entry.position]
            entry.A += sum(row) / len(row)
        dropped = entries.pop(self.start)
        self.heads[h] = entries
        if not self.merge:
            return False
        targets = entries[self.start : self.start + self.merge_tokens]
        m = len(targets)
        mean_A = sum(t.A for t in targets) / m
        probability = min(max(dropped.A / mean_A, 0.0), 1.0) if mean_A > 0 else float(dropped.A > 0)
        M = draw() < probability
        if M:
            for target in targets:
                target.v = target.v + dropped.v / m
        return M

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `(H_k, m, D)`, values `(H_k, m, D)` and positions `(H_k, m)`, in the order of positions."""
        keys = torch.stack([torch.stack([e.k for e in entries]) for entries in self.heads])
        values = torch.stack([torch.stack([e.v for e in entries]) for entries in self.heads])
        return keys, values, torch.tensor([[e.position for e in entries] for entries in self.heads])
