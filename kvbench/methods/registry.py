"""Find policies by name: the files of this package, and every entry point of the group `kvbench.policies`.

The configuration of a method is made here from its class, so that a method is one file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from kvbench import methods
from kvbench.catalogue import ENTRY_POINT_GROUP, WRITE, listing
from kvbench.errors import ConfigError, nearest
from kvbench.methods.base import Policy
from kvbench.methods.full import Full

FIRST_IN_TABLES = (
    "full", "h2o", "cam", "kvmerger", "kvmerger_bias", "kvmerger_plus", "snapkv", "streaming_llm", "knorm", "pyramidkv",
    "adakv", "tova", "keepkv", "weightedkv", "d2o", "expected_attention", "criticalkv", "critical_adakv", "cake",
    "kvzip", "defensivekv", "layer_defensivekv",
)  # fmt: skip
"""Order of the arms of `arms=all`, by age; methods that are not listed follow by name."""
SHARES = (0.5, 0.35, 0.2)
BACKEND_HAS_GONE = (
    " is no option of a method any more: kernels are the engine's choice, so leave it out and set engine.kernels "
    "(auto, torch or triton; engine=plain is torch everywhere)"
)

logger = logging.getLogger(__name__)


def load_policies() -> dict[str, type[Policy]]:
    """All methods by name, sorted: those of this package, and what other distributions register as entry points."""
    policies = dict(_own_policies())
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        origin = f"entry point {entry_point.name} = {entry_point.value}"
        try:
            policy = entry_point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{origin} cannot be loaded ({error}): mend or uninstall the package") from error
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise ConfigError(f"{origin} is not a subclass of kvbench.methods.base.Policy: correct the entry point")
        if policies.setdefault(entry_point.name, policy) is not policy:
            raise ConfigError(f"{origin} claims a name that another package has: uninstall one of them")
    return dict(sorted(policies.items()))


def method_config(policy: type[Policy], **options: object) -> dict[str, Any]:
    """What `method=NAME` composes: class, options and their defaults, where given the values of `options`."""
    defaults = {
        f.name: _written(f.default if f.default_factory is dataclasses.MISSING else f.default_factory())
        for f in dataclasses.fields(policy)
    }
    return {"_target_": f"{policy.__module__}.{policy.__qualname__}", **defaults, **options}


def _written(value: object) -> object:
    """An option's default in a configuration: "???" is Hydra's word for a value that has to be given."""
    if isinstance(value, Policy):  # its class and what differs, so that another class can take its place
        differing = {name: _written(option) for name, option in value.options().items()}
        return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **differing}
    return "???" if value is dataclasses.MISSING else value


def all_arms(before_question: bool = False) -> dict[str, dict[str, Any]]:
    """What `arms=all` composes: every method of this package at 50, 35 and 20 %, the full cache once.

    Methods that have the model repeat a prompt without its question are in `arms=all_before_question` only. KVMerger
    and D2O leave three layers whole, which a model of few layers cannot pay for at the lower budgets.
    """
    arms = {}
    for name, policy in _in_order().items():
        if "reconstruction" in policy().needs and not before_question:
            continue
        if policy is Full:
            arms[name] = method_config(policy)
        else:
            arms |= {f"{name}_{100 * share:.0f}": method_config(policy, budget=share) for share in SHARES}
    return arms


def merging_arms() -> dict[str, dict[str, Any]]:
    """What `arms=merging` composes: every method that merges, with its base, at 50, 35 and 20 %; the full cache."""
    arms = {Full.name: method_config(Full)}
    for name, policy in _in_order().items():
        if (base := policy().without_merging()) is not None:
            for share in SHARES:
                arms[f"{name}_{100 * share:.0f}"] = method_config(policy, budget=share)
                arms[f"{name}_off_{100 * share:.0f}"] = method_config(policy, budget=share, **base.options())
    return arms


def _in_order() -> dict[str, type[Policy]]:
    own = _own_policies()
    return {name: own[name] for name in [*FIRST_IN_TABLES, *sorted(own.keys() - set(FIRST_IN_TABLES))]}


@functools.cache
def _own_policies() -> dict[str, type[Policy]]:
    """Every class in a module of `kvbench.methods` that has a method's name: a file there is all a method needs."""
    modules = [importlib.import_module(f"{methods.__name__}.{found.name}") for found in iter_modules(methods.__path__)]
    classes = [(module, value) for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {
        policy.name: policy
        for module, policy in classes
        if issubclass(policy, Policy) and policy.__module__ == module.__name__ and "name" in vars(policy)
    }


def policy_class(name: str) -> type[Policy]:
    """The class of a method by its name, `module:Class` or `file.py:Class`."""
    source, colon, attribute = name.rpartition(":")
    if not colon:
        if name not in (policies := load_policies()):
            raise ConfigError(f"unknown method {name!r}:{nearest(name, policies)} {listing('methods')}")
        return policies[name]
    try:
        policy = getattr(_module(source), attribute)
    except (ImportError, AttributeError, SyntaxError, ValueError, OSError) as error:
        raise ConfigError(f"{name} cannot be loaded ({error}): {WRITE}") from error
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigError(f"{name} is not a subclass of kvbench.methods.base.Policy: derive it from that class")
    return policy


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = spec_from_file_location(f"kvbench_file_{Path(source).stem}", source)
    assert spec is not None
    assert spec.loader is not None
    known = sys.modules.get(spec.name)
    if known is not None and known.__file__ == spec.origin:
        return known
    module = sys.modules[spec.name] = module_from_spec(spec)  # where dataclasses and Hydra look a class up
    spec.loader.exec_module(module)
    return module


def build_policy(name: str, options: Mapping[str, object] | None = None) -> Policy:
    """Build a method from its name, `module:Class` or `file.py:Class`, and its options, `budget` among them.

    What is left out has its default.
    """
    policy = policy_class(name)
    given, known = dict(options or {}), [field.name for field in dataclasses.fields(policy)]
    if "backend" in given and "backend" not in known:
        pass_over_backend(given.pop("backend"))
    if unknown := [option for option in given if option not in known]:
        said = nearest(unknown[0], known) or f" choose among {', '.join(known)}"
        raise ConfigError(f"unknown option {', '.join(unknown)} for method {name}:{said}")
    try:
        return policy(**given)  # type: ignore[arg-type]  # every policy validates its own fields
    except TypeError as error:
        raise ConfigError(f"{name} cannot be built ({error}): define compress() and give options defaults") from error


def pass_over_backend(value: object) -> None:
    """Say what has become of an option of three methods: "auto", its default, is taken, what nobody obeys refused."""
    if value != "auto":
        raise ConfigError(f"backend={value}{BACKEND_HAS_GONE}")
    logger.warning("backend=%s%s", value, BACKEND_HAS_GONE)
