"""Policies with one deliberate mistake each, and the rule of `kvbench.testing` that has to find it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, DecodeSlots, LayerStates, Policy

MISTAKES: dict[type[Policy], str] = {}
"""Class -> the one rule that it breaks."""


def keep(layer: LayerStates, kept: Tensor) -> CompressedLayer:
    return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], kept.expand(layer.n_kv_heads, -1))


@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """Nothing is wrong: keep the newest tokens."""

    name: ClassVar[str] = "newest"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        return keep(layer, torch.arange(layer.n_tokens - budget_tokens, layer.n_tokens))


@dataclass
class Mass:
    mass: Tensor


@dataclass(frozen=True, kw_only=True)
class Stepper(Newest):
    """Nothing is wrong: replace slot `step_index` modulo m by the new token, and count what each slot receives."""

    name: ClassVar[str] = "stepper"
    steps: ClassVar[bool] = True

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = super().compress(layer, budget_tokens)
        kept.state = Mass(torch.zeros(kept.keys.shape[:2]))
        return kept

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        slots.state.mass += attention.unflatten(0, (slots.keys.shape[0], -1)).sum(1)
        slots.move_new_token(slots.step_index.remainder(slots.n_slots).reshape(1))


def breaks(rule: str) -> Callable[[type[Policy]], type[Policy]]:
    """Note the rule that a class breaks, and make it a policy that is sound otherwise."""

    def make(kind: type[Policy]) -> type[Policy]:
        kind.name = kind.__dict__.get("name", kind.__name__.lower())
        MISTAKES[kind] = rule
        return dataclass(frozen=True, kw_only=True)(kind)

    return make


def spoils(rule: str, base: type[Newest] = Newest, **members: Any) -> Callable[[Callable[..., Any]], type[Policy]]:
    """Make a policy of a function that spoils the kept slots, or, of a `Stepper`, one that replaces the step."""

    def make(spoil: Callable[..., Any]) -> type[Policy]:
        def compress(self: Newest, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
            kept = base.compress(self, layer, budget_tokens)
            return spoil(self, layer, kept) or kept

        method = {"step": spoil} if base is Stepper else {"compress": compress}
        return breaks(rule)(type(spoil.__name__, (base,), {**method, **members, "__module__": __name__}))

    return make


# ---- the class -------------------------------------------------------------------------------------------------------


class Undecorated(Newest):
    name: ClassVar[str] = "undecorated"
    sinks: int = 4  # no field


@dataclass(frozen=True, kw_only=True)
class Nameless(Newest):
    pass


MISTAKES |= {Undecorated: "dataclass", Nameless: "name"}


@breaks("bad_budgets")
class Unvalidated(Newest):
    def __post_init__(self) -> None:
        pass


@breaks("options")
class TupleOption(Newest):
    kernel: tuple[int, int] = (3, 5)  # comes back from JSON as a list


@breaks("options")
class NameTaken(Newest):
    name: ClassVar[str] = "h2o"  # `method=h2o` builds another class


@breaks("declares_step")
class StepUndeclared(Newest):
    def step(self, slots: DecodeSlots, attention: Tensor) -> None:  # never called
        slots.keys[:, 0] = slots.keys[:, -1]


@breaks("layer_budgets")
class Overdrawn(Newest):
    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        return [n_tokens, *super().layer_budgets(n_tokens, n_layers)[1:]]


@spoils("needs", needs=frozenset({"gradients"}))
def demanding(self, layer, kept):
    """Needs what no prefill observes."""


# ---- what compress returns -------------------------------------------------------------------------------------------


@spoils("compress")
def undeclared(self, layer, kept):
    layer.group_scores(layer.column_sums)  # never asked for


@spoils("compress", needs=frozenset({"window_attention"}), window_tokens=16)
def window_blind(self, layer, kept):
    layer.window_attention.view(layer.n_query_heads, 16, layer.n_tokens)  # short prompts have fewer rows


@spoils("shapes")
def per_query_head(self, layer, kept):
    parts = (kept.keys, kept.values, kept.positions)
    return CompressedLayer(*(part.repeat_interleave(layer.group_size, 0) for part in parts))


@spoils("dtypes")
def upcast(self, layer, kept):
    kept.values = kept.values.float()


@spoils("lengths")
def short_lengths(self, layer, kept):
    kept.lengths = torch.full(kept.keys.shape[:1], kept.keys.shape[1], dtype=torch.int32)


@breaks("lengths")
class RaggedStepper(Stepper):
    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        kept = super().compress(layer, budget_tokens)
        kept.lengths = torch.full((layer.n_kv_heads,), budget_tokens)
        return kept


@breaks("exact_budget")
class Greedy(Newest):
    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        return super().compress(layer, min(budget_tokens + 1, layer.n_tokens))


@spoils("exact_budget")
def padded_short(self, layer, kept):
    n_slots = kept.keys.shape[1]
    kept.lengths = torch.full((layer.n_kv_heads,), n_slots)
    kept.lengths[0] = max(1, n_slots // 2)


@spoils("positions")
def twice(self, layer, kept):
    return keep(layer, torch.cat([kept.positions[0, -1:], kept.positions[0, 1:]]))


@spoils("positions")
def from_one(self, layer, kept):
    kept.positions = kept.positions + 1


@spoils("bias")
def hiding(self, layer, kept):
    kept.bias = torch.zeros(kept.positions.shape)
    kept.bias[:, :1] = -torch.inf


@spoils("bias")
def half_bias(self, layer, kept):
    kept.bias = torch.zeros(kept.positions.shape, dtype=torch.bfloat16)


@spoils("finite")
def zero_spread(self, layer, kept):
    spread = (layer.keys - layer.keys[:, :1]).abs().amax((1, 2), keepdim=True)
    kept.values = torch.where(spread / spread == 1, kept.values, spread / spread)


# ---- purity ----------------------------------------------------------------------------------------------------------


@spoils("inputs", needs=frozenset({"column_sums"}))
def scribbling(self, layer, kept):
    layer.column_sums /= layer.query_counts


@spoils("inputs")
def replacing(self, layer, kept):
    layer.keys = layer.keys[:, :1]


@breaks("inputs")
class SelfTuning(Newest):
    sinks: int = 4

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        object.__setattr__(self, "sinks", self.sinks + 1)
        return super().compress(layer, budget_tokens)


@spoils("deterministic", calls=[])
def remembering(self, layer, kept):
    self.calls.append(layer)
    return keep(layer, (torch.arange(kept.keys.shape[1]) + len(self.calls)).remainder(layer.n_tokens))


@spoils("generators")
def unseeded(self, layer, kept):
    return keep(layer, torch.randperm(layer.n_tokens)[: kept.keys.shape[1]].sort().values)


@spoils("full_budget")
def never_whole(self, layer, kept):
    kept.values = 0.5 * kept.values


# ---- steps -----------------------------------------------------------------------------------------------------------


@spoils("steps", Stepper)
def scratch_forgotten(self, slots, attention):
    slots.state.mass[:, :-1] += attention.unflatten(0, (slots.keys.shape[0], -1)).sum(1)


@spoils("in_place", Stepper)
def rebinding(self, slots, attention):
    slots.keys, slots.values = slots.keys.roll(-1, 1), slots.values.roll(-1, 1)


@spoils("in_place", Stepper)
def state_rebinding(self, slots, attention):
    slots.state.mass = slots.state.mass + 1.0


@spoils("new_tokens", Stepper)
def forgetting(self, slots, attention):
    slots.state.mass += 1.0


@spoils("step_finite", Stepper)
def exploding(self, slots, attention):
    Stepper.step(self, slots, attention)
    slots.state.mass /= slots.step_index


@spoils("step_pure", Stepper)
def dicing(self, slots, attention):
    slots.move_new_token(torch.randint(slots.n_slots, (1,)))


@spoils("no_host_reads", Stepper)
def reading_back(self, slots, attention):
    if attention.max() >= 0:
        Stepper.step(self, slots, attention)


@spoils("no_host_reads", Stepper)
def mask_indexing(self, slots, attention):
    Stepper.step(self, slots, attention)
    slots.state.mass[slots.state.mass < 0] = 0.0


@spoils("engines", Stepper)
def first_sight(self, slots, attention):
    """Start anew with every `DecodeSlots` not seen before, of which the plain engine makes one per token."""
    if not hasattr(slots, "seen"):
        slots.seen = True
        slots.state.mass.zero_()
    slots.state.mass += attention.unflatten(0, (slots.keys.shape[0], -1)).sum(1)
    target = slots.state.mass[:, :-1].min(1, keepdim=True).indices
    for tensor in slots.per_slot:
        index = target.reshape(target.shape + (1,) * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
        tensor.scatter_(1, index, tensor[:, -1:].clone())
