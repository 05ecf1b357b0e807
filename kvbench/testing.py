"""Does a compression method keep the contract of `kvbench/methods/base.py`? One function a rule, one call for all.

    check_policy(Newest(sinks=4))        raises `Broken`, which names every broken rule
    @pytest.mark.parametrize("check", policy_checks(Newest, Newest(sinks=4)))        a test for every policy and rule

A rule looks at what the policy does, yields `(broken, seen, remedy)`, of which the first that is broken ends it, and
returns what it saw. A rule whose ground is missing because another one is broken is not run.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import pickle
import random
import re
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, get_origin, get_type_hints
from unittest import SkipTest

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # where torch's own notes on extending it place it
from transformers import LlamaConfig

from kvbench.errors import BudgetError, ConfigError, KvbenchError
from kvbench.methods.base import (
    CompressedLayer,
    DecodeSlots,
    LayerStates,
    Policy,
    constant_state,
    make_state,
    slot_state,
)
from kvbench.methods.full import Full
from kvbench.methods.registry import load_policies, method_config
from kvbench.models.config import named_config
from kvbench.models.load import LoadedModel, load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.observe import Observer
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Answer, Arm, Request

BUDGETS = (0.1, 0.2, 0.35, 0.5, 1.0)
N_LAYERS, HEAD_DIM, SEED, N_STEPS, MODEL_LAYERS = 32, 16, 7, 24, 8
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1)}  # query heads and KV heads of each kind of attention
TOLERANCE_NATS = 2e-4  # of likelihood and KL between the engines, whose sums run in different orders; as in their tests
PASSED, BROKEN, NOT_RUN = "passed", "broken", "not run"

_Holder = CompressedLayer | DecodeSlots | LayerStates
Looks = Generator[tuple[bool, str, str], None, str]
RULES: dict[str, tuple[Callable[[Trial], Looks], tuple[str, ...]]] = {}
"""Rules by name, in the order in which they are looked at, each with those without which it has no ground."""


class Broken(AssertionError):
    """The policy breaks a rule."""


class Finding(NamedTuple):
    """What came of one rule: `seen` is the observation or why it was not run, `remedy` is empty unless it is broken."""

    rule: str
    statement: str
    status: str
    seen: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.statement} Seen: {self.seen}. {self.remedy}"


def check_policy(policy: Policy | type[Policy], on_fail: str | None = "raise") -> list[Finding]:
    """One finding per rule, at the policy's own budget and at 10, 20, 35, 50 and 100 %; it takes a second or two.

    A class is checked with its defaults. `on_fail` "raise" raises `Broken`, whose message names all broken rules; None
    returns their findings, too.
    """
    trial = Trial(policy)
    findings = [trial.finding(rule) for rule in RULES]
    broken = [str(finding) for finding in findings if finding.status == BROKEN]
    if broken and on_fail == "raise":
        raise Broken("\n".join([f"{trial.policy} breaks {len(broken)} of {len(findings)} rules", *broken]))
    return findings


def policy_checks(*policies: Policy | type[Policy]) -> list[Callable[[], None]]:
    """One function per policy and rule for `pytest.mark.parametrize`: it returns, raises `Broken` or skips its test."""

    def checking(trial: Trial, rule: str) -> Callable[[], None]:
        def check() -> None:
            finding = trial.finding(rule)
            if finding.status != PASSED:
                raise Broken(str(finding)) if finding.status == BROKEN else SkipTest(finding.seen)

        check.__name__ = f"{type(trial.policy).__name__}-{rule}"  # how pytest calls the test
        return check

    return [checking(trial, rule) for trial in map(Trial, policies) for rule in RULES]


def rule(*after: str) -> Callable[[Callable[[Trial], Looks]], None]:
    """Add a function `check_NAME` to `RULES`, to be looked at after others; the statement is its docstring."""
    return lambda look: RULES.update({look.__name__.removeprefix("check_"): (look, after)})


class Case(NamedTuple):
    """One call of `compress`; with `equal_keys` all keys of a head are the same, so that every comparison is a tie."""

    heads: str
    n_tokens: int
    budget: float
    layer_index: int = N_LAYERS // 2
    dtype: torch.dtype = torch.float32
    equal_keys: bool = False

    def __str__(self) -> str:
        heads = "/".join(map(str, HEADS[self.heads]))
        where = f"{self.heads} {heads}, {self.n_tokens} tokens, budget {self.budget:g}, layer {self.layer_index}"
        return f"{where}, {str(self.dtype).removeprefix('torch.')}{', equal keys' if self.equal_keys else ''}"


class Trial:
    """A policy under check with what it did in every case, computed once and looked at by many rules."""

    def __init__(self, policy: Policy | type[Policy]):
        self.policy = policy if isinstance(policy, Policy) else policy()
        self.kept: dict[Case, CompressedLayer] = {}  # filled by the rule that calls `compress` first
        self._states: dict[tuple[object, ...], LayerStates] = {}
        self._allocations: dict[Case, list[int]] = {}
        self._findings: dict[str, Finding] = {}

    def finding(self, name: str) -> Finding:
        """What comes of a rule; an exception that the rule did not expect is the policy's, and breaks it."""
        if name not in self._findings:
            look, after = RULES[name]
            self._findings[name] = Finding(name, look.__doc__ or "", *self._look(look, after))
        return self._findings[name]

    def _look(self, look: Callable[[Trial], Looks], after: tuple[str, ...]) -> tuple[str, ...]:
        ground = map(self.finding, after)
        if missing := [one.rule for one in ground if one.status == BROKEN or one.seen.startswith("needs ")]:
            return NOT_RUN, f"needs {', '.join(missing)}"
        looks = look(self)
        try:
            while True:
                broken, seen, remedy = next(looks)
                if broken:
                    return BROKEN, seen, remedy
        except StopIteration as end:
            return PASSED, end.value
        except SkipTest as reason:
            return NOT_RUN, str(reason)
        except Exception as error:  # foreign code: whatever it raises is a finding
            remedy = "mend the exception; a policy may raise ConfigError when built and BudgetError in layer_budgets"
            return BROKEN, _describe(error), remedy

    @functools.cached_property
    def policies(self) -> dict[float, Policy]:
        """The policy at each budget that it takes; one that refuses a budget (`full`) lacks it here."""
        found: dict[float, Policy] = {}
        for budget in sorted({*BUDGETS, float(self.policy.budget)}):
            with suppress(ConfigError):
                found[budget] = dataclasses.replace(self.policy, budget=budget)
        return found

    @functools.cached_property
    def cases(self) -> list[Case]:
        """Every kind of heads at lengths around the window, the first and last layer, half precision, and ties."""
        window = self.policy.window_tokens
        lengths = sorted({7, 40, 97} | ({window - 1, window + 13} if window > 1 else set()))
        found: list[Case] = []
        for budget in self.policies:
            found += [Case(heads, n_tokens, budget) for heads in HEADS for n_tokens in lengths]
            found += [Case("GQA", 97, budget, layer_index=index) for index in (0, N_LAYERS - 1)]
            found += [Case("GQA", 40, budget, dtype=torch.bfloat16), Case("MHA", 40, budget, equal_keys=True)]
        return [case for case in found if _takes(self.policies[case.budget], case.n_tokens, N_LAYERS)]

    @property
    def some_cases(self) -> list[Case]:
        """Cases of the middle length at all budgets: enough to see impurity, and quick."""
        return [case for case in self.kept if case.n_tokens == 40]

    @property
    def step_cases(self) -> list[Case]:
        """Cases whose cache is stepped: full precision and half, GQA, MHA and MQA, small and large budgets."""
        if not self.policy.steps:
            raise SkipTest("one-shot: the policy declares no step")
        return [case for case in self.some_cases if case.budget in (0.2, 0.5, 1.0) and not case.equal_keys]

    def budget_tokens(self, case: Case) -> int:
        """Slots of the case's layer: per KV head, or of all heads together if the policy allocates them."""
        policy = self.policies[case.budget]
        if policy.allocates:
            return self.allocation(case._replace(layer_index=0))[case.layer_index]
        return policy.layer_budgets(case.n_tokens, N_LAYERS)[case.layer_index]

    def allocation(self, case: Case) -> list[int]:
        """What a policy allocates to the layers that are like the case's."""
        policy = self.policies[case.budget]
        if case not in self._allocations:
            layers = [self.states(case._replace(layer_index=index)) for index in range(N_LAYERS)]
            preferences = [policy.preference(copy.deepcopy(layer)) for layer in layers]
            self._allocations[case] = policy.allocate(preferences, case.n_tokens, HEADS[case.heads][1])
        return self._allocations[case]

    def states(self, case: Case) -> LayerStates:
        """The case's inputs; shared by all budgets, so never handed to the policy itself."""
        policy = self.policies[case.budget]
        key = (case._replace(budget=1.0), policy.needs, policy.window_tokens)
        if key not in self._states:
            self._states[key] = layer_states(case, policy)
        return self._states[key]

    @torch.inference_mode()
    def compress(self, case: Case, states: LayerStates | None = None) -> CompressedLayer:
        """Call `compress` as the engines do, on a copy of the case's inputs unless others are given."""
        layer = states or copy.deepcopy(self.states(case))
        return self.policies[case.budget].compress(layer, self.budget_tokens(case))

    def heads(self) -> Iterator[tuple[Case, CompressedLayer, int, int]]:
        """Every KV head of every case: the case, its layer, the head, and the slots the head keeps."""
        for case, kept in self.kept.items():
            n_kv_heads, n_slots = kept.keys.shape[:2]
            for head, length in enumerate([n_slots] * n_kv_heads if kept.lengths is None else kept.lengths.tolist()):
                yield case, kept, head, length

    @torch.inference_mode()
    def advance(self, case: Case, slots: DecodeSlots, number: int) -> None:
        """Bring new token `number` into the scratch slot with zeros in its state, as the cache does, and step."""
        generator = torch.Generator().manual_seed(SEED * 1000 + number)
        n_kv_heads, n_slots, head_dim = slots.keys.shape
        slots.step_index.fill_(number)
        for tensor in (slots.keys, slots.values):
            tensor[:, -1] = torch.randn(n_kv_heads, head_dim, generator=generator).to(tensor.dtype)
        for tensor in slot_state(slots.state).values():
            tensor[:, -1] = 0
        attention = (3.0 * torch.randn(HEADS[case.heads][0], n_slots, generator=generator)).softmax(-1)
        self.policies[case.budget].step(slots, attention)

    def after_steps(self, case: Case) -> DecodeSlots:
        """The case's cache after `N_STEPS` steps."""
        slots = decode_slots(self.kept[case])
        for number in range(N_STEPS):
            self.advance(case, slots, number)
        return slots


