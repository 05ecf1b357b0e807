"""`python -m kvbench.paper`: experiments compose, run what is missing once, and rebuild without a model."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from kvbench import paper
from kvbench.arguments import parser
from kvbench.metrics.longbench import KVMERGER_DATASETS
from kvbench.paper import experiment_grid, experiment_names, experiment_part

SMALL = ["arms=smoke", "protocol.max_new_tokens=4", "protocol.gold_tokens=4", "task.lengths=[160]", "task.depths=[0.5]"]


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_composes(name):
    parts = [experiment_part(name, "smollm2-135m", task) for task in experiment_grid(name)[1][::3]]
    assert all(part.plan.arms[0].policy.name == "full" for part in parts)
    assert len({part.run for part in parts}) == len(parts)


def test_the_papers_tables_have_the_papers_data_sets_and_models():
    models, tasks = experiment_grid("longbench")
    assert {task.removeprefix("longbench/") for task in tasks} == set(KVMERGER_DATASETS)
    assert models == ["llama2-7b-chat", "llama2-13b-chat", "mistral-7b-instruct"] == experiment_grid("zeroscrolls")[0]
    assert len(experiment_grid("zeroscrolls")[1]) == 10


def test_sweeps_cover_what_they_promise():
    def values(experiment, option):
        arms = experiment_part(experiment, "smollm2-135m", "passkey").plan.arms
        return sorted({getattr(arm.policy, option) for arm in arms if arm.policy.name != "full"})

    assert len(values("sigma", "sigma")) == 6
    assert 5.0 in values("sigma", "sigma")
    assert values("threshold", "threshold") == [0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert values("pivot", "pivot") == ["attention", "last", "random"]
    assert values("value_scale", "value_scale") == ["count", "log_bias", "mean"]
    assert values("budgets", "budget") == [0.1, 0.2, 0.35, 0.5, 0.7, 0.9]


def test_experiments_with_the_same_questions_share_a_run():
    parts = [experiment_part(name, "smollm2-135m", task) for name in ("sigma", "pivot") for task in ("passkey", "mini")]
    plans = paper.merged_plans(parts)
    assert len(plans) == len(parts) / 2
    keys = [arm.key for arm in plans[0].arms]
    assert len(keys) == len(set(keys))
    assert {arm.key for part in parts for arm in part.plan.arms} == set(keys)


def test_runs_what_is_missing_then_rebuilds_from_records_alone(tmp_path, monkeypatch, capsys):
    arguments = [
        "--experiment", "needle", "--model", "tiny-random", "--limit", "2", "--results", str(tmp_path / "results"),
        "--override", f"output.root={tmp_path / 'runs'}", "model.name='org/m'", *SMALL,
    ]  # fmt: skip
    assert paper.main(arguments) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    before = {path: path.read_bytes() for path in written}
    assert all("org_m-" in path.name for path in written)  # a name with a slash gets its tables all the same
    text = next(path for path in written if path.suffix == ".md").read_text()
    assert "no records" not in text
    assert re.search(r"\| `h2o@0.5` \| \d", text)
    for path in written:
        path.unlink()
    monkeypatch.setattr(paper, "run_plan", None)  # nothing may run
    assert paper.main([*arguments, "--rebuild"]) == 0
    assert {path: path.read_bytes() for path in written} == before


def test_prompts_are_cut_only_where_the_benchmark_says_how():
    cut = experiment_part("sigma", "smollm2-135m", "longbench/trec", prompt_tokens=1500)
    whole = experiment_part("sigma", "smollm2-135m", "passkey", prompt_tokens=1500)
    assert (cut.plan.model.max_prompt_tokens, whole.plan.model.max_prompt_tokens) == (1500, None)


def test_a_task_without_data_is_named_and_left_out(tmp_path, capsys):
    overrides = [f"data.root={tmp_path}", f"data.official={tmp_path}", f"output.root={tmp_path / 'runs'}"]
    part = experiment_part("longbench", "tiny-random", "longbench/trec", 1, overrides)
    assert paper.run_missing([part], Console(stderr=True, width=200)) == 1
    assert "left out:" in capsys.readouterr().err


def test_cells_name_the_command_that_fills_them_and_nothing_run_is_not_success(tmp_path, capsys):
    folder = tmp_path / "no rows"
    arguments = [
        "--experiment", "longbench", "--model", "tiny-random", "--limit", "1", "--data", str(folder), "--official",
        str(folder), "--results",
        str(tmp_path / "results"), "--override", f"output.root={tmp_path / 'runs'}", "arms=smoke",
    ]  # fmt: skip
    assert paper.main(arguments) == 2
    out, err = capsys.readouterr()
    assert "9 of 9 tasks left out" in err
    text = next(Path(line) for line in out.split("\n") if line.endswith(".md")).read_text()
    override = f"--override output.root={tmp_path / 'runs'} arms=smoke"
    again = f"kvbench tables --experiment longbench --model tiny-random --limit 1 --data DIR --official DIR {override}"
    assert f"- qasper: `{again}`" in text
    assert vars(parser("tables").parse_args(again.split()[2:]))["limit"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experiment", "nope"], "'nope' is no experiment of kvbench tables: choose from budgets"),
        (["--experiment", "needel"], "did you mean needle?"),
        (["--limit", "x"], "invalid int value: 'x'"),
        (["--experiment", "needle", "--model", "nope"], "model=nope is unknown"),
        (["--experiment", "needle", "--override", "arms=null"], "arms=null names none of the arms"),
        (["--experiment", "needle", "--limit", "0"], "task.limit=0 is not an integer of at least 1"),
        (["--experiment", "needle", "--results", "/proc/none"], "/proc/none cannot be used"),
    ],
)
def test_something_to_mend_is_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(paper, "run_plan", None)  # told before anything runs
    assert paper.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvbench: ")
    assert words in line
