"""What methods share that keep the best-scored tokens of every head, and, of these, methods that merge the others.

A subclass of `ScoredPolicy` says how keys are scored and how many first and last tokens are always kept. Whoever
allocates slots differently (`kvbench.methods.adakv`) takes the scores from here and leaves `compress` aside.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.errors import ConfigError
from kvbench.methods.base import CompressedLayer, LayerStates, Policy, floor_share
from kvbench.methods.options import Count, Fraction, GroupReduction
from kvbench.ops.selection import heavy_and_recent, largest_of_all, marked_positions, other_positions


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
        """Scores of all keys, `(H_k, T)` fp32, higher is better; entries of protected tokens are not read."""

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the best-scored tokens of each KV head (ties: the more recent token)."""
        ranks = protect_first(self.scores(layer), self.first_tokens)
        return take_slots(layer, heavy_and_recent(ranks, budget_tokens - self.last_tokens, self.last_tokens))

    def __str__(self) -> str:
        """The method's name and the options that differ from their defaults: how another method's arm names it."""
        options = ",".join(f"{name}={value}" for name, value in sorted(self.options().items()))
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True, kw_only=True)
class OverScores(Policy):
    """Another choice of slots by the scores of a method.

    Attributes:
        base: the method whose scores, protected tokens and layer budgets are used, its own `budget` is not: SnapKV
            (the papers), PyramidKV, Knorm, ExpectedAttention or another `ScoredPolicy`, at its own defaults. On the
            command line `method.base._target_=kvbench.methods.knorm.Knorm +method.base.recent_tokens=32`.
    """

    base: ScoredPolicy

    def __post_init__(self) -> None:
        """Validate the options; raises `ConfigError`."""
        if not isinstance(self.base, ScoredPolicy):
            raise ConfigError(
                f"base={self.base!r} scores no keys: give a method of kvbench.methods.scored, e.g. "
                "base._target_=kvbench.methods.snapkv.SnapKV"
            )
        super().__post_init__()

    @property
    def needs(self) -> frozenset[str]:
        """What the base method needs."""
        return self.base.needs

    @property
    def window_tokens(self) -> int:
        """The base method's window."""
        return self.base.window_tokens

    @property
    def minimum_tokens(self) -> int:
        """The base method's minimum."""
        return self.base.minimum_tokens

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """The base method's layer budgets for this budget; over PyramidKV, layers and heads both differ."""
        return dataclasses.replace(self.base, budget=self.budget).layer_budgets(n_tokens, n_layers)


@dataclass(frozen=True, kw_only=True)
class EvictAndMerge(Policy):
    """Evict once at the end of the prompt and merge what was evicted; while decoding the cache grows.

    Kept are the first tokens (sinks), the most recent ones, and the best-scored between. Every evicted token has at
    most one kept token to join; what a joined slot becomes is the method's own.

    Attributes:
        start_tokens: first tokens always kept.
        recent_share: share of the kept slots that holds the most recent tokens.
        merge: false drops the evicted tokens: the eviction base to compare with.
        group_reduce: how the query heads of a KV head share one score: "mean", "max" or "first".
    """

    start_tokens: Count = 4
    recent_share: Fraction = 0.5
    merge: bool = True
    group_reduce: GroupReduction = "mean"

    @property
    def minimum_tokens(self) -> int:
        """The start tokens, a recent one, and one that its score has chosen."""
        return self.start_tokens + 2

    def recent_tokens(self, n_slots: int) -> int:
        """Recent tokens among a layer's slots: the floor of their share, at least 1, leaving one to the scores."""
        return max(1, min(floor_share(self.recent_share, n_slots), n_slots - self.start_tokens - 1))

    @abstractmethod
    def scores(self, layer: LayerStates) -> Tensor:
        """Scores `(H_k, T)` fp32 by which the tokens between start and recent window are kept; higher is better."""

    @abstractmethod
    def merged(self, layer: LayerStates, kept: CompressedLayer, positions: Tensor, evicted: Tensor) -> CompressedLayer:
        """Merge the tokens at `(H_k, T - m)` evicted positions, ascending, into copies of the `(H_k, m)` kept."""

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep, then merge. A budget of T leaves the layer whole."""
        if budget_tokens >= layer.n_tokens:
            return layer.whole()
        recent = self.recent_tokens(budget_tokens)
        ranks = protect_first(self.scores(layer), self.start_tokens)
        positions = heavy_and_recent(ranks, budget_tokens - recent, recent)
        kept = take_slots(layer, positions)
        return self.merged(layer, kept, positions, other_positions(positions, layer.n_tokens)) if self.merge else kept


def protect_first(scores: Tensor, n_first: int) -> Tensor:
    """Copy scores `(H_k, T)` with infinity for the first `n_first` tokens, so that no other token ranks above them."""
    ranks = scores.clone()
    ranks[:, :n_first] = float("inf")
    return ranks


def take_slots(layer: LayerStates, positions: Tensor, lengths: Tensor | None = None) -> CompressedLayer:
    """Copy the keys and values at `(H_k, m)` int64 positions; `lengths` `(H_k,)` if heads keep different numbers."""
    rows = positions.unsqueeze(-1).expand(-1, -1, layer.keys.shape[-1])
    return CompressedLayer(layer.keys.gather(1, rows), layer.values.gather(1, rows), positions, lengths=lengths)


def take_marked(layer: LayerStates, marks: Tensor) -> CompressedLayer:
    """Copy the keys and values that `(H_k, T)` bool marks; heads are ragged."""
    lengths = marks.sum(1)
    return take_slots(layer, marked_positions(marks, int(lengths.max())).clamp_max(layer.n_tokens - 1), lengths)


def allocate_by_scores(scores: Sequence[Tensor], n_slots: int) -> list[int]:
    """Slots of each layer among the best of all layers' `(H_k, T)` scores; ties: recency, then lower layer, head."""
    return largest_of_all(torch.cat(list(scores)), n_slots).sum(1).view(len(scores), -1).sum(1).tolist()


def window_votes(layer: LayerStates, window_tokens: int) -> Tensor:
    """Mean attention of each key from the last queries, `(H, T)` fp32; the prefill may have observed more of them."""
    return layer.observed("window_attention")[:, -window_tokens:].mean(1, dtype=torch.float32)
