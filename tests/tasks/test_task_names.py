"""The benchmarks' tasks are found by long and short name and by glob, without a file each; former classes are built."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Glob
from hydra.utils import instantiate

from kvbench.metrics import ruler
from kvbench.metrics.longbench import ROWS
from kvbench.metrics.zeroscrolls import TASKS
from kvbench.tasks import register_benchmarks
from kvbench.tasks.base import Mix, Task
from kvbench.tasks.longbench import LongBench
from kvbench.tasks.synthetic import NeedleInHaystack

LONG_NAMES = [
    *(f"longbench/{name}" for name in ROWS), *(f"ruler/{name}" for name in ruler.TASKS),
    *(f"zeroscrolls/{name}" for name in TASKS),
]  # fmt: skip
ROOT = "defaults: [{task: vcsum}, _self_]\ndata: {root: null, official: null}\n"  # like ours, where tasks touch it


@pytest.fixture
def hydra(tmp_path: Path):
    register_benchmarks(tmp_path)
    (tmp_path / "config.yaml").write_text(ROOT)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield


def composed(*overrides: str) -> Task:
    return instantiate(compose("config", overrides=list(overrides)).task)


def test_every_task_is_composed_by_its_own_name(hydra: None) -> None:
    for name in LONG_NAMES:
        task = composed(f"task={name}", "task.limit=3")
        own = f"ruler-26.3-4096-{task.task}" if name.startswith("ruler/") else task.dataset
        assert name.endswith(f"/{own.removeprefix('zeroscrolls_').removeprefix('ruler-26.3-4096-')}")
        assert (task.name, task.limit) == (own, 3)
    assert composed("task=longbench/samsum_e", "data.root=/rows", "data.official=/official") == LongBench(
        name="samsum_e", dataset="samsum_e", language="en", category="few-shot", metric="rouge_l", chat=False,
        first_line_only=True, stop_newline=True, root="/rows", official="/official",
    )  # fmt: skip
    assert composed("task=samsum_e") == composed("task=longbench/samsum_e")


def test_long_and_short_names_are_listed_for_globs(hydra: None) -> None:
    listed = GlobalHydra.instance().config_loader().get_group_options("task")
    assert {*LONG_NAMES, *ROWS} <= set(listed)
    assert Glob(include=["longbench/*", "ruler/*", "zeroscrolls/*"]).filter(listed) == sorted(LONG_NAMES)
    found = Glob(include=["longbench/l*", "longbench/t*"], exclude=["*_e"]).filter(listed)
    assert found == [f"longbench/{name}" for name in ("lcc", "lsht", "trec", "triviaqa")]


def test_a_file_wins_over_a_benchmark_s_task_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "task" / "longbench").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(ROOT)
    own = "defaults: [/task/longbench/_base@_here_]\ndataset: mine\nlanguage: zh\ncategory: few-shot\nmetric: needle\n"
    for name in ("vcsum", "longbench/vcsum"):
        (tmp_path / "task" / f"{name}.yaml").write_text(own)
    register_benchmarks(tmp_path / "nowhere")
    stored = ConfigStore.instance().repo["task"]
    for place in (stored, stored["longbench"]):
        place.pop("vcsum.yaml", None)  # as in a process that has registered nothing yet
    register_benchmarks(tmp_path / "task")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert composed().dataset == composed("task=longbench/vcsum").dataset == "mine"


@pytest.mark.parametrize(
    ("former", "kind"),
    [("kvbench.tasks.mix.Mix", Mix), ("kvbench.tasks.synthetic.niah.NeedleInHaystack", NeedleInHaystack)],
)
def test_former_classes_are_built_with_a_line_that_names_the_new_one(
    former: str, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    assert type(instantiate({"_target_": former})) is kind
    assert f"is now {kind.__module__}" in caplog.text
