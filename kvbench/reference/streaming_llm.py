"""StreamingLLM token by token, in plain lists: the yardstick for `kvbench.methods.streaming_llm`."""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceStreamingLLM:
    """The cache of one layer: tokens (position, keys of all heads, values of all heads) in the order of positions."""

    def __init__(self, keys: Tensor, values: Tensor, budget_tokens: int, start_size: int = 4):
        self.start_size, self.cache_size = start_size, budget_tokens
        self.tokens: list[tuple[int, Tensor, Tensor]] = []
        for j in range(keys.shape[1]):
            self.append(j, keys[:, j], values[:, j])

    def append(self, position: int, k: Tensor, v: Tensor) -> None:
        """Add one token; evict the oldest that is no start token once the cache is full."""
        self.tokens.append((position, k, v))
        if len(self.tokens) > self.cache_size:
            del self.tokens[self.start_size]

    def stacked(self) -> tuple[Tensor, Tensor, list[int]]:
        """Keys `(H_k, m, D)`, values `(H_k, m, D)` and positions, in the order of positions."""
        positions, keys, values = zip(*self.tokens, strict=True)
        return torch.stack(keys, 1), torch.stack(values, 1), list(positions)
