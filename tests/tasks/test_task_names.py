"""Tasks are found by long and short name, and by glob, in an application of its own (the root config is not needed)."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate

from kvbench.metrics.longbench import ROWS
from kvbench.metrics.zeroscrolls import TASKS as ZEROSCROLLS_TASKS
from kvbench.tasks import register_benchmarks
from kvbench.tasks.base import Mix
from kvbench.tasks.longbench import LongBench
from kvbench.tasks.synthetic import NeedleInHaystack

TASKS = Path(__file__).resolve().parents[2] / "configs" / "task"


@pytest.fixture
def app_folder(tmp_path: Path) -> Path:
    """A config folder with a root config like ours in the parts that tasks touch, and the real `task` group."""
    (tmp_path / "task").symlink_to(TASKS)
    root = {"defaults": [{"task": "qasper"}, "_self_"], "data": {"root": None, "official": None}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(root))
    return tmp_path


def compose_task(folder: Path, *overrides: str) -> LongBench:
    register_benchmarks(TASKS)
    with initialize_config_dir(str(folder), version_base="1.3"):
        return instantiate(compose("config", overrides=list(overrides)).task)


def test_short_and_long_name_are_the_same_task(app_folder: Path) -> None:
    long = compose_task(app_folder, "task=longbench/samsum_e", "data.root=/rows", "data.official=/official")
    short = compose_task(app_folder, "task=samsum_e", "data.root=/rows", "data.official=/official")
    assert long == short
    assert long == LongBench(
        name="samsum_e", dataset="samsum_e", language="en", category="few-shot", metric="rouge_l", chat=False,
        first_line_only=True, stop_newline=True, root="/rows", official="/official",
    )  # fmt: skip


def test_alias_works_in_a_defaults_list(app_folder: Path) -> None:
    assert compose_task(app_folder).dataset == "qasper"
    assert compose_task(app_folder, "task.limit=3").limit == 3


@pytest.mark.parametrize(
    "name", [*(f"longbench/{name}" for name in ROWS), *(f"zeroscrolls/{name}" for name in ZEROSCROLLS_TASKS)]
)
def test_every_task_composes_under_its_own_name(app_folder: Path, name: str) -> None:
    task = compose_task(app_folder, f"task={name}")
    assert name.endswith(f"/{task.dataset.removeprefix('zeroscrolls_')}")
    assert task.name == task.dataset


def test_glob_sweeps_over_a_folder(app_folder: Path) -> None:
    script = app_folder / "app.py"
    script.write_text(
        "import hydra, pathlib\n"
        "from kvbench.tasks import register_benchmarks\n"
        f"register_benchmarks(pathlib.Path({str(TASKS)!r}))\n"
        f"@hydra.main(config_path={str(app_folder)!r}, config_name='config', version_base='1.3')\n"
        "def main(config):\n    print('ran', config.task.name)\n"
        "main()\n"
    )
    command = [
        sys.executable,
        str(script),
        "-m",
        "task=glob([longbench/l*, longbench/t*], exclude=*_e)",
        "hydra.sweep.dir=out",
    ]
    done = subprocess.run(command, cwd=app_folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    ran = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert ran == ["lcc", "lsht", "trec", "triviaqa"]


def test_a_file_wins_over_a_benchmark_s_task_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "task" / "longbench").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("defaults: [{task: vcsum}, _self_]\ndata: {root: null, official: null}\n")
    own = "defaults: [/task/longbench/_base@_here_]\ndataset: mine\nlanguage: zh\ncategory: few-shot\nmetric: needle\n"
    for name in ("vcsum", "longbench/vcsum"):
        (tmp_path / "task" / f"{name}.yaml").write_text(own)
    node = ConfigStore.instance().repo["task"]
    for place in (node, node["longbench"]):
        place.pop("vcsum.yaml", None)
    register_benchmarks(tmp_path / "task")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        for override in ([], ["task=longbench/vcsum"]):
            assert instantiate(compose("config", overrides=override).task).dataset == "mine"


@pytest.mark.parametrize(
    ("former", "kind"),
    [("kvbench.tasks.mix.Mix", Mix), ("kvbench.tasks.synthetic.niah.NeedleInHaystack", NeedleInHaystack)],
)
def test_former_classes_are_built_with_a_line_that_names_the_new_one(former: str, kind: type, caplog) -> None:
    assert type(instantiate({"_target_": former})) is kind
    assert f"is now {kind.__module__}" in caplog.text
