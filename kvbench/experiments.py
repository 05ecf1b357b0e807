"""What `configs/experiment/` describes: for each experiment its models, tasks and arms, as plans and as a table's spec.

An experiment file is an ordinary Hydra experiment whose sweep (`hydra.sweeper.params`) names models and tasks, so
`python -m kvbench experiment=longbench` runs it too; here its parts are taken one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from kvbench.commands import one_line
from kvbench.config import check_arguments, config_folder, register
from kvbench.errors import ConfigError
from kvbench.plan import Plan, build_plan
from kvbench.records.folder import identity_hash
from kvbench.results.cells import ExpectedArm, ExpectedColumn, TableSpec

TRUNCATING = ("longbench/", "zeroscrolls/")  # tasks that define how a prompt is cut; others refuse a longer prompt


@dataclass(frozen=True)
class ExperimentPart:
    """One task of an experiment for one model.

    Attributes:
        experiment: name of the experiment file.
        model: option of the group `model`.
        task: option of the group `task`.
        plan: what runs.
    """

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
    """The models and tasks of an experiment.

    Raises:
        ConfigError: if there is no such experiment.
    """
    if name not in experiment_names():
        raise ConfigError(f"experiment {name!r} is unknown; known are {', '.join(experiment_names())}")
    params = composed([f"experiment={name}"], hydra_too=True).hydra.sweeper.params
    return _values(params.model), _values(params.task)


def experiment_part(
    name: str,
    model: str,
    task: str,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    prompt_tokens: int | None = None,
) -> ExperimentPart:
    """One task of an experiment; see `experiment_parts`."""
    lines = [f"experiment={name}", f"model={model}", f"task={task}", *overrides]
    if prompt_tokens is not None and task.startswith(TRUNCATING):
        lines.append(f"model.max_prompt_tokens={prompt_tokens}")
    if limit is not None:
        lines.append(f"task.limit={limit}")
    return ExperimentPart(name, model, task, build_plan(composed(lines)))


def experiment_parts(
    name: str,
    models: Sequence[str] = (),
    limit: int | None = None,
    overrides: Sequence[str] = (),
    prompt_tokens: int | None = None,
) -> list[ExperimentPart]:
    """The parts of an experiment: its tasks for each model, models first.

    Args:
        name: name of a file in `configs/experiment`.
        models: models that replace the experiment's own.
        limit: at most so many samples of each task.
        overrides: further Hydra overrides for every part.
        prompt_tokens: cut the prompts of benchmarks that define how (LongBench, ZeroSCROLLS) to so many tokens.

    Raises:
        ConfigError: if there is no such experiment, or it cannot be built.
    """
    own, tasks = experiment_grid(name)
    return [
        experiment_part(name, model, task, limit, overrides, prompt_tokens) for model in models or own for task in tasks
    ]


def table_spec(parts: Sequence[ExperimentPart], command: str) -> TableSpec:
    """The table of one experiment and one model.

    Args:
        parts: its parts, all of one model.
        command: the command that fills its cells; shown beside cells without records.
    """
    first = parts[0]
    arms = tuple(
        ExpectedArm(arm.key, arm.policy.name, arm.policy.budget, not arm.policy.options()) for arm in first.plan.arms
    )
    columns = tuple(ExpectedColumn(part.plan.task.name, part.run, command) for part in parts)
    title = f"{first.experiment} ({first.plan.compress.replace('_', ' ')})"
    return TableSpec(first.experiment, first.plan.model.name, title, arms, columns, first.plan.mix_environments)


def composed(overrides: Sequence[str], hydra_too: bool = False) -> DictConfig:
    """The configuration that these overrides compose; with `hydra_too` its `hydra` node as well.

    Raises:
        ConfigError: if they compose none.
    """
    register()
    check_arguments(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose("config", overrides=list(overrides), return_hydra_config=hydra_too)
    except Exception as error:  # Hydra refuses some overrides with a plain ValueError
        raise ConfigError(one_line(error)) from error


def _values(text: str) -> list[str]:
    return [value.strip() for value in str(text).split(",") if value.strip()]
