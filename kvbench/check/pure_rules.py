"""Rules about purity: what `compress` may depend on, and what it must leave alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kvbench.check.inputs import SEED, Case, copy_of, tensors_of
from kvbench.check.rule import Broken
from kvbench.check.subject import Subject
from kvbench.methods.base import CompressedLayer, constant_state, slot_state

SEEDED = "draw from a torch.Generator seeded with layer.seed and layer.layer_index, or from kvbench.ops.counter_rng"


def deterministic(subject: Subject) -> str:
    """The same layer with the same seed gives the same slots, whatever was compressed in between."""
    cases = _chosen(subject)
    once = {}
    for case in cases:
        with seeded_globals():
            once[case] = subject.compress(case)
    for case in reversed(cases):
        with seeded_globals():
            again = subject.compress(case)
        if different := differences(once[case], again):
            raise Broken(
                f"{case}: {', '.join(different)} differ between two calls",
                f"depend on the layer and its seed alone: keep nothing between calls; {SEEDED}",
            )
    return f"{len(cases)} cases repeated in reverse order, bit for bit"


def global_generators(subject: Subject) -> str:
    """No global generator (torch, NumPy, random) is used or seeded."""
    cases = _chosen(subject)
    before = generator_states()
    for case in cases:
        subject.compress(case)
    if used := [name for name, state in generator_states().items() if state != before[name]]:
        raise Broken(f"the global generator of {', '.join(used)} has moved", SEEDED)
    return "torch, NumPy and random untouched"


def inputs_untouched(subject: Subject) -> str:
    """`compress` writes neither to the layer's tensors nor to the policy."""
    cases = _chosen(subject)
    for case in cases:
        layer = copy_of(subject.states(case))
        fields, options = dict(vars(layer)), dataclasses.asdict(subject.policies[case.budget])
        subject.compress(case, layer)
        if moved := [name for name, value in vars(layer).items() if value is not fields.get(name)]:
            raise Broken(f"{case}: layer.{', '.join(moved)} was replaced", "leave LayerStates as it is")
        left = tensors_of(layer)
        for name, tensor in tensors_of(subject.states(case)).items():
            if name not in left or not same(tensor, left[name]):
                raise Broken(f"{case}: layer.{name} was written to", "clone() before writing in place")
        if dataclasses.asdict(subject.policies[case.budget]) != options:
            raise Broken(f"{case}: the policy's options changed", "compute what depends on the layer anew in each call")
    return f"{len(cases)} cases compared with copies"


def _chosen(subject: Subject) -> list[Case]:
    """Cases of the middle length at all budgets: enough to see impurity, and quick."""
    return [case for case in subject.kept if case.n_tokens == 40]


def differences(one: CompressedLayer, other: CompressedLayer) -> list[str]:
    """Names of the parts in which two compressed layers differ."""
    first, second = _parts(one), _parts(other)
    return [
        name
        for name in sorted({*first, *second})
        if name not in first or name not in second or not same(first[name], second[name])
    ]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _parts(layer: CompressedLayer) -> dict[str, Tensor]:
    parts = {"keys": layer.keys, "values": layer.values}
    parts |= {f"state {name}": tensor for name, tensor in slot_state(layer.state).items()}
    parts |= {f"constant {name}": tensor for name, tensor in constant_state(layer.state).items()}
    for name, tensor in (("positions", layer.positions), ("lengths", layer.lengths), ("bias", layer.bias)):
        if tensor is not None:
            parts[name] = tensor
    return parts


def generator_states() -> dict[str, object]:
    """The states of all global generators, as values that can be compared."""
    kind, numbers, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  (the global generator is what is looked at)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "NumPy": (kind, np.asarray(numbers).tobytes(), *rest),
        "random": random.getstate(),
    }


@contextmanager
def seeded_globals() -> Iterator[None]:
    """Run a block with the global generators in a known state, and put them back after it."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002  (as above)
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(SEED)
            np.random.seed(SEED)  # noqa: NPY002  (as above)
            random.seed(SEED)
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002  (as above)
            random.setstate(python_state)
