"""Words for the annotations of options, which a policy checks when it is built, and the same checks as functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from kvbench.errors import ConfigError
from kvbench.fields import Within


@dataclass(frozen=True)
class WithinExcept(Within):
    """A range without one of its ends; without an upper end, the lower one is left out."""

    left_out: float = 0.0

    def holds(self, value: float) -> bool:
        """Whether the number lies in the range and is not the one left out."""
        return value != self.left_out and super().holds(value)

    def __str__(self) -> str:
        return f" above {self.left_out:g}" if self.high is None else f"{super().__str__()} except {self.left_out:g}"


@dataclass(frozen=True)
class Odd(Within):
    """Odd numbers of a range: widths that have a middle."""

    def holds(self, value: float) -> bool:
        """Whether the number lies in the range and is odd."""
        return value % 2 == 1 and super().holds(value)

    def __str__(self) -> str:
        return f"{super().__str__()}, odd so that it has a middle"


Fraction = Annotated[float, Within(0, 1)]
AboveZero = Annotated[float, WithinExcept(0)]
Count = Annotated[int, Within(0)]
Positive = Annotated[int, Within(1)]
Width = Annotated[int, Odd(1)]
GroupReduction = Literal["mean", "max", "first"]
WholeLayers = Literal["inside", "on_top"]
"""Whether the slots of layers left whole count towards the budget, or the other layers have all of it."""


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
    option: str, value: object, low: float, high: float, *, include_low: bool = True, include_high: bool = True
) -> None:
    """Raise `ConfigError` unless `value` is a number between `low` and `high`, ends included as asked."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")
    if not (low < number < high or (include_low and number == low) or (include_high and number == high)):
        left, right = "[" if include_low else "(", "]" if include_high else ")"
        raise ConfigError(f"{option}={value!r} is not in {left}{low:g}, {high:g}{right}")
