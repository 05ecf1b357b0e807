r"""H2O, the heavy-hitter oracle: keep the tokens that attracted most attention, and the most recent ones.

Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (NeurIPS
2023). The official code holds four variants that differ; this is the one that really drops
(FMInference/H2O, `h2o_hf/utils_real_drop/modify_llama.py`): one selection at the end of the prompt, then one eviction
after each new token, at original positions. Three deliberate deviations: scores are summed in fp32 (there: fp16), sizes
are shares of the budget (there: absolute numbers), and selection is per KV head with a choice of reduction over its
query heads (there: no grouped-query attention; the authors' later version in llama-recipes takes the first query
head). With A the attention of the prompt's T queries, a key's score is

$$S_j = \sum_{i=j}^{T} A_{ij}.$$
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, DecodeSlots, LayerStates, Policy, floor_share, reduce_groups
from kvbench.methods.options import Fraction, GroupReduction
from kvbench.ops.selection import heavy_and_recent, keep_slots
from kvbench.ops.steps import RowsStepper


@dataclass
class H2OState:
    """Attention mass of each slot over all queries so far, `(H_k, m)` fp32, and with counts how many queries saw it."""

    scores: Tensor
    counts: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Heavy hitters plus a recent window, of constant size while decoding.

    Slots are ordered [heavy, recent], prompt positions ascending in both. While decoding, the recent slots are a ring:
    the token that leaves the window before new token `step_index` is in ring slot `step_index mod recent`.

    Attributes:
        recent_share: share of the kept slots that holds the most recent tokens; the rest holds heavy hitters. Half and
            half is the official setting (heavy_ratio = recent_ratio = 0.1 of the prompt). At 0 there is no window: a
            new token has to win against the weakest heavy hitter at once.
        normalise_by_count: divide each score by the number of queries that could see its key (the flavour of kvpress'
            ObservedAttention); H2O itself ranks by the plain sum, which favours early tokens.
        group_reduce: how the query heads of a KV head share one score: "mean" (same ranks as the sum), "max" or
            "first".
    """

    recent_share: Fraction = 0.5
    normalise_by_count: bool = False
    group_reduce: GroupReduction = "mean"

    name: ClassVar[str] = "h2o"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})
    steps: ClassVar[bool] = True
    minimum_tokens: ClassVar[int] = 4  # below that, one of the halves holds a single token

    def split(self, n_slots: int) -> tuple[int, int]:
        """Divide a layer's slots into (heavy, recent); recent is the floor of its share, at least 1 (0 of 0)."""
        recent = max(1, floor_share(self.recent_share, n_slots)) if self.recent_share else 0
        return n_slots - recent, recent

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the heavy hitters among the older tokens and the recent window."""
        scores = layer.group_scores(layer.observed("column_sums"), self.group_reduce)
        ranks = scores / layer.query_counts if self.normalise_by_count else scores
        positions = heavy_and_recent(ranks, *self.split(budget_tokens), layer.kernels)
        keys, values, kept_scores = keep_slots(layer.keys, layer.values, scores, positions, layer.kernels)
        counts = (layer.n_tokens - positions).float() if self.normalise_by_count else None
        return CompressedLayer(keys, values, positions, state=H2OState(kept_scores, counts))

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        """Count the new token's attention, then evict the weakest of the heavy slots and the token leaving the window.

        The leaving token wins a tie (it is the more recent one); among heavy slots the first of equals goes. Device
        operations only: nothing is read back to the host.
        """
        heavy, recent = self.split(slots.n_slots)
        scores = slots.state.scores
        scores += reduce_groups(attention, slots.keys.shape[0], self.group_reduce)
        ranks = scores
        if self.normalise_by_count:
            slots.state.counts += 1.0
            ranks = scores / slots.state.counts
        leaving = (heavy + slots.step_index.remainder(max(recent, 1))).reshape(1)  # without a window the new token
        if heavy:
            weakest = ranks[:, :heavy].min(dim=1, keepdim=True)
            wins = ranks.index_select(1, leaving) >= weakest.values
            target = torch.where(wins, weakest.indices, leaving)  # a loser moves onto itself and is overwritten below
            for tensor in slots.per_slot:
                index = target.reshape(target.shape + (1,) * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
                tensor.scatter_(1, index, tensor.index_select(1, leaving))
        slots.move_new_token(leaving)

    @classmethod
    def rows_stepper(cls) -> type[RowsStepper]:
        """One launch for all rows, options differing from row to row included."""
        from kvbench.ops.steps_triton import H2ORowsStepper  # imports triton, which a CPU may lack

        return H2ORowsStepper