def layer_states(case: Case, policy: Policy) -> LayerStates:
    """What a prefill knows of a layer, from the engines' own `Observer`: just what the policy declares in `needs`.

    Queries and values are random, keys like a model's: neighbours are alike, and all of a head share a mean.
    """
    n_query_heads, n_kv_heads = HEADS[case.heads]
    layer_seed = 1000 * case.layer_index if policy.allocates else 0  # who compares layers gets different ones
    seed = SEED + case.n_tokens + layer_seed
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    noise = normal(n_kv_heads, case.n_tokens + 2, HEAD_DIM)
    keys = normal(n_kv_heads, 1, HEAD_DIM) + noise[:, 2:] + noise[:, 1:-1] + noise[:, :-2]
    if case.equal_keys:
        keys = keys[:, :1].repeat(1, case.n_tokens, 1)
    query, values = normal(n_query_heads, case.n_tokens, HEAD_DIM), normal(n_kv_heads, case.n_tokens, HEAD_DIM)
    output_weight = normal(n_query_heads, HEAD_DIM, 24).to(case.dtype)
    reconstruction = normal(n_kv_heads, case.n_tokens).sigmoid()
    caught: list[LayerStates] = []
    observer = Observer(
        needs=policy.needs, window_tokens=policy.window_tokens, n_layers=N_LAYERS, n_query_heads=n_query_heads,
        seed=SEED, on_layer=caught.append, kernels="torch",
        config=LlamaConfig(hidden_size=n_query_heads * HEAD_DIM, num_attention_heads=n_query_heads, head_dim=HEAD_DIM),
        given={"output_weight": [output_weight] * N_LAYERS, "reconstruction": [reconstruction] * N_LAYERS},
    )  # fmt: skip
    query, keys, values = (tensor.to(case.dtype)[None] for tensor in (query, keys, values))
    observer.attend(case.layer_index, query, keys, values, HEAD_DIM**-0.5)
    return caught[0]


