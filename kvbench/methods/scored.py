"""What methods share that keep the best-scored tokens of every head: one score per key decides, nothing merges.

A subclass says how keys are scored and how many first and last tokens are always kept. Whoever allocates slots
differently (`kvbench.methods.adakv`) takes the scores from here and leaves `compress` aside.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates, Policy
from kvbench.ops.selection import heavy_and_recent


@dataclass(frozen=True, kw_only=True)
class ScoredPolicy(Policy):
    """Keep the protected tokens and those of highest score, per KV head, at their original positions."""

    @property
    def first_tokens(self) -> int:
        """How many of the first tokens are always kept (attention sinks)."""
        return 0

    @property
    def last_tokens(self) -> int:
        """How many of the last tokens are always kept."""
        return 0

    @property
    def minimum_tokens(self) -> int:
        """The protected tokens and one that its score has chosen."""
        return self.first_tokens + self.last_tokens + 1

    @abstractmethod
    def scores(self, layer: LayerStates) -> Tensor:
        """Score every key.

        Args:
            layer: the layer's states; not to be modified.

        Returns:
            `(H_k, T)` fp32, higher is better; entries of protected tokens are not read.
        """

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the best-scored tokens of each KV head (ties: the more recent token); see `Policy.compress`."""
        ranks = protect_first(self.scores(layer), self.first_tokens)
        positions = heavy_and_recent(ranks, budget_tokens - self.last_tokens, self.last_tokens)
        return take_slots(layer, positions)

    def __str__(self) -> str:
        """The method's name and the options that differ from their defaults: how another method's arm names it."""
        options = ",".join(f"{name}={value}" for name, value in sorted(self.options().items()))
        return f"{self.name}({options})" if options else self.name


def protect_first(scores: Tensor, n_first: int) -> Tensor:
    """Copy scores `(H_k, T)` with infinity for the first `n_first` tokens, so that no other token ranks above them."""
    ranks = scores.clone()
    ranks[:, :n_first] = float("inf")
    return ranks


def take_slots(layer: LayerStates, positions: Tensor, lengths: Tensor | None = None) -> CompressedLayer:
    """Copy the keys and values at some positions.

    Args:
        layer: the layer's states.
        positions: `(H_k, m)` int64.
        lengths: `(H_k,)` int64 if heads keep different numbers of slots, else None.

    Returns:
        The kept slots, without bias and state.
    """
    rows = positions.unsqueeze(-1).expand(-1, -1, layer.keys.shape[-1])
    return CompressedLayer(layer.keys.gather(1, rows), layer.values.gather(1, rows), positions, lengths=lengths)
