"""What `configs/experiment/` describes: for each experiment its models, tasks and arms, as plans and as a table's spec.

An experiment file is an ordinary Hydra experiment whose sweep (`hydra.sweeper.params`) names models and tasks, so
`python -m kvbench experiment=longbench` runs it too; here its parts are taken one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from kvbench.commands import one_line
from kvbench.config import check_arguments, register
from kvbench.errors import ConfigError
from kvbench.paths import config_folder
from kvbench.plan import Plan, build_plan
from kvbench.records.folder import identity_hash
from kvbench.results.cells import ExpectedArm, ExpectedColumn, TableSpec

TRUNCATING = ("longbench/", "zeroscrolls/")  # tasks that define how a prompt is cut; others refuse a longer prompt


class ExperimentPart(NamedTuple):
    """One task of an experiment for one model: the experiment's file, the options of two groups, and what runs."""

    experiment: str
    model: str
    task: str
    plan: Plan

    @property
    def run(self) -> Path:
        """The run folder that holds its records: the one whose name ends with the hash of the plan's identity."""
        name = identity_hash(self.plan.identity)
        found = sorted(self.plan.output_root.glob(f"*-{name}"))
        return found[0] if found else self.plan.output_root / name


def experiment_names() -> list[str]:
    """Names of all experiments, sorted."""
    return sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))


def experiment_grid(name: str) -> tuple[list[str], list[str]]:
    """The models and tasks of an experiment; `ConfigError` if there is none of that name."""
    if name not in experiment_names():
        raise ConfigError(f"experiment {name!r} is unknown; known are {', '.join(experiment_names())}")
    params = composed([f"experiment={name}"], hydra_too=True).hydra.sweeper.params
    models, tasks = ([value.strip() for value in str(values).split(",")] for values in (params.model, params.task))
    return models, tasks


def experiment_part(
    name: str,
    model: str,
    task: str,
    limit: int | None = None,
    more: Sequence[str] = (),
    prompt_tokens: int | None = None,
) -> ExperimentPart:
    """One task of an experiment: at most `limit` samples, prompts cut to `prompt_tokens`, `more` Hydra overrides."""
    lines = [f"experiment={name}", f"model={model}", f"task={task}", *more]
    if prompt_tokens is not None and task.startswith(TRUNCATING):
        lines.append(f"model.max_prompt_tokens={prompt_tokens}")
    lines += [] if limit is None else [f"task.limit={limit}"]
    return ExperimentPart(name, model, task, build_plan(composed(lines)))


def experiment_parts(name: str, models: Sequence[str] = (), **settings: Any) -> list[ExperimentPart]:
    """All tasks of an experiment for its own models or others, models first; settings as of `experiment_part`."""
    own, tasks = experiment_grid(name)
    return [experiment_part(name, model, task, **settings) for model in models or own for task in tasks]


def table_spec(parts: Sequence[ExperimentPart], command: str) -> TableSpec:
    """The table of the parts of one experiment and one model; the command fills its cells."""
    plan = parts[0].plan
    arms = tuple(ExpectedArm(a.key, a.policy.name, a.policy.budget, not a.policy.options()) for a in plan.arms)
    columns = tuple(ExpectedColumn(part.plan.task.name, part.run, command) for part in parts)
    title = f"{parts[0].experiment} ({plan.compress.replace('_', ' ')})"
    return TableSpec(parts[0].experiment, plan.model.name, title, arms, columns, plan.mix_environments)


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
