"""Every leaf of the configuration with values that it does not expect: planned, and run where a plan comes of it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from verdicts import CASES, NASTY, QASPER, QUALITY, Tally

from kvbench.config import composed, group_options
from kvbench.fields import shown
from kvbench.plan import build_plan
from kvbench.run import run_plan

SMALL = [
    "model=tiny-random", "model.n_layers=2", "protocol.max_new_tokens=2", "protocol.gold_tokens=2", "task.limit=1",
    "output.root=runs", "model.max_prompt_tokens=200",
]  # fmt: skip
GRID = ["task.lengths=[128]", "model.max_prompt_tokens=null"]
METHODS = group_options("method")


def bases(rows: Path, official: Path) -> list[list[str]]:
    """Overrides of small configurations of every kind of task, engine and method."""
    kinds = [
        [*GRID, "task=passkey", "arms=smoke"],
        [*GRID, "task=niah", "method=h2o", "budget=0.5"],
        [*GRID, "task=fewshot", "method=kvmerger", "budget=0.7", "engine=plain"],
        ["task=demo", "task.tasks.passkey.lengths=[128]", "task.tasks.fewshot.lengths=[128]", "method=snapkv",
         "model.max_prompt_tokens=null"],
        ["task=mini", "method=tova", "model.max_prompt_tokens=null"],
        ["task=qasper", f"data.root={rows}", f"data.official={official}", "method=streaming_llm"],
        ["task=zeroscrolls/quality", f"data.root={rows}", "method=knorm", "protocol.compress=before_question"],
    ]  # fmt: skip
    methods = [[*GRID, "task=passkey", f"method={name}"] for name in METHODS]
    return [[*SMALL, *kind] for kind in (*kinds, *methods)]


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all values of a configuration, groups included."""
    items = node.items() if isinstance(node, dict) else []
    for key, value in items:
        below = f"{path}.{key}" if path else str(key)
        yield below
        yield from leaves(value, below)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "qasper.jsonl").write_text(json.dumps(QASPER) + "\n")
    (folder / "quality").mkdir()
    for split, name in (("validation", "z1"), ("test", "z2")):
        (folder / "quality" / f"{split}.jsonl").write_text(json.dumps({**QUALITY, "id": name}) + "\n")
    return folder


def test_no_value_of_the_configuration_ends_in_a_traceback(data, shared_data, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    configs = [composed(base) for base in bases(data, shared_data / "longbench_official")]
    paths = [list(leaves(OmegaConf.to_container(config))) for config in configs]
    tally = Tally("values of the configuration")
    random = tally.random
    for _ in range(CASES):
        place = random.randrange(len(configs))
        path, value = random.choice(paths[place]), random.choice(NASTY)
        tally.attempt(f"{path}={shown(value)}", lambda p=place, k=path, v=value: run(configs[p], k, v))
    tally.check(record_property)


def run(base: DictConfig, path: str, value: Any) -> None:
    config = copy.deepcopy(base)
    OmegaConf.update(config, path, value, merge=False, force_add=True)
    outcome = run_plan(build_plan(config), Console(file=io.StringIO()))
    assert not outcome.n_failed, "samples failed"
