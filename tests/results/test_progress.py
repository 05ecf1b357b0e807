"""The view of a run that two shards write, from its folder alone."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from kvbench.progress import RunWatch, draw, find_runs, main
from kvbench.records.folder import RunFolder
from kvbench.records.schema import Record

ARMS = ("full", "h2o@0.5")
START = 1_000_000.0


def shard(root: Path, number: int) -> RunFolder:
    folder = RunFolder(root, "passkey-m", {"model": "m"}, f"{number}-of-2")
    call = {"started_at": START, "host": f"node{number}", "process": 1, "shard": f"{number}/2", "arms": list(ARMS)}
    folder.note_call({**call, "task_samples": 6, "missing_answers": 6})
    return folder


def answers(sample: str, at_s: float, **fields) -> list[Record]:
    return [Record(sample, "passkey", arm, arm, 1.0, recorded_at=START + at_s, **fields) for arm in ARMS]


@pytest.fixture
def run(tmp_path) -> Path:
    first, second = shard(tmp_path, 1), shard(tmp_path, 2)
    first.append([*answers("a", 10), *answers("b", 20)])
    second.append(answers("c", 30, status="failed", reason="too \x1b[31mbad"))
    return first.path


def test_both_shards_count_and_their_rate_gives_the_time_left(run):
    seen = RunWatch(run).look(START + 60)
    assert [tuple(arm.values()) for arm in seen["arms"]] == [("full", 3, 1, 6), ("h2o@0.5", 3, 1, 6)]
    assert seen["samples_per_minute"] == pytest.approx(3.0)
    assert seen["left_s"] == pytest.approx(60.0)
    calls = [tuple(call.values()) for call in seen["calls"]]
    assert calls == [("1/2", "node1", 4, 6, 40.0), ("2/2", "node2", 2, 6, 30.0)]
    assert not seen["complete"]
    seen = RunWatch(run).look(START + 5000)  # it stands still
    assert (seen["samples_per_minute"], seen["left_s"]) == (0.0, None)


def test_each_look_reads_what_is_new_and_half_a_line_waits_for_its_end(run, tmp_path):
    watch = RunWatch(run)
    assert watch.look(START + 60)["arms"][0]["n_done"] == 3
    path = run / "shards" / "1-of-2" / "records" / "full.jsonl"
    line = json.dumps(answers("d", 70)[0].to_dict()) + "\n"
    for half, n_done in ((line[:40], 3), (line[40:], 4)):
        with path.open("a") as file:
            file.write(half)
        assert watch.look(START + 80)["arms"][0]["n_done"] == n_done


def test_a_failure_that_is_retried_counts_no_longer(run, tmp_path):
    watch = RunWatch(run)
    assert {arm for _, arm, _ in watch.look(START + 60)["failures"]} == set(ARMS)
    RunFolder(tmp_path, "passkey-m", {"model": "m"}, "2-of-2").append(answers("c", 90))
    seen = watch.look(START + 100)
    assert seen["failures"] == []
    assert [arm["n_failed"] for arm in seen["arms"]] == [0, 0]
    assert seen["arms"][0]["n_done"] == 3


def test_the_view_shows_arms_shards_failures_and_nothing_that_moves_the_cursor(run):
    console = Console(file=io.StringIO(), width=100)
    console.print(draw([RunWatch(run).look(START + 60)]))
    text = console.file.getvalue()
    for word in ("full", "3/6", "2/2", "node2", "4/6", "0:00:40 ago", "3.00 samples a minute", "0:01:00", "bad"):
        assert word in text
    assert "\x1b" not in text


def test_one_look_ends_with_json_and_tells_failures_by_its_exit_code(run, tmp_path, capsys):
    assert main([str(tmp_path), "--once"]) == 3
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["name"], found["complete"], found["arms"][0]["n_done"]) == (run.name, False, 3)


def test_the_live_view_ends_when_all_is_done(run, tmp_path, capsys):
    folder = RunFolder(tmp_path, "passkey-m", {"model": "m"}, "1-of-2")
    folder.append([record for name in ("d", "e", "f") for record in answers(name, 100)])
    assert main([str(run)]) == 0
    assert "complete" in capsys.readouterr().out


def test_runs_are_found_at_and_below_the_folders_named(run, tmp_path, capsys):
    assert find_runs([tmp_path]) == [run] == find_runs([run, tmp_path])
    assert main([str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
