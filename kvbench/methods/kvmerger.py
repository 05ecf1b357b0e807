r"""KVMerger: merge runs of similar adjacent keys, and their values, around the token that attracted most attention.

A set S of adjacent tokens becomes one slot; p is its token of highest attention:

$$w_i = \frac{g_i}{\sum_{j \in S} g_j}, \quad g_i = \exp\left(-\frac{\lVert k_p - k_i \rVert^2}{2 \sigma^2}\right),
\qquad \tilde k = \sum_{i \in S} w_i k_i, \qquad \tilde v = |S| \sum_{i \in S} w_i v_i.$$

Source: Wang et al., "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks"
(arXiv 2407.08454). There is no official code, and the paper leaves open what the options below decide: how a budget is
met with a fixed threshold, whether a set is a chain or is anchored, what sigma means (its formula refers to itself),
and when it fires (here: once, at the end of the prompt, on post-RoPE keys). The default is the reading nearest to its
text; docs/methods/kvmerger.md gives the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from kvbench.fields import Within
from kvbench.methods.base import CompressedLayer, LayerStates, Policy, floor_share, with_whole_layers
from kvbench.methods.options import AboveZero, Count, Fraction, GroupReduction, WholeLayers
from kvbench.ops import segments
from kvbench.ops.counter_rng import counter_uniform
from kvbench.ops.merging import merge_segments

# Protected shares at the paper's two budgets: (budget, recent, highest attention).
LOWER_PROTECTION = (0.35, 0.08, 0.02)
UPPER_PROTECTION = (0.50, 0.17, 0.12)


@dataclass(frozen=True, kw_only=True)
class KVMerger(Policy):
    """Merge runs of adjacent keys whose cosine is high; recent and most-attended tokens are never merged.

    Attributes:
        budget_mode: "exact" links the adjacent pairs of highest cosine until the budget is met (ties: the later pair),
            the same number in every head; "threshold" links pairs above `threshold` as the paper does, whatever number
            of slots results, so that heads become ragged; the budget then only sets what is protected, and 1 does not
            keep everything.
        threshold: cosine above which tokens are merged, for `budget_mode: threshold`; 0.75 throughout the paper.
        linkage: "chain" compares each token with its neighbour; "anchor" with the token its set started from, scanning
            from the last token to the first. Exact anchored sets come from a per-head threshold found by bisection; of
            the sets then still too many, the closest neighbours are joined.
        scope: "head" forms sets per KV head; "layer" forms them once for all heads, from head-mean cosines and scores.
        recent_fraction: share of the prompt's last tokens that is protected; None takes it from the budget: 0.17 at
            0.5, 0.08 at 0.35, linear between, constant beyond.
        topk_fraction: share of the prompt protected for its attention, among the older tokens; None as before: 0.12,
            0.02. Where a layer's slots are too few for both, they are scaled down in proportion.
        whole_first_layers: first layers left uncompressed; their slots count towards the budget.
        whole_last_layers: last layers left uncompressed, likewise.
        whole_layers: "inside" counts them; "on_top" does not, so that more is kept than the budget says.
        pivot: "attention" (highest attention in the set), "random" (the paper's ablation) or "last".
        sigma: width of the Gaussian weights, in units of key distance; 5 is the best of the paper's six fixed values.
        sigma_mode: "fixed" uses `sigma`; "mean_distance" uses sum of distances to the pivot / (sqrt(2) set size), the
            likely meaning of the paper's formula.
        value_scale: "count" multiplies a merged value by the size of its set (the paper); "mean" does not; "log_bias"
            does not, but adds log(size) to the slot's attention logits.
        merge: false keeps the pivot's own key and value and drops the others: the eviction base to compare with.
        group_reduce: how the query heads of a KV head share one attention score: "mean" (the paper), "max" or "first".
    """

    budget_mode: Literal["exact", "threshold"] = "exact"
    threshold: Annotated[float, Within(-1, 1)] = 0.75
    linkage: Literal["chain", "anchor"] = "chain"
    scope: Literal["head", "layer"] = "head"
    recent_fraction: Fraction | None = None
    topk_fraction: Fraction | None = None
    whole_first_layers: Count = 2
    whole_last_layers: Count = 1
    whole_layers: WholeLayers = "inside"
    pivot: Literal["attention", "random", "last"] = "attention"
    sigma: AboveZero = 5.0
    sigma_mode: Literal["fixed", "mean_distance"] = "fixed"
    value_scale: Literal["count", "mean", "log_bias"] = "count"
    merge: bool = True
    group_reduce: GroupReduction = "mean"

    name: ClassVar[str] = "kvmerger"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})

    @property
    def exact_budget(self) -> bool:
        """True unless the fixed threshold decides or whole layers come on top."""
        return self.budget_mode == "exact" and self.whole_layers == "inside"

    def is_whole(self, layer_index: int, n_layers: int) -> bool:
        """Whether a layer is left uncompressed."""
        return layer_index < self.whole_first_layers or layer_index >= n_layers - self.whole_last_layers

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """Give whole layers all T slots and spread the rest evenly; in threshold mode the upper bound T for all."""
        if self.budget_mode == "threshold":
            return [n_tokens] * n_layers
        numbers = self.whole_first_layers, self.whole_last_layers
        return with_whole_layers(self, n_tokens, n_layers, *numbers, self.whole_layers)

    def protected_counts(self, n_tokens: int, budget_tokens: int | None) -> tuple[int, int]:
        """How many recent and how many most-attended tokens are protected; `budget_tokens` None is no limit.

        Protected tokens cut the rest into at most `n_top + 1` runs, each of which needs a slot. Where
        `n_recent + 2 n_top + 1` exceeds the layer's slots (it happens because whole layers eat the budget), both
        numbers are scaled down in proportion, so that the budget can be met exactly whatever the data.
        """
        low, low_recent, low_top = LOWER_PROTECTION
        high, high_recent, high_top = UPPER_PROTECTION
        along = min(max((self.budget - low) / (high - low), 0.0), 1.0)
        recent, topk = self.recent_fraction, self.topk_fraction
        recent = low_recent + along * (high_recent - low_recent) if recent is None else recent
        topk = low_top + along * (high_top - low_top) if topk is None else topk
        n_recent = floor_share(recent, n_tokens)
        n_top = min(floor_share(topk, n_tokens), n_tokens - n_recent)
        if budget_tokens is not None and n_recent + 2 * n_top + 1 > budget_tokens:
            wanted, available = n_recent + 2 * n_top, budget_tokens - 1
            n_recent, n_top = n_recent * available // wanted, n_top * available // wanted
        return n_recent, n_top

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Merge one layer into slots at their pivots' positions; a budget of T leaves it whole."""
        exact = self.budget_mode == "exact"
        if self.is_whole(layer.layer_index, layer.n_layers) or (exact and budget_tokens >= layer.n_tokens):
            return layer.whole()
        scores = layer.group_scores(layer.observed("column_sums"), self.group_reduce)
        starts, lengths = self.sets(layer, scores, budget_tokens)
        merged = merge_segments(
            layer.keys, layer.values, self.pivot_scores(scores, layer), starts,
            sigma=float(self.sigma), mean_distance=self.sigma_mode == "mean_distance",
            scale_values=self.value_scale == "count", merge=self.merge, kernels=layer.kernels,
        )  # fmt: skip
        bias = merged.counts.clamp_min(1).log() if self.merge and self.value_scale == "log_bias" else None
        return CompressedLayer(merged.keys, merged.values, merged.pivots, lengths=lengths, bias=bias)

    def sets(self, layer: LayerStates, scores: Tensor, budget_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Divide the tokens of every head into sets of neighbours by `(H_k, T)` fp32 aggregated attention.

        Gives `(H_k, m + 1)` int64, where the sets begin (see `segments.segment_starts`), and the sets per head `(H_k,)`
        int64 if they differ, else None. Exact chains, the default, have a kernel.
        """
        share = self.scope == "layer"
        if share:
            scores = scores.mean(0, keepdim=True)
        exact = self.budget_mode == "exact"
        protection = self.protected_counts(layer.n_tokens, budget_tokens if exact else None)
        if exact and self.linkage == "chain":
            arguments = (layer.keys, scores, *protection, budget_tokens, share, layer.kernels)
            return segments.exact_chain_starts(*arguments), None
        protected = segments.protected_tokens(scores, *protection)
        units = segments.unit_keys(layer.keys)
        if exact:
            links = segments.exact_anchored_links(units, protected, budget_tokens, share)
            return segments.segment_starts(links.expand(layer.n_kv_heads, -1), budget_tokens), None
        if self.linkage == "anchor":
            links = segments.anchored_links(segments.cosine_table(units, share), protected, self.threshold)
        else:
            links = segments.mergeable_cosines(units, protected, share) > self.threshold
        links = links.expand(layer.n_kv_heads, -1)
        lengths = (~links).sum(1)
        return segments.segment_starts(links, int(lengths.max())), lengths

    def pivot_scores(self, scores: Tensor, layer: LayerStates) -> Tensor:
        """Scores whose maximum in a set is its pivot (ties: the latest token), `(H_k, T)` fp32."""
        if self.pivot == "attention":
            return scores
        if self.pivot == "last":
            return torch.zeros_like(scores)
        heads, tokens = (torch.arange(size, device=scores.device) for size in scores.shape)
        return counter_uniform(layer.seed, layer.layer_index, heads.unsqueeze(1), tokens)


@dataclass(frozen=True, kw_only=True)
class KVMergerBias(KVMerger):
    r"""KVMerger with a consistent count: plain-average values, log(size) on the logits, and no layer left whole.

    $$\tilde v = \sum_{i \in S} w_i v_i, \qquad \text{logit} = s\, q \cdot \tilde k + \log |S|$$

    A merged slot then weighs in the softmax like the tokens it stands for, in the denominator as well as in the
    numerator (proportional attention, Bolya et al., "Token Merging", ICLR 2023, section 3); the paper's value scaling
    corrects only the numerator, which inflates layers without an attention sink. So no layer need be left whole, and
    all layers share the budget evenly. The options are KVMerger's.
    """

    value_scale: Literal["count", "mean", "log_bias"] = "log_bias"
    whole_first_layers: Count = 0
    whole_last_layers: Count = 0

    name: ClassVar[str] = "kvmerger_bias"
