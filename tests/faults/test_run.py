"""What may go wrong during a run, each really done to the real command line."""

import json
import shutil
import signal
import subprocess

import pytest
import torch
from commands import RUN, complete_lines, rows, wait_until
from safetensors.torch import load_file, save_file

from kvbench.records.schema import SCHEMA_VERSION

WHOLE = [*RUN, "output.root=runs"]
SMALL = [*WHOLE, "task.limit=2"]
N_ARMS = 9


def run_folder(folder):
    (found,) = [path for path in (folder / "runs").iterdir() if (path / "records").is_dir()]
    return found


def lost_rows(before, folder):
    """Rows that were recorded and are not, or are others."""
    after = rows(folder / "runs")
    return [key for key, record in before.items() if after.get(key) != record]


@pytest.fixture(scope="module")
def undisturbed(cli, tmp_path_factory):
    """A folder with a complete run of `SMALL`, and the command that made it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, cli.run(SMALL, folder, 0)


@pytest.fixture
def damaged(undisturbed, tmp_path):
    """A copy of that folder, to be damaged."""
    shutil.copytree(undisturbed[0] / "runs", tmp_path / "runs")
    return tmp_path


# ---- files -----------------------------------------------------------------------------------------------------------


def test_half_written_last_lines_are_computed_again(cli, undisturbed, damaged, record_property):
    files = sorted(run_folder(damaged).glob("records/*.jsonl"))
    for number, path in enumerate(files):
        content = path.read_bytes()
        last = content.rindex(b"\n", 0, -1) + 1
        # Everything from "the line feed alone is missing" to "one byte of the line was written".
        path.write_bytes(content[: max(last + 1, len(content) - 1 - number * (len(content) - last) // len(files))])
    assert cli.run(SMALL, damaged, 0).tables == undisturbed[1].tables
    missing = rows(undisturbed[0] / "runs").keys() - rows(damaged / "runs").keys()
    record_property("faults", f"half-written last lines: {len(files)}, rows lost: {len(missing)}")
    assert not missing


def test_two_processes_write_the_same_run(cli, undisturbed, tmp_path, record_property):
    commands = [cli.start(SMALL, tmp_path) for _ in range(2)]
    assert [command.wait() for command in commands] == [0, 0], [command.stderr for command in commands]
    files = sorted(run_folder(tmp_path).glob("records/*.jsonl"))
    n_lines = sum(path.read_bytes().count(b"\n") for path in files)
    assert n_lines == sum(len(complete_lines(path)) for path in files)
    assert rows(tmp_path / "runs") == rows(undisturbed[0] / "runs")
    assert [command.tables for command in commands] == [undisturbed[1].tables] * 2
    record_property("faults", f"two writers: {n_lines} lines of {2 * N_ARMS} rows, broken lines: 0, rows lost: 0")


@pytest.mark.parametrize("limit_bytes", [3000, 6500], ids=["at the configuration", "in the middle of a record"])
def test_a_file_that_cannot_grow_is_one_line_and_loses_nothing(cli, tmp_path, limit_bytes, record_property):
    """No file can grow beyond the limit: the write that crosses it comes back short, the next one fails."""
    arguments = [*WHOLE, "task.lengths=[130]"]  # so that the prompts' file stays below the limit
    stopped = cli.run(arguments, tmp_path, 2, file_limit_bytes=limit_bytes)
    assert "cannot be written" in stopped.error_line
    assert "File too large" in stopped.error_line
    before = rows(tmp_path / "runs")
    assert (len(before) > 0) == (limit_bytes > 6000)
    cli.run(arguments, tmp_path, 0)
    lost = lost_rows(before, tmp_path)
    kept = f"file size limit of {limit_bytes} bytes: {len(before)} rows kept"
    record_property("faults", f"{kept}, rows lost: {len(lost)}")
    assert not lost
    assert len(rows(tmp_path / "runs")) == 8 * N_ARMS


def mount(*arguments):
    """Whether the command `mount` did as told; that takes an administrator."""
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for ten pages."""
    (disk := tmp_path / "disk").mkdir()
    if not mount("-t", "tmpfs", "-o", "size=40k", "kvbench-test", str(disk)):
        pytest.skip("mounting a small file system needs an administrator; the file size limit is tested without")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_no_space_left_on_the_device(cli, undisturbed, small_disk, record_property):
    stopped = cli.run(SMALL, small_disk, 2)
    assert "No space left on device" in stopped.error_line
    assert "free space and run" in stopped.error_line
    before = rows(small_disk / "runs")
    assert mount("-o", "remount,size=4m", str(small_disk))
    assert cli.run(SMALL, small_disk, 0).tables == undisturbed[1].tables
    lost = lost_rows(before, small_disk)
    record_property("faults", f"full disk of 40 KiB: {len(before)} rows kept, rows lost: {len(lost)}")
    assert not lost


def test_records_of_a_newer_version_are_left_alone(cli, damaged):
    path = run_folder(damaged) / "records" / "full.jsonl"
    newer = "".join(json.dumps({**row, "schema": SCHEMA_VERSION + 1}) + "\n" for row in complete_lines(path))
    path.write_text(newer, encoding="utf-8")
    refused = cli.run(SMALL, damaged, 2)
    assert f"schema {SCHEMA_VERSION + 1}" in refused.error_line
    assert "upgrade kvbench" in refused.error_line
    assert path.read_text(encoding="utf-8") == newer


# ---- methods, metrics, models ----------------------------------------------------------------------------------------

