"""Records survive crashes, resume, and never lie about what was written."""

import os

import pytest

from kvbench.errors import RecordError
from kvbench.records.folder import RunFolder, file_name, identity_hash
from kvbench.records.read import read_calls, read_config, read_prompts, read_record_file, read_records, record_files
from kvbench.records.schema import Record

IDENTITY = {"model": "m", "task": "t"}


def record(sample: str = "s1", arm: str = "h2o@0.5", **fields) -> Record:
    return Record(sample=sample, dataset="passkey", arm=arm, method="h2o", budget=0.5, **fields)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path, "t", IDENTITY)


@pytest.fixture
def shards(tmp_path) -> list[RunFolder]:
    """The run without shards, and its two shards."""
    return [RunFolder(tmp_path, "t", IDENTITY, shard) for shard in (None, "1-of-2", "2-of-2")]


def test_equal_identities_share_a_folder_and_others_do_not(tmp_path):
    first, again = RunFolder(tmp_path, "t-m", IDENTITY), RunFolder(tmp_path, "t-m", dict(reversed(IDENTITY.items())))
    other = RunFolder(tmp_path, "t-m", {**IDENTITY, "model": "n"})
    assert first.path == again.path != other.path
    assert first.path.name == f"t-m-{identity_hash(IDENTITY)}"


def test_appended_records_are_done_and_read_back(folder):
    folder.append([record("s1", prediction="ünï\n\ud83d"), record("s2", status="failed", reason="why")])
    assert [(key, r["status"]) for key, r in folder.recorded().items()] == [
        (("passkey", "s1", "h2o@0.5"), "ok"), (("passkey", "s2", "h2o@0.5"), "failed"),
    ]  # fmt: skip


def test_a_half_written_last_line_is_skipped_and_spoils_nothing_after_it(folder):
    folder.append([record("s1"), record("s2")])
    path = folder.home / "records" / file_name("h2o@0.5")
    path.write_bytes(path.read_bytes()[:-20])
    assert set(folder.recorded()) == {("passkey", "s1", "h2o@0.5")}
    folder.append([record("s3")])
    assert [r["sample"] for r in read_record_file(path)] == ["s1", "s3"]


def test_a_success_replaces_a_failure_and_the_first_success_counts(folder):
    folder.append([record(status="failed"), record(score=0.25), record(score=0.75)])
    (kept,) = read_records(folder.path)
    assert kept["score"] == 0.25


def test_a_number_that_is_no_number_is_never_written(folder):
    with pytest.raises(ValueError, match="JSON"):
        folder.append([record(gold_nll=float("nan"))])
    assert read_records(folder.path) == []


def test_prompts_are_kept_once_and_survive_a_broken_line(folder):
    folder.keep_prompts([{"dataset": "a", "sample": "1", "prompt": "Zeile\u2028eins"}])
    with (folder.path / "prompts.jsonl").open("a") as file:
        file.write('{"dataset": "a", "sam\n')
    folder.keep_prompts([{"dataset": "a", "sample": s, "prompt": "other"} for s in ("1", "2")])
    assert read_prompts(folder.path) == {("a", "1"): "Zeile\u2028eins", ("a", "2"): "other"}


@pytest.mark.parametrize("left_by_a_crash", [None, b"", b'{"model": "m", "conf', b"[]"])
def test_configuration_is_written_once_to_its_end(folder, left_by_a_crash):
    if left_by_a_crash is not None:
        (folder.path / "config.json").write_bytes(left_by_a_crash)
    folder.describe({"budget": 0.5})
    folder.describe({"budget": 0.9})
    assert read_config(folder.path) == {**IDENTITY, "config": {"budget": 0.5}}
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.json", "records"]


def test_arm_files_have_safe_and_distinct_names():
    assert file_name("kvmerger@0.35,sigma=3").startswith("kvmerger@0.35_sigma=3-")
    assert file_name("a/../b") != file_name("a_.._b")
    assert "/" not in file_name("a/../b")
    assert file_name("h2o@0.5") == "h2o@0.5.jsonl"


def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder is wanted")
    with pytest.raises(RecordError, match=r"output\.root") as error:
        RunFolder(tmp_path / "taken", "t", IDENTITY)
    assert "\n" not in str(error.value)


def test_two_writers_never_interleave_lines(folder):
    children = []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            for i in range(40):
                folder.append([record(f"s{child}-{i}", prediction="x" * 5000)])
            folder.keep_prompts({"dataset": "a", "sample": f"{child}-{i}", "prompt": "x" * 20000} for i in range(20))
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    (path,) = record_files(folder.path)
    assert len(read_record_file(path)) == 160
    assert sum(map(bool, path.read_bytes().split(b"\n"))) == 160  # no line is broken
    assert len(read_prompts(folder.path)) == 80


def test_shards_of_a_run_write_files_of_their_own_and_are_read_as_one(shards, tmp_path):
    whole, first, second = shards
    assert whole.path == first.path == second.path
    first.append([record("s1"), record("s2", status="failed")])
    second.append([record("s3")])
    whole.append([record("s2")])
    assert all({sample for _, sample, _ in folder.recorded()} == {"s1", "s2", "s3"} for folder in shards)
    assert {r["sample"]: r["status"] for r in read_records(whole.path)} == {"s1": "ok", "s2": "ok", "s3": "ok"}
    assert len(list(tmp_path.rglob("h2o@0.5.jsonl"))) == 3
    for folder, score in ((second, 0.75), (first, 0.25)):  # of the same sample in two shards one record counts
        folder.append([record("s9", score=score)])
    assert [r["score"] for r in read_records(whole.path) if r["sample"] == "s9"] == [0.25]


def test_prompts_and_calls_of_all_shards_are_read(shards):
    _, first, second = shards
    first.keep_prompts([{"dataset": "a", "sample": "1", "prompt": "one"}])
    second.keep_prompts([{"dataset": "a", "sample": s, "prompt": "two"} for s in ("1", "2")])
    assert read_prompts(first.path) == {("a", "1"): "one", ("a", "2"): "two"}
    for folder, time in ((first, 2.0), (second, 1.0)):
        folder.note_call({"started_at": time, "arms": [], "task_samples": 2, "missing_answers": 0})
    first.note_call({"started_at": "yesterday", "arms": []})
    assert [call["started_at"] for call in read_calls(first.path)] == [1.0, 2.0]


LABELS = ["..", "../../out", "/etc/passwd", "a/../../b", "C:\\x", "\0", "", "\x1b[2J", "." * 300]


@pytest.mark.parametrize("label", LABELS)
def test_a_label_never_leaves_the_folder_of_runs(tmp_path, label):
    root = tmp_path / "runs"
    folder = RunFolder(root, label, IDENTITY)
    folder.append([record(arm="../../../out"), record(arm="/tmp/out"), record(arm="..")])
    assert folder.path.resolve().parent == root.resolve()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.parent for path in folder.path.glob("**/*.jsonl")] == [folder.path / "records"] * 3
