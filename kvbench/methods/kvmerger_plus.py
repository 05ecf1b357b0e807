r"""KVMerger Plus: whole memories for the heads that use them, and kept values that absorb what was dropped.

No paper describes this method; `docs/findings.md` has the trials behind it, and those that failed. Its parts:

1. **Heads are not alike.** Some attend to a place near by or to the first tokens whatever is asked, others may attend
   anywhere (as in DuoAttention, Xiao et al., arXiv 2410.10819, which learns which are which beforehand). Queries q_i
   from all over the prompt, turned to its end so that they see every key, tell them apart: the reach of token j,

   $$r_j = \max\left(\max_i A_{ij}, \frac{1}{T} \sum_t \max_i A_{it}\right),
   \qquad A = \operatorname{softmax}(q K^\top),$$

   is the most that any of them, in any query head of the group, attends to it, and at least the head's mean. The tokens
   of all heads and layers compete for the slots by reach; every head gets a share of the average for certain.
2. A head's slots hold the last tokens; of the others a part goes to what the question attends to (the highest attention
   of the last few queries, pooled along the tokens, so that a chosen token brings its neighbours: SnapKV, arXiv
   2404.14469, with a narrower window and a wider kernel), a part to what has the longest reach (DefensiveKV, arXiv
   2510.13334, takes maxima, too, over the last queries), and the rest to what the text goes on with: the mean attention
   by all queries that could see a token (H2O, arXiv 2306.14048, without its favour for early tokens) and by the last.
3. Dropped tokens are not averaged into neighbours as in KVMerger (arXiv 2407.08454). Instead the kept values, and on
   request a bias, are refitted until some queries, the last ones and a few from all over the prompt, get the output
   they had (`kvbench.ops.refit`). With P their attention on the kept slots and o their output over all tokens,

   $$\tilde V = V + \operatorname{argmin}_X \lVert (o - P V) - P X \rVert^2 + \lambda \lVert X \rVert^2.$$

   That is the value update of GRKV (arXiv 2605.31105), with other queries (there 32 of the whole prompt), a relative
   ridge (0.01 absolute), all slots (there the best and the last are fixed) and no cap (0.1 of the values' norm).

It fires once, at the end of the prompt; while decoding the cache grows. Keys are never changed. The first edition (all
heads alike, a quarter of the slots for the last tokens) is in `docs/findings.md`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvbench.methods.base import CompressedLayer, LayerStates, Policy, floor_share
from kvbench.methods.expected_attention import turn
from kvbench.methods.options import AboveZero, Count, Fraction, GroupReduction, Positive, Width
from kvbench.methods.scored import allocate_by_scores, take_marked
from kvbench.ops.refit import attend, kept_mass, refit_bias, refit_values
from kvbench.ops.selection import largest_by_recency, largest_of_all


@dataclass(frozen=True, kw_only=True)
class KVMergerPlus(Policy):
    """Give slots to heads that reach far, fill them with what question and text attend to, and refit their values.

    Attributes:
        floor_share: share of the average slots that every head gets for certain.
        reach_queries: queries from all over the prompt, the middles of as many equal parts.
        recent_tokens: last tokens always kept, in at most half of a head's slots.
        question_share: share of a head's other slots that the question fills.
        question_queries: last prompt queries that count as the question. It is short: wider windows let the text before
            it outvote it.
        kernel_tokens: width of the pooling of their attention, odd; 1 does not pool. An answer is several tokens long
            and stands next to the words that the question repeats.
        reach_share: share that the tokens of longest reach fill; mean attention fills the rest.
        text_queries: last prompt queries whose mean attention is one half of the text's score.
        refit: "values" (same bytes as eviction), "both" values and a bias (4 bytes more a slot), or "none".
        refit_queries: last prompt queries to which slots are refitted, beside a quarter of the reach queries.
        ridge: how much corrections are shrunk, in units of a query's mean squared attention.
        group_reduce: how the query heads of a KV head share one score: "mean", "max" or "first".
    """

    floor_share: Fraction = 0.5
    reach_queries: Positive = 128
    recent_tokens: Count = 32
    question_share: Fraction = 0.25
    question_queries: Positive = 16
    kernel_tokens: Width = 13
    reach_share: Fraction = 0.35
    text_queries: Positive = 256
    refit: Literal["values", "both", "none"] = "values"
    refit_queries: Positive = 64
    ridge: AboveZero = 0.03
    group_reduce: GroupReduction = "mean"

    name: ClassVar[str] = "kvmerger_plus"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums", "queries", "rotary_frequencies"})
    allocates: ClassVar[bool] = True
    minimum_tokens: ClassVar[int] = 4  # below that, one of the parts of a head may hold nothing

    def preference(self, layer: LayerStates) -> Tensor:
        """Reach `(H_k, T)` fp32, infinity for the tokens with which a head's certain slots are counted."""
        reach = self.reach(self.reaching_rows(layer))
        certain = largest_by_recency(reach, max(1, floor_share(self.floor_share, self.budget_tokens(layer.n_tokens))))
        return reach.masked_fill(certain, math.inf)

    def allocate(self, preferences: Sequence[Tensor], n_tokens: int, n_kv_heads: int) -> list[int]:
        """How many of the tokens of longest reach lie in each layer."""
        return allocate_by_scores(preferences, len(preferences) * n_kv_heads * self.budget_tokens(n_tokens))

    def without_merging(self) -> Policy | None:
        """The slots as they were chosen, nothing refitted."""
        return None if self.refit == "none" else dataclasses.replace(self, refit="none")

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Choose slots and refit them; with a bias if `refit` is "both". A layer that keeps all is left whole."""
        if budget_tokens >= layer.n_tokens * layer.n_kv_heads:
            return layer.whole()
        reaching, last = self.reaching_rows(layer), self.last_rows(layer)
        kept = take_marked(layer, self.marks(layer, budget_tokens, reaching, last))
        if self.refit == "none":
            return kept
        assert kept.positions is not None
        assert kept.lengths is not None
        rows = torch.cat([last[:, :, -self.refit_queries :], reaching[:, :, 1::4]], dim=2).flatten(1, 2)
        padding = torch.arange(kept.positions.shape[1], device=rows.device) >= kept.lengths.unsqueeze(1)
        mass = kept_mass(rows, kept.positions).masked_fill(padding.unsqueeze(1), 0.0)
        kept.bias = refit_bias(mass, self.ridge) if self.refit == "both" else None
        kept.values = refit_values(rows, mass, layer.values, kept.values, kept.bias, self.ridge)
        return kept

    def marks(self, layer: LayerStates, n_slots: int, reaching: Tensor, last: Tensor) -> Tensor:
        """Mark the tokens to keep (ties: the more recent token), `(H_k, T)` bool, `n_slots` in all."""
        n_tokens = layer.n_tokens
        reach = self.reach(reaching)
        certain = largest_by_recency(reach, max(1, floor_share(self.floor_share, self.budget_tokens(n_tokens))))
        slots = largest_of_all(reach.masked_fill(certain, math.inf), n_slots).sum(1, keepdim=True)
        recent = (slots // 2).clamp_max(self.recent_tokens)
        chosen = torch.arange(n_tokens, device=slots.device) >= n_tokens - recent
        parts = (
            (self.votes(layer, last), self.question_share),
            (reach, self.reach_share),
            (self.text(layer, last), 1.0),
        )
        for scores, share in parts:
            left = slots - chosen.sum(1, keepdim=True)
            count = (share * (slots - recent).double() + 1e-9).floor().long().minimum(left)
            chosen = chosen | largest_by_recency(scores.masked_fill(chosen, -math.inf), count)
        return chosen

    def reach(self, reaching: Tensor) -> Tensor:
        """The most attention a token gets from any row of `(H_k, G, N, T)`, at least the head's mean, `(H_k, T)`."""
        most = reaching.amax((1, 2))
        return most.maximum(most.mean(1, keepdim=True))

    def votes(self, layer: LayerStates, last: Tensor) -> Tensor:
        """The question's highest attention, pooled along the tokens, `(H_k, T)` fp32."""
        votes = last[:, :, -self.question_queries :].amax(2).flatten(0, 1)
        votes = layer.group_scores(votes, self.group_reduce)
        return max_pool1d(votes, self.kernel_tokens, stride=1, padding=self.kernel_tokens // 2)

    def text(self, layer: LayerStates, last: Tensor) -> Tensor:
        """Mean attention by the queries that could see a token and by the last ones, averaged, `(H_k, T)` fp32."""
        seen = layer.group_scores(layer.observed("column_sums"), self.group_reduce) / layer.query_counts
        late = last[:, :, -self.text_queries :].mean(2).flatten(0, 1)
        return 0.5 * (seen + layer.group_scores(late, self.group_reduce))

    def reaching_rows(self, layer: LayerStates) -> Tensor:
        """Attention rows of the reach queries, turned to the end of the prompt, `(H_k, G, N, T)` fp32."""
        n_tokens = layer.n_tokens
        n_queries = min(self.reach_queries, n_tokens)
        edges = torch.arange(n_queries + 1, device=layer.keys.device) * n_tokens // n_queries
        places = (edges[:-1] + edges[1:] - 1) // 2
        angles = (n_tokens - 1 - places).unsqueeze(1) * layer.observed("rotary_frequencies")
        queries = turn(layer.observed("queries").index_select(1, places).float(), angles.cos(), angles.sin())
        return attention_rows(layer, queries)

    def last_rows(self, layer: LayerStates) -> Tensor:
        """Attention rows of the last queries that any part reads, `(H_k, G, N, T)` fp32."""
        n_tokens = layer.n_tokens
        n_queries = min(n_tokens, max(self.question_queries, self.text_queries, self.refit_queries))
        tokens = torch.arange(n_tokens, device=layer.keys.device)
        hidden = tokens > tokens[-n_queries:].unsqueeze(1)
        return attention_rows(layer, layer.observed("queries")[:, -n_queries:], hidden.repeat(layer.group_size, 1))


def attention_rows(layer: LayerStates, queries: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Softmax rows of rotated queries `(H, N, D)` over all keys, `(H_k, G, N, T)` fp32; `hidden` `(G * N, T)` bool."""
    grouped = (queries.float() * layer.observed("scaling")).unflatten(0, (layer.n_kv_heads, -1)).flatten(1, 2)
    weights = attend(grouped, layer.keys, layer.values, hidden=hidden).weights
    return weights.unflatten(1, (layer.group_size, -1))
