"""One shard, eight shards in any order and a resumed run give the same records except times."""

import random
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from kvbench.config import config_folder, register
from kvbench.plan import build_plan
from kvbench.records.read import read_records, record_files
from kvbench.run import Outcome, run_plan

TIMES = ("seconds", "recorded_at", "call")
TASK = [
    "model=tiny-random", "task=passkey", "task.lengths=[200,260,320]", "task.samples_per_cell=1",
    "protocol.max_new_tokens=5", "protocol.gold_tokens=4",
]  # fmt: skip
NINE_ARMS = [*TASK, "arms=smoke"]  # 18 rows a sample: no two samples share a batch
ONE_ARM = [*TASK, "method=cam", "budget=0.5"]  # 3 rows a sample: samples share batches


def run(root: Path, arguments: list[str], *more: str) -> Outcome:
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        plan = build_plan(compose("config", overrides=[*arguments, f"output.root={root}", *more]))
    return run_plan(plan, Console(quiet=True))


def records(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["sample"], r["arm"]): {k: v for k, v in r.items() if k not in TIMES} for r in read_records(folder)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), NINE_ARMS).folder


def test_eight_shards_in_any_order_give_the_same_records(whole, tmp_path):
    numbers = random.Random(0).sample(range(1, 9), 8)
    outcomes = [run(tmp_path, NINE_ARMS, f"shard={number}/8") for number in numbers]
    assert {outcome.folder.name for outcome in outcomes} == {whole.name}
    positions = [position for outcome in outcomes for position in outcome.samples]
    assert sorted(positions) == list(range(15))
    sharded = records(outcomes[0].folder)
    assert len(sharded) == 15 * 9
    expected = records(whole)
    assert sharded.keys() == expected.keys()
    for key, record in sharded.items():
        assert_same(record, expected[key])
        assert record["engine"] == expected[key]["engine"]  # here the batches are the same


def test_a_run_that_was_cut_off_and_goes_on_as_two_shards_gives_the_same_records(whole, tmp_path):
    run(tmp_path, NINE_ARMS, "task.limit=4")
    folder = run(tmp_path, NINE_ARMS, "shard=2/2").folder
    for path in record_files(folder)[::2]:  # as if killed: some arms of the last samples are lost or half-written
        path.write_bytes(path.read_bytes()[:-700])
    for number in (1, 2):
        run(tmp_path, NINE_ARMS, f"shard={number}/2")
    resumed, expected = records(folder), records(whole)
    assert resumed.keys() == expected.keys()
    for key, record in resumed.items():
        assert_same(record, expected[key])


def test_samples_that_share_batches_with_others_get_the_same_answers(tmp_path):
    single = records(run(tmp_path / "1", ONE_ARM).folder)
    for number in (3, 1, 2):
        folder = run(tmp_path / "3", ONE_ARM, f"shard={number}/3").folder
    sharded = records(folder)
    assert sharded.keys() == single.keys()
    assert single != sharded  # their batches were others, and say so
    for key, record in sharded.items():
        assert_same(record, single[key])


def test_a_shard_without_samples_is_done_at_once(tmp_path):
    outcome = run(tmp_path, TASK, "task.limit=2", "shard=3/4", "method=h2o", "budget=0.5")
    assert outcome.samples == {}
    assert read_records(outcome.folder) == []


def assert_same(record: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal but for what depends on who shared the batch: its size, and the last bits of sums of floats."""
    floats = ("gold_nll", "kl", "kl_per_token")
    for name in floats:
        assert record[name] == pytest.approx(expected[name], abs=2e-6), name
    rest = {name for name in record if name not in (*floats, "engine")}
    assert {name: record[name] for name in rest} == {name: expected[name] for name in rest}
