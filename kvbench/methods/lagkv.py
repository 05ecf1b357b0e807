r"""LagKV: score a token by how much its channels differ once they are scaled to the range of the tokens that follow.

Source: Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important" (arXiv
2504.04704); LagKVPress of NVIDIA/kvpress. After the sinks the prompt is cut into partitions of equal length. Keys of a
partition are scaled, channel by channel, to the minimum and maximum of the next one; a token's standard deviation over
its scaled channels, by a softmax over its partition, is half of its score, and the same of values the other half. With
low and high the extremes of the next partition, channel by channel,

$$\hat k_j = \frac{k_j - k^{low}}{k^{high} - k^{low}}, \qquad
S_j = \frac{1}{2} \operatorname{softmax}_j(\operatorname{std}(\hat k_j))
+ \frac{1}{2} \operatorname{softmax}_j(\operatorname{std}(\hat v_j)).$$

The last whole partition has nothing to be scaled to: it is kept, with what is left over after it.

Scores become ranks within the partition, so that every partition keeps nearly the same number; on equal ranks the more
recent partition wins (kvpress leaves that open). Prompts of less than two partitions keep the most recent tokens, as
there. Our guard: a channel that does not vary in the next partition counts as one of range 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvbench.fields import Within
from kvbench.methods.base import LayerStates
from kvbench.methods.options import Count
from kvbench.methods.scored import ScoredPolicy

LEAST_RANGE = 1e-6


@dataclass(frozen=True, kw_only=True)
class LagKV(ScoredPolicy):
    """Tokens that stand out against the next partition; one selection at the end of the prompt.

    Attributes:
        start_tokens: first tokens that are always kept.
        lag_tokens: tokens of a partition, at least 2. 128 in the paper and in kvpress.
        cross_scoring: compare the scores of all partitions themselves instead of their ranks; over ranks all heads are
            alike, so `adakv` on this base needs it.
    """

    start_tokens: Count = 4
    lag_tokens: Annotated[int, Within(2)] = 128
    cross_scoring: bool = False

    name: ClassVar[str] = "lagkv"

    @property
    def first_tokens(self) -> int:
        """The sinks."""
        return self.start_tokens

    def scores(self, layer: LayerStates) -> Tensor:
        """Ranks from 0 to below 1 (or scores), `(H_k, T)` fp32; 1 for sinks, last partition and what follows it."""
        n_partitions = (layer.n_tokens - self.start_tokens) // self.lag_tokens
        scores = torch.ones(layer.keys.shape[:2], device=layer.keys.device)
        if n_partitions < 2:
            return scores
        scored = slice(self.start_tokens, self.start_tokens + (n_partitions - 1) * self.lag_tokens)
        found = (self._spreads(layer.keys, n_partitions) + self._spreads(layer.values, n_partitions)) / 2
        if not self.cross_scoring:
            order = found.sort(dim=-1, stable=True).indices
            ranks = torch.arange(self.lag_tokens, device=scores.device).float() / self.lag_tokens
            found = torch.empty_like(found).scatter_(-1, order, ranks.expand_as(found))
        scores[:, scored] = found.flatten(1)
        return scores

    def _spreads(self, states: Tensor, n_partitions: int) -> Tensor:
        """Softmax of the standard deviations in each partition but the last, `(H_k, n_partitions - 1, lag)` fp32."""
        end = self.start_tokens + n_partitions * self.lag_tokens
        parts = states[:, self.start_tokens : end].float().unflatten(1, (n_partitions, self.lag_tokens))
        low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
        scaled = (parts[:, :-1] - low) / (high - low).clamp_min(LEAST_RANGE)
        return scaled.std(-1).softmax(-1)
