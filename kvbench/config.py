"""The schema behind `configs/config.yaml`: a mistyped key or a value of the wrong type fails at composition, by name.

`register()` puts the schema into Hydra's store, adds the groups that have no files because classes say it all (every
method, also those of other distributions, and `arms=all`), and is called by the command line before Hydra composes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig

from kvbench.commands import one_line
from kvbench.errors import ConfigError
from kvbench.fields import Seed, Within
from kvbench.methods.registry import all_arms, load_policies, merging_arms, method_config
from kvbench.models.config import ModelConfig
from kvbench.paths import config_folder
from kvbench.tasks import register_benchmarks


@dataclass
class ProtocolConfig:
    """How a sample is asked; part of a run's identity.

    Attributes:
        compress: "after_question" (the whole prompt is compressed, as in the papers) or "before_question" (only the
            context is compressed; the question is read with the compressed cache).
        seed: of everything random in a policy, per sample.
        gold_tokens: at most this many tokens of the gold answer are teacher-forced for likelihood and KL; 0 skips both.
        max_new_tokens: overrides the task's generation limit; null keeps it.
    """

    compress: str = "after_question"
    seed: Seed = 0
    gold_tokens: Annotated[int, Within(0)] = 64
    max_new_tokens: Annotated[int, Within(1)] | None = None


@dataclass
class DataConfig:
    """Where benchmark data is; null for what is fetched."""

    root: str | None = None  # folder with `<dataset>.jsonl` files
    official: str | None = None  # folder with the official LongBench configuration files


@dataclass
class OutputConfig:
    """Where runs are kept, and what is printed."""

    root: str = "runs"  # folder of run folders, created if missing
    table: bool = True  # whether to print the table after the run
    gate: Annotated[float, Within(0, 100)] = 60.0  # score of the full cache below which RULER ranks no methods


@dataclass
class RootConfig:
    """The whole configuration; see the comments in `configs/config.yaml`."""

    model: ModelConfig = MISSING
    task: Any = MISSING
    method: Any = None
    arms: Any = MISSING
    engine: Any = MISSING
    budget: float | None = None
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    retry_failed: bool = False
    mix_environments: bool = False
    shard: str | None = None


def register() -> None:
    """Make schema, methods, `arms=all` and the benchmarks' tasks known to Hydra; may be called repeatedly."""
    register_benchmarks(config_folder() / "task")
    store = ConfigStore.instance()
    store.store(name="kvbench_schema", node=RootConfig, provider="kvbench")
    for name, policy in load_policies().items():
        store.store(group="method", name=name, node=method_config(policy), provider=policy.__module__)
    store.store(group="arms", name="all", node=all_arms(), provider="kvbench")
    store.store(group="arms", name="merging", node=merging_arms(), provider="kvbench")
    everyone = all_arms(before_question=True)
    store.store(group="arms", name="all_before_question", node=everyone, provider="kvbench")


def group_options(group: str) -> list[str]:
    """The options of a group of the configuration: its files, and what `register` has stored; none if it has none."""
    register()
    files = [path.stem for path in (config_folder() / group).glob("[!_]*.yaml")]
    stored = [name.removesuffix(".yaml") for name in ConfigStore.instance().repo.get(group, {})]
    return sorted({*files, *stored})


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would without saying which: words not in UTF-8, groups with a value that can name no option."""
    for argument in arguments:
        if argument.encode("utf-8", "replace") != argument.encode("utf-8", "surrogateescape"):
            raise ConfigError(f"argument {argument!r} is not UTF-8: give it in that encoding")
        value = re.fullmatch(r"(\w+)=(null|true|false|[-+.\d]+)", argument)
        if value and (options := group_options(value[1])):
            choices = ", ".join(options)
            raise ConfigError(f"{argument} names no option of {value[1]}: leave it out, or choose one of {choices}")


def composed(overrides: Sequence[str], hydra_too: bool = False) -> DictConfig:
    """The configuration that these overrides compose (`ConfigError` if none); with `hydra_too` its `hydra` node too."""
    register()
    check_arguments(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose("config", overrides=list(overrides), return_hydra_config=hydra_too)
    except Exception as error:  # Hydra refuses some overrides with a plain ValueError
        raise ConfigError(one_line(error)) from error
