"""Policies with one deliberate mistake each, and the rule of `kvbench.testing` that has to find it."""

from dataclasses import dataclass, replace
from typing import ClassVar

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


@dataclass(frozen=True, kw_only=True)
class Shares(Newest):
    """Nothing is wrong: layers get slots by how much the model attends to their keys while it repeats the prompt."""

    name: ClassVar[str] = "shares"
    allocates: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"window_logsumexp", "output_weight", "window_attention"})
    window_tokens: ClassVar[int] = 5

    def preference(self, layer: LayerStates) -> Tensor:
        log_sums, rows = layer.observed("window_logsumexp")[:, -5:], layer.window_attention[:, -5:]
        return (log_sums.std() + rows.amax() + layer.observed("output_weight").float().norm()).reshape(1)

    def allocate(self, preferences, n_tokens, n_kv_heads):
        n_layers, total = len(preferences), len(preferences) * n_kv_heads * self.budget_tokens(n_tokens)
        order = torch.cat(list(preferences)).argsort().tolist()
        budgets = [total // n_layers] * n_layers
        spare = min(total // n_layers - n_kv_heads, n_kv_heads * n_tokens - total // n_layers)
        budgets[order[0]], budgets[order[-1]] = budgets[order[0]] - spare, budgets[order[-1]] + spare
        return budgets

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        each, more = divmod(budget_tokens, layer.n_kv_heads)
        lengths = torch.tensor([each + (head < more) for head in range(layer.n_kv_heads)])
        kept = super().compress(layer, int(lengths.max()))
        keys, values = kept.keys.clone(), kept.values.clone()
        return CompressedLayer(keys, values, kept.positions.clone(), lengths=lengths)


def breaks(rule):
    """Note the rule that a class breaks, and make it a policy that is sound otherwise."""

    def make(kind: type[Policy]) -> type[Policy]:
        kind.name = kind.__dict__.get("name", kind.__name__.lower())
        MISTAKES[kind] = rule
        return dataclass(frozen=True, kw_only=True)(kind)

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
    def __post_init__(self):
        pass


@breaks("options")
class TupleOption(Newest):
    kernel: tuple[int, int] = (3, 5)  # comes back from JSON as a list


@breaks("options")
class NameTaken(Newest):
    name: ClassVar[str] = "h2o"  # `method=h2o` builds another class


@breaks("declares_step")
class StepUndeclared(Newest):
    def step(self, slots, attention):  # never called
        slots.keys[:, 0] = slots.keys[:, -1]


@breaks("layer_budgets")
class Overdrawn(Newest):
    def layer_budgets(self, n_tokens, n_layers):
        return [n_tokens, *super().layer_budgets(n_tokens, n_layers)[1:]]


@breaks("allocate")
class Overallocated(Shares):
    def allocate(self, preferences, n_tokens, n_kv_heads):
        return [slots + 1 for slots in super().allocate(preferences, n_tokens, n_kv_heads)]


@breaks("lengths")
class RaggedStepper(Stepper):
    def compress(self, layer, budget_tokens):
        return replace(super().compress(layer, budget_tokens), lengths=torch.full((layer.n_kv_heads,), budget_tokens))


@breaks("exact_budget")
class Greedy(Newest):
    def compress(self, layer, budget_tokens):
        return super().compress(layer, min(budget_tokens + 1, layer.n_tokens))


@breaks("inputs")
class SelfTuning(Newest):
    sinks: int = 4

    def compress(self, layer, budget_tokens):
        object.__setattr__(self, "sinks", self.sinks + 1)
        return super().compress(layer, budget_tokens)


# ---- what compress does: a function of the layer and what a sound policy keeps of it ---------------------------------


def per_query_head(layer, kept):
    parts = (kept.keys, kept.values, kept.positions)
    return CompressedLayer(*(part.repeat_interleave(layer.group_size, 0) for part in parts))


def half_as_long_as_it_says(layer, kept):
    lengths = torch.full((layer.n_kv_heads,), kept.keys.shape[1])
    lengths[0] = max(1, kept.keys.shape[1] // 2)
    return replace(kept, lengths=lengths)


def zero_spread(layer, kept):
    spread = (layer.keys - layer.keys[:, :1]).abs().amax((1, 2), keepdim=True)
    return replace(kept, values=torch.where(spread / spread == 1, kept.values, spread / spread))


def remembering(layer, kept, calls=[]):  # noqa: B006  (the mistake on trial)
    calls.append(layer)
    return keep(layer, (torch.arange(kept.keys.shape[1]) + len(calls)).remainder(layer.n_tokens))


def biased(kept, value, dtype=torch.float32):
    bias = torch.zeros(kept.positions.shape, dtype=dtype)
    bias[:, :1] = value
    return replace(kept, bias=bias)


COMPRESS = {
    "Demanding": ("needs", lambda layer, kept: kept, {"gradients"}),
    "Undeclared": ("compress", lambda layer, kept: layer.group_scores(layer.column_sums), ()),
    "WindowBlind": (  # short prompts have fewer rows
        "compress", lambda layer, kept: layer.window_attention.view(layer.n_query_heads, 16, -1, layer.n_tokens),
        {"window_attention"},
    ),
    "PerQueryHead": ("shapes", per_query_head, ()),
    "Upcast": ("dtypes", lambda layer, kept: replace(kept, values=kept.values.float()), ()),
    "ShortLengths": ("lengths", lambda layer, kept: replace(kept, lengths=kept.positions.ne(-1).sum(1).int()), ()),
    "PaddedShort": ("exact_budget", half_as_long_as_it_says, ()),
    "Twice": ("positions", lambda layer, kept: keep(layer, kept.positions[0].roll(1).index_fill(
        0, torch.tensor([kept.keys.shape[1] - 1]), layer.n_tokens - 1)), ()),
    "FromOne": ("positions", lambda layer, kept: replace(kept, positions=kept.positions + 1), ()),
    "Hiding": ("bias", lambda layer, kept: biased(kept, -torch.inf), ()),
    "HalfBias": ("bias", lambda layer, kept: biased(kept, 0.0, torch.bfloat16), ()),
    "ZeroSpread": ("finite", zero_spread, ()),
    "Scribbling": ("inputs", lambda layer, kept: layer.column_sums.div_(layer.query_counts), {"column_sums"}),
    "Replacing": ("inputs", lambda layer, kept: setattr(layer, "keys", layer.keys[:, :1]), ()),
    "Remembering": ("deterministic", remembering, ()),
    "Unseeded": (
        "generators", lambda layer, kept: keep(layer, torch.randperm(layer.n_tokens)[: kept.keys.shape[1]]), (),
    ),
    "NeverWhole": ("full_budget", lambda layer, kept: replace(kept, values=0.5 * kept.values), ()),
}  # fmt: skip
"""Class -> the rule it breaks, what it does to the kept slots, its needs."""


# ---- what step does --------------------------------------------------------------------------------------------------


def received(slots, attention):
    return attention.unflatten(0, (slots.keys.shape[0], -1)).sum(1)


def rebinding(slots, attention):
    slots.keys, slots.values = slots.keys.roll(-1, 1), slots.values.roll(-1, 1)


def exploding(slots, attention):
    Stepper().step(slots, attention)
    slots.state.mass /= slots.step_index


def reading_back(slots, attention):
    if attention.max() >= 0:
        Stepper().step(slots, attention)


def mask_indexing(slots, attention):
    Stepper().step(slots, attention)
    slots.state.mass[slots.state.mass < 0] = 0.0


def first_sight(slots, attention):
    """Start anew with every `DecodeSlots` not seen before, of which the plain engine makes one per token."""
    if not hasattr(slots, "seen"):
        slots.seen = True
        slots.state.mass.zero_()
    slots.state.mass += received(slots, attention)
    target = slots.state.mass[:, :-1].min(1, keepdim=True).indices
    for tensor in slots.per_slot:
        index = target.reshape(target.shape + (1,) * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
        tensor.scatter_(1, index, tensor[:, -1:].clone())


STEPS = {
    "ScratchForgotten": ("steps", lambda slots, attention: slots.state.mass[:, :-1].add_(received(slots, attention))),
    "Rebinding": ("in_place", rebinding),
    "StateRebinding": ("in_place", lambda slots, attention: setattr(slots.state, "mass", slots.state.mass + 1.0)),
    "Forgetting": ("new_tokens", lambda slots, attention: slots.state.mass.add_(1.0)),
    "Exploding": ("step_finite", exploding),
    "Dicing": ("step_pure", lambda slots, attention: slots.move_new_token(torch.randint(slots.n_slots, (1,)))),
    "ReadingBack": ("no_host_reads", reading_back),
    "MaskIndexing": ("no_host_reads", mask_indexing),
    "FirstSight": ("engines", first_sight),
}
"""Class -> the rule it breaks, and its step."""


def compress_and_spoil(spoil):
    def compress(self, layer, budget_tokens):
        kept = Newest.compress(self, layer, budget_tokens)
        spoiled = spoil(layer, kept)
        return spoiled if isinstance(spoiled, CompressedLayer) else kept

    return compress


for name, (rule, spoil, needs) in COMPRESS.items():
    members = {"compress": compress_and_spoil(spoil), "needs": frozenset(needs), "__module__": __name__}
    members |= {"window_tokens": 16} if name == "WindowBlind" else {}
    globals()[name] = breaks(rule)(type(name, (Newest,), members))
for name, (rule, step) in STEPS.items():
    members = {"step": lambda self, slots, attention, step=step: step(slots, attention), "__module__": __name__}
    globals()[name] = breaks(rule)(type(name, (Stepper,), members))