def decode_slots(compressed: CompressedLayer) -> DecodeSlots:
    """The cache's view of a compressed layer: copies with one scratch slot appended."""
    per_slot = {"keys": compressed.keys, "values": compressed.values, **slot_state(compressed.state)}
    copies = {name: torch.cat([held, torch.zeros_like(held[:, :1])], dim=1) for name, held in per_slot.items()}
    keys, values = copies.pop("keys"), copies.pop("values")
    copies |= {name: tensor.clone() for name, tensor in constant_state(compressed.state).items()}
    state = make_state(type(compressed.state) if compressed.state is not None else None, copies)
    return DecodeSlots(keys, values, state, torch.zeros((), dtype=torch.int64))


def _takes(policy: Policy, n_tokens: int, n_layers: int) -> bool:
    try:
        return bool(policy.layer_budgets(n_tokens, n_layers))
    except BudgetError:
        return False


def _describe(error: BaseException) -> str:
    """An exception in one line, with the place it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def _parts(holder: _Holder, scratch: bool = True) -> dict[str, Tensor]:
    """All tensors by name, with or without the scratch slot."""
    state, fields = getattr(holder, "state", None), {**vars(holder), **getattr(holder, "extras", {})}
    found = {name: tensor for name, tensor in fields.items() if isinstance(tensor, Tensor)}
    found |= {f"state {name}": tensor for name, tensor in slot_state(state).items()}
    if not scratch:
        found = {name: tensor[:, :-1] if tensor.ndim > 1 else tensor for name, tensor in found.items()}
    return found | {f"constant {name}": tensor for name, tensor in constant_state(state).items()}


def _bits(holder: _Holder) -> dict[str, object]:
    """What tells two values of each tensor apart, by name; of slots, without the scratch slot."""
    parts = _parts(holder, scratch=not isinstance(holder, DecodeSlots)).items()
    return {name: (part.shape, part.dtype, *part.reshape(-1).view(torch.uint8).tolist()) for name, part in parts}


def _differences(one: dict[str, object], other: dict[str, object]) -> str:
    return ", ".join(sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)))


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[int], object]]] = {
    "torch": (lambda: torch.get_rng_state().numpy(), lambda s: torch.set_rng_state(torch.tensor(s)), torch.manual_seed),
    "NumPy": (np.random.get_state, np.random.set_state, np.random.seed),
    "random": (random.getstate, random.setstate, random.seed),
}  # get, set and seed each global generator


def _repeats(cases: list[Case], run: Callable[[Case], _Holder]) -> Iterator[tuple[Case, str, str]]:
    """Run the cases, then again in reverse order, each with seeded global generators that are put back after it.

    Yields each case with the names of what differs and of the global generators that have moved.
    """

    def seeded(case: Case) -> tuple[dict[str, object], str]:
        held = {name: copy.deepcopy(get()) for name, (get, _, _) in GENERATORS.items()}
        for _, _, seed in GENERATORS.values():
            seed(SEED)
        before = {name: pickle.dumps(get()) for name, (get, _, _) in GENERATORS.items()}
        try:
            bits = _bits(run(case))
            return bits, ", ".join(n for n, (get, _, _) in GENERATORS.items() if pickle.dumps(get()) != before[n])
        finally:
            for name, (_, put_back, _) in GENERATORS.items():
                put_back(held[name])

    once = {case: seeded(case)[0] for case in cases}
    for case in reversed(cases):
        bits, moved = seeded(case)
        yield case, _differences(once[case], bits), moved


# ---- the class: what it declares, and how its options behave ---------------------------------------------------------


@rule()
def check_dataclass(trial: Trial) -> Looks:
    """The class is a frozen dataclass, and its options are its keyword-only fields."""
    kind, remedy = type(trial.policy), "decorate the class with @dataclass(frozen=True, kw_only=True)"
    fields = {field.name: field for field in dataclasses.fields(trial.policy)}
    hints = {name: get_type_hints(kind)[name] for name in vars(kind).get("__annotations__", {})}
    options = [name for name, hint in hints.items() if ClassVar not in (hint, get_origin(hint))]
    forgotten = ", ".join(name for name in options if name not in fields)
    yield bool(forgotten), f"{forgotten} of {kind.__name__} is annotated, but no field", remedy
    positional = ", ".join(name for name, field in fields.items() if not field.kw_only)
    yield bool(positional), f"{positional} can be given by position", remedy
    return ", ".join(fields)


@rule()
def check_name(trial: Trial) -> Looks:
    """`name` is a lower-case identifier of the class's own."""
    name, remedy = getattr(trial.policy, "name", None), 'give the class `name: ClassVar[str] = "my_method"`'
    yield not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name)), f"name is {name!r}", remedy
    seen = f"name {name!r} is that of the parent class, so records of both would be mixed"
    yield "name" not in vars(type(trial.policy)), seen, remedy
    return f"{name!r}"


