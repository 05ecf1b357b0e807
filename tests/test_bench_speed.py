"""The speed benchmark runs and prints what it promises; no time is asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench_speed.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one quick run on the CPU printed last, compared with what it wrote to its file."""
    out = tmp_path_factory.mktemp("bench") / "speed.json"
    arguments = ["--quick", "--repeats", "1", "--model", "tiny-random", "--cpu-model", "tiny-random"]
    arguments += ["--arms", "full,h2o@0.5", "--rows", "2,4,5,6,7", "--threads", "1", "--out", str(out)]
    done = run_bench(*arguments)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    return dict(printed)


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import speed_timing

    return speed_timing


def test_document_has_a_line_for_every_row_with_its_raw_times(document: dict[str, Any]) -> None:
    assert [row["row"] for row in document["rows"]] == [2, 4, 4, 5, 6, 6, 7]
    assert not any(row["failed"] for row in document["rows"])
    for row in document["rows"]:
        for times in row["seconds"].values():
            assert len(times["raw"]) == 1
            assert times["p50"] == pytest.approx(times["raw"][0])
        assert row["peak_bytes"] > 0


def test_values_follow_from_the_times(document: dict[str, Any]) -> None:
    fork, peer, batched, cache, arms, column_sums, further = document["rows"]
    seconds = {name: times["p50"] for name, times in fork["seconds"].items()}
    assert fork["value"] == pytest.approx((seconds["forked"] - seconds["observed"]) / seconds["plain"])
    assert peer["value"] is None
    assert "--peer" in peer["note"]
    assert batched["value"] == pytest.approx(batched["seconds"]["sample"]["p50"])
    assert batched["details"]["settings"]["batch_samples"] == 2
    assert cache["value"] == pytest.approx(max(cache["details"]["ratios"].values()))
    assert arms["value"] == pytest.approx(arms["seconds"]["arms"]["p50"] / arms["seconds"]["full"]["p50"])
    assert column_sums["details"]["observe"] == ["torch"]
    assert further["value"] == pytest.approx(further["seconds"]["arms"]["p50"] / further["seconds"]["full"]["p50"] - 1)


def test_cache_bytes_count_the_scores_that_h2o_keeps(document: dict[str, Any]) -> None:
    details = next(row["details"] for row in document["rows"] if row["row"] == 5)
    slots = 128 * 4 * 2  # half of 256 tokens, 4 layers, 2 KV heads
    assert details["ratios"]["full"] == pytest.approx(1.0)
    assert details["bytes"]["h2o@0.5"] >= slots * (2 * 16 * 4 + 4)


def test_document_says_where_it_was_measured(document: dict[str, Any]) -> None:
    assert document["models"]["main"]["name"] == "tiny-random"
    assert document["models"]["main"]["arms"] == ["full", "h2o@0.5"]
    assert set(document["versions"]) >= {"torch", "transformers"}
    assert document["device"]


def test_a_row_that_cannot_be_measured_is_recorded_and_the_run_fails() -> None:
    arguments = ["--quick", "--model", "tiny-random", "--rows", "5", "--arms", "full,h2o@0.001"]
    done = run_bench(*arguments)
    row = json.loads(done.stdout.splitlines()[-1])["rows"][0]
    assert done.returncode == 1
    assert row["failed"]
    assert row["value"] is None
    assert "BudgetError" in row["note"]


def test_peer_without_its_environment_says_how_to_install_it() -> None:
    done = run_bench("--peer", "--quick")
    assert done.returncode == 2
    assert "kvpress==0.5.5" in done.stderr


def test_row_judges_its_value_by_the_direction_of_its_target(timing: ModuleType) -> None:
    def met(value: float, **options: Any) -> bool | None:
        return timing.Row(1, "q", "c", {}, lambda t: value, **options).record()["met"]

    assert met(1.0, target=1.5) is True
    assert met(2.0, target=1.5) is False
    assert met(31.0, target=30.0, at_least=True) is True
    assert met(29.0, target=30.0, at_least=True) is False
    assert met(1.0) is None
    assert met(math.nan, must_run=True) is False


def test_spread_is_that_of_the_value_over_the_repeats(timing: ModuleType) -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "plain": [1.0, 1.0, 2.0]}
    record = timing.Row(1, "q", "c", seconds, lambda t: t["ours"] / t["plain"]).record()
    assert record["value"] == pytest.approx(2.0)
    assert record["spread"] == pytest.approx({"p20": 1.4, "p50": 2.0, "p80": 2.0})
