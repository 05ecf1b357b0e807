"""The GPU hours of docs/scale.md come from measured numbers by the arithmetic that the page describes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gpu_hours():
    spec = importlib.util.spec_from_file_location("gpu_hours", ROOT / "scripts" / "gpu_hours.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gpu_hours", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def speeds(gpu_hours):
    return {
        model: gpu_hours.Speed.of(json.loads((gpu_hours.SPEED / file).read_text()))
        for model, file in gpu_hours.MODELS.items()
    }


def test_the_arithmetic_gives_the_sample_that_was_measured(speeds):
    for speed in speeds.values():
        assert speed.seconds(3500, 128, 0, 7) == pytest.approx(speed.sample_s, rel=0.04)


def test_each_part_of_the_arithmetic_counts(gpu_hours):
    speed = gpu_hours.Speed("a GPU", 3500, fork_s=0.5, step_s=0.01, arm_token_s=0.001, cache_share=0.25, sample_s=0)
    assert speed.seconds(3500, 1, 0, 7) == pytest.approx(0.5)
    assert speed.seconds(1750, 1, 0, 7) == pytest.approx(0.25)
    assert speed.seconds(3500, 101, 0, 7) == pytest.approx(0.5 + 100 * 0.01)
    assert speed.seconds(3500, 101, 0, 9) == pytest.approx(0.5 + 100 * 0.012)
    assert speed.seconds(3500, 1, 64, 7) == pytest.approx(0.5 + 64 * 0.25 * 0.01)


def test_the_page_shows_what_the_script_gives_for_an_experiment(gpu_hours, speeds):
    parts = {"needle": gpu_hours.experiment_parts("needle", ["llama2-7b-chat"])}
    header, rule, row, _ = gpu_hours.table(parts, speeds)
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for line in (header, rule, row):
        assert line in page