@rule()
def check_needs(trial: Trial) -> Looks:
    """`needs` names only what a prefill can observe, and a window has a size."""
    needs, n_window = trial.policy.needs, trial.policy.window_tokens
    remedy = "see `needs` and `window_tokens` in kvbench/methods/base.py, or compute scores from keys and values"
    yield not isinstance(needs, frozenset), f"needs is a {type(needs).__name__}", "write it as frozenset({...})"
    try:
        layer_states(Case("GQA", 7, 1.0), trial.policy)
    except KvbenchError as error:
        yield True, str(error), remedy
    return (", ".join(sorted(needs)) or "keys and values only") + (f", window of {n_window} tokens" if n_window else "")


@rule()
def check_bad_budgets(trial: Trial) -> Looks:
    """A budget outside (0, 1] raises `ConfigError` when the policy is built."""
    for budget in (0.0, -0.5, 1.5, math.nan, "half"):
        with suppress(ConfigError):
            dataclasses.replace(trial.policy, budget=budget)  # type: ignore[arg-type]  # "half"
            yield True, f"budget={budget!r} was taken", "call super().__post_init__() first in __post_init__"
    return "0, -0.5, 1.5, nan and a word are refused"


@rule("dataclass")
def check_options(trial: Trial) -> Looks:
    """Options survive JSON and configuration files, and `options()` tells what differs from the defaults."""
    policy, kind, fields = trial.policy, type(trial.policy), _described(trial.policy)
    remedy = "use numbers, strings, booleans, None or policies for options, and convert lists in __post_init__"
    try:
        again = kind(**instantiate(json.loads(json.dumps(fields)), _convert_="all"))
        yield again != policy, f"{policy} comes back from JSON as {again}", remedy
    except (TypeError, ValueError) as error:
        yield True, f"options {fields} do not survive JSON ({error})", remedy
    wrong = ", ".join(name for name in policy.options() if name not in fields or name == "budget")
    yield bool(wrong), f"options() names {wrong}", "leave options() as the base class has it"
    try:
        instantiate(OmegaConf.create(method_config(kind)))
    except (OmegaConfBaseException, TypeError) as error:
        seen = f"no configuration can be made of the class: {' '.join(str(error).split())}"
        yield True, seen, "annotate options with int, float, bool, str or one of them and None, each with a default"
    known = load_policies().get(policy.name, kind)
    yield known is not kind, f"method={policy.name} builds a {known.__name__}", "choose a name that is not taken"
    return "unchanged by JSON; configured by the class alone"


def _described(policy: Policy) -> dict[str, object]:
    """The fields as configuration files write them: a policy within a policy by its class and fields."""
    fields: dict[str, object] = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    for name, option in fields.items():
        if isinstance(option, Policy):
            fields[name] = {"_target_": f"{type(option).__module__}.{type(option).__qualname__}", **_described(option)}
    return fields


@rule()
def check_declares_step(trial: Trial) -> Looks:
    """A class that defines `step` sets `steps`, and one that sets it defines `step`."""
    kind, steps = type(trial.policy), trial.policy.steps
    remedy = "define step(), or leave steps out: the cache then grows"
    yield steps and kind.step is Policy.step, "steps is true, but there is no step", remedy
    seen = "step is defined, but steps is false, so it is never called"
    yield kind.steps is False and "step" in vars(kind), seen, "set steps: ClassVar[bool] = True"
    return "steps while decoding" if steps else "one-shot: the cache grows while decoding"


