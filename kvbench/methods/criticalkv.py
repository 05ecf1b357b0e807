r"""CriticalKV and CriticalAdaKV: where attention leaves a doubt, keep the tokens whose values change the output.

Source: Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective" (arXiv
2502.03805), algorithm 1; CriticalKVPress and CriticalAdaKVPress of NVIDIA/kvpress. What a token adds to the hidden
states is its attention times its value times the output projection, and the L1 norm of the latter two bounds the error
of leaving it out. A first share of the slots goes by another method's scores s alone, the others, for
a group of G query heads, by

$$S_j = (s_j + \epsilon)\, \frac{1}{G} \sum_{g=1}^{G} \lVert v_j W^g_o \rVert_1.$$

CriticalAdaKV first divides a layer's slots among its heads: the best scores of all heads together are counted, after
each head's own best `floor_share` have been put before all others.

Scores must not be negative, as attention is: with Knorm a large norm would speak against a token (so in kvpress, too).

Deviations: protected tokens of the base method are in the first stage whatever its share (there: SnapKV's window may
lose some of its tokens where the stage is smaller); ties go to the more recent token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates, floor_share
from kvbench.methods.options import AboveZero, Fraction
from kvbench.methods.scored import OverScores, ScoredPolicy, take_marked, take_slots
from kvbench.methods.snapkv import SnapKV
from kvbench.ops.selection import heavy_and_recent, largest_by_recency, largest_of_all

BLOCK_TOKENS = 2048
"""Tokens that are projected at a time: a block of `(tokens, hidden)` is all that is ever held."""
PAPERS_BASE = SnapKV()


@dataclass(frozen=True, kw_only=True)
class CriticalKV(OverScores):
    """Two stages, the second weighed by projected values; one selection at the end of the prompt.

    Attributes:
        first_stage_share: share of the slots that the base method's scores alone decide; 0.5 in the paper.
        epsilon: added to the scores of the second stage.
    """

    base: ScoredPolicy = PAPERS_BASE
    first_stage_share: Fraction = 0.5
    epsilon: AboveZero = 1e-4

    name: ClassVar[str] = "criticalkv"

    @property
    def needs(self) -> frozenset[str]:
        """What the base method needs, and the output projection."""
        return self.base.needs | {"output_weight"}

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the best of both stages in each head."""
        scores = self.protected_scores(layer)
        first = max(floor_share(self.first_stage_share, budget_tokens), self._n_protected)
        ranks = self.second_stage(layer, scores, largest_by_recency(scores, first))
        return take_slots(layer, heavy_and_recent(ranks, budget_tokens, 0))

    @property
    def _n_protected(self) -> int:
        return self.base.first_tokens + self.base.last_tokens

    def protected_scores(self, layer: LayerStates) -> Tensor:
        """The base method's scores `(H_k, T)` fp32, infinity for its protected tokens."""
        scores = self.base.scores(layer).clone()
        scores[:, : self.base.first_tokens] = scores[:, layer.n_tokens - self.base.last_tokens :] = torch.inf
        return scores

    def second_stage(self, layer: LayerStates, scores: Tensor, chosen: Tensor) -> Tensor:
        """Ranks `(H_k, T)`: infinity for what is chosen, weighed scores for the others."""
        return ((scores + self.epsilon) * projected_value_norms(layer)).masked_fill(chosen, torch.inf)


@dataclass(frozen=True, kw_only=True)
class CriticalAdaKV(CriticalKV):
    """CriticalKV in heads that get their slots as in AdaKV, without a remainder.

    Attributes:
        floor_share: share of its average slots that every head gets for certain.
    """

    floor_share: Fraction = 0.2

    name: ClassVar[str] = "critical_adakv"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Divide the slots, then keep the best of both stages; `lengths` sum to `H_k * budget_tokens`."""
        scores = self.protected_scores(layer)
        certain = largest_by_recency(scores, max(floor_share(self.floor_share, budget_tokens), self._n_protected))
        scores = scores.masked_fill(certain, torch.inf)
        slots = largest_of_all(scores, layer.n_kv_heads * budget_tokens).sum(1, keepdim=True)
        first = largest_by_recency(scores, (slots * self.first_stage_share).floor())
        ranks = self.second_stage(layer, scores, first | certain)
        return take_marked(layer, largest_by_recency(ranks, slots))


def projected_value_norms(layer: LayerStates) -> Tensor:
    """L1 norm of every value behind the output projection, `(H_k, T)` fp32, mean over the group's query heads."""
    weight = layer.observed("output_weight").unflatten(0, (layer.n_kv_heads, -1))
    norms = layer.values.new_zeros(layer.values.shape[:2], dtype=torch.float32)
    for head, values in enumerate(layer.values):
        for start in range(0, layer.n_tokens, BLOCK_TOKENS):
            block = values[start : start + BLOCK_TOKENS]
            for projection in weight[head]:
                norms[head, start : start + BLOCK_TOKENS] += (block @ projection).float().abs().sum(-1)
    return norms / layer.group_size
