"""Policies whose decoding step breaks one rule of the contract each; see `wrong_policies.py`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from wrong_policies import Stepper

from kvbench.methods.base import DecodeSlots


@dataclass(frozen=True, kw_only=True)
class ScratchForgotten(Stepper):
    """steps: takes attention to be as wide as the slots that stay."""

    name: ClassVar[str] = "scratch_forgotten"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        slots.state.mass[:, :-1] += attention.unflatten(0, (slots.keys.shape[0], -1)).sum(1)


@dataclass(frozen=True, kw_only=True)
class Rebinding(Stepper):
    """in_place: a new tensor of the same size."""

    name: ClassVar[str] = "rebinding"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        slots.keys = slots.keys.roll(-1, 1)
        slots.values = slots.values.roll(-1, 1)


@dataclass(frozen=True, kw_only=True)
class StateRebinding(Stepper):
    """in_place: a new tensor in a field of the state."""

    name: ClassVar[str] = "state_rebinding"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        slots.state.mass = slots.state.mass + 1.0


@dataclass(frozen=True, kw_only=True)
class Forgetting(Stepper):
    """new_tokens: only counts, so every new token is overwritten by the next."""

    name: ClassVar[str] = "forgetting"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        slots.state.mass += 1.0


@dataclass(frozen=True, kw_only=True)
class Exploding(Stepper):
    """step_finite: divides by a count that starts at zero."""

    name: ClassVar[str] = "exploding"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        super().step(slots, attention)
        slots.state.mass /= slots.step_index


@dataclass(frozen=True, kw_only=True)
class Dicing(Stepper):
    """step_pure: the slot is drawn from the global generator."""

    name: ClassVar[str] = "dicing"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        target = torch.randint(slots.keys.shape[1] - 1, (1,))
        for tensor in (slots.keys, slots.values):
            tensor.index_copy_(1, target, tensor[:, -1:].clone())


@dataclass(frozen=True, kw_only=True)
class ReadingBack(Stepper):
    """no_host_reads: an `if` on a tensor."""

    name: ClassVar[str] = "reading_back"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        if attention.max() >= 0:
            super().step(slots, attention)


@dataclass(frozen=True, kw_only=True)
class MaskIndexing(Stepper):
    """no_host_reads: a boolean mask as index."""

    name: ClassVar[str] = "mask_indexing"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        super().step(slots, attention)
        mass = slots.state.mass
        mass[mass < 0] = 0.0


@dataclass(frozen=True, kw_only=True)
class FirstSight(Stepper):
    """engines: starts anew with every `DecodeSlots` it has not seen, of which the plain engine makes one per token."""

    name: ClassVar[str] = "first_sight"

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        if not hasattr(slots, "seen"):
            slots.seen = True  # type: ignore[attr-defined]  # the mistake on trial
            slots.state.mass.zero_()
        slots.state.mass += attention.unflatten(0, (slots.keys.shape[0], -1)).sum(1)
        target = slots.state.mass[:, :-1].min(1, keepdim=True).indices
        for tensor in slots.per_slot:
            index = target.reshape(target.shape + (1,) * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
            tensor.scatter_(1, index, tensor[:, -1:].clone())
