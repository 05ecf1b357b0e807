"""Rules about the class: what it declares, and how its options behave."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any, ClassVar, get_origin, get_type_hints

from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvbench.check.inputs import BUDGETS, Case, layer_states
from kvbench.check.rule import Broken
from kvbench.check.subject import Subject
from kvbench.errors import BudgetError, ConfigError, KvbenchError
from kvbench.methods.base import Policy
from kvbench.methods.registry import load_policies, method_config

DECORATOR = "decorate the class with @dataclass(frozen=True, kw_only=True)"


def frozen_dataclass(subject: Subject) -> str:
    """The class is a frozen dataclass, and its options are its keyword-only fields."""
    kind = type(subject.policy)
    fields = {field.name: field for field in dataclasses.fields(subject.policy)}
    hints = get_type_hints(kind)
    own = [name for name in vars(kind).get("__annotations__", {}) if get_origin(hints[name]) is not ClassVar]
    if forgotten := [name for name in own if hints[name] is not ClassVar and name not in fields]:
        raise Broken(f"{', '.join(forgotten)} of {kind.__name__} is annotated, but no field", DECORATOR)
    if positional := [name for name, field in fields.items() if not field.kw_only]:
        raise Broken(f"{', '.join(positional)} can be given by position", DECORATOR)
    return ", ".join(fields)


def has_name(subject: Subject) -> str:
    """`name` is a lower-case identifier of the class's own."""
    kind = type(subject.policy)
    name = getattr(kind, "name", None)
    remedy = 'give the class `name: ClassVar[str] = "my_method"`'
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise Broken(f"name is {name!r}", remedy)
    if "name" not in vars(kind):
        raise Broken(f"name {name!r} is that of the parent class, so records of both would be mixed", remedy)
    return f"{name!r}"


def needs_can_be_met(subject: Subject) -> str:
    """`needs` names only what a prefill can observe, and a window has a size."""
    policy = subject.policy
    remedy = "see `needs` and `window_tokens` in kvbench/methods/base.py, or compute scores from keys and values"
    if not isinstance(policy.needs, frozenset):
        raise Broken(f"needs is a {type(policy.needs).__name__}", "write it as frozenset({...})")
    try:
        layer_states(Case("GQA", 7, 1.0), policy)
    except KvbenchError as error:
        raise Broken(str(error), remedy) from error
    window = f", window of {policy.window_tokens} tokens" if policy.window_tokens else ""
    return (", ".join(sorted(policy.needs)) or "keys and values only") + window


def refuses_bad_budgets(subject: Subject) -> str:
    """A budget outside (0, 1] raises `ConfigError` when the policy is built."""
    bad: tuple[Any, ...] = (0.0, -0.5, 1.5, math.nan, "half")
    for budget in bad:
        try:
            dataclasses.replace(subject.policy, budget=budget)
        except ConfigError:
            continue
        raise Broken(f"budget={budget!r} was taken", "call super().__post_init__() first in __post_init__")
    return "0, -0.5, 1.5, nan and a word are refused"


def options_round_trip(subject: Subject) -> str:
    """Options survive JSON and configuration files, and `options()` tells what differs from the defaults."""
    policy, kind = subject.policy, type(subject.policy)
    fields = {field.name: _described(getattr(policy, field.name)) for field in dataclasses.fields(policy)}
    plain = "use numbers, strings, booleans, None or policies for options, and convert lists in __post_init__"
    try:
        again = kind(**instantiate(json.loads(json.dumps(fields)), _convert_="all"))
    except (TypeError, ValueError) as error:
        raise Broken(f"options {fields} do not survive JSON ({error})", plain) from error
    if again != policy:
        raise Broken(f"{policy} comes back from JSON as {again}", plain)
    if wrong := [name for name in policy.options() if name not in fields or name == "budget"]:
        raise Broken(f"options() names {', '.join(wrong)}", "leave options() as the base class has it")
    return f"unchanged by JSON; {_from_configuration(policy)}"


def _described(option: object) -> object:
    """An option as configuration files write it: a policy within a policy by its class and fields."""
    if not isinstance(option, Policy):
        return option
    fields = {field.name: _described(getattr(option, field.name)) for field in dataclasses.fields(option)}
    return {"_target_": f"{type(option).__module__}.{type(option).__qualname__}", **fields}


def _from_configuration(policy: Policy) -> str:
    """Build the policy the way the command line does."""
    kind = type(policy)
    try:
        built = instantiate(OmegaConf.create(method_config(kind)))
    except (OmegaConfBaseException, TypeError) as error:
        raise Broken(
            f"no configuration can be made of the class: {' '.join(str(error).split())}",
            "annotate options with int, float, bool, str or one of them and None, each with a default",
        ) from error
    if (known := load_policies().get(policy.name, type(built))) is not kind:
        raise Broken(f"method={policy.name} builds a {known.__name__}", "choose a name that is not taken")
    return "configured by the class alone"


def declares_step(subject: Subject) -> str:
    """A class that defines `step` sets `steps`, and one that sets it defines `step`."""
    kind = type(subject.policy)
    if subject.policy.steps and kind.step is Policy.step:
        raise Broken("steps is true, but there is no step", "define step(), or leave steps out: the cache then grows")
    if kind.steps is False and "step" in vars(kind):
        raise Broken("step is defined, but steps is false, so it is never called", "set steps: ClassVar[bool] = True")
    return "steps while decoding" if subject.policy.steps else "one-shot: the cache grows while decoding"


def divides_budget(subject: Subject) -> str:
    """`layer_budgets` gives every layer 1 to T slots that add up to the budget, or raises `BudgetError`."""
    if not subject.policies:
        raise Broken(f"no budget of {BUDGETS} can be set", "let the class take `budget` as the base class does")
    refused: dict[float, int] = {}
    n_taken = 0
    for budget, policy in subject.policies.items():
        for n_tokens in (3, 7, 40, 97, 1000):
            for n_layers in (8, 32):
                where = f"budget {budget:g} of {n_tokens} tokens in {n_layers} layers"
                try:
                    budgets = policy.layer_budgets(n_tokens, n_layers)
                except BudgetError:
                    refused[budget] = n_tokens
                    continue
                n_taken += 1
                _check_budgets(policy, budgets, n_tokens, n_layers, where)
    if not n_taken:
        raise Broken("every budget is refused for every length", "lower minimum_tokens or see layer_budgets")
    limits = ", ".join(f"{budget:g} of {n_tokens}" for budget, n_tokens in refused.items())
    some = f"; refused up to {limits} tokens" if refused else ""
    kind = "sums are exact" if subject.policy.exact_budget else "upper limits: exact_budget is false"
    return f"{n_taken} combinations of budget, length and depth, {kind}{some}"


def _check_budgets(policy: Policy, budgets: list[int], n_tokens: int, n_layers: int, where: str) -> None:
    if len(budgets) != n_layers or any(type(slots) is not int for slots in budgets):
        raise Broken(f"{where}: {len(budgets)} entries", "return one int per layer")
    if bad := [slots for slots in budgets if not 1 <= slots <= n_tokens]:
        raise Broken(
            f"{where}: a layer gets {bad[0]} slots", "raise BudgetError where a layer would get none, and cap at T"
        )
    expected = n_layers * policy.budget_tokens(n_tokens)
    if policy.exact_budget and sum(budgets) != expected:
        raise Broken(
            f"{where}: layers get {sum(budgets)} slots per KV head in all, the budget is {expected}",
            "let the entries sum to n_layers * budget_tokens(n_tokens), or set exact_budget to False",
        )
