"""Shards are complete, disjoint, balanced and fixed; in any order, or resumed, they give one run's records."""

import random

import pytest
from rich.console import Console

from kvbench.config import composed, spelled_out
from kvbench.errors import ConfigError
from kvbench.plan import Shard, build_plan
from kvbench.records.read import read_records, record_files
from kvbench.run import run_plan
from kvbench.tasks.base import Sample

TIMES = ("seconds", "recorded_at", "call")
TASK = [
    "model=tiny-random", "model.n_layers=4", "task=passkey", "task.lengths=[200,260,320]", "task.samples_per_cell=1",
    "protocol.max_new_tokens=5", "protocol.gold_tokens=4",
]  # fmt: skip
NINE_ARMS = [*TASK, "arms=smoke"]  # 18 rows a sample: no two samples share a batch
ONE_ARM = [*TASK, "method=cam", "budget=0.5"]  # 4 rows a sample: samples share batches


def samples(lengths):
    return [Sample(str(i), "d", "x" * length, ("a",), "needle", 4) for i, length in enumerate(lengths)]


def random_samples(n_samples):
    return samples([int(random.Random(7 + i).lognormvariate(8, 1)) for i in range(n_samples)])


@pytest.mark.parametrize(("n_samples", "count"), [(200, 8), (17, 4), (5, 5), (3, 8), (1, 1)])
def test_every_sample_is_in_exactly_one_shard_and_shards_are_of_one_size(n_samples, count):
    task = random_samples(n_samples)
    parts = [Shard(number, count).positions(task) for number in range(1, count + 1)]
    assert sorted(position for part in parts for position in part) == list(range(n_samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == sorted(part) for part in parts)


def test_shards_have_about_as_much_to_read_and_are_fixed_also_where_prompts_are_equally_long():
    task = random_samples(200)
    parts = [Shard(number, 8).positions(task) for number in range(1, 9)]
    characters = [sum(len(task[position].prompt) for position in part) for part in parts]
    one_after_the_other = [sum(len(sample.prompt) for sample in task[i * 25 : i * 25 + 25]) for i in range(8)]
    longest = max(len(sample.prompt) for sample in task)
    assert max(characters) - min(characters) <= longest  # what dealing in turns guarantees
    assert max(characters) - min(characters) < (max(one_after_the_other) - min(one_after_the_other)) / 2
    assert Shard(1, 4).positions(samples([10] * 16)) == [0, 7, 8, 15]


def test_a_shard_is_read_and_written_alike_and_a_range_is_spelled_out_for_hydra():
    assert Shard.parse("2/8") == Shard(2, 8)
    assert (str(Shard(2, 8)), Shard(2, 8).folder_name) == ("2/8", "2-of-8")
    words = ["-m", "shard=range(3)", "task=glob(*)", "x=range(3)"]
    assert spelled_out(words) == ["-m", "shard=1/3,2/3,3/3", "task=glob(*)", "x=range(3)"]
    with pytest.raises(ConfigError, match=r"range\(0\)"):
        spelled_out(["shard=range(0)"])


@pytest.mark.parametrize("text", ["0/8", "9/8", "0/0", "3", "", "2/8/1", "-1/4", "2/ 8", "a/b", "1/0", "1/99999999"])
def test_anything_else_is_refused_with_the_remedy(text):
    with pytest.raises(ConfigError, match="shard=2/8"):
        Shard.parse(text)


def run(root, arguments, *more):
    plan = build_plan(composed([*arguments, f"output.root={root}", *more]))
    return run_plan(plan, Console(quiet=True))


def records(folder):
    return {(r["sample"], r["arm"]): {k: v for k, v in r.items() if k not in TIMES} for r in read_records(folder)}


def assert_same(found, expected):
    """Equal but for what depends on who shared the batch: its size, and the last bits of sums of floats."""
    floats = ("gold_nll", "kl", "kl_per_token")
    assert found.keys() == expected.keys()
    for key, record in found.items():
        for name in floats:
            assert record[name] == pytest.approx(expected[key][name], abs=2e-6), name
        rest = {name for name in record if name not in (*floats, "engine")}
        assert {name: record[name] for name in rest} == {name: expected[key][name] for name in rest}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), NINE_ARMS).folder


def test_eight_shards_in_any_order_give_the_same_records(whole, tmp_path):
    numbers = random.Random(0).sample(range(1, 9), 8)
    outcomes = [run(tmp_path, NINE_ARMS, f"shard={number}/8") for number in numbers]
    assert {outcome.folder.name for outcome in outcomes} == {whole.name}
    assert sorted(position for outcome in outcomes for position in outcome.samples) == list(range(15))
    found, expected = records(outcomes[0].folder), records(whole)
    assert len(found) == 15 * 9
    assert_same(found, expected)
    assert all(record["engine"] == expected[key]["engine"] for key, record in found.items())  # the batches are the same


def test_a_run_that_was_cut_off_and_goes_on_as_two_shards_gives_the_same_records(whole, tmp_path):
    run(tmp_path, NINE_ARMS, "task.limit=4")
    folder = run(tmp_path, NINE_ARMS, "shard=2/2").folder
    for path in record_files(folder)[::2]:  # as if killed: some arms of the last samples are lost or half-written
        path.write_bytes(path.read_bytes()[:-700])
    for number in (1, 2):
        run(tmp_path, NINE_ARMS, f"shard={number}/2")
    assert_same(records(folder), records(whole))


def test_samples_that_share_batches_with_others_get_the_same_answers(tmp_path):
    single = records(run(tmp_path / "1", ONE_ARM).folder)
    for number in (3, 1, 2):
        folder = run(tmp_path / "3", ONE_ARM, f"shard={number}/3").folder
    assert single != records(folder)  # their batches were others, and say so
    assert_same(records(folder), single)


def test_a_shard_without_samples_is_done_at_once(tmp_path):
    outcome = run(tmp_path, TASK, "task.limit=2", "shard=3/4", "method=h2o", "budget=0.5")
    assert outcome.samples == {}
    assert read_records(outcome.folder) == []
