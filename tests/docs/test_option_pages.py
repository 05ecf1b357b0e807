"""The pages of options are made from the files and classes that the program reads, and leave nothing out."""

import dataclasses
import runpy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kvbench.config import group_options
from kvbench.models.config import ModelConfig
from kvbench.tasks.synthetic import PassKey

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("griffe", reason="the documentation's packages are not installed: pip install --group dev")
    return runpy.run_path(str(ROOT / "scripts" / "docs_reference.py"), run_name="test")


def test_every_group_that_a_run_composes_has_a_page(pages):
    entries = OmegaConf.load(ROOT / "configs" / "config.yaml").defaults
    composed = {str(key) for entry in entries if not isinstance(entry, str) for key in entry}
    assert {key for key in composed if not key.startswith("override")} == pages["GROUPS"].keys() - {"hydra/launcher"}
    index = pages["options_page"]()
    assert all(page in index for page, _ in pages["GROUPS"].values())
    assert "gold_tokens: 64" in index
    assert "\nhydra:" not in index


@pytest.mark.parametrize("group", ["model", "task", "arms", "engine", "experiment", "hydra/launcher"])
def test_a_page_has_every_file_of_its_group(pages, group):
    page = pages["group_page"](group)
    files = {file.stem for file in (ROOT / "configs" / group).glob("[!_]*.yaml")}
    assert files <= {line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")}
    assert page.count("```") % 2 == 0


def test_the_page_of_tasks_has_every_task(pages):
    page = pages["group_page"]("task")
    named = [name for name in group_options("task") if "/" in name and not name.rpartition("/")[2].startswith("_")]
    assert len(named) > 30
    assert all(f"`{name}`" in page for name in named)


@pytest.mark.parametrize(("group", "kind"), [("model", ModelConfig), ("task", PassKey)])
def test_every_field_stands_on_the_page_with_default_and_meaning(pages, group, kind):
    page = pages["group_page"](group)
    for field in dataclasses.fields(kind):
        assert f"`{field.name}=" in page, field.name
    assert "`digits=6` (an integer from 2 to 100)\n:   length of a key" in page or group == "model"
    assert "`dtype=auto` (printable text)\n:   " in page or group == "task"


def test_a_comment_goes_on_below_its_key(pages):
    lines = ["compile: true        # in decode steps run", "                     # fused", "max_rows: null  # rows"]
    assert pages["comments_of"](lines) == {"compile": "in decode steps run fused", "max_rows": "rows"}
