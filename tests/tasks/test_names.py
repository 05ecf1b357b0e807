"""Tasks are found by long and short name, and by glob, in an application of its own (the root config is not needed)."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from kvbench.tasks.longbench import LongBench
from kvbench.tasks.names import nested_task_names, register_task_names

TASKS = Path(__file__).resolve().parents[2] / "configs" / "task"


@pytest.fixture
def app_folder(tmp_path: Path) -> Path:
    """A config folder with a root config like ours in the parts that tasks touch, and the real `task` group."""
    (tmp_path / "task").symlink_to(TASKS)
    root = {"defaults": [{"task": "qasper"}, "_self_"], "data": {"root": None, "official": None}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(root))
    return tmp_path


def compose_task(folder: Path, *overrides: str) -> LongBench:
    register_task_names(TASKS)
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


@pytest.mark.parametrize("name", nested_task_names(TASKS))
def test_every_file_composes_under_its_own_name(app_folder: Path, name: str) -> None:
    task = compose_task(app_folder, f"task={name}")
    assert name.endswith(f"/{task.dataset.removeprefix('zeroscrolls_')}")
    assert task.name == task.dataset


def test_glob_sweeps_over_a_folder(app_folder: Path) -> None:
    script = app_folder / "app.py"
    script.write_text(
        "import hydra, pathlib\n"
        "from kvbench.tasks.names import register_task_names\n"
        f"register_task_names(pathlib.Path({str(TASKS)!r}))\n"
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
