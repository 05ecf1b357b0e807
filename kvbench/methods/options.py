"""Checks for policy options: each raises `ConfigError` with the value, the limit and the choices.

Also the one reduction from query heads to KV heads that both `compress` and `step` need.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvbench.errors import ConfigError

GROUP_REDUCTIONS = ("mean", "max", "first")


def require_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{option}={value!r} is not one of {', '.join(choices)}")


def require_bool(option: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{option}={value!r} is not true or false")


def require_count(option: str, value: object, minimum: int) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{option}={value!r} is not an integer >= {minimum}")


def require_number(
    option: str,
    value: object,
    low: float,
    high: float,
    *,
    include_low: bool = True,
    include_high: bool = True,
) -> None:
    """Raise `ConfigError` unless `value` is a number between `low` and `high`, ends included as asked."""
    inside = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (low < value or (include_low and value == low))
        and (value < high or (include_high and value == high))
    )
    if not inside:
        left, right = "[" if include_low else "(", "]" if include_high else ")"
        raise ConfigError(f"{option}={value!r} is not in {left}{low:g}, {high:g}{right}")


def reduce_groups(scores: Tensor, n_kv_heads: int, reduce: str) -> Tensor:
    """Reduce query-head scores to KV heads; query head h belongs to KV head h // G.

    Args:
        scores: `(H, ...)`.
        n_kv_heads: H_k.
        reduce: "mean", "max" or "first" (first query head of each group, as in llama-recipes' H2O).

    Returns:
        `(H_k, ...)`; the argument itself where every KV head has one query head.

    Raises:
        ConfigError: for any other `reduce`.
    """
    require_choice("group_reduce", reduce, GROUP_REDUCTIONS)
    if scores.shape[0] == n_kv_heads:
        return scores  # a group of one: nothing to launch
    grouped = scores.unflatten(0, (n_kv_heads, -1))
    if reduce == "mean":
        return grouped.mean(1)
    if reduce == "max":
        return grouped.amax(1)
    return grouped[:, 0]
