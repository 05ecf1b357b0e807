"""The cache folder's place, and folders that are complete or not there."""

import json
import multiprocessing
import time

import pytest

from kvbench.errors import DataError
from kvbench.paths import MANIFEST, cache_folder, complete_folder, ensure_folder

IDENTITY = {"sha256": "abc", "version": 1}


def write_two(folder):
    (folder / "a.txt").write_text("first")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("second")


def test_the_place_is_named_by_three_variables_in_turn(tmp_path, monkeypatch):
    for name, value in {"HOME": "home", "XDG_CACHE_HOME": "xdg", "KVBENCH_CACHE": "own"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("KVBENCH_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "kvbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "kvbench"
    assert cache_folder().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match="KVBENCH_CACHE"):
        cache_folder()


def test_written_once_then_reused_and_remains_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".x.partial" / "old").mkdir(parents=True)
    calls = []
    for _ in range(2):
        folder = ensure_folder(tmp_path / "x", IDENTITY, lambda folder: (calls.append(1), write_two(folder)))
    assert len(calls) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(["a.txt", "sub", MANIFEST])
    assert json.loads((folder / MANIFEST).read_text())["files_bytes"] == {"a.txt": 5, "sub/b.txt": 6}
    assert not (tmp_path / ".x.partial").exists()


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError("stopped"), RuntimeError), (OSError(28, "No space left on device"), DataError)],
)
def test_a_failing_writer_leaves_nothing(tmp_path, error, raised):
    def write(folder):
        write_two(folder)
        raise error

    with pytest.raises(raised, match=r"stopped|No space left"):
        ensure_folder(tmp_path / "x", IDENTITY, write)
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == []


MANIFESTS = ["", "{", "[]", "{}", '{"files_bytes": {"a": 6}, "identity": {}}', '{"files_bytes": 3}']


@pytest.mark.parametrize("damage", ["no manifest", "truncated file", "missing file", "other version", *MANIFESTS])
def test_a_damaged_folder_is_written_again(tmp_path, damage):
    folder = ensure_folder(tmp_path / "x", IDENTITY, write_two)
    identity = {**IDENTITY, "version": 2} if damage == "other version" else IDENTITY
    if damage == "no manifest":
        (folder / MANIFEST).unlink()
    elif damage == "truncated file":
        (folder / "a.txt").write_text("fir")
    elif damage == "missing file":
        (folder / "a.txt").unlink()
    elif damage in MANIFESTS:
        (folder / MANIFEST).write_text(damage)
    (folder / "stale.txt").write_text("left over")
    assert not complete_folder(folder, identity)
    ensure_folder(folder, identity, write_two)
    assert complete_folder(folder, identity)
    assert not (folder / "stale.txt").exists()


def test_two_processes_write_once(tmp_path):
    def write(temporary):
        with (tmp_path / "log").open("a") as file:
            file.write("written\n")
        time.sleep(0.3)
        write_two(temporary)

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=ensure_folder, args=(tmp_path / "x", IDENTITY, write)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "log").read_text() == "written\n"
    assert complete_folder(tmp_path / "x", IDENTITY)
