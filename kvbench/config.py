"""The schema behind `configs/config.yaml`: a mistyped key or a value of the wrong type fails at composition, by name.

`register()` puts the schema into Hydra's store, adds the groups that have no files because classes say it all (every
method, also those of other distributions, and `arms=all`), and is called by the command line before Hydra composes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from omegaconf import MISSING, DictConfig, OmegaConf

from kvbench import catalogue
from kvbench.commands import one_line
from kvbench.errors import ConfigError, nearest
from kvbench.fields import Seed, Within
from kvbench.models.config import ModelConfig, model_node
from kvbench.paths import config_folder
from kvbench.tasks import register_benchmarks

MAX_SHARDS = 1000
SHARD_REMEDY = "give shard=I/N with I from 1 to N, e.g. shard=2/8, or with -m shard=range(8) for all eight"
GROUPS = {
    "model": "models", "task": "tasks", "method": "methods", "arms": "arms", "engine": "engines",
    "experiment": "experiments",
}  # fmt: skip
"""The groups of the configuration, and what `kvbench ls` calls their options."""
ARMS_OF_CLASSES = {
    "all": "Every method of the package at 50, 35 and 20 %, and the full cache",
    "all_before_question": "The same and the methods that need protocol.compress=before_question",
    "merging": "Every method that merges, and its own base: the same slots with merging off",
}
"""Sets of arms that are made from the methods' classes."""


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
    csv: bool = True  # whether to put the run's line into `runs.csv`, beside `root`


@dataclass
class RootConfig:
    """The whole configuration; see the comments in `configs/config.yaml`."""

    model: ModelConfig = MISSING
    task: Any = MISSING
    method: Any = None
    methods: Any = None
    arms: Any = MISSING
    engine: Any = MISSING
    budget: float | None = None
    budgets: list[float] | None = None
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    retry_failed: bool = False
    mix_environments: bool = False
    shard: str | None = None
    log: str | None = None


def register(overrides: Sequence[str] = (), light: bool = False) -> None:
    """Make schema, methods, `arms=all` and the benchmarks' tasks known to Hydra; may be called repeatedly.

    What the overrides name without a file is registered too: `method=module:Class`, and models by hub id, folder or
    GGUF file. `light` takes the methods from the catalogue, which needs no torch: enough to check names.
    """
    register_benchmarks(config_folder() / "task")
    store = ConfigStore.instance()
    store.store(name="kvbench_schema", node=RootConfig, provider="kvbench")
    nodes: dict[str, Any] = {}
    sets: dict[str, Any] = {name: {} for name in ARMS_OF_CLASSES}
    if light:
        nodes = {name: _light_node(method) for name, method in catalogue.methods().items()}
    else:
        from kvbench.methods.registry import all_arms, load_policies, merging_arms, method_config, policy_class

        nodes = {name: method_config(policy) for name, policy in load_policies().items()}
        sets = {"all": all_arms(), "all_before_question": all_arms(before_question=True), "merging": merging_arms()}
    for name, arms in sets.items():
        store.store(group="arms", name=name, node=arms, provider="kvbench")
    for override in parsed(overrides):
        for name in _choices(override):
            if override.key_or_group == "method" and ":" in name:
                found = catalogue.method(name)
                nodes[name] = _light_node(found) if light else method_config(policy_class(name))
            elif override.key_or_group == "model" and name not in catalogue.files("model") and model_node(name):
                _store("model", name, model_node(name))
    for name, node in nodes.items():
        _store("method", name, node)


def _light_node(method: catalogue.Method) -> dict[str, Any]:
    return {"_target_": method.target, **method.options}


def _store(group: str, name: str, node: Any) -> None:
    """Store an option whose name may have slashes: Hydra looks it up like a path."""
    *folders, last = [part for part in name.split("/") if part]
    ConfigStore.instance().store(group="/".join([group, *folders]), name=last, node=node, provider="kvbench")


def group_options(group: str) -> list[str]:
    """The options of a group: its files, and what is registered with one name; none if it is no group.

    Registers what needs no torch unless something is registered already.
    """
    if "kvbench_schema.yaml" not in ConfigStore.instance().repo:
        register(light=True)
    stored = ConfigStore.instance().repo.get(group, {})
    names = [name.removesuffix(".yaml") for name, node in stored.items() if not isinstance(node, dict)]
    return sorted({*catalogue.files(group), *names})


