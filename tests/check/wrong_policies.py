"""Policies with one deliberate mistake each; the docstring's first word is the rule that has to find it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, DecodeSlots, LayerStates, Policy


def newest(layer: LayerStates, n_slots: int) -> CompressedLayer:
    kept = torch.arange(layer.n_tokens - n_slots, layer.n_tokens)
    return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], kept.expand(layer.n_kv_heads, -1))


@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """Nothing is wrong: keep the newest tokens."""

    name: ClassVar[str] = "newest"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        return newest(layer, budget_tokens)


@dataclass
class Mass:
    mass: Tensor


@dataclass(frozen=True, kw_only=True)
class Stepper(Newest):
    """Nothing is wrong: replace slot `step_index` modulo m by the new token, and count what each slot receives."""

    name: ClassVar[str] = "stepper"
    steps: ClassVar[bool] = True

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        kept.state = Mass(torch.zeros(kept.keys.shape[:2]))
        return kept

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        slots.state.mass += attention.unflatten(0, (slots.keys.shape[0], -1)).sum(1)
        target = slots.step_index.remainder(slots.keys.shape[1] - 1).reshape(1)
        for tensor in slots.per_slot:
            tensor.index_copy_(1, target, tensor[:, -1:].clone())


class Undecorated(Newest):
    """dataclass: the option is no field."""

    name: ClassVar[str] = "undecorated"
    sinks: int = 4


@dataclass(frozen=True, kw_only=True)
class Nameless(Newest):
    """name: that of the parent."""


@dataclass(frozen=True, kw_only=True)
class Demanding(Newest):
    """needs: something no prefill observes."""

    name: ClassVar[str] = "demanding"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})


@dataclass(frozen=True, kw_only=True)
class Unvalidated(Newest):
    """bad_budgets: nothing is refused."""

    name: ClassVar[str] = "unvalidated"

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class TupleOption(Newest):
    """options: a tuple comes back from JSON as a list."""

    name: ClassVar[str] = "tuple_option"
    kernel: tuple[int, int] = (3, 5)


@dataclass(frozen=True, kw_only=True)
class NameTaken(Newest):
    """options: `method=h2o` builds another class."""

    name: ClassVar[str] = "h2o"


@dataclass(frozen=True, kw_only=True)
class StepUndeclared(Newest):
    """declares_step: never called."""

    name: ClassVar[str] = "step_undeclared"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        slots.keys[:, 0] = slots.keys[:, -1]


@dataclass(frozen=True, kw_only=True)
class Overdrawn(Newest):
    """layer_budgets: the first layer gets what the others do not give."""

    name: ClassVar[str] = "overdrawn"

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        return [n_tokens, *super().layer_budgets(n_tokens, n_layers)[1:]]


@dataclass(frozen=True, kw_only=True)
class Undeclared(Newest):
    """compress: the column sums were never asked for."""

    name: ClassVar[str] = "undeclared"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        layer.group_scores(layer.column_sums)  # type: ignore[arg-type]  # the mistake on trial
        return newest(layer, budget_tokens)


@dataclass(frozen=True, kw_only=True)
class WindowBlind(Newest):
    """compress: short prompts have fewer rows than the window."""

    name: ClassVar[str] = "window_blind"
    needs: ClassVar[frozenset[str]] = frozenset({"window_attention"})

    @property
    def window_tokens(self) -> int:
        return 16

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        layer.window_attention.view(layer.n_query_heads, 16, layer.n_tokens)
        return newest(layer, budget_tokens)


@dataclass(frozen=True, kw_only=True)
class PerQueryHead(Newest):
    """shapes: one cache per query head."""

    name: ClassVar[str] = "per_query_head"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        parts = (kept.keys, kept.values, kept.positions)
        return CompressedLayer(*(part.repeat_interleave(layer.group_size, 0) for part in parts))


@dataclass(frozen=True, kw_only=True)
class Upcast(Newest):
    """dtypes: sums in fp32 that are not cast back."""

    name: ClassVar[str] = "upcast"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        return CompressedLayer(kept.keys, kept.values.float(), kept.positions)


@dataclass(frozen=True, kw_only=True)
class ShortLengths(Newest):
    """lengths: int32."""

    name: ClassVar[str] = "short_lengths"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        kept.lengths = torch.full((layer.n_kv_heads,), budget_tokens, dtype=torch.int32)
        return kept


@dataclass(frozen=True, kw_only=True)
class RaggedStepper(Stepper):
    """lengths: not together with a step."""

    name: ClassVar[str] = "ragged_stepper"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = super().compress(layer, budget_tokens)
        kept.lengths = torch.full((layer.n_kv_heads,), budget_tokens)
        return kept


@dataclass(frozen=True, kw_only=True)
class Greedy(Newest):
    """exact_budget: one slot too many."""

    name: ClassVar[str] = "greedy"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        return newest(layer, min(budget_tokens + 1, layer.n_tokens))


@dataclass(frozen=True, kw_only=True)
class PaddedShort(Newest):
    """exact_budget: a head's length leaves slots unused."""

    name: ClassVar[str] = "padded_short"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        kept.lengths = torch.full((layer.n_kv_heads,), budget_tokens)
        kept.lengths[0] = max(1, budget_tokens // 2)
        return kept


@dataclass(frozen=True, kw_only=True)
class Twice(Newest):
    """positions: the last token is kept twice."""

    name: ClassVar[str] = "twice"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = torch.arange(layer.n_tokens - budget_tokens, layer.n_tokens)
        kept[0] = layer.n_tokens - 1
        return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], kept.expand(layer.n_kv_heads, -1))


