import json
import multiprocessing
import time
from pathlib import Path

import pytest

from kvbench.paths import MANIFEST, cache_folder, complete_folder, ensure_folder

IDENTITY = {"sha256": "abc", "version": 1}


def write_two(folder: Path) -> None:
    (folder / "a.txt").write_text("first")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("second")


def slow_writer(folder: Path, log: Path) -> None:
    def write(temporary: Path) -> None:
        with log.open("a") as file:
            file.write("written\n")
        time.sleep(0.3)
        write_two(temporary)

    ensure_folder(folder, IDENTITY, write)


def test_environment_names_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("KVBENCH_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "kvbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "kvbench"


def test_written_once_then_reused(tmp_path):
    calls = []
    for _ in range(2):
        ensure_folder(tmp_path / "x", IDENTITY, lambda folder: (calls.append(1), write_two(folder)))
    assert len(calls) == 1
    assert (tmp_path / "x" / "sub" / "b.txt").read_text() == "second"
    assert json.loads((tmp_path / "x" / MANIFEST).read_text())["files_bytes"] == {"a.txt": 5, "sub/b.txt": 6}


def test_a_failing_writer_leaves_nothing(tmp_path):
    def write(folder):
        write_two(folder)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        ensure_folder(tmp_path / "x", IDENTITY, write)
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == []


@pytest.mark.parametrize(
    "damage", ["no manifest", "truncated file", "missing file", "other version", "broken manifest"]
)
def test_a_damaged_folder_is_written_again(tmp_path, damage):
    folder = ensure_folder(tmp_path / "x", IDENTITY, write_two)
    identity = IDENTITY
    if damage == "no manifest":
        (folder / MANIFEST).unlink()
    elif damage == "truncated file":
        (folder / "a.txt").write_text("fir")
    elif damage == "missing file":
        (folder / "a.txt").unlink()
    elif damage == "broken manifest":
        (folder / MANIFEST).write_text("{")
    else:
        identity = {**IDENTITY, "version": 2}
    (folder / "stale.txt").write_text("left over")
    assert not complete_folder(folder, identity)
    ensure_folder(folder, identity, write_two)
    assert complete_folder(folder, identity)
    assert not (folder / "stale.txt").exists()


def test_two_processes_write_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=slow_writer, args=(tmp_path / "x", tmp_path / "log")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "log").read_text() == "written\n"
    assert complete_folder(tmp_path / "x", IDENTITY)
