"""TOVA token by token, in plain lists and fp32: the yardstick for `kvbench.methods.tova`."""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceTOVA:
    """The multi-state of one layer: tokens (position, keys of all heads, values of all heads), at most `k` of them.

    Args:
        keys: `(H_k, T, D)`.
        values: `(H_k, T, D)`.
        last_row: `(H, T)`, softmax attention of the last prompt query.
        k: size of the multi-state.
        keep_newest: never drop the newest token.
    """

    def __init__(self, keys: Tensor, values: Tensor, last_row: Tensor, k: int, keep_newest: bool = False):
        self.k, self.keep_newest = k, keep_newest
        self.tokens = [(j, keys[:, j], values[:, j]) for j in range(keys.shape[1])]
        self.evict({j: last_row[:, j].tolist() for j in range(keys.shape[1])})

    def evict(self, attention_by_position: dict[int, list[float]]) -> None:
        """Drop the tokens with the lowest mean attention over all query heads until `k` are left."""
        mean = {j: sum(attention_by_position[j]) / len(attention_by_position[j]) for j, _, _ in self.tokens}
        while len(self.tokens) > self.k:
            candidates = self.tokens[:-1] if self.keep_newest else self.tokens
            weakest = min((j for j, _, _ in candidates), key=lambda j: (mean[j], j))
            self.tokens = [token for token in self.tokens if token[0] != weakest]

    def step(self, position: int, k: Tensor, v: Tensor, attention_by_position: dict[int, list[float]]) -> None:
        """Append the new token and evict."""
        self.tokens.append((position, k, v))
        self.evict(attention_by_position)

    def stacked(self) -> tuple[Tensor, Tensor, list[int]]:
        """Keys `(H_k, m, D)`, values `(H_k, m, D)` and positions, in the order of positions."""
        positions, keys, values = zip(*self.tokens, strict=True)
        return torch.stack(keys, 1), torch.stack(values, 1), list(positions)