@dataclass(frozen=True, kw_only=True)
class FromOne(Newest):
    """positions: counted from one."""

    name: ClassVar[str] = "from_one"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        return CompressedLayer(kept.keys, kept.values, kept.positions + 1)


@dataclass(frozen=True, kw_only=True)
class Hiding(Newest):
    """bias: a mask is no compression."""

    name: ClassVar[str] = "hiding"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        kept.bias = torch.zeros(kept.positions.shape)
        kept.bias[:, :1] = -torch.inf
        return kept


@dataclass(frozen=True, kw_only=True)
class HalfBias(Newest):
    """bias: half precision."""

    name: ClassVar[str] = "half_bias"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        kept.bias = torch.zeros(kept.positions.shape, dtype=torch.bfloat16)
        return kept


@dataclass(frozen=True, kw_only=True)
class ZeroSpread(Newest):
    """finite: divides by the spread of the keys, which may be zero."""

    name: ClassVar[str] = "zero_spread"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        spread = (layer.keys - layer.keys[:, :1]).abs().amax((1, 2), keepdim=True)
        return CompressedLayer(
            kept.keys, torch.where(spread / spread == 1, kept.values, spread / spread), kept.positions
        )


@dataclass(frozen=True, kw_only=True)
class Scribbling(Newest):
    """inputs: the column sums are written to."""

    name: ClassVar[str] = "scribbling"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        assert layer.column_sums is not None
        layer.column_sums /= layer.query_counts
        return newest(layer, budget_tokens)


@dataclass(frozen=True, kw_only=True)
class Replacing(Newest):
    """inputs: an attribute of the layer is replaced."""

    name: ClassVar[str] = "replacing"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        layer.keys = layer.keys[:, :1]
        return kept


@dataclass(frozen=True, kw_only=True)
class SelfTuning(Newest):
    """inputs: an option is changed behind the frozen dataclass's back."""

    name: ClassVar[str] = "self_tuning"
    sinks: int = 4

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        object.__setattr__(self, "sinks", self.sinks + 1)
        return newest(layer, budget_tokens)


@dataclass(frozen=True, kw_only=True)
class Remembering(Newest):
    """deterministic: the number of calls so far shifts the window."""

    name: ClassVar[str] = "remembering"
    calls: ClassVar[list[int]] = []

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        self.calls.append(budget_tokens)
        kept = (torch.arange(budget_tokens) + len(self.calls)).remainder(layer.n_tokens)
        return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], kept.expand(layer.n_kv_heads, -1))


@dataclass(frozen=True, kw_only=True)
class Unseeded(Newest):
    """generators: draws from torch's global generator."""

    name: ClassVar[str] = "unseeded"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = torch.randperm(layer.n_tokens)[:budget_tokens].sort().values
        return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], kept.expand(layer.n_kv_heads, -1))


@dataclass(frozen=True, kw_only=True)
class NeverWhole(Newest):
    """full_budget: values are scaled even if nothing is left out."""

    name: ClassVar[str] = "never_whole"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = newest(layer, budget_tokens)
        return CompressedLayer(kept.keys, 0.5 * kept.values, kept.positions)
