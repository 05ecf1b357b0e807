"""The cache folder's place, and folders that are complete or not there."""

from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import DataError
from kvbench.paths import MANIFEST, cache_folder, complete_folder, ensure_folder


def test_the_place_is_named_by_three_variables_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("KVBENCH_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "kvbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "kvbench"
    assert cache_folder().is_dir()


def test_a_place_that_cannot_be_made_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match="KVBENCH_CACHE"):
        cache_folder()


def write_a(folder: Path) -> dict[str, Any]:
    (folder / "a").write_text("content")
    return {"from": "test"}


def test_a_complete_folder_is_not_written_again(tmp_path: Path) -> None:
    folder = ensure_folder(tmp_path / "x", {"version": 1}, write_a)

    def write_again(folder: Path) -> None:
        raise AssertionError("the folder was complete")

    assert ensure_folder(folder, {"version": 1}, write_again) == folder
    ensure_folder(folder, {"version": 2}, write_a)
    assert complete_folder(folder, {"version": 2})
    assert not complete_folder(folder, {"version": 1})


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"files_bytes": {"a": 6}, "identity": {}}', '{"files_bytes": 3}']
)
def test_a_broken_manifest_means_incomplete(tmp_path: Path, manifest: str) -> None:
    folder = ensure_folder(tmp_path / "x", {}, write_a)
    (folder / MANIFEST).write_text(manifest)
    assert not complete_folder(folder, {})


def test_a_failed_writer_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise DataError("stopped")

    with pytest.raises(DataError, match="stopped"):
        ensure_folder(tmp_path / "x", {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


def test_remains_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.partial" / "old").mkdir(parents=True)
    folder = ensure_folder(tmp_path / "x", {}, write_a)
    assert sorted(path.name for path in folder.iterdir()) == ["a", MANIFEST]
    assert not (tmp_path / ".x.partial").exists()


def test_a_full_disk_is_a_data_error(tmp_path: Path) -> None:
    def no_space(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        ensure_folder(tmp_path / "x", {}, no_space)
