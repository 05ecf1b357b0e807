"""From a composed configuration to a plan; impossible combinations are refused here, before a weight is loaded.

Shards: fixed, balanced parts of a task's samples, so that several processes or machines can share one run.

    python -m kvbench task=qasper shard=2/8             the second of eight parts
    python -m kvbench -m task=qasper 'shard=range(8)'     all eight, one job each

Shards are counted from 1, as in "page 2 of 8". Which samples a shard holds depends on the task's samples and the number
of shards alone, never on what is recorded already, so that a shard that was cut off goes on wherever it is started
again. All arms of a sample stay in one shard: they share a prefill.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from kvbench.config import SHARD_REMEDY, DataConfig, OutputConfig, ProtocolConfig, method_entries
from kvbench.errors import ConfigError, KvbenchError
from kvbench.fields import check_fields, shown
from kvbench.methods.base import Policy
from kvbench.methods.full import Full, in_effect
from kvbench.methods.registry import build_policy, load_policies, pass_over_backend
from kvbench.models.config import ModelConfig
from kvbench.paths import user_path
from kvbench.runtime.requests import RECONSTRUCTION, Arm, Engine
from kvbench.tasks.base import Sample, Task


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "2/8"; refuses another form, and a part that there is not."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if match is None:
            raise ConfigError(f"shard={text!r} does not say which part of how many: {SHARD_REMEDY}")
        number, count = int(match[1]), int(match[2])
        if not 1 <= number <= count:
            raise ConfigError(f"shard={text} is none of the parts 1 to {count}: {SHARD_REMEDY}")
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def folder_name(self) -> str:
        """Name of the shard's folder in the run folder."""
        return f"{self.number}-of-{self.count}"

    def positions(self, samples: Sequence[Sample]) -> list[int]:
        """Positions in `samples` (all of the task, in its order) of those that are this shard's, ascending.

        Sorted by falling prompt length, samples are dealt out like cards in turns of alternating direction (1 to N, N
        to 1, ...). So shards differ by one sample at most, and what they have to read is balanced too, also where long
        prompts are cut: only the order of the lengths counts.
        """
        longest_first = sorted(range(len(samples)), key=lambda position: (-len(samples[position].prompt), position))
        turns = [(rank // self.count, rank % self.count) for rank in range(len(samples))]
        dealt_to = [place if turn % 2 == 0 else self.count - 1 - place for turn, place in turns]
        return sorted(longest_first[rank] for rank, shard in enumerate(dealt_to) if shard == self.number - 1)


COMPRESS_CHOICES = ("after_question", "before_question")
UNIDENTIFYING_MODEL_KEYS = ("device", "device_map")  # where it runs does not change what is asked
SPECIAL_TOKENS_KEY = "parse_special_tokens"
UNIDENTIFYING_TASK_KEYS = ("limit", "root", "official", "limit_seconds")  # nor how much of it, or where its files lie


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know: the composed configuration (`kvbench.config` explains its fields), built."""

    model: ModelConfig
    task: Task
    arms: tuple[Arm, ...]  # to measure, in order
    reference: Arm  # the full cache, against which KL is measured
    engine: Engine
    compress: str
    seed: int
    gold_tokens: int
    max_new_tokens: int | None
    output_root: Path  # folder of run folders
    retry_failed: bool
    identity: dict[str, Any]  # what defines the run; hashed into its folder's name
    config: dict[str, Any]  # the full composed configuration, plain types
    mix_environments: bool = False
    shard: Shard | None = None  # the part of the samples to run, or None for all; no part of the identity


def build_plan(config: DictConfig) -> Plan:
    """The plan of a composed `kvbench.config.RootConfig`; `ConfigError` if a value is unknown or out of range."""
    if (compress := config.protocol.compress) not in COMPRESS_CHOICES:
        raise ConfigError(f"protocol.compress={compress!r} is not one of {', '.join(COMPRESS_CHOICES)}")
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    for group, kind in (("protocol", ProtocolConfig), ("data", DataConfig), ("output", OutputConfig)):
        check_fields(kind(**plain[group]), group)
    model = ModelConfig.from_mapping(plain["model"])
    task = _instantiate(config.task, "task", Task)
    arms = _arms(config)
    repeating = [arm.key for arm in arms if RECONSTRUCTION in in_effect(arm.policy).needs]
    if repeating and compress != "before_question":
        raise ConfigError(
            f"protocol.compress={compress} puts the question into the prompt that {', '.join(repeating)} has the model "
            "repeat, which is another method: set protocol.compress=before_question, or leave it out"
        )
    identity = {"model": _model_identity(model), "task": _task_identity(task), "protocol": plain["protocol"]}
    return Plan(
        model=model, task=task, arms=arms, reference=Arm.of(Full()),
        engine=_instantiate(config.engine, "engine", Engine), **vars(ProtocolConfig(**plain["protocol"])),
        output_root=user_path(config.output.root), retry_failed=config.retry_failed, identity=identity, config=plain,
        mix_environments=config.mix_environments,
        shard=None if config.shard is None else Shard.parse(config.shard),
    )  # fmt: skip


def _arms(config: DictConfig) -> tuple[Arm, ...]:
    """The arms that the configuration names; a method that is named runs beside the full cache."""
    if config.method is not None and config.methods is not None:
        raise ConfigError("method and methods are both given: write all of them into methods=[...]")
    if config.budget is not None and config.budgets is not None:
        raise ConfigError("budget and budgets are both given: write all of them into budgets=[...]")
    if config.methods is not None:
        policies = [Full(), *(build_policy(name, options) for name, options in method_entries(config))]
    elif config.method is not None:
        policies = [Full(), _policy(config.method, "method")]
    else:
        if not OmegaConf.is_dict(config.arms):
            raise ConfigError(f"arms={shown(config.arms)} names no arms: choose a set, e.g. arms=paper, or method=h2o")
        policies = [_policy(node, f"arms.{name}") for name, node in config.arms.items() if node is not None]
    budgets = [config.budget] if config.budgets is None else list(config.budgets)
    arms: dict[str, Arm] = {}
    for policy in policies:
        for budget in budgets if type(policy) is not Full else [None]:
            arm = Arm.of(policy if budget is None else dataclasses.replace(policy, budget=budget))
            _refuse_namesakes(arm.policy, arms.setdefault(arm.key, arm))
    if not arms:
        raise ConfigError("no arm to run: name a method (method=h2o) or a set of arms (arms=paper)")
    return tuple(arms.values())


def _refuse_namesakes(policy: Policy, known: Arm) -> None:
    """Refuse a method that goes by the name of another: its answers would be tabled as the other's."""
    registered = load_policies().get(policy.name, type(policy))
    for other in (registered, type(known.policy)):
        if (other.__module__, other.__qualname__) != (type(policy).__module__, type(policy).__qualname__):
            raise ConfigError(
                f"{type(policy).__module__}.{type(policy).__qualname__} has the name {policy.name!r} of "
                f"{other.__module__}.{other.__qualname__}: give it a `name` of its own"
            )
    if known.policy != policy:
        raise ConfigError(f"two arms with different options are both named {known.key}: change an option's text")


def _policy(node: DictConfig, name: str) -> Policy:
    """Build a method; one whose class has no `backend` (any more) may still come with it."""
    try:
        return _instantiate(node, name, Policy)
    except ConfigError as error:
        if "unexpected keyword argument 'backend'" not in str(error):
            raise
    without = copy.deepcopy(node)
    with open_dict(without):
        pass_over_backend(without.pop("backend"))
    return _instantiate(without, name, Policy)


def _model_identity(model: ModelConfig) -> dict[str, Any]:
    """The model's fields that define the questions; keeping special tokens text, the default, goes without saying.

    So a run begun before there was that option goes on in its folder: rows that spell no special token, and no official
    row we have seen spells one, were always asked like this.
    """
    unsaid = UNIDENTIFYING_MODEL_KEYS if model.parse_special_tokens else (*UNIDENTIFYING_MODEL_KEYS, SPECIAL_TOKENS_KEY)
    return {key: value for key, value in dataclasses.asdict(model).items() if key not in unsaid}


def _task_identity(value: Any) -> Any:
    """A task's class and fields, those of tasks within it too, without what does not define the questions."""
    if isinstance(value, Task):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **_task_identity(fields)}
    if isinstance(value, Mapping):
        return {k: _task_identity(v) for k, v in value.items() if k not in UNIDENTIFYING_TASK_KEYS}
    return [_task_identity(v) for v in value] if isinstance(value, (list, tuple)) else value


def _instantiate(node: DictConfig, name: str, kind: type) -> Any:
    """Build the object a configuration node describes; Hydra's wrapping is taken off our own errors."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(f"{name} names no class (_target_): choose an option of its group, e.g. {name}=...")
    try:
        made = hydra.utils.instantiate(node, _convert_="all")
    except Exception as error:  # a class may raise anything; Hydra itself refuses some settings with a TypeError
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, KvbenchError):
            cause = cause.__cause__
        if isinstance(cause, KvbenchError):
            raise cause from None
        raise ConfigError(f"{name} cannot be built: {cause}") from error
    if not isinstance(made, kind):
        raise ConfigError(f"{name}._target_={node._target_} is a {type(made).__name__}, not a {kind.__name__}")
    return made
