"""KVMerger Plus: what works best in our own trials; keep by two opinions, then let the kept slots absorb the rest.

No paper describes this choice of slots; `docs/findings.md` has the trials behind it, and those that failed. Its parts:

1. A quarter of the slots goes to the last tokens. Of the others a third goes to what the question asks for: votes of
   the prompt's last few queries, pooled along the tokens so that a chosen token brings its neighbours (SnapKV, arXiv
   2404.14469, with a narrower window and a wider kernel).
2. The others go to what the text needs to go on: the mean attention a key received, once over all queries that could
   see it and once over the last few hundred (H2O, arXiv 2306.14048, without its favour for early tokens).
3. Dropped tokens are not averaged into neighbours as in KVMerger (arXiv 2407.08454). Instead the kept values, and on
   request a bias, are refitted until the last queries get the output they had (`kvbench.ops.refit`). That is the value
   update of GRKV (arXiv 2605.31105), with other queries (there 32 of the whole prompt), a relative ridge (0.01
   absolute), all slots (there the best and the last are fixed) and no cap (0.1 of the values' norm).

It fires once, at the end of the prompt; while decoding the cache grows. Keys are never changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvbench.methods.base import CompressedLayer, LayerStates, Policy, floor_share
from kvbench.methods.options import AboveZero, Fraction, GroupReduction, Positive, Width
from kvbench.methods.scored import take_slots
from kvbench.ops.refit import kept_mass, refit_bias, refit_values
from kvbench.ops.selection import largest_by_recency, marked_positions


@dataclass(frozen=True, kw_only=True)
class KVMergerPlus(Policy):
    """Keep what question and text look at, and refit the kept values to the attention of the last queries.

    Attributes:
        recent_share: share of the kept slots that holds the most recent tokens, at least one.
        question_share: share of the other slots that the question's votes fill; attention to the text fills the rest.
        question_queries: last prompt queries that vote. A question is short: wider windows let the text before it
            outvote it.
        kernel_tokens: width of the pooling of those votes, odd; 1 does not pool. An answer is several tokens long and
            stands next to the words that the question repeats.
        text_queries: last prompt queries whose mean attention is one half of the text's score.
        refit: "values" (same bytes as eviction), "both" values and a bias (4 bytes more a slot), or "none".
        refit_queries: last prompt queries to which slots are refitted.
        ridge: how much corrections are shrunk, in units of a query's mean squared attention.
        group_reduce: how the query heads of a KV head share one score: "mean", "max" or "first".
    """

    recent_share: Fraction = 0.25
    question_share: Fraction = 0.33
    question_queries: Positive = 16
    kernel_tokens: Width = 13
    text_queries: Positive = 256
    refit: Literal["values", "both", "none"] = "values"
    refit_queries: Positive = 64
    ridge: AboveZero = 0.03
    group_reduce: GroupReduction = "mean"

    name: ClassVar[str] = "kvmerger_plus"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums", "window_attention"})
    minimum_tokens: ClassVar[int] = 4  # below that, one of the three parts may hold nothing

    @property
    def window_tokens(self) -> int:
        """The widest of the three windows."""
        return max(self.question_queries, self.text_queries, self.refit_queries)

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Choose slots and refit them; with a bias if `refit` is "both". A budget of T leaves the layer whole."""
        if budget_tokens >= layer.n_tokens:
            return layer.whole()
        positions = self.positions(layer, budget_tokens)
        kept = take_slots(layer, positions)
        if self.refit == "none":
            return kept
        window = layer.observed("window_attention")[:, -self.refit_queries :]
        rows = window.unflatten(0, (layer.n_kv_heads, -1)).flatten(1, 2)
        mass = kept_mass(rows, positions)
        kept.bias = refit_bias(mass, self.ridge) if self.refit == "both" else None
        kept.values = refit_values(rows, mass, layer.values, kept.values, kept.bias, self.ridge)
        return kept

    def positions(self, layer: LayerStates, budget_tokens: int) -> Tensor:
        """Choose the tokens to keep (ties: the more recent token), `(H_k, budget_tokens)` int64, ascending."""
        recent, n_question = self.split(budget_tokens)
        older = layer.n_tokens - recent
        votes = self.mean_attention(layer, self.question_queries)[:, :older]
        votes = max_pool1d(votes, self.kernel_tokens, stride=1, padding=self.kernel_tokens // 2)
        asked = largest_by_recency(votes, n_question)
        told = self.text_scores(layer)[:, :older].masked_fill(asked, -math.inf)
        kept = torch.ones(layer.n_kv_heads, layer.n_tokens, dtype=torch.bool, device=layer.keys.device)
        kept[:, :older] = asked | largest_by_recency(told, budget_tokens - recent - n_question)
        return marked_positions(kept, budget_tokens)

    def split(self, n_slots: int) -> tuple[int, int]:
        """How many of a layer's slots hold recent tokens, and how many follow the question."""
        recent = max(1, floor_share(self.recent_share, n_slots))
        return recent, floor_share(self.question_share, n_slots - recent)

    def mean_attention(self, layer: LayerStates, n_queries: int) -> Tensor:
        """Mean attention each key receives from the last queries, `(H_k, T)` fp32."""
        return layer.group_scores(layer.observed("window_attention")[:, -n_queries:].mean(1), self.group_reduce)

    def text_scores(self, layer: LayerStates) -> Tensor:
        """Mean attention over the queries that could see a key and over the last ones, averaged, `(H_k, T)` fp32."""
        seen = layer.group_scores(layer.observed("column_sums"), self.group_reduce) / layer.query_counts
        return 0.5 * (seen + self.mean_attention(layer, self.text_queries))