@rule()
def check_layer_budgets(trial: Trial) -> Looks:
    """`layer_budgets` gives every layer 1 to T slots that add up to the budget, or raises `BudgetError`."""
    exact, refused, n_taken = trial.policy.exact_budget, dict[float, int](), 0
    yield not trial.policies, f"no budget of {BUDGETS} can be set", "let the class take `budget` as the base class does"
    for budget, n_tokens, n_layers in itertools.product(trial.policies, (3, 7, 40, 97, 1000), (8, 32)):
        policy, where = trial.policies[budget], f"budget {budget:g} of {n_tokens} tokens in {n_layers} layers"
        if not _takes(policy, n_tokens, n_layers):
            refused[budget] = n_tokens
            continue
        n_taken += 1
        budgets = policy.layer_budgets(n_tokens, n_layers)
        integers = len(budgets) == n_layers and all(type(slots) is int for slots in budgets)
        yield not integers, f"{where}: {len(budgets)} entries", "return one int per layer"
        low, high = min(budgets), max(budgets)
        remedy = "raise BudgetError where a layer would get none, and cap at T"
        yield low < 1 or high > n_tokens, f"{where}: a layer gets {low} slots, another {high}", remedy
        given, expected = sum(budgets), n_layers * policy.budget_tokens(n_tokens)
        seen = f"{where}: layers get {given} slots per KV head in all, the budget is {expected}"
        remedy = "let the entries sum to n_layers * budget_tokens(n_tokens), or set exact_budget to False"
        yield exact and given != expected, seen, remedy
    yield not n_taken, "every budget is refused for every length", "lower minimum_tokens or see layer_budgets"
    limits = ", ".join(f"{budget:g} of {n_tokens}" for budget, n_tokens in refused.items())
    kind = "sums are exact" if exact else "upper limits: exact_budget is false"
    some = f"; refused up to {limits} tokens" if refused else ""
    return f"{n_taken} combinations of budget, length and depth, {kind}{some}"


@rule("needs", "layer_budgets")
def check_allocate(trial: Trial) -> Looks:
    """`allocate` gives every layer H_k to `H_k * T` slots that add up to the budget, from what all layers prefer."""
    if not trial.policy.allocates:
        raise SkipTest("layer_budgets decides: the policy does not allocate")
    lowest, highest = math.inf, 0.0
    for case in dict.fromkeys(case._replace(layer_index=0) for case in trial.cases if case.budget < 1.0):
        budgets, n_kv_heads = trial.allocation(case), HEADS[case.heads][1]
        integers = len(budgets) == N_LAYERS and all(type(slots) is int for slots in budgets)
        yield not integers, f"{case}: {len(budgets)} entries", "return one int per layer"
        low, high, most = min(budgets), max(budgets), n_kv_heads * case.n_tokens
        seen = f"{case}: a layer gets {low} slots, another {high}"
        yield low < n_kv_heads or high > most, seen, f"give each layer {n_kv_heads} to {most}"
        expected = N_LAYERS * n_kv_heads * trial.policies[case.budget].budget_tokens(case.n_tokens)
        wrong = trial.policy.exact_budget and sum(budgets) != expected
        remedy = "let the entries sum to n_layers * H_k * budget_tokens(n_tokens)"
        yield wrong, f"{case}: layers get {sum(budgets)} slots in all, the budget is {expected}", remedy
        lowest, highest = min(lowest, low / most), max(highest, high / most)
    return f"layers get {100 * lowest:.0f} to {100 * highest:.0f} % of their slots"


# ---- what compress returns -------------------------------------------------------------------------------------------

_SOUND = ("shapes", "dtypes", "lengths")


@rule("needs", "layer_budgets", "allocate")
def check_compress(trial: Trial) -> Looks:
    """`compress` returns a `CompressedLayer` for MHA, GQA and MQA, for short and long prompts, at every budget."""
    remedy = f"mend it; needs declares {', '.join(sorted(trial.policy.needs)) or 'nothing'}, so only that is there. "
    remedy += "A budget too small is refused in layer_budgets, not in compress"
    for case in trial.cases:
        try:
            kept = trial.compress(case)
        except Exception as error:  # foreign code: whatever it raises is a finding
            yield True, f"{case}: {_describe(error)}", remedy
        wrong = not isinstance(kept, CompressedLayer)
        yield wrong, f"{case}: a {type(kept).__name__} came back", "return a CompressedLayer"
        trial.kept[case] = kept
    yield not trial.kept, "no case could be tried", "take at least one of the budgets 0.1 to 1"
    lengths, budgets = (sorted({getattr(case, name) for case in trial.kept}) for name in ("n_tokens", "budget"))
    return f"{len(trial.kept)} cases: {lengths} tokens, budgets {budgets}"


@rule("compress")
def check_shapes(trial: Trial) -> Looks:
    """Keys and values are `(H_k, m, D)`, positions `(H_k, m)`, state `(H_k, m, ...)`."""
    remedy, names = "keep states per KV head: reduce the query heads of a group before you choose tokens", set()
    for case, kept in trial.kept.items():
        slots = (HEADS[case.heads][1], kept.keys.shape[1] if kept.keys.ndim == 3 else -1)
        for name, expected in {"keys": (*slots, HEAD_DIM), "positions": slots, "values": (*slots, HEAD_DIM)}.items():
            shape = expected if getattr(kept, name) is None else tuple(getattr(kept, name).shape)
            yield shape != expected, f"{case}: {name} {shape}, expected {expected}", remedy
        for name, state in slot_state(kept.state).items():
            seen = f"{case}: state {name!r} {tuple(state.shape)}, expected {slots} and more"
            yield state.shape[:2] != slots, seen, "declare what is not per slot with field(metadata=CONSTANT)"
        names |= {*slot_state(kept.state), *constant_state(kept.state)}
    return f"as they should be; state and constants: {', '.join(sorted(names)) or 'none'}"


@rule("compress")
def check_dtypes(trial: Trial) -> Looks:
    """Keys and values keep the model's dtype, positions are int64, all on the layer's device."""
    for case, kept in trial.kept.items():
        device = trial.states(case).keys.device
        for name, dtype in {"keys": case.dtype, "values": case.dtype, "positions": torch.int64}.items():
            if (tensor := getattr(kept, name)) is not None:
                remedy = f"return {name} as {dtype}: .to(layer.keys.dtype)"
                yield tensor.dtype != dtype, f"{case}: {name} are {tensor.dtype}", remedy
                remedy = "create tensors with device=layer.keys.device"
                yield tensor.device != device, f"{case}: {name} lie on {tensor.device}", remedy
    return ", ".join(sorted({str(case.dtype).removeprefix("torch.") for case in trial.kept}))


