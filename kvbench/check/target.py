"""From the words of a command line to a policy."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from kvbench.errors import ConfigError
from kvbench.methods.base import Policy
from kvbench.methods.registry import build_policy


def policy_from(target: str, settings: Sequence[str] = ()) -> Policy:
    """Build the policy to check.

    Args:
        target: a method name ("h2o") or a class in a module ("my.module:MyPolicy").
        settings: options as `name=value`, values as on the command line of kvbench.

    Raises:
        ConfigError: if there is no such method, module or class, it is no complete policy, or it refuses an option.
    """
    options = parse_options(settings)
    if ":" not in target:
        return build_policy(target, options)
    kind = _policy_class(target)
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"unknown option {', '.join(unknown)} for {target}: choose among {', '.join(known)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"{target} cannot be built ({error}): define compress() and give options defaults") from error


def parse_options(settings: Sequence[str]) -> dict[str, Any]:
    """Options from words such as `sinks=4`.

    Raises:
        ConfigError: for a word that is no `name=value`.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(settings))
    except HydraException as error:
        raise ConfigError(f"options {' '.join(settings)} cannot be read: write name=value") from error
    if sweeps := [override.input_line for override in overrides if override.is_sweep_override()]:
        raise ConfigError(f"{sweeps[0]} gives several values: check one policy at a time")
    return {override.key_or_group: override.value() for override in overrides}


def _policy_class(target: str) -> type[Policy]:
    module, _, name = target.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f"{target} cannot be loaded ({error}): write module:Class, with the module's folder in the current "
            "directory or installed"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise ConfigError(f"{target} is not a subclass of kvbench.methods.base.Policy: derive it from that class")
    return kind
