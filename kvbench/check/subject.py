"""The policy under check with what it did in every case, computed once and looked at by many rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import torch

from kvbench.check.inputs import BUDGETS, N_LAYERS, Case, cases, copy_of, layer_states
from kvbench.errors import BudgetError, ConfigError
from kvbench.methods.base import CompressedLayer, LayerStates, Policy


class Subject:
    """One policy under check.

    Args:
        policy: the policy; its own budget is tried beside `BUDGETS`.

    Attributes:
        policy: as given.
        kept: what `compress` returned in each case; filled by the rule that calls it first.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.kept: dict[Case, CompressedLayer] = {}
        self._states: dict[tuple[object, ...], LayerStates] = {}

    @cached_property
    def policies(self) -> dict[float, Policy]:
        """The policy at each budget that it takes; one that refuses a budget (`full`) lacks it here."""
        found: dict[float, Policy] = {}
        for budget in sorted({*BUDGETS, float(self.policy.budget)}):
            try:
                found[budget] = dataclasses.replace(self.policy, budget=budget)
            except ConfigError:
                continue
        return found

    @cached_property
    def cases(self) -> list[Case]:
        """The cases whose budget the policy takes: refused are those where `layer_budgets` raises `BudgetError`."""
        found = cases(self.policy.window_tokens, self.policies)
        return [case for case in found if self._takes(case)]

    def _takes(self, case: Case) -> bool:
        try:
            self.budget_tokens(case)
        except BudgetError:
            return False
        return True

    def budget_tokens(self, case: Case) -> int:
        """Slots per KV head of the case's layer.

        Raises:
            BudgetError: if the policy refuses the budget.
        """
        return self.policies[case.budget].layer_budgets(case.n_tokens, N_LAYERS)[case.layer_index]

    def states(self, case: Case) -> LayerStates:
        """The case's inputs; shared by all budgets, so never handed to the policy itself."""
        policy = self.policies[case.budget]
        key = (dataclasses.replace(case, budget=1.0), policy.needs, policy.window_tokens)
        if key not in self._states:
            self._states[key] = layer_states(case, policy)
        return self._states[key]

    def compress(self, case: Case, states: LayerStates | None = None) -> CompressedLayer:
        """Call `compress` as the engines do, on a copy of the case's inputs unless others are given."""
        with torch.inference_mode():
            policy = self.policies[case.budget]
            return policy.compress(states or copy_of(self.states(case)), self.budget_tokens(case))

    def heads(self) -> Iterator[tuple[Case, CompressedLayer, int, int]]:
        """Every KV head of every case: the case, its layer, the head, and the slots the head keeps."""
        for case, kept in self.kept.items():
            n_slots = kept.keys.shape[1]
            lengths = [n_slots] * case.n_kv_heads if kept.lengths is None else kept.lengths.tolist()
            for head, length in enumerate(lengths):
                yield case, kept, head, length

    @cached_property
    def step_cases(self) -> list[Case]:
        """Cases whose cache is stepped: full precision and half, GQA and MHA, small and large budgets."""
        wanted = [case for case in self.cases if case.layer_index == N_LAYERS // 2 and not case.equal_keys]
        return [case for case in wanted if case.n_tokens == 40 and case.budget in (0.2, 0.5, 1.0)]