@rule("shapes")
def check_lengths(trial: Trial) -> Looks:
    """Ragged heads say how many slots they keep: `lengths (H_k,)` int64, 1 to m; a policy that steps has none."""
    ragged = [(case, kept.lengths, kept.keys) for case, kept in trial.kept.items() if kept.lengths is not None]
    for case, lengths, keys in ragged:
        remedy = "keep equal heads in a policy that steps, or drop the step"
        yield trial.policy.steps, f"{case}: lengths beside steps", remedy
        wrong = lengths.dtype != torch.int64 or lengths.shape != keys.shape[:1]
        yield wrong, f"{case}: lengths {lengths.dtype} {tuple(lengths.shape)}", "return (H_k,) of torch.int64"
        low, high, n_slots = int(lengths.min()), int(lengths.max()), keys.shape[1]
        seen = f"{case}: lengths from {low} to {high} with m = {n_slots}"
        yield low < 1 or high > n_slots, seen, "keep at least one slot per head, and pad to the longest head"
    return f"ragged in {len(ragged)} of {len(trial.kept)} cases" if ragged else "all heads keep equally many slots"


@rule("shapes", "lengths")
def check_exact_budget(trial: Trial) -> Looks:
    """The kept slots are the budget exactly, at 10, 20, 35, 50 and 100 %, ties and padding included."""
    exact, remedy = trial.policy.exact_budget, "keep budget_tokens slots per KV head on average"
    remedy += ", or set exact_budget to False if a threshold decides" if exact else ""
    for case, kept in trial.kept.items():
        allowed = trial.budget_tokens(case) * (1 if trial.policies[case.budget].allocates else HEADS[case.heads][1])
        seen = f"{case}: {kept.n_slots} slots in all heads, {'expected' if exact else 'at most'} {allowed}"
        yield kept.n_slots > allowed or (exact and kept.n_slots < allowed), seen, remedy
    budgets = ", ".join(f"{100 * budget:g} %" for budget in sorted({case.budget for case in trial.kept}))
    return f"{budgets}: {'exact' if exact else 'within the limit'}"


@rule(*_SOUND)
def check_positions(trial: Trial) -> Looks:
    """Every slot stands for one prompt token of its own: positions in 0 .. T-1, no two alike in a head."""
    order, verbatim, total = "ascending", 0, 0
    for case, kept, head, length in trial.heads():
        if kept.positions is None:
            continue
        places = kept.positions[head, :length]
        low, high, n_unique = int(places.min()), int(places.max()), len(places.unique())
        remedy = "give the index in the prompt of the token each slot stands for"
        yield low < 0 or high >= case.n_tokens, f"{case}: positions from {low} to {high}", remedy
        seen = f"{case}: head {head} has {length} slots at {n_unique} positions"
        yield n_unique != length, seen, "keep each token once per head; a merged slot stands for its pivot"
        order = order if bool((places.diff() > 0).all()) else "not always ascending"
        verbatim += int((kept.keys[head, :length] == trial.states(case).keys[head, places]).all(-1).sum())
        total += length
    share = f"{100 * verbatim / max(1, total):.0f} % of the kept keys are a prompt token's own"
    return f"valid and unique, {order}; {share}" if total else "not given"


@rule(*_SOUND)
def check_bias(trial: Trial) -> Looks:
    """A bias is `(H_k, m)` fp32 and finite on every kept slot."""
    biased = {case: (kept.bias, kept.keys.shape[:2]) for case, kept in trial.kept.items() if kept.bias is not None}
    for case, (bias, shape) in biased.items():
        wrong, seen = bias.dtype != torch.float32 or bias.shape != shape, f"bias {bias.dtype} {tuple(bias.shape)}"
        yield wrong, f"{case}: {seen}", f"return it as torch.float32 of shape {tuple(shape)}"
    for case, kept, head, length in trial.heads():
        infinite = kept.bias is not None and not bool(kept.bias[head, :length].isfinite().all())
        yield infinite, f"{case}: bias of head {head} is not finite", "leave a slot out instead of hiding it with -inf"
    return f"in {len(biased)} of {len(trial.kept)} cases" if biased else "none"


@rule(*_SOUND)
def check_finite(trial: Trial) -> Looks:
    """Keys and values of kept slots are finite, also where all keys of a head are equal."""
    for (case, kept, head, length), name in itertools.product(trial.heads(), ("keys", "values")):
        infinite = not bool(getattr(kept, name)[head, :length].isfinite().all())
        yield infinite, f"{case}: {name} of head {head} are not finite", "guard divisions and logarithms by zero"
    return "NaN and infinity in none"


# ---- purity: what compress may depend on, and what it must leave alone -----------------------------------------------

_PURE = ("inputs", "deterministic", "generators")
_SEEDED = "draw from a torch.Generator seeded with layer.seed and layer.layer_index, or from kvbench.ops.counter_rng"


