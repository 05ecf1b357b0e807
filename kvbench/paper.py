"""Run what the paper's tables and figures still lack, then write them from the records.

    kvbench tables --experiment longbench --model llama2-7b-chat --data DIR --official DIR2
    kvbench tables --model smollm2-135m --limit 10
    kvbench tables --rebuild --model smollm2-135m      # run nothing: tables and figures from the records alone

Experiments that ask the same model the same questions share one run: the arms of all of them ride on one prefill.
Tasks whose data or weights cannot be had are named and left out; their cells name the command that fills them. What
`--limit` cut short goes on later from where it stopped.

A file of `configs/experiment/` is an ordinary Hydra experiment whose sweep (`hydra.sweeper.params`) names models and
tasks, so `kvbench run experiment=longbench` runs it too; here its parts are taken one by one.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kvbench.arguments import parse
from kvbench.commands import EXIT_MEND, command
from kvbench.config import composed
from kvbench.errors import ConfigError, KvbenchError
from kvbench.paths import config_folder, published_folder
from kvbench.plan import Plan, build_plan
from kvbench.records.folder import identity_hash
from kvbench.results.cells import ExpectedArm, ExpectedColumn, TableSpec, build_table, read_published
from kvbench.results.figures import write_figures
from kvbench.results.tables import write_table
from kvbench.run import run_plan

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
    keys = {arm.policy: arm.key for arm in plan.arms}
    bases = {arm.key: arm.policy.without_merging() for arm in plan.arms}
    merging = tuple((key, keys[base]) for key, base in bases.items() if base in keys)
    settings = plan.mix_environments, plan.config["output"]["gate"], merging
    return TableSpec(parts[0].experiment, plan.model.name, title, arms, columns, *settings)


def merged_plans(parts: Sequence[ExperimentPart]) -> list[Plan]:
    """One plan for all parts that ask one model the same questions, with the arms of all of them; by first question."""
    merged: dict[Path, Plan] = {}
    for part in parts:
        known = merged.setdefault(part.run, part.plan)
        arms = {arm.key: arm for arm in (*known.arms, *part.plan.arms)}
        merged[part.run] = dataclasses.replace(known, arms=tuple(arms.values()))
    return list(merged.values())


def run_missing(parts: Sequence[ExperimentPart], console: Console) -> int:
    """Run the parts; returns how many tasks could not be run (each is named on the console)."""
    n_left_out = 0
    plans = merged_plans(parts)
    for number, plan in enumerate(plans, 1):
        what = f"[{number}/{len(plans)}] {plan.task.name} · {plan.model.name} · {len(plan.arms)} arms"
        console.print(what, markup=False, highlight=False)
        try:
            run_plan(plan, console)
        except KvbenchError as error:
            n_left_out += 1
            console.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
    return n_left_out


def write_all(parts: Sequence[ExperimentPart], results: Path, options: Sequence[str]) -> list[Path]:
    """Write `tables/` and `figures/` of every experiment and model, from records alone; returns the files.

    `options` are the words that belong into the commands shown beside empty cells.
    """
    published = read_published(published_folder())
    groups: dict[tuple[str, str], list[ExperimentPart]] = {}
    for part in parts:
        groups.setdefault((part.experiment, part.model), []).append(part)
    written = []
    for (experiment, model), group in groups.items():
        command = shlex.join(["kvbench", "tables", "--experiment", experiment, "--model", model, *options])
        table = build_table(table_spec(group, command), published)
        written += write_table(table, results / "tables") + write_figures(table, results / "figures")
    return written


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done (some tasks left out included: they are named), 2 to mend."""
    options = parse("tables", arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(stderr=True)
    given = {"data.root": options.data, "data.official": options.official}
    overrides = [*options.override, *(f"{name}={folder}" for name, folder in given.items() if folder)]
    settings = {"limit": options.limit, "more": overrides, "prompt_tokens": options.prompt_tokens}
    names = options.experiment or experiment_names()
    parts = [part for name in names for part in experiment_parts(name, options.model, **settings)]
    for name in ("tables", "figures"):
        (options.results / name).mkdir(parents=True, exist_ok=True)  # what cannot be written is told before it is run
    left_out = 0 if options.rebuild else run_missing(parts, console)
    words = {"--limit": options.limit, "--prompt-tokens": options.prompt_tokens}
    words |= {name: given and "DIR" for name, given in (("--data", options.data), ("--official", options.official))}
    again = [word for name, value in words.items() if value for word in (name, str(value))]
    again += ["--override", *options.override] if options.override else []
    print(*write_all(parts, options.results, again), sep="\n")
    if left_out:
        n_tasks = len(merged_plans(parts))
        console.print(f"{left_out} of {n_tasks} tasks left out, see above")
        return EXIT_MEND if left_out == n_tasks else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
