"""Checks for policy options: each raises `ConfigError` with the value, the limit and the choices."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.errors import ConfigError
from kvbench.methods.base import GROUP_REDUCTIONS, reduce_groups

__all__ = ["GROUP_REDUCTIONS", "reduce_groups", "require_bool", "require_choice", "require_count", "require_number"]


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
