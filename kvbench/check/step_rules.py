"""Rules about `step`: one new token after the other in a cache of constant size."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.check.host_reads import host_reads
from kvbench.check.inputs import Case, bring_token, decode_slots
from kvbench.check.pure_rules import generator_states, same, seeded_globals
from kvbench.check.rule import Broken, NotRun, describe
from kvbench.check.subject import Subject
from kvbench.methods.base import DecodeSlots, constant_state, slot_state

N_STEPS = 24


def steps(subject: Subject) -> str:
    """`step` takes new tokens one after the other at every budget, in full precision and in half."""
    for case in _cases(subject):
        slots = decode_slots(subject.kept[case])
        for number in range(N_STEPS):
            attention = bring_token(slots, case, number)
            try:
                _step(subject, case, slots, attention)
            except Exception as error:  # foreign code: whatever it raises is a finding
                raise Broken(
                    f"{case}, new token {number}: {describe(error)}",
                    "mend it; slots hold m + 1 entries (the last is the new token), attention is (H, m + 1) fp32",
                ) from error
    return f"{N_STEPS} new tokens in each of {len(_cases(subject))} cases"


def steps_in_place(subject: Subject) -> str:
    """`step` writes into the tensors it is given: it neither rebinds them nor changes `step_index`."""
    for case in _cases(subject):
        slots = decode_slots(subject.kept[case])
        attention = bring_token(slots, case, 0)
        given = {"keys": slots.keys, "values": slots.values, "step_index": slots.step_index}
        held = {**slot_state(slots.state), **constant_state(slots.state)}
        shapes = {name: tensor.shape for name, tensor in given.items()}
        _step(subject, case, slots, attention)
        for name, tensor in given.items():
            if getattr(slots, name) is not tensor or tensor.shape != shapes[name]:
                raise Broken(
                    f"{case}: slots.{name} was rebound or resized",
                    "write in place: tensor.copy_(...), index_copy_, scatter_ or tensor[...] = ...",
                )
        now = {**slot_state(slots.state), **constant_state(slots.state)}
        if now.keys() != held.keys() or any(now[name] is not held[name] for name in held):
            raise Broken(
                f"{case}: a field of slots.state was added, removed or rebound",
                "create state in compress and write it in place in step",
            )
        if int(slots.step_index) != 0:
            raise Broken(f"{case}: step_index was changed to {int(slots.step_index)}", "the cache counts; only read it")
    return "same tensors, same sizes"


def keeps_new_tokens(subject: Subject) -> str:
    """New tokens reach the slots 0 .. m-1: the scratch slot is overwritten by the next token."""
    moved = total = 0
    for case in _cases(subject):
        slots = decode_slots(subject.kept[case])
        for number in range(N_STEPS):
            attention = bring_token(slots, case, number)
            before = slots.keys[:, :-1].clone(), slots.values[:, :-1].clone()
            _step(subject, case, slots, attention)
            moved += not (same(before[0], slots.keys[:, :-1]) and same(before[1], slots.values[:, :-1]))
            total += 1
    if not moved:
        raise Broken(
            f"none of {total} new tokens left a trace in slots 0 .. m-1",
            "move the scratch slot (index m) over another slot, with its state; or leave out `steps`",
        )
    return f"{moved} of {total} new tokens changed the kept slots"


def step_stays_finite(subject: Subject) -> str:
    """Keys, values and state stay finite over many steps."""
    for case in _cases(subject):
        slots = _run(subject, case, N_STEPS)
        for name, tensor in {"keys": slots.keys, "values": slots.values, **slot_state(slots.state)}.items():
            if tensor.is_floating_point() and not bool(tensor[:, :-1].isfinite().all()):
                raise Broken(f"{case}: {name} after {N_STEPS} steps are not finite", "guard divisions by zero")
    return f"after {N_STEPS} steps"


def step_is_pure(subject: Subject) -> str:
    """`step` depends on its slots alone: steps repeat bit for bit, and no global generator is used."""
    before = generator_states()
    cases = _cases(subject)
    once = {}
    for case in cases:
        with seeded_globals():
            once[case] = _run(subject, case, N_STEPS)
    for case in reversed(cases):
        with seeded_globals():
            before_steps = generator_states()
            again = _run(subject, case, N_STEPS)
            used = [name for name, state in generator_states().items() if state != before_steps[name]]
        if used:
            raise Broken(f"{case}: the global generator of {', '.join(used)} has moved", _SEED)
        for name, tensor in _tensors(once[case]).items():
            if not same(tensor, _tensors(again)[name]):
                raise Broken(f"{case}: {name} differ between two runs of the same steps", _SEED)
    assert before == generator_states()
    return f"{len(cases)} runs of {N_STEPS} steps repeated in reverse order, bit for bit"


def step_reads_nothing_back(subject: Subject) -> str:
    """`step` never waits for the device (best effort: what can be seen on a CPU)."""
    for case in _cases(subject):
        slots = decode_slots(subject.kept[case])
        for number in range(2):
            attention = bring_token(slots, case, number)
            with host_reads() as seen:
                _step(subject, case, slots, attention)
            if seen:
                raise Broken(
                    f"{case}: {', '.join(dict.fromkeys(seen))}",
                    "stay on the device: torch.where, gather and scatter_ instead of if, item() and boolean masks; "
                    "step_index may be used in tensor arithmetic",
                )
    return "no item(), tolist(), bool(tensor) or boolean mask"


_SEED = "keep what a step needs in state and constants; derive randomness from the seed in compress and from step_index"


def _cases(subject: Subject) -> list[Case]:
    if not subject.policy.steps:
        raise NotRun("one-shot: the policy declares no step")
    return subject.step_cases


def _step(subject: Subject, case: Case, slots: DecodeSlots, attention: Tensor) -> None:
    with torch.inference_mode():
        subject.policies[case.budget].step(slots, attention)


def _run(subject: Subject, case: Case, n_steps: int) -> DecodeSlots:
    slots = decode_slots(subject.kept[case])
    for number in range(n_steps):
        _step(subject, case, slots, bring_token(slots, case, number))
    return slots


def _tensors(slots: DecodeSlots) -> dict[str, Tensor]:
    parts = {"keys": slots.keys[:, :-1], "values": slots.values[:, :-1]}
    parts |= {f"state {name}": tensor[:, :-1] for name, tensor in slot_state(slots.state).items()}
    return parts | {f"constant {name}": tensor for name, tensor in constant_state(slots.state).items()}
