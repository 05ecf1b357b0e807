"""Shards are complete, disjoint, balanced and fixed, whatever the order in which they run."""

import random

import pytest

from kvbench.errors import ConfigError
from kvbench.shards import Shard, spell_out_shards
from kvbench.tasks.base import Sample


def samples(lengths: list[int]) -> list[Sample]:
    return [Sample(str(i), "d", "x" * length, ("a",), "needle", 4) for i, length in enumerate(lengths)]


def lengths(n_samples: int) -> list[int]:
    return [int(random.Random(7 + i).lognormvariate(8, 1)) for i in range(n_samples)]


@pytest.mark.parametrize(("n_samples", "count"), [(200, 8), (17, 4), (5, 5), (3, 8), (1, 1)])
def test_every_sample_is_in_exactly_one_shard_and_shards_are_of_one_size(n_samples, count):
    task = samples(lengths(n_samples))
    parts = [Shard(number, count).positions(task) for number in range(1, count + 1)]
    assert sorted(position for part in parts for position in part) == list(range(n_samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == sorted(part) for part in parts)


def test_shards_have_about_as_much_to_read():
    task = samples(lengths(200))
    parts = [Shard(number, 8).positions(task) for number in range(1, 9)]
    characters = [sum(len(task[position].prompt) for position in part) for part in parts]
    one_after_the_other = [sum(len(sample.prompt) for sample in task[i * 25 : i * 25 + 25]) for i in range(8)]
    longest = max(len(sample.prompt) for sample in task)
    assert max(characters) - min(characters) <= longest  # what dealing in turns guarantees
    assert max(characters) - min(characters) < (max(one_after_the_other) - min(one_after_the_other)) / 2


def test_a_shard_is_fixed_also_where_prompts_are_equally_long():
    task = samples([10] * 16)
    assert Shard(1, 4).positions(task) == [0, 7, 8, 15] == Shard(1, 4).positions(task)


def test_a_shard_is_read_and_written_alike():
    assert Shard.parse("2/8") == Shard(2, 8)
    assert str(Shard(2, 8)) == "2/8"
    assert Shard(2, 8).folder_name == "2-of-8"


@pytest.mark.parametrize("text", ["0/8", "9/8", "0/0", "3", "", "2/8/1", "-1/4", "2/ 8", "a/b", "1/0", "1/99999999"])
def test_anything_else_is_refused_with_the_remedy(text):
    with pytest.raises(ConfigError, match="shard=2/8"):
        Shard.parse(text)


def test_a_range_of_shards_is_spelled_out_for_hydra():
    assert spell_out_shards(["-m", "shard=range(3)", "task=glob(*)", "x=range(3)"]) == [
        "-m", "shard=1/3,2/3,3/3", "task=glob(*)", "x=range(3)",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"range\(0\)"):
        spell_out_shards(["shard=range(0)"])