def parsed(arguments: Sequence[str]) -> list[Override]:
    """The overrides among a command's arguments; `ConfigError` if Hydra's grammar does not know one."""
    try:
        return OverridesParser.create().parse_overrides(list(arguments))
    except Exception as error:
        raise ConfigError(one_line(error)) from error


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra's grammar takes them.

    `shard=range(3)` becomes `shard=1/3,2/3,3/3`, which it sweeps over; `model=~/folder` gets quotes, `model=folder/`
    loses its slash.
    """
    spelled = list(arguments)
    for place, argument in enumerate(arguments):
        if match := re.fullmatch(r"shard=range\((.*)\)", argument.replace(" ", "")):
            count = int(match[1]) if re.fullmatch(r"\d{1,6}", match[1], re.ASCII) else 0
            if not 1 <= count <= MAX_SHARDS:
                problem = f"{argument} does not name a number of shards from 1 to {MAX_SHARDS}"
                raise ConfigError(f"{problem}: {SHARD_REMEDY}")
            spelled[place] = "shard=" + ",".join(f"{number}/{count}" for number in range(1, count + 1))
        elif match := re.fullmatch(r"model=(~[^'\",]*|[^'\",]+/)", argument):
            spelled[place] = f"model='{match[1].rstrip('/')}'"
    return spelled


def defer_task_settings(arguments: Sequence[str]) -> list[str]:
    """Write `task.X=V` beside a swept `task=` as `task.X=choice(V)`, a sweep over one value.

    Hydra tries what is not swept on the default task first, which may have no X.
    """
    if not any(re.match(r"task=.*[,(]", argument, re.DOTALL) for argument in arguments):
        return list(arguments)
    setting = re.compile(r"^(task\.[\w.]+=)(?!(?:choice|range|glob|interval|shuffle)\()(.+)", re.DOTALL)
    return [setting.sub(r"\1choice(\2)", argument) for argument in arguments]


def _choices(override: Override) -> list[str]:
    """The names that an override of a group chooses; none for a glob, a range, or what is no name."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [str(choice) for choice in value.list if isinstance(choice, str)]
    return [value] if isinstance(value, str) else []