@rule("compress")
def check_inputs(trial: Trial) -> Looks:
    """`compress` writes neither to the layer's tensors nor to the policy."""
    for case in trial.some_cases:
        layer, policy = copy.deepcopy(trial.states(case)), trial.policies[case.budget]
        fields, bits, options = dict(vars(layer)), _bits(layer), dataclasses.asdict(policy)
        trial.compress(case, layer)
        moved = ", ".join(name for name, value in vars(layer).items() if value is not fields.get(name))
        yield bool(moved), f"{case}: layer.{moved} was replaced", "leave LayerStates as it is"
        written = _differences(bits, _bits(layer))
        yield bool(written), f"{case}: layer.{written} was written to", "clone() before writing in place"
        remedy = "compute what depends on the layer anew in each call"
        yield dataclasses.asdict(policy) != options, f"{case}: the policy's options changed", remedy
    return f"{len(trial.some_cases)} cases compared with copies"


@rule("compress")
def check_deterministic(trial: Trial) -> Looks:
    """The same layer with the same seed gives the same slots, whatever was compressed in between."""
    remedy = f"depend on the layer and its seed alone: keep nothing between calls; {_SEEDED}"
    for case, different, _ in _repeats(trial.some_cases, trial.compress):
        yield bool(different), f"{case}: {different} differ between two calls", remedy
    return f"{len(trial.some_cases)} cases repeated in reverse order, bit for bit"


@rule("compress")
def check_generators(trial: Trial) -> Looks:
    """No global generator (torch, NumPy, random) is used or seeded."""
    for case, _, moved in _repeats(trial.some_cases, trial.compress):
        yield bool(moved), f"{case}: the global generator of {moved} has moved", _SEEDED
    return "torch, NumPy and random untouched"


@rule(*_SOUND, "exact_budget", "positions", "bias", "finite", *_PURE)
def check_full_budget(trial: Trial) -> Looks:
    """A budget of 100 % keeps the full cache: every key and value, no bias, in any order."""
    if not trial.policy.exact_budget:
        raise SkipTest("exact_budget is false: a threshold may compress at any budget")
    whole = [case for case in trial.kept if case.budget == 1.0]
    for case in whole:
        kept, layer = trial.kept[case], trial.states(case)
        remedy = f"return the layer as it is if budget_tokens >= {case.n_tokens} (layer.whole())"
        places = torch.arange(case.n_tokens).expand(kept.keys.shape[:2]) if kept.positions is None else kept.positions
        rows = places.argsort(1)[..., None].expand_as(kept.keys)
        for name in ("keys", "values"):
            lost = not torch.equal(getattr(kept, name).gather(1, rows), getattr(layer, name))
            yield lost, f"{case}: {name} are not those of the prompt", remedy
        highest = 0.0 if kept.bias is None else float(kept.bias.abs().max())
        yield highest != 0.0, f"{case}: bias up to {highest:.3g}", remedy
    return f"equal to the full cache in {len(whole)} cases"


# ---- step: one new token after the other in a cache of constant size -------------------------------------------------

_STEPS = ("steps", "in_place")
_HELD = "keep what a step needs in its state; derive randomness from the seed in compress and from step_index"


@rule(*_SOUND, "declares_step", "bias")
def check_steps(trial: Trial) -> Looks:
    """`step` takes new tokens one after the other at every budget, in full precision and in half."""
    remedy = "mend it; slots hold m + 1 entries (the last is the new token), attention is (H, m + 1) fp32"
    for case in trial.step_cases:
        slots = decode_slots(trial.kept[case])
        for number in range(N_STEPS):
            try:
                trial.advance(case, slots, number)
            except Exception as error:  # foreign code: whatever it raises is a finding
                yield True, f"{case}, new token {number}: {_describe(error)}", remedy
    return f"{N_STEPS} new tokens in each of {len(trial.step_cases)} cases"


@rule("steps")
def check_in_place(trial: Trial) -> Looks:
    """`step` writes into the tensors it is given: it neither rebinds them nor changes `step_index`."""
    remedy = "write in place: tensor.copy_(...), index_copy_, scatter_ or tensor[...] = ...; create state in compress"
    for case in trial.step_cases:
        slots = decode_slots(trial.kept[case])
        before = {name: (tensor, tensor.shape) for name, tensor in _parts(slots).items()}
        trial.advance(case, slots, 0)
        now = _parts(slots)
        for name, (tensor, shape) in before.items():
            same = now.get(name) is tensor and tensor.shape == shape
            yield not same, f"{case}: slots.{name} was rebound or resized", remedy
        added, index = ", ".join(now.keys() - before.keys()), int(slots.step_index)
        yield bool(added), f"{case}: slots.{added} was added", remedy
        yield index != 0, f"{case}: step_index was changed to {index}", "the cache counts; only read it"
    return "same tensors, same sizes"


@rule(*_STEPS)
def check_new_tokens(trial: Trial) -> Looks:
    """New tokens reach the slots 0 .. m-1: the scratch slot is overwritten by the next token."""
    moved, total = 0, N_STEPS * len(trial.step_cases)
    for case in trial.step_cases:
        slots = decode_slots(trial.kept[case])
        for number in range(N_STEPS):
            before = _bits(slots)
            trial.advance(case, slots, number)
            moved += not {"keys", "values"}.isdisjoint(_differences(before, _bits(slots)).split(", "))
    remedy = "move the scratch slot (index m) over another slot, with its state; or leave out `steps`"
    yield not moved, f"none of {total} new tokens left a trace in slots 0 .. m-1", remedy
    return f"{moved} of {total} new tokens changed the kept slots"


