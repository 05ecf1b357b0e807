r"""GRKV: what another method keeps, its values and keys refitted to attention outputs over the whole prompt.

Source: "GRKV" (arXiv 2605.31105, EMNLP 2026) in the form that is released (official code pjunjie/GRKV at 04a9e39,
grkv/press.py, queries.py, solver.py, operators.py; `configs/llama.yaml`), which differs from what reports say of the
paper: docs/methods/grkv.md. One fit per layer at the end of the prompt:

1. Another method chooses the slots. Its protected tokens and the best of every head's others (`guard_share` of them)
   are fixed, the rest may move.
2. Queries from all over the prompt are turned to its last position, where they see every key. What they get there from
   the whole cache is the target.
3. Values move by ridge regression, then keys by one Gauss-Newton step (`kvbench.ops.refit`), each at most by a share of
   the norm of what may move in the head.
4. The layer keeps both corrections, that of the values or none, whichever fits the same queries best.

Of the base's slots, with attention P on them and targets o of the weighted queries, the movable values become

$$\tilde V = V + \operatorname{argmin}_X \lVert (o - P V) - P X \rVert^2 + \lambda \lVert X \rVert^2.$$

Deviations: the query is turned on from its own position, after the model's rounding, and not rotated anew; a prompt no
longer than the base's window is refused with its budget, where the official code leaves it whole; ties of the guard go
to the more recent token. That code takes retentions of 10 and 20 % only, this one any.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvbench.errors import ConfigError
from kvbench.methods.base import CompressedLayer, LayerStates, Policy
from kvbench.methods.criticalkv import CriticalAdaKV
from kvbench.methods.expected_attention import turn
from kvbench.methods.options import AboveZero, Fraction, Positive
from kvbench.methods.scored import ScoredPolicy, protect_first
from kvbench.methods.snapkv import SnapKV
from kvbench.ops.refit import add_within, attend, attend_to_all, key_correction, ridge_correction
from kvbench.ops.selection import largest_by_recency

RELEASED_BASE = CriticalAdaKV(base=SnapKV(kernel_tokens=5, pooling="avg"))


@dataclass(frozen=True, kw_only=True)
class GRKV(Policy):
    """Refit the slots of another method to outputs of queries spread over the prompt, by at most a few per cent.

    Attributes:
        base: the method that chooses the slots; its own `budget` is not used. One that scores keys (SnapKV, Knorm) or
            chooses by the scores of one that does (AdaKV, CriticalKV).
        refit: "both" values and keys, "values" alone, or "none": the base itself, to compare with.
        guard_share: share of each head's chosen tokens, those of highest score, that stay as they are; the released
            0.1 is for Llama, for Mistral it is 0.
        sample: "stratified" takes the middle of equal parts of the prompt, "window" its last queries.
        fit_queries: how many.
        place: "last" has each ask from the prompt's last position, "own" from its own, where it sees what is before it.
        query_weight: weight of all queries together against the ridge.
        ridge: price of moving a slot, for the squared change of its value or key.
        value_cap_ratio: most that the values of a head may move, in units of their norm.
        key_cap_ratio: most that its keys may.
        iterations: most steps of conjugate gradients for the keys.
        tolerance: remainder, as a share of the start, at which they end before.
    """

    base: Policy = RELEASED_BASE
    refit: Literal["both", "values", "none"] = "both"
    guard_share: Fraction = 0.1
    sample: Literal["stratified", "window"] = "stratified"
    fit_queries: Positive = 32
    place: Literal["last", "own"] = "last"
    query_weight: AboveZero = 6.0
    ridge: AboveZero = 0.01
    value_cap_ratio: AboveZero = 0.1
    key_cap_ratio: AboveZero = 0.025
    iterations: Positive = 16
    tolerance: AboveZero = 1e-6

    name: ClassVar[str] = "grkv"

    def __post_init__(self) -> None:
        """Validate the options; raises `ConfigError`."""
        if not isinstance(self.scorer, ScoredPolicy) or self.base.steps or self.base.allocates:
            raise ConfigError(
                f"base={self.base!r} does not choose slots by scores, once, in each layer: give a method of "
                "kvbench.methods.scored or one over it, e.g. base._target_=kvbench.methods.adakv.AdaKV"
            )
        super().__post_init__()

    @property
    def scorer(self) -> object:
        """The method whose scores the base follows."""
        found: object = self.base
        while isinstance(below := getattr(found, "base", None), Policy):
            found = below
        return found

    @property
    def needs(self) -> frozenset[str]:
        """What the base needs, the queries, and frequencies to turn them with."""
        if self.refit == "none":
            return self.base.needs
        turned = {"rotary_frequencies"} if self.place == "last" else set()
        return self.base.needs | {"queries"} | turned

    @property
    def window_tokens(self) -> int:
        """The base's window."""
        return self.base.window_tokens

    @property
    def minimum_tokens(self) -> int:
        """The base's minimum."""
        return self.base.minimum_tokens

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """The base's layer budgets for this budget."""
        return dataclasses.replace(self.base, budget=self.budget).layer_budgets(n_tokens, n_layers)

    def without_merging(self) -> Policy | None:
        """The slots as they were chosen, nothing refitted."""
        return None if self.refit == "none" else dataclasses.replace(self, refit="none")

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Let the base choose, then refit. A budget of T leaves the layer as the base does."""
        kept = self.base.compress(layer, budget_tokens)
        if self.refit == "none" or budget_tokens >= layer.n_tokens:
            return kept
        queries, seen = self.fitting_queries(layer)
        positions, padding = layer_slots(kept)
        fixed = padding | self.guarded(layer, positions, padding)
        later, unseen = None, padding.unsqueeze(1)
        if self.place == "own":
            later = (torch.arange(layer.n_tokens, device=seen.device) > seen.unsqueeze(1)).unsqueeze(0)
            unseen = unseen | (positions.unsqueeze(1) > seen.unsqueeze(1))
        target, _ = attend_to_all(queries, layer.keys, layer.values, later)
        weights = torch.full_like(seen, self.query_weight / min(self.fit_queries, layer.n_tokens), dtype=torch.float32)
        regression: dict[str, Any] = {"relative": False, "row_weights": weights.unsqueeze(0), "fixed": fixed}

        def price(states: Tensor, start: Tensor) -> Tensor:
            return self.ridge * (states.float() - start.float()).square().sum()

        def misfit(output: Tensor) -> Tensor:
            return (weights.unsqueeze(1) * (target - output).square()).sum()

        base = attend(queries, kept.keys, kept.values, hidden=unseen)
        correction = ridge_correction(base.weights, target - base.output, self.ridge, **regression)
        values = add_within(kept.values, correction, self.value_cap_ratio, fixed)
        refitted = base._replace(output=torch.bmm(base.weights, values.float()))
        fits = [misfit(base.output), misfit(refitted.output) + price(values, kept.values)]
        keys = kept.keys
        if self.refit == "both":
            correction = key_correction(
                queries, refitted, values, target - refitted.output, self.ridge, **regression,
                iterations=self.iterations, tolerance=self.tolerance, one_system=True,
            )  # fmt: skip
            keys = add_within(kept.keys, correction, self.key_cap_ratio, fixed)
            output = attend(queries, keys, values, hidden=unseen).output
            fits.append(misfit(output) + price(values, kept.values) + price(keys, kept.keys))
        best = torch.stack(fits).nan_to_num(nan=torch.inf).cummin(0).values  # of each and those before it
        kept.keys = torch.where(best[-1] < best[1], keys, kept.keys)
        kept.values = torch.where(best[-1] < best[0], values, kept.values)
        return kept

    def fitting_queries(self, layer: LayerStates) -> tuple[Tensor, Tensor]:
        """Queries `(H_k, N, D)` fp32 as `kvbench.ops.refit` takes them, and the last position each sees, `(N,)`."""
        n_tokens = layer.n_tokens
        n_queries = min(self.fit_queries, n_tokens)
        steps = torch.arange(n_queries + 1, device=layer.keys.device)
        edges = steps * n_tokens // n_queries
        places = (edges[:-1] + edges[1:] - 1) // 2 if self.sample == "stratified" else n_tokens - 1 - steps[:-1].flip(0)
        queries = layer.observed("queries").index_select(1, places).float()
        if self.place == "last":
            angles = (n_tokens - 1 - places).unsqueeze(1) * layer.observed("rotary_frequencies")
            queries = turn(queries, angles.cos(), angles.sin())
        queries = (queries * layer.observed("scaling")).unflatten(0, (layer.n_kv_heads, -1)).flatten(1, 2)
        return queries, places.repeat(layer.group_size)

    def guarded(self, layer: LayerStates, positions: Tensor, padding: Tensor) -> Tensor:
        """Mark kept slots that stay: the base's last tokens and the best of each head's others, `(H_k, m)` bool."""
        scorer = self.scorer
        assert isinstance(scorer, ScoredPolicy)
        last = positions >= layer.n_tokens - scorer.last_tokens
        others = ~(last | padding)
        scores = protect_first(scorer.scores(layer), scorer.first_tokens).gather(1, positions)
        counts = (self.guard_share * others.sum(1, keepdim=True).double() + 1e-9).floor()
        return last | largest_by_recency(scores.masked_fill(~others, -torch.inf), counts)


def layer_slots(kept: CompressedLayer) -> tuple[Tensor, Tensor]:
    """Positions of a layer's slots and which are padding of ragged heads, `(H_k, m)` int64 and bool."""
    assert kept.positions is not None
    slots = torch.arange(kept.positions.shape[1], device=kept.positions.device)
    lengths = slots.shape[0] if kept.lengths is None else kept.lengths.unsqueeze(1)
    return kept.positions, (slots >= lengths).expand_as(kept.positions)