def check_words(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would without saying which: words not in UTF-8, groups with a value that can name no option."""
    for argument in arguments:
        if argument.encode("utf-8", "replace") != argument.encode("utf-8", "surrogateescape"):
            raise ConfigError(f"argument {argument!r} is not UTF-8: give it in that encoding")
        value = re.fullmatch(r"(\w+)=(null|true|false|[-+.\d]+)", argument)
        if value and value[1] in GROUPS and argument != "experiment=null":
            raise ConfigError(_no_option(value[1], value[2]))


def check_arguments(arguments: Sequence[str], multirun: bool = False) -> DictConfig:
    """Refuse, before torch is imported, what names no option and no setting, and say the nearest name there is.

    Refused are also several values without a sweep, and what `check_words` refuses. Returned is the configuration as
    far as it can be composed without torch.
    """
    check_words(arguments)
    overrides = parsed(arguments)
    for override in overrides:
        if override.is_sweep_override() and not multirun:
            raise ConfigError(_several(override))
    register(arguments, light=True)
    for override in overrides:
        if (group := override.key_or_group) in GROUPS and not override.is_delete():
            known = group_options(group)
            for name in _choices(override):
                if name not in known and not _is_registered(group, name):
                    raise ConfigError(_no_option(group, name))
    words = list(_light_words(overrides))
    try:
        config = _compose(words)
    except Exception as error:
        raise ConfigError(_unknown_setting(overrides, words) or one_line(error)) from error
    _check_methods(config)
    _check_options(overrides, config)
    return config


def _is_registered(group: str, name: str) -> bool:
    """Whether an option with slashes in its name was stored, or lies in a subfolder."""
    node: Any = ConfigStore.instance().repo.get(group, {})
    *folders, last = [part for part in name.split("/") if part]
    for folder in folders:
        node = node.get(folder, {})
    return f"{last}.yaml" in node or (config_folder() / group / f"{name}.yaml").is_file()


def _no_option(group: str, name: str) -> str:
    """Why `group=name` is refused, and what was meant."""
    if re.fullmatch(r"null|true|false|[-+.\d]+", name):
        return f"{group}={name} names none of the {GROUPS[group]}: leave it out, or name one ({_listed(group)})"
    said = nearest(name, group_options(group))
    if group == "model" and not said:
        said = " it is no file of configs/model, no folder and no ORGANISATION/MODEL of the hub;"
    return f"{group}={name} is unknown:{said} {_listed(group)}"


def _listed(group: str) -> str:
    return catalogue.listing(GROUPS[group])


def _several(override: Override) -> str:
    """What to write in place of several values without -m."""
    key, values = override.key_or_group, str(override.input_line).partition("=")[2]
    if key in ("method", "budget"):
        return f"{key}={values} gives several values: write '{key}s=[{values}]' for one batch, or add -m for a sweep"
    if key in ("methods", "budgets"):
        return f"{key}={values} is no list: write '{key}=[{values}]'"
    return f"{override.input_line} gives several values: add -m to run one job for each"


def _light_words(overrides: Sequence[Override]) -> Iterator[str]:
    """The overrides that composing without torch can check: of sweeps their first value, none within a method."""
    for override in overrides:
        key = override.key_or_group
        if key.startswith(("method.", "arms.")):
            continue
        value = override.value()
        if not override.is_sweep_override():
            yield str(override.input_line)
        elif isinstance(value, Glob):
            yield from (f"{key}={name}" for name in value.filter(group_options(key))[:1])
        elif isinstance(value, ChoiceSweep):
            yield f"{str(override.input_line).partition('=')[0]}={next(override.sweep_string_iterator())}"


def _unknown_setting(overrides: Sequence[Override], words: Sequence[str]) -> str:
    """Which override names a setting that there is not, and what was meant; empty if none does."""
    groups = [word for word in words if word.lstrip("+~").partition("=")[0].partition("@")[0] in GROUPS]
    try:
        config = _compose(groups)
    except Exception:
        return ""
    for override in overrides:
        if override.is_add() or override.is_force_add() or override.package or "/" in override.key_or_group:
            continue
        if override.key_or_group.startswith(("method.", "arms.", "hydra.")):
            continue
        if said := _missing(config, override.key_or_group):
            return said
    return ""


def settings() -> dict[str, Any]:
    """Everything that can be set, by its dotted name, with its value; groups by their own name too."""
    register(light=True)
    found: dict[str, Any] = dict.fromkeys(GROUPS)

    def walk(node: Mapping[str, Any], before: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict) and not f"{before}{name}".startswith("arms"):
                walk(value, f"{before}{name}.")
            elif not str(name).startswith("_"):
                found[f"{before}{name}"] = value

    walk(cast(dict[str, Any], OmegaConf.to_container(_compose([]))), "")
    return found


def _missing(config: DictConfig, key: str) -> str:
    """Why there is no setting of this dotted name; empty if there is one."""
    node: Any = OmegaConf.to_container(config)
    before = ""
    for part in key.split("."):
        if not isinstance(node, dict):
            return ""
        if part not in node:
            known = [f"{before}{name}" for name in node]
            below = [f"{name}.{part}" for name, inner in node.items() if isinstance(inner, dict) and part in inner]
            meant = f" did you mean {before}{below[0]}?" if below else nearest(f"{before}{part}", known)
            said = meant or f" there are {', '.join(known)}"
            return f"{key} is no setting:{said}"
        node = node[part]
        before += f"{part}."
    return ""


def _check_options(overrides: Sequence[Override], config: DictConfig) -> None:
    """Refuse options that a method has not: `method.X=` and `arms.NAME.X=`."""
    keys = [o.key_or_group for o in overrides if not (o.is_add() or o.is_force_add() or o.is_delete() or o.package)]
    other_class = {key.removesuffix("._target_") for key in keys if key.endswith("._target_")}
    for key in keys:
        if not key.startswith(("method.", "arms.")):
            continue
        depth = 2 if key.startswith("method.") else 3
        parent, name = key.split(".")[: depth - 1], ".".join(key.split(".")[:depth])
        if ".".join(parent) in other_class or key.endswith(".backend"):
            continue
        if not key.startswith("method.") and not config.arms:  # a set of `ARMS_OF_CLASSES`: Hydra knows its names
            continue
        if key.startswith("method.") and config.method is None:
            raise ConfigError(
                f"{key} is an option of no method: name one with method=NAME, or write arms.NAME.{key[7:]}"
            )
        if said := _missing(config, name):
            raise ConfigError(said)


def method_entries(config: DictConfig) -> list[tuple[str, dict[str, Any]]]:
    """The entries of `methods=[h2o,my.module:Class,{kvmerger:{sigma:3}}]`: each method's name and its options."""
    given = OmegaConf.to_container(config.methods) if OmegaConf.is_config(config.methods) else config.methods
    entries = given if isinstance(given, list) else [given]
    found: list[tuple[str, dict[str, Any]]] = []
    for entry in entries:
        named = entry if isinstance(entry, dict) else {entry: {}}
        for name, options in named.items():
            if not isinstance(name, str) or not isinstance(options, dict):
                raise ConfigError(
                    f"methods has the entry {entry}: write NAME, module:Class or {{NAME:{{option:value}}}}"
                )
            found.append((name, options))
    if not found:
        raise ConfigError("methods=[] names no method: write e.g. 'methods=[h2o,kvmerger]'")
    return found


def _check_methods(config: DictConfig) -> None:
    if config.methods is None:
        return
    for name, options in method_entries(config):
        method = catalogue.method(name)
        for option in options if method.complete else ():
            if option not in method.options:
                said = nearest(option, method.options) or f" there are {', '.join(method.options)}"
                raise ConfigError(f"unknown option {option} for method {name}:{said}")


def _compose(overrides: Sequence[str], hydra_too: bool = False) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra_too)


def composed(overrides: Sequence[str], hydra_too: bool = False) -> DictConfig:
    """The configuration that these overrides compose (`ConfigError` if none); with `hydra_too` its `hydra` node too."""
    overrides = spelled_out(overrides)
    check_words(overrides)
    register(overrides)
    try:
        return _compose(overrides, hydra_too)
    except Exception as error:  # Hydra refuses some overrides with a plain ValueError
        check_arguments(overrides)  # which says it better where it can
        raise ConfigError(one_line(error)) from error
