"""Check the fields of a configuration object against their annotations: types, ranges and choices, in one place.

With `digits: Annotated[int, Within(2, 100)] = 5` and `check_fields(self, "task")` in `__post_init__`, a wrong value is
refused in one line: "task.digits='abc' is not an integer from 2 to 100: give one, e.g. digits=5".
"""

from __future__ import annotations

import dataclasses
import sys
import types
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from kvbench.errors import ConfigError

UNPRINTABLE = ("Cc", "Cs")
"""Control characters (NUL among them) and lone surrogates: no file name, table or terminal takes them."""


@dataclass(frozen=True)
class Within:
    """The range of a number, both ends included; None for no end."""

    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the number lies in the range."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f" of at least {self.low}" if self.high is None else f" of at most {self.high}"
        return f" from {self.low} to {self.high}"


Seed = Annotated[int, Within(-(2**63), 2**63 - 1)]
"""What every generator of random numbers takes."""


def check_fields(config: Any, group: str) -> None:
    """Refuse (`ConfigError`) the first field of a dataclass instance whose value is not what its annotation says.

    Understood are int, float (finite), bool, str (printable), None, `Literal`, sequences, mappings, unions, classes,
    and `Annotated` with a `Within`; any other annotation lets everything pass. `group`, e.g. "task", stands before the
    field's name in messages.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, annotation = getattr(config, field.name), hints[field.name]
        if not fits(value, annotation) or not _printable(value):
            example = _example(field)
            raise ConfigError(
                f"{group}.{field.name}={shown(value)} is not {in_words(annotation)}: give one"
                + (f", e.g. {field.name}={example}" if example else "")
            )


def shown(value: Any) -> str:
    """A value for a message, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation says; see `check_fields` for what is understood."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Within)]
        return fits(value, arguments[0]) and all(limits.holds(value) for limits in ranges)
    if origin in (Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, item = arguments
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(item, arguments[0]) for item in value)
    if annotation in (int, float):
        is_number = isinstance(value, (int, annotation)) and not isinstance(value, bool)
        return is_number and (annotation is int or abs(value) <= sys.float_info.max)
    return isinstance(value, annotation) if annotation is not Any and isinstance(annotation, type) else True


def _printable(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_printable, value))
    return not (isinstance(value, str) and any(unicodedata.category(c) in UNPRINTABLE for c in value))


def in_words(annotation: Any) -> str:
    """What an annotation asks for, as messages and the documentation say it: "an integer of at least 1"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(arguments[0]) + "".join(str(extra) for extra in arguments[1:] if isinstance(extra, Within))
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(choice) for choice in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping, each value {in_words(arguments[1])}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each entry {in_words(arguments[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "printable text", type(None): "null"}
    return names.get(annotation) or f"a {getattr(annotation, '__name__', annotation)}"


def _example(field: dataclasses.Field[Any]) -> str:
    """The default as one writes it on the command line; empty if there is none."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING or value is None or value == "" or value == {}:
        return ""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
