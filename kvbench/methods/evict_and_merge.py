"""What methods share that evict tokens and merge them into kept ones: who is kept, and sums over those who join a slot.

Kept are the first tokens (sinks), the most recent ones, and the best-scored between. Every evicted token has at most
one kept token to join; what a joined slot becomes is the method's own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates, Policy
from kvbench.methods.options import GROUP_REDUCTIONS, require_bool, require_choice, require_count, require_number
from kvbench.methods.scored import protect_first, take_slots
from kvbench.ops.segments import unit_keys
from kvbench.ops.selection import heavy_and_recent

BLOCK_TOKENS = 1024  # evicted tokens compared with all kept ones at a time: bounds the table of cosines


@dataclass(frozen=True, kw_only=True)
class EvictAndMerge(Policy):
    """Evict once at the end of the prompt and merge what was evicted; while decoding the cache grows.

    Attributes:
        start_tokens: first tokens always kept.
        recent_share: share of the kept slots that holds the most recent tokens.
        merge: false drops the evicted tokens: the eviction base to compare with.
        group_reduce: how the query heads of a KV head share one score: "mean", "max" or "first".
    """

    start_tokens: int = 4
    recent_share: float = 0.5
    merge: bool = True
    group_reduce: str = "mean"

    def __post_init__(self) -> None:
        """Validate the options; raises `ConfigError`."""
        super().__post_init__()
        require_count("start_tokens", self.start_tokens, minimum=0)
        require_number("recent_share", self.recent_share, 0.0, 1.0)
        require_bool("merge", self.merge)
        require_choice("group_reduce", self.group_reduce, GROUP_REDUCTIONS)

    @property
    def minimum_tokens(self) -> int:
        """The start tokens, a recent one, and one that its score has chosen."""
        return self.start_tokens + 2

    def recent_tokens(self, n_slots: int) -> int:
        """Recent tokens among a layer's slots: the floor of their share, at least 1, leaving one to the scores."""
        recent = math.floor(round(self.recent_share * n_slots, 9))
        return max(1, min(recent, n_slots - self.start_tokens - 1))

    @abstractmethod
    def scores(self, layer: LayerStates) -> Tensor:
        """Scores `(H_k, T)` fp32 by which the tokens between start and recent window are kept; higher is better."""

    @abstractmethod
    def merge_evicted(
        self, layer: LayerStates, kept: CompressedLayer, positions: Tensor, evicted: Tensor
    ) -> CompressedLayer:
        """Merge the evicted tokens into the kept slots.

        Args:
            layer: the layer's states; not to be modified.
            kept: the kept slots, copies.
            positions: `(H_k, m)` int64, where they were in the prompt.
            evicted: `(H_k, T - m)` int64, ascending positions of the evicted tokens.

        Returns:
            As many slots as `kept` has, at its positions.
        """

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep, then merge; see `Policy.compress`. A budget of T leaves the layer whole."""
        if budget_tokens >= layer.n_tokens:
            return layer.whole()
        recent = self.recent_tokens(budget_tokens)
        ranks = protect_first(self.scores(layer), self.start_tokens)
        positions = heavy_and_recent(ranks, budget_tokens - recent, recent)
        kept = take_slots(layer, positions)
        return self.merge_evicted(layer, kept, positions, others(positions, layer.n_tokens)) if self.merge else kept


def others(positions: Tensor, n_tokens: int) -> Tensor:
    """Tokens that are not at some positions.

    Args:
        positions: `(H, m)` int64, distinct in each row.
        n_tokens: T.

    Returns:
        `(H, T - m)` int64, ascending.
    """
    tokens = torch.arange(n_tokens, device=positions.device).expand(positions.shape[0], -1)
    marked = tokens.scatter(1, positions, n_tokens)
    return marked.sort(dim=1).values[:, : n_tokens - positions.shape[1]].contiguous()


def tokens_at(states: Tensor, positions: Tensor) -> Tensor:
    """Rows of `(H, T, D)` states at `(H, n)` positions, in fp32."""
    return states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1])).float()


def nearest_kept(keys: Tensor, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
    """For every evicted token, the kept token whose key has the highest cosine.

    Args:
        keys: `(H, T, D)`.
        kept: `(H, m)` int64 positions.
        evicted: `(H, n)` int64 positions.

    Returns:
        The cosines `(H, n)` fp32, and the slots `(H, n)` int64, in 0 .. m - 1.
    """
    units = unit_keys(keys)
    kept_units = tokens_at(units, kept).transpose(1, 2)
    blocks = [(tokens_at(units, block) @ kept_units).max(-1) for block in evicted.split(BLOCK_TOKENS, dim=1)]
    return torch.cat([block.values for block in blocks], 1), torch.cat([block.indices for block in blocks], 1)


def sum_by_slot(rows: Tensor, slots: Tensor, n_slots: int) -> Tensor:
    """Add up the rows that go to the same slot, in token order: no atomics, the same bits on every run.

    Args:
        rows: `(H, n, C)` fp32.
        slots: `(H, n)` int64, in 0 .. m - 1.
        n_slots: m.

    Returns:
        `(H, m, C)` fp32, zeros for slots that no row goes to.
    """
    by_slot = slots.sort(dim=1, stable=True)
    ordered = rows.gather(1, by_slot.indices.unsqueeze(-1).expand_as(rows))
    bounds = torch.arange(n_slots + 1, device=slots.device).expand(slots.shape[0], -1).contiguous()
    offsets = torch.searchsorted(by_slot.values, bounds)
    return torch.segment_reduce(ordered, "sum", offsets=offsets, axis=1, unsafe=True)