@rule(*_STEPS, "finite")
def check_step_finite(trial: Trial) -> Looks:
    """Keys, values and state stay finite over many steps."""
    for case in trial.step_cases:
        for name, tensor in _parts(trial.after_steps(case), scratch=False).items():
            infinite = not name.startswith("constant ") and not bool(tensor.isfinite().all())
            yield infinite, f"{case}: {name} after {N_STEPS} steps are not finite", "guard divisions by zero"
    return f"after {N_STEPS} steps"


@rule(*_STEPS)
def check_step_pure(trial: Trial) -> Looks:
    """`step` depends on its slots alone: steps repeat bit for bit, and no global generator is used."""
    for case, different, moved in _repeats(trial.step_cases, trial.after_steps):
        yield bool(moved), f"{case}: the global generator of {moved} has moved", _HELD
        yield bool(different), f"{case}: {different} differ between two runs of the same steps", _HELD
    return f"{len(trial.step_cases)} runs of {N_STEPS} steps repeated in reverse order, bit for bit"


@rule(*_STEPS)
def check_no_host_reads(trial: Trial) -> Looks:
    """`step` never waits for the device (best effort: what can be seen on a CPU)."""
    remedy = "stay on the device: torch.where, gather and scatter_ instead of if, item() and boolean masks; "
    remedy += "step_index may be used in tensor arithmetic"
    for case in trial.step_cases:
        slots = decode_slots(trial.kept[case])
        for number in range(2):
            with _host_reads() as seen:
                trial.advance(case, slots, number)
            yield bool(seen), f"{case}: {', '.join(dict.fromkeys(seen))}", remedy
    return "no item(), tolist(), bool(tensor) or boolean mask"


HOST_READS = {
    "tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__format__",
    "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "equal", "allclose", "_local_scalar_dense",
    "_unique2", "a boolean mask as index",
}  # fmt: skip


@contextmanager
def _host_reads() -> Iterator[list[str]]:
    """Collect by name what a block asks of tensors that needs their values on the host."""
    seen: list[str] = []

    class Functions(TorchFunctionMode):  # what Python asks of a tensor
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend({getattr(func, "__name__", "")} & HOST_READS)
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):  # what operators read on their own: how many entries of a mask are true
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
            masked = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
            seen.extend({"a boolean mask as index" if masked else name} & HOST_READS)
            return func(*args, **(kwargs or {}))

    with Functions(), Operators():
        yield seen


# ---- the whole: inside both engines, on a tiny model with random weights ---------------------------------------------


@rule(*_SOUND, *_PURE, *_STEPS, "bias", "finite", "step_pure")
def check_engines(trial: Trial) -> Looks:
    """The fused engine (all rows in one batch) and the plain one (one row, dense) give the same answers."""
    remedy = "what works in one engine only depends on more than its arguments: on earlier calls, on memory it "
    remedy += "shares with the layer, or on padding and scratch slots"
    requests: list[Request] = []
    for n_tokens, n_question, n_arms in ((61, 0, 2), (67, 3, 1)):
        takers = [one for one in trial.policies.values() if _takes(one, n_tokens - n_question, MODEL_LAYERS)]
        yield not takers, f"no budget is taken for {n_tokens} tokens", "lower minimum_tokens or see layer_budgets"
        requests.append(_request(len(requests), n_tokens, n_question, [takers[0], takers[len(takers) // 2]][:n_arms]))
    answers: list[list[Answer]] = []
    for engine in (PlainEngine(), FusedEngine()):
        answers.append([])
        for answer in engine.run(_tiny_model(), requests):
            if not isinstance(answer, Answer):
                yield True, f"{type(engine).__name__}: {answer.reason}", "see that keys and values stay finite"
            else:
                answers[-1].append(answer)
        answers[-1].sort(key=lambda answer: (answer.index, answer.arm.key))
    for expected, got in zip(*answers, strict=True):
        where = f"{got.arm.key}, {expected.compressed_tokens} tokens compressed"
        for what, field in (("slots", "slots_per_layer"), ("tokens", "token_ids")):
            ours, theirs = getattr(got, field), getattr(expected, field)
            yield ours != theirs, f"{where}: {what} {ours} against {theirs}", remedy
        gap = max(abs(a - b) for a, b in zip(got.gold_nll + got.kl, expected.gold_nll + expected.kl, strict=True))
        yield not gap < TOLERANCE_NATS, f"{where}: likelihood or KL differ by {gap:.2g} nats", remedy
    context = "with and without a question after the compressed context"
    budgets = ", ".join(f"{arm.policy.budget:g}" for arm in requests[0].arms)
    return f"{len(answers[0])} answers of 8 tokens, {context}; budgets {budgets}"


def _request(index: int, n_tokens: int, n_question: int, policies: list[Policy]) -> Request:
    ids = torch.randint(3, 250, (n_tokens + 4,), generator=torch.Generator().manual_seed(index)).tolist()
    arms = {f"{policy.name}@{policy.budget:g}": policy for policy in policies}
    return Request(
        index=index, input_ids=tuple(ids[:n_tokens]), compress_at=n_tokens - n_question, gold_ids=tuple(ids[n_tokens:]),
        arms=tuple(Arm(*arm) for arm in arms.items()), reference=Arm("reference", Full()), stop_ids=(2,),
        max_new_tokens=8, seed=index, demand_ids=((5, 6, 7), (5, 6), (9,)),
    )  # fmt: skip


@functools.cache
def _tiny_model() -> LoadedModel:
    return load_model(named_config("tiny-random", n_layers=MODEL_LAYERS, device="cpu"))
