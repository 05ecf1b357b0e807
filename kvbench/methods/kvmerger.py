"""KVMerger: merge runs of similar adjacent keys, and their values, around the token that attracted most attention.

Source: Wang et al., "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks"
(arXiv 2407.08454). There is no official code, and the paper leaves open what the options below decide: how a budget is
met with a fixed threshold, whether a set is a chain or is anchored, what sigma means (its formula refers to itself),
and when it fires (here: once, at the end of the prompt, on post-RoPE keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates, Policy, with_whole_layers
from kvbench.methods.options import (
    GROUP_REDUCTIONS,
    reduce_groups,
    require_bool,
    require_choice,
    require_count,
    require_number,
)
from kvbench.ops import merging, segments
from kvbench.ops.counter_rng import counter_uniform

# Protected shares at the paper's two budgets: (budget, recent, highest attention).
LOWER_PROTECTION = (0.35, 0.08, 0.02)
UPPER_PROTECTION = (0.50, 0.17, 0.12)


@dataclass(frozen=True, kw_only=True)
class KVMerger(Policy):
    """Merge runs of adjacent keys whose cosine is high; recent and most-attended tokens are never merged.

    Attributes:
        budget_mode: "exact" links the adjacent pairs of highest cosine until the budget is met (ties: the later pair),
            the same number in every head; "threshold" links pairs above `threshold` as the paper does, whatever number
            of slots results, so that heads become ragged.
        threshold: cosine above which tokens are merged, in [-1, 1]; for `budget_mode: threshold`.
        linkage: "chain" compares each token with its neighbour; "anchor" with the token its set started from, scanning
            from the last token to the first. Exact anchored sets come from a per-head threshold found by bisection; of
            the sets then still too many, the closest neighbours are joined.
        scope: "head" forms sets per KV head; "layer" forms them once for all heads, from head-mean cosines and scores.
        recent_fraction: share of the prompt's last tokens that is protected; None takes it from the budget: 0.17 at
            0.5, 0.08 at 0.35, linear between, constant beyond.
        topk_fraction: share of the prompt protected for its attention, among the older tokens; None as before: 0.12,
            0.02.
        whole_first_layers: first layers left uncompressed; their slots count towards the budget.
        whole_last_layers: last layers left uncompressed, likewise.
        pivot: "attention" (highest attention in the set), "random" or "last".
        sigma: width of the Gaussian weights, in units of key distance.
        sigma_mode: "fixed" uses `sigma`; "mean_distance" uses sum of distances to the pivot / (sqrt(2) set size).
        value_scale: "count" multiplies a merged value by the size of its set (the paper); "mean" does not; "log_bias"
            does not, but adds log(size) to the slot's attention logits.
        merge: false keeps the pivot's own key and value and drops the others: the eviction base to compare with.
        group_reduce: how the query heads of a KV head share one attention score: "mean", "max" or "first".
    """

    budget_mode: str = "exact"
    threshold: float = 0.75
    linkage: str = "chain"
    scope: str = "head"
    recent_fraction: float | None = None
    topk_fraction: float | None = None
    whole_first_layers: int = 2
    whole_last_layers: int = 1
    pivot: str = "attention"
    sigma: float = 5.0
    sigma_mode: str = "fixed"
    value_scale: str = "count"
    merge: bool = True
    group_reduce: str = "mean"

    name: ClassVar[str] = "kvmerger"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})

    def __post_init__(self) -> None:
        """Validate the options; raises `ConfigError`."""
        super().__post_init__()
        require_choice("budget_mode", self.budget_mode, ("exact", "threshold"))
        require_number("threshold", self.threshold, -1.0, 1.0)
        require_choice("linkage", self.linkage, ("chain", "anchor"))
        require_choice("scope", self.scope, ("head", "layer"))
        for option in ("recent_fraction", "topk_fraction"):
            if getattr(self, option) is not None:
                require_number(option, getattr(self, option), 0.0, 1.0)
        require_count("whole_first_layers", self.whole_first_layers, minimum=0)
        require_count("whole_last_layers", self.whole_last_layers, minimum=0)
        require_choice("pivot", self.pivot, ("attention", "random", "last"))
        require_number("sigma", self.sigma, 0.0, math.inf, include_low=False, include_high=False)
        require_choice("sigma_mode", self.sigma_mode, ("fixed", "mean_distance"))
        require_choice("value_scale", self.value_scale, ("count", "mean", "log_bias"))
        require_bool("merge", self.merge)
        require_choice("group_reduce", self.group_reduce, GROUP_REDUCTIONS)

    @property
    def exact_budget(self) -> bool:
        """True unless the fixed threshold decides."""
        return self.budget_mode == "exact"

    def is_whole(self, layer_index: int, n_layers: int) -> bool:
        """Whether a layer is left uncompressed."""
        return layer_index < self.whole_first_layers or layer_index >= n_layers - self.whole_last_layers

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """Give whole layers all T slots and spread what is left evenly over the others.

        Returns:
            Slots per KV head and layer, summing to `n_layers * budget_tokens(n_tokens)`; in threshold mode the upper
            bound T for every layer.

        Raises:
            BudgetError: if the whole layers leave the others less than one slot each.
        """
        if not self.exact_budget:
            return [n_tokens] * n_layers
        return with_whole_layers(self, n_tokens, n_layers, self.whole_first_layers, self.whole_last_layers)

    def protected_counts(self, n_tokens: int, budget_tokens: int | None) -> tuple[int, int]:
        """How many recent and how many most-attended tokens are protected.

        Protected tokens cut the rest into at most `n_top + 1` runs, each of which needs a slot. Where
        `n_recent + 2 n_top + 1` exceeds the layer's slots (it happens because whole layers eat the budget), both
        numbers are scaled down in proportion, so that the budget can be met exactly whatever the data.

        Args:
            n_tokens: prompt length T.
            budget_tokens: the layer's slots, or None if there is no limit.
        """
        low, low_recent, low_top = LOWER_PROTECTION
        high, high_recent, high_top = UPPER_PROTECTION
        along = min(max((self.budget - low) / (high - low), 0.0), 1.0)
        recent_fraction = low_recent + along * (high_recent - low_recent)
        topk_fraction = low_top + along * (high_top - low_top)
        if self.recent_fraction is not None:
            recent_fraction = self.recent_fraction
        if self.topk_fraction is not None:
            topk_fraction = self.topk_fraction
        n_recent = math.floor(round(recent_fraction * n_tokens, 9))
        n_top = min(math.floor(round(topk_fraction * n_tokens, 9)), n_tokens - n_recent)
        if budget_tokens is not None and n_recent + 2 * n_top + 1 > budget_tokens:
            wanted, available = n_recent + 2 * n_top, budget_tokens - 1
            n_recent, n_top = n_recent * available // wanted, n_top * available // wanted
        return n_recent, n_top

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Merge one layer; see `Policy.compress`.

        Args:
            layer: needs `column_sums`.
            budget_tokens: slots per KV head; T leaves the layer whole. Ignored in threshold mode.

        Returns:
            Slots at their pivots' positions; `lengths` in threshold mode, `bias` with `value_scale: log_bias`.
        """
        if layer.column_sums is None:
            raise ValueError(f"{self.name} needs column_sums, which the prefill did not provide")
        if self.is_whole(layer.layer_index, layer.n_layers) or (self.exact_budget and budget_tokens >= layer.n_tokens):
            return layer.whole()
        scores = reduce_groups(layer.column_sums, layer.n_kv_heads, self.group_reduce)
        triton = layer.kernels == "triton"
        starts, lengths = self.sets(layer.keys, scores, budget_tokens, triton)
        merge_segments = merging.merge_segments
        if triton:
            from kvbench.ops.merging_triton import merge_segments
        merged = merge_segments(
            layer.keys,
            layer.values,
            self.pivot_scores(scores, layer),
            starts,
            sigma=float(self.sigma),
            mean_distance=self.sigma_mode == "mean_distance",
            scale_values=self.value_scale == "count",
            merge=self.merge,
        )
        bias = None
        if self.merge and self.value_scale == "log_bias":
            bias = merged.counts.clamp_min(1).log()
        return CompressedLayer(merged.keys, merged.values, merged.pivots, lengths=lengths, bias=bias)

    def sets(self, keys: Tensor, scores: Tensor, budget_tokens: int, triton: bool) -> tuple[Tensor, Tensor | None]:
        """Divide the tokens of every head into sets of neighbours.

        Args:
            keys: `(H_k, T, D)`.
            scores: `(H_k, T)` fp32, aggregated attention.
            budget_tokens: sets per head; not used in threshold mode.
            triton: use the kernels (exact chains have one, the default; the other forms are torch on every device).

        Returns:
            `(H_k, m + 1)` int64, where the sets begin (see `segments.segment_starts`), and the sets per head `(H_k,)`
            int64 if they differ, else None.
        """
        share = self.scope == "layer"
        if share:
            scores = scores.mean(0, keepdim=True)
        n_heads, n_tokens, _ = keys.shape
        protection = self.protected_counts(n_tokens, budget_tokens if self.exact_budget else None)
        if self.exact_budget and self.linkage == "chain":
            exact_chain_starts = segments.exact_chain_starts
            if triton:
                from kvbench.ops.segments_triton import exact_chain_starts
            return exact_chain_starts(keys, scores, *protection, budget_tokens, share), None
        protected = segments.protected_tokens(scores, *protection)
        units = segments.unit_keys(keys)
        if self.exact_budget:
            links = segments.exact_anchored_links(units, protected, budget_tokens, share)
            return segments.segment_starts(links.expand(n_heads, -1), budget_tokens), None
        if self.linkage == "anchor":
            links = segments.anchored_links(segments.cosine_table(units, share), protected, self.threshold)
        else:
            links = segments.mergeable_cosines(units, protected, share) > self.threshold
        links = links.expand(n_heads, -1)
        lengths = (~links).sum(1)
        return segments.segment_starts(links, int(lengths.max())), lengths

    def pivot_scores(self, scores: Tensor, layer: LayerStates) -> Tensor:
        """Scores whose maximum in a set is its pivot (ties: the latest token), `(H_k, T)` fp32."""
        if self.pivot == "attention":
            return scores
        if self.pivot == "last":
            return torch.zeros_like(scores)
        heads = torch.arange(scores.shape[0], device=scores.device).unsqueeze(1)
        return counter_uniform(
            layer.seed, layer.layer_index, heads, torch.arange(scores.shape[1], device=scores.device)
        )


@dataclass(frozen=True, kw_only=True)
class KVMergerBias(KVMerger):
    """KVMerger with a consistent count: plain-average values, log(size) on the logits, and no layer left whole.

    A merged slot then weighs in the softmax like the tokens it stands for, in the denominator as well as in the
    numerator (proportional attention, Bolya et al., "Token Merging", ICLR 2023, section 3); the paper's value scaling
    corrects only the numerator.
    """

    value_scale: str = "log_bias"
    whole_first_layers: int = 0
    whole_last_layers: int = 0

    name: ClassVar[str] = "kvmerger_bias"
