r"""AdaKV: divide a layer's slots among its heads by where the high scores are, whatever scores the keys.

Source: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference"
(NeurIPS 2025, arXiv 2407.11550), algorithm 1 and its safeguard; official code FFY0/AdaKV. The scores of all heads of a
layer are pooled, and the best H_k b of them counted per head: c_h. A head keeps its own best

$$b_h = \alpha b + (1 - \alpha)\, c_h, \qquad \sum_h c_h = H_k b, \qquad \alpha = \mathtt{floor\_share}$$

tokens, and heads become ragged.

Deviations: the official code rounds every head's number, so that the total may be off by a few; here the remainders
decide (largest first, ties: the lower head), and the total is exact. Its `normalize` switch is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates, floor_share
from kvbench.methods.options import Fraction
from kvbench.methods.scored import OverScores, ScoredPolicy, protect_first, take_marked
from kvbench.methods.snapkv import SnapKV
from kvbench.ops.selection import largest_by_recency, largest_of_all

PAPERS_BASE = SnapKV()


@dataclass(frozen=True, kw_only=True)
class AdaKV(OverScores):
    """Ragged heads over the scores of another method; one selection at the end of the prompt.

    Attributes:
        floor_share: share of its average slots that every head gets for certain; 1 is the base method. The authors
            recommend 0.2 with grouped-query attention.
    """

    base: ScoredPolicy = PAPERS_BASE
    floor_share: Fraction = 0.2

    name: ClassVar[str] = "adakv"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep each head's best, in the order of positions; `lengths` sum to `H_k * budget_tokens`."""
        first, last = self.base.first_tokens, self.base.last_tokens
        n_tokens = layer.n_tokens
        scores = self.base.scores(layer)
        lengths = first + last + self.head_slots(scores[:, first : n_tokens - last], budget_tokens - first - last)
        kept = torch.ones_like(scores, dtype=torch.bool)
        older = protect_first(scores, first)[:, : n_tokens - last]
        kept[:, : n_tokens - last] = largest_by_recency(older, lengths.unsqueeze(1) - last)
        return take_marked(layer, kept)

    def head_slots(self, scores: Tensor, average: int) -> Tensor:
        """Divide `H_k * average` slots among heads by `(H_k, n)` scores of competing tokens; `(H_k,)` int64, <= n."""
        n_heads = scores.shape[0]
        total = n_heads * average
        floor = floor_share(self.floor_share, average)
        counts = largest_of_all(scores, total).sum(1)
        shares = counts * (total - n_heads * floor)  # times 1 / total, in integers
        slots = shares // max(total, 1)
        left = total - n_heads * floor - slots.sum()
        order = shares.remainder(max(total, 1)).sort(descending=True, stable=True).indices
        slots[order] += torch.arange(n_heads, device=scores.device) < left
        return floor + slots
