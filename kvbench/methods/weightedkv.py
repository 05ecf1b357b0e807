r"""WeightedKV: drop the key of a little-attended token and leave its value with the token that follows it.

Source: Yuan et al., "WeightedKV: Attention Scores Weighted Key-Value Cache Merging for Large Language Models" (ICASSP
2025, arXiv 2503.01330); no official code was found. The evicted tokens E between two kept ones
leave their values with the later one, c:

$$\tilde v_c = \frac{a_c v_c + \sum_{j \in E} a_j v_j}{a_c + \sum_{j \in E} a_j}, \qquad
a_j = \frac{1}{T - j + 1} \sum_{i=j}^{T} A_{ij},$$

a being the average attention a token received from the queries that could see it. Keys are never mixed.

Our readings: the paper evicts one token per step of a text; here all evictions happen once, at the end of the prompt,
and long runs of evicted tokens share one slot. Sinks and a recent window are protected, half of the slots each way as
in H2O; the paper's numbers for them are not known to us. Query heads of a group share their mean attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.methods.scored import EvictAndMerge
from kvbench.ops.merging import sum_by_slot, tokens_at


@dataclass(frozen=True, kw_only=True)
class WeightedKV(EvictAndMerge):
    """Values of evicted tokens merge forwards, weighted by average attention; the options are `EvictAndMerge`'s."""

    name: ClassVar[str] = "weightedkv"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})

    def scores(self, layer: LayerStates) -> Tensor:
        """Average attention of each token, above 0."""
        sums = layer.group_scores(layer.observed("column_sums"), self.group_reduce)
        return sums / layer.query_counts + torch.finfo(torch.float32).tiny

    def merged(self, layer: LayerStates, kept: CompressedLayer, positions: Tensor, evicted: Tensor) -> CompressedLayer:
        """Mix the values of evicted tokens into the next kept one."""
        attention = self.scores(layer)
        weights = attention.gather(1, evicted).unsqueeze(-1)
        staying = attention.gather(1, positions).unsqueeze(-1)
        n_slots = kept.keys.shape[1]
        following = torch.searchsorted(positions, evicted)  # the last token is kept, so there is always one
        rows = torch.cat([tokens_at(layer.values, evicted) * weights, weights], -1)
        sums = sum_by_slot(rows, following, n_slots)
        values = (kept.values.float() * staying + sums[..., :-1]) / (staying + sums[..., -1:])
        return CompressedLayer(kept.keys, values.to(kept.values.dtype), positions)
