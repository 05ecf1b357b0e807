r"""ZSMerge: keep the last and the most attended tokens, and average all others into a few dense slots.

Source: Liu et al., "ZSMerge: Zero-Shot KV Cache Compression for Memory-Efficient Long-Context LLMs" (arXiv 2503.10714);
official code SusCom-Lab/ZSMerge, `mergekv/mergekv.py`, its one-shot part at the end of the prompt. A token's score is
the attention it received, each query counting 0.98 times the next one. What is neither in the tail nor among the best
is cut, in order, into as many blocks of nearly equal size as there are dense slots; a block becomes the plain mean of
its keys and values, and the logarithm of its size, times a scale, is added to its logits. With W observed queries and
a block B,

$$S_j = \sum_{i=T-W+1}^{T} 0.98^{T-i} A_{ij}, \qquad \tilde k = \frac{1}{|B|} \sum_{j \in B} k_j, \qquad
\tilde v = \frac{1}{|B|} \sum_{j \in B} v_j, \qquad \text{bias} = c \log |B|.$$

Deviations: only the last `observation_tokens` queries count (512 leave out weights below 4e-5); query heads of a group
share one score; while decoding the cache grows (there: a token that leaves the tail takes the place of the weakest one,
which joins a dense slot). A dense slot stands at the position of the best-scored token of its block, and without
merging it is that token: with one dense slot exactly the choice of the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvbench.fields import Within
from kvbench.methods.base import CompressedLayer, LayerStates, Policy, floor_share
from kvbench.methods.options import Fraction, GroupReduction, Positive, WithinExcept
from kvbench.methods.scored import take_slots
from kvbench.ops.merging import tokens_at
from kvbench.ops.selection import heavy_and_recent, other_positions


@dataclass(frozen=True, kw_only=True)
class ZSMerge(Policy):
    """Tail, best tokens and dense slots; merges once at the end of the prompt.

    Attributes:
        tail_share: share of the kept slots that holds the most recent tokens, at least one. 0.1 is the official
            default, 0.4 in its scripts.
        dense_slots: slots into which all other tokens are averaged, fewer where the budget is short.
        decay: weight of a query relative to the next one.
        observation_tokens: last prompt queries whose attention counts.
        bias_scale: factor of log(size of the block) on a dense slot's logits; 1 is the official default, 0.6 in its
            scripts.
        merge: false keeps the best-scored token of each block and drops the others: the eviction base.
        group_reduce: how the query heads of a KV head share one score: "mean" (same ranks as the sum), "max" or
            "first".
    """

    tail_share: Fraction = 0.1
    dense_slots: Positive = 1
    decay: Annotated[float, WithinExcept(0, 1)] = 0.98
    observation_tokens: Positive = 512
    bias_scale: Annotated[float, Within(0)] = 1.0
    merge: bool = True
    group_reduce: GroupReduction = "mean"

    name: ClassVar[str] = "zsmerge"
    needs: ClassVar[frozenset[str]] = frozenset({"window_attention"})
    minimum_tokens: ClassVar[int] = 3  # one slot of each kind

    @property
    def window_tokens(self) -> int:
        """The queries that count."""
        return self.observation_tokens

    def split(self, n_slots: int) -> tuple[int, int, int]:
        """Divide a layer's slots into (dense, best, tail)."""
        tail = max(1, min(floor_share(self.tail_share, n_slots), n_slots - 2))
        dense = min(self.dense_slots, n_slots - tail - 1)
        return dense, n_slots - tail - dense, tail

    def scores(self, layer: LayerStates) -> Tensor:
        """Attention from the last queries, weighted by age, `(H_k, T)` fp32."""
        window = layer.observed("window_attention")[:, -self.observation_tokens :]
        ages = torch.arange(window.shape[1] - 1, -1, -1, device=window.device)
        return layer.group_scores((window * (self.decay**ages).unsqueeze(-1)).sum(1), self.group_reduce)

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Choose, then average the rest. A budget of T leaves the layer whole."""
        if budget_tokens >= layer.n_tokens:
            return layer.whole()
        dense, best, tail = self.split(budget_tokens)
        scores = self.scores(layer)
        chosen = heavy_and_recent(scores, best, tail)
        rest = other_positions(chosen, layer.n_tokens)
        size, longer = divmod(rest.shape[1], dense)
        sizes = [size + 1] * longer + [size] * (dense - longer)
        blocks = rest.split(sizes, 1)
        pivots = torch.cat([_best(scores, block) for block in blocks], 1)
        positions, order = torch.cat([pivots, chosen], 1).sort(1)
        kept = take_slots(layer, positions)
        if not self.merge:
            return kept
        at = order.argsort(1)[:, :dense]  # where the dense slots have come to stand
        for states, into in ((layer.keys, kept.keys), (layer.values, kept.values)):
            means = torch.stack([tokens_at(states, block).mean(1) for block in blocks], 1)
            into.scatter_(1, at.unsqueeze(-1).expand_as(means), means.to(into.dtype))
        logarithms = self.bias_scale * torch.tensor(sizes, dtype=torch.float32, device=at.device).log()
        kept.bias = torch.zeros(positions.shape, device=at.device).scatter_(1, at, logarithms.expand_as(at))
        return kept


def _best(scores: Tensor, block: Tensor) -> Tensor:
    """The position of the highest score among `(H_k, n)` ascending ones (ties: the most recent), `(H_k, 1)`."""
    return block.flip(1).gather(1, scores.gather(1, block).flip(1).argmax(1, keepdim=True))