NO_OTHER_ARM = [
    f"arms.{name}=null"
    for name in ("full", *(f"{method}_{n}" for method in ("h2o", "cam", "kvmerger", "kvmerger_bias") for n in (50, 35)))
]
FAULTY = {
    "RaisesInCompress": "RuntimeError: broken on purpose (fault_policies.py:",
    "RaisesInStep": "ZeroDivisionError: broken in step (fault_policies.py:",
    "FillsMemoryInCompress": "out of memory with a single arm",
    "FillsMemoryInStep": "out of memory with a single arm",
    "MakesNan": "not finite",
}


def outcome(command, arm):
    """Samples measured, samples failed, and the score."""
    return tuple(command.arms[arm][name] for name in ("n", "n_failed", "score"))


@pytest.mark.parametrize("policy", FAULTY)
def test_a_failing_method_is_recorded_with_its_reason(cli, tmp_path, policy, record_property):
    """Beside a good arm: the good one is measured, the bad one recorded as failed."""
    bad = f"{{_target_: fault_policies.{policy}, budget: 0.5}}"
    arguments = [*SMALL, f"+arms.bad={bad}", "+arms.good={_target_: fault_policies.Newest, budget: 0.5}", *NO_OTHER_ARM]
    command = cli.run(arguments, tmp_path, 3)
    (bad_key,) = command.arms.keys() - {"newest@0.5"}
    assert outcome(command, bad_key) == (0, 2, None)
    assert outcome(command, "newest@0.5") == (2, 0, 0.0)
    records = [record for record in rows(tmp_path / "runs").values() if record["arm"] == bad_key]
    assert [(record["status"], record["score"]) for record in records] == [("failed", None)] * 2
    assert all(FAULTY[policy] in record["reason"] for record in records), records
    record_property("faults", f"{policy}: 2 rows recorded as failed, 2 rows of the other arm measured, rows lost: 0")


def test_a_failed_sample_is_tried_again_when_asked_and_a_success_replaces_its_failure(cli, tmp_path):
    (switch := tmp_path / "switch").touch()
    method = ["method=full", "method._target_=fault_policies.RaisesWhile", f"+method.file={switch}", "budget=0.5"]
    failed = cli.run([*SMALL, *method], tmp_path, 3)
    cli.run([*SMALL, *method, "retry_failed=true"], tmp_path, 3)
    switch.unlink()
    assert cli.run([*SMALL, *method], tmp_path, 0).tables == failed.tables
    retried = cli.run([*SMALL, *method, "retry_failed=true"], tmp_path, 0)
    key = list(retried.arms)[-1]
    assert outcome(retried, key) == (2, 0, 0.0)


def assert_every_sample_fails(command, folder, words):
    assert {outcome(command, key) for key in command.arms} == {(0, 2, None)}
    assert all(words in record["reason"] for record in rows(folder / "runs").values())


BROKEN_METRICS = {"raises": "ValueError: broken metric (cli_server.py:", "nan": "score=nan", "text": "metric needle"}


@pytest.mark.parametrize("kind", BROKEN_METRICS)
def test_a_metric_that_fails_never_scores_zero(cli, tmp_path, kind):
    assert_every_sample_fails(cli.run(SMALL, tmp_path, 3, broken_metric=kind), tmp_path, BROKEN_METRICS[kind])


def test_a_model_whose_logits_are_no_numbers_fails_every_sample(cli, tiny_gqa, tmp_path):
    folder = tmp_path / "model"
    tiny_gqa.model.save_pretrained(folder)
    tiny_gqa.tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    command = cli.run([*SMALL, "model=local", f"model.path={folder}"], tmp_path, 3)
    assert_every_sample_fails(command, tmp_path, "not finite")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(cli, tmp_path):
    """A run that takes a second for each of 4 samples, interrupted while it decodes; and how to run it again."""
    touched = tmp_path / "decoding"
    method = ["method=full", "method._target_=fault_policies.SlowSteps", f"+method.file={touched}", "budget=0.5"]
    arguments = [*RUN, "task.limit=4", "engine.max_rows=1", "output.root=runs", *method]

    def start(seconds):
        command = cli.start([*arguments, f"++method.seconds={seconds}"], tmp_path)
        assert wait_until(touched.exists, command)
        command.send(signal.SIGINT)
        return command

    return start, lambda seconds: cli.run([*arguments, f"++method.seconds={seconds}"], tmp_path, 0)


def test_one_interrupt_finishes_the_sample_in_flight(slow, tmp_path, record_property):
    start, again = slow
    command = start(0.05)
    assert command.wait() == 130, command.stderr
    for words in ("finishing the samples in flight; Ctrl-C again stops now",
                  "interrupted (1 of 4 samples were finished, 3 are left)", "the same command goes on"):  # fmt: skip
        assert words in command.stderr
    before = rows(tmp_path / "runs")
    assert len(before) == 2
    again(0.05)
    lost = lost_rows(before, tmp_path)
    record_property("faults", f"Ctrl-C once: 1 row in flight written, exit code 130, rows lost: {len(lost)}")
    assert not lost
    assert len(rows(tmp_path / "runs")) == 8


def test_two_interrupts_stop_now(slow, tmp_path, record_property):
    start, again = slow
    command = start(5)
    wait_until(lambda: "finishing" in command.stderr, command)
    command.send(signal.SIGINT)
    assert command.wait() == 130, command.stderr
    assert "the same command goes on" in command.stderr
    assert {row["arm"] for row in rows(tmp_path / "runs").values()} <= {"full"}, (
        "the sample in flight, which takes a minute, was not to be waited for"
    )
    again(0)
    record_property("faults", "Ctrl-C twice: stopped in the middle of a sample, exit code 130, rows lost: 0")
