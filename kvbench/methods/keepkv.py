r"""KeepKV: an evicted token joins the kept token with the most similar key, and its vote stays with it as a bias.

Source: Tian et al., "KeepKV: Achieving Periodic Lossless KV Cache Compression for Efficient LLM Inference" (AAAI 2026,
arXiv 2504.09936); official code kkvcache/KeepKV, `utils_hh/modify_llama_oursk.py`. A slot that stands for p tokens
has p electoral votes: log(p) is added to its logits. Slot c and the evicted tokens E that join it become

$$\tilde k = \frac{\sum_{e \in E \cup \{c\}} s_e k_e}{\sum_{e \in E \cup \{c\}} s_e}, \qquad
\tilde v = \frac{\sum_{e \in E \cup \{c\}} s_e v_e}{\sum_{e \in E \cup \{c\}} s_e}, \qquad
\text{bias} = \log(1 + |E|),$$

where s estimates from the last queries the unnormalised attention exp(q.k) that a token gets; evicted tokens below the
similarity threshold go.

What follows the code and not the paper: the merged key is the plain convex mixture (the paper scales it further, which
others found harmful; T0nyN1/kv-cache-merging-limits measured +0.37 LongBench points for keys left in place against
-9.75 for the scaled ones, at 5 %; `merge_keys=False` leaves them in place).

There exp(q.k) is taken as it is, in fp32, and overflows at logits of 88. Here it is the softmax row times
exp(L - max L), L being the row's log-sum-exp: every ratio is the same, and nothing overflows. Queries of large logits
decide almost alone then; `row_scale=softmax` lets each count alike.

Deviations: the window is a fixed number of queries (there: as many as the recent budget); one merge at the end of the
prompt (there: also after every new token); layers share the budget evenly; query heads of a group share votes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from kvbench.fields import Within
from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.methods.options import Positive
from kvbench.methods.scored import EvictAndMerge
from kvbench.ops.merging import nearest_kept, sum_by_slot, tokens_at


@dataclass(frozen=True, kw_only=True)
class KeepKV(EvictAndMerge):
    """Merging with votes; the options of `EvictAndMerge`, and these.

    Attributes:
        threshold: cosine of the keys at and above which an evicted token merges; below, it is dropped. 0.8 officially.
        observation_tokens: last prompt queries that score the tokens and estimate their weights; as many as the recent
            window has in the official code.
        distance_weight: weight of the last of these queries in the scores, the first one's being 1; linear between.
            1.2 in the official code.
        row_scale: "raw" weighs each query by its exp(log-sum-exp), as officially, also between the query heads of a
            group; "raw_per_head" lets the heads of a group count alike; "softmax" all queries.
        merge_keys: false leaves the kept keys as they are and merges values and votes only.
    """

    threshold: Annotated[float, Within(-1, 1)] = 0.8
    observation_tokens: Positive = 32
    distance_weight: Annotated[float, Within(0)] = 1.2
    row_scale: Literal["raw", "raw_per_head", "softmax"] = "raw"
    merge_keys: bool = True

    name: ClassVar[str] = "keepkv"

    @property
    def needs(self) -> frozenset[str]:
        """The window's rows, and their scale unless it does not count."""
        return frozenset({"window_attention"} | ({"window_logsumexp"} if self.row_scale != "softmax" else set()))

    @property
    def window_tokens(self) -> int:
        """The observation window."""
        return self.observation_tokens

    def window(self, layer: LayerStates) -> Tensor:
        """Attention of the last queries, scaled, `(H_k, min(W, T), T)` fp32, reduced over the heads of a group."""
        rows = layer.observed("window_attention")[:, -self.observation_tokens :].float()
        if self.row_scale != "softmax":
            rows = rows * (self.logsumexp(layer) - self.highest(layer)).exp().flatten(0, 1).unsqueeze(-1)
        return layer.group_scores(rows, self.group_reduce)

    def logsumexp(self, layer: LayerStates) -> Tensor:
        """Log-sum-exp of the window's rows, `(H_k, G, W)` fp32."""
        return layer.observed("window_logsumexp")[:, -self.observation_tokens :].unflatten(0, (layer.n_kv_heads, -1))

    def highest(self, layer: LayerStates) -> Tensor:
        """The largest of them, of a group or of each head of it, `(H_k, 1 or G, 1)`."""
        return self.logsumexp(layer).amax((1, 2) if self.row_scale == "raw" else 2, keepdim=True)

    def scores(self, layer: LayerStates) -> Tensor:
        """Attention from the window's queries, later queries weighted a little more."""
        window = self.window(layer)
        weights = torch.linspace(1.0, self.distance_weight, window.shape[1], device=window.device)
        return (window * weights.unsqueeze(-1)).sum(1)

    def attention_estimates(self, layer: LayerStates) -> Tensor:
        """s: mean attention of each token over the window's queries that can see it, `(H_k, T)` fp32, above 0."""
        window = self.window(layer)
        seen_by = layer.query_counts.clamp_max(window.shape[1])
        least = torch.tensor(torch.finfo(torch.float32).tiny)
        if self.row_scale == "raw":  # a query head of another scale than its group has no such number
            least = least + torch.finfo(torch.float16).tiny * (-self.highest(layer)).exp().squeeze(-1)
        return window.sum(1) / seen_by + least.to(window.device)

    def merged(self, layer: LayerStates, kept: CompressedLayer, positions: Tensor, evicted: Tensor) -> CompressedLayer:
        """Mix similar tokens into their slots by weight; the bias is the logarithm of the votes."""
        cosines, slots = nearest_kept(layer.keys, positions, evicted)
        joins = cosines >= self.threshold
        estimates = self.attention_estimates(layer)
        joining = estimates.gather(1, evicted) * joins
        staying = estimates.gather(1, positions).unsqueeze(-1)
        n_slots = kept.keys.shape[1]
        sums = sum_by_slot(torch.stack([joining, joins.float()], -1), slots, n_slots)
        total, votes = staying + sums[..., :1], 1.0 + sums[..., 1]

        def mixed(states: Tensor, own: Tensor) -> Tensor:
            joined = sum_by_slot(tokens_at(states, evicted) * joining.unsqueeze(-1), slots, n_slots)
            return ((own.float() * staying + joined) / total).to(own.dtype)

        return CompressedLayer(
            mixed(layer.keys, kept.keys) if self.merge_keys else kept.keys,
            mixed(layer.values, kept.values),
            positions,
            bias=votes.log(),
        )
