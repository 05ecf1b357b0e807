"""Slots per layer for methods that do not treat all layers alike; the sum over layers is always the budget."""

from __future__ import annotations

import math

from kvbench.errors import BudgetError
from kvbench.methods.base import Policy, larger_budget


def with_whole_layers(policy: Policy, n_tokens: int, n_layers: int, n_first: int, n_last: int) -> list[int]:
    """Leave the first and last layers whole and spread what is left evenly over the others.

    Args:
        policy: whose budget is spent.
        n_tokens: prompt length T.
        n_layers: number of layers.
        n_first: first layers left whole.
        n_last: last layers left whole.

    Returns:
        Slots per KV head and layer, summing to `n_layers * budget_tokens(n_tokens)`.

    Raises:
        BudgetError: if the whole layers leave the others fewer than the method's `minimum_tokens` each.
    """
    others = [index for index in range(n_layers) if n_first <= index < n_layers - n_last]
    n_whole = n_layers - len(others)
    total = n_layers * policy.budget_tokens(n_tokens)
    left = total - n_whole * n_tokens
    least = len(others) * policy.minimum_tokens
    if left < least:
        options = {"whole_first_layers": n_first, "whole_last_layers": n_last}
        lower = " or ".join(name for name, count in options.items() if count)
        average = math.ceil((n_whole * n_tokens + least) / n_layers)
        raise BudgetError(
            f"budget {policy.budget} of {n_tokens} tokens in {n_layers} layers = {total} slots per KV head; "
            f"{policy.name} needs {n_whole * n_tokens} for {n_whole} whole layers and at least {least} for the others: "
            f"{f'lower {lower}, or ' if lower else ''}{larger_budget(average, n_tokens)}"
        )
    budgets = [n_tokens] * n_layers
    for rank, index in enumerate(others):
        budgets[index] = (rank + 1) * left // len(others) - rank * left // len(others)
    return budgets
