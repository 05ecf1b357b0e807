"""Archives and rows from elsewhere: plain files within limits, every bad row named, or nothing at all."""

import io
import stat
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import pytest

from kvbench.errors import DataError
from kvbench.tasks import data
from kvbench.tasks.data import MAX_LINE_BYTES, Row, open_member, read_jsonl, read_rows, unpack


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def patched(archive: Path, offset: int, change: bytes, directory: bool = True) -> Path:
    """Overwrite bytes, counted from the archive's directory or from its start."""
    content = bytearray(archive.read_bytes())
    start = content.rindex(b"PK\x01\x02") * directory + offset
    content[start : start + len(change)] = change
    archive.write_bytes(content)
    return archive


def refused(tmp_path: Path, archive: Path, problem: str) -> None:
    target = tmp_path / "target"
    target.mkdir(exist_ok=True)
    with pytest.raises(DataError, match=problem):
        unpack(archive, target, ".jsonl")
    assert not list(target.iterdir())


def test_only_the_wanted_files_are_unpacked(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("data/", b""), ("data/a.jsonl", b"{}\n"), ("data/b.py", b"1"))
    assert unpack(archive, tmp_path / "target", ".jsonl") == ["data/a.jsonl"]
    assert [path.name for path in (tmp_path / "target").rglob("*")] == ["data", "a.jsonl"]


@pytest.mark.parametrize("name", [r"../a", r"/a", r"data/../../a", r"..\a", r"C:\a", r"C:a", r"\\host\a"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    refused(
        tmp_path, make_zip(tmp_path / "x.zip", ("fine.jsonl", b"{}"), (f"{name}.jsonl", b"{}")), "leaves the folder"
    )


def test_links_special_encrypted_and_namesake_files_are_refused(tmp_path: Path) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        info = zipfile.ZipInfo("link.jsonl")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        refused(tmp_path, make_zip(tmp_path / "x.zip", (info, b"/etc/passwd")), "link or a special file")
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = make_zip(tmp_path / "x.zip", ("a.jsonl", b"1"), ("a.jsonl", b"2"))
    refused(tmp_path, archive, "two files named")
    refused(tmp_path, patched(make_zip(tmp_path / "y.zip", ("a.jsonl", b"{}")), 8, b"\1"), "encrypted")


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "x.zip", ("a.jsonl", b"x" * 3 * 2**20), ("b.jsonl", b""))
    refused(tmp_path, archive, "zip bomb")
    monkeypatch.setattr(data, "MAX_RATIO", 1e9)
    for limit, value, problem in (
        ("MAX_TOTAL_BYTES", 3_000_000, "unpacks to 3145728 bytes, the limit is 3000000"),
        ("MAX_MEMBERS", 1, "has 2 files, the limit is 1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(data, limit, value)
            refused(tmp_path, archive, problem)
    assert unpack(archive, tmp_path / "target", ".jsonl") == ["a.jsonl", "b.jsonl"]


def test_damage_is_found(tmp_path: Path) -> None:
    fine = make_zip(tmp_path / "x.zip", ("a.jsonl", bytes(range(256)) * 400)).read_bytes()
    for offset, change, directory in (
        (60, bytes([fine[60] ^ 1]), False),  # a flipped bit
        (24, (10).to_bytes(4, "little"), True),  # says 10 bytes: only so many are read, the sum is wrong
    ):
        (tmp_path / "x.zip").write_bytes(fine)
        with pytest.raises(DataError, match="damaged"):
            unpack(patched(tmp_path / "x.zip", offset, change, directory), tmp_path / str(offset), ".jsonl")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, 99])
@pytest.mark.parametrize("damaged", [False, True])
def test_only_the_common_ways_of_packing_are_read(tmp_path: Path, method: int, damaged: bool) -> None:
    """zipfile lets LZMAError and bzip2's nameless OSError through, and LZMA may ask for 4 GiB."""
    known = zipfile.ZIP_STORED if method == 99 else method
    archive = make_zip(tmp_path / "x.zip", ("a.jsonl", b"{}" * 100), method=known)
    patched(archive, 10, method.to_bytes(2, "little"))
    if damaged:
        patched(archive, 44, b"\xff" * 16, directory=False)
    refused(tmp_path, archive, f"packed by method {method}.* pack it anew with zip")


def test_one_member_can_be_read_in_place(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("t/test.jsonl", b"1\n2\n"))
    with open_member(archive, ("test.jsonl", "t/test.jsonl")) as (file, name):
        assert (file.readline(), name) == (b"1\n", "t/test.jsonl")
    with pytest.raises(DataError, match="has no no such; it has t/test"), open_member(archive, ("no such",)):
        pass
    with pytest.raises(DataError, match="does not exist"), open_member(tmp_path / "none.zip", ("a",)):
        pass


def rows(path: Path, content: bytes) -> list[tuple[int, dict]]:
    path.write_bytes(content)
    return list(read_jsonl(path))


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    content = '{"a": "one\u2028still one\x85"}\r\n{"a": "二"}'.encode()
    assert rows(tmp_path / "x.jsonl", content) == [(1, {"a": "one\u2028still one\x85"}), (2, {"a": "二"})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": ', "malformed JSON"),
        (b"", "the line is empty"),
        (b"   ", "the line is empty"),
        (b"null", "must be a JSON object, this is a NoneType"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
        ("﻿{}".encode(), "malformed JSON"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "malformed JSON"),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "longer than 999999 bytes"),
    ],
    ids=["cut", "empty", "blank", "null", "latin-1", "byte order mark", "deep", "digits", "long"],
)
def test_a_bad_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, problem: str) -> None:
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 999_999)
    path = tmp_path / "x.jsonl"
    with pytest.raises(DataError, match=problem) as error:
        rows(path, b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert f"{path}:2: " in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_an_empty_file_and_a_folder(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none", "cannot be read: No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=problem):
            list(read_jsonl(path))
    with pytest.raises(DataError, match="is empty"):
        rows(tmp_path / "x.jsonl", b"")


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("any", ..., "f:1: field 'x' is missing"),
        ("text", 3, "must be a string, this is a int"),
        ("text", "\ud800", "lone surrogate at character 0"),
        ("texts", ["a", 1], "must be a list of strings"),
        ("texts", ["a", "b\ud800"], "lone surrogate at character 1"),
        ("count", True, "non-negative integer"),
        ("count", -1, "non-negative integer"),
        ("count", "3", "non-negative integer"),
    ],
)
def test_fields_are_checked(kind: str, value: object, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        getattr(Row({} if value is ... else {"x": value}, "f:1"), kind)("x")


def test_a_row_of_a_gigabyte_is_refused_by_reading_a_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(2**30)  # a hole: it takes no room on the disk, and is read as bytes
    tracemalloc.start()
    with pytest.raises(DataError, match=r"x\.jsonl:1: the line is longer than 67108864 bytes"):
        list(read_jsonl(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * MAX_LINE_BYTES


def test_parquet_rows_are_those_that_were_written(tmp_path: Path) -> None:
    written = [{"a": "2020-01-01", "b": None, "c": 7}, {"a": "x\u2028y", "b": ["z", ""], "c": 2**40}]
    datasets.Dataset.from_list(written).to_parquet(tmp_path / "x.parquet")
    assert list(read_rows(tmp_path / "x.parquet")) == list(enumerate(written, start=1))
    (tmp_path / "x.parquet").write_bytes(b"not Parquet")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet") as error:
        list(read_rows(tmp_path / "x.parquet"))
    assert "\n" not in str(error.value)


def test_a_small_file_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(url: str, file: io.BytesIO, **options: object) -> None:
        for _ in range(10**6):
            file.write(b"x" * 2**20)

    monkeypatch.setattr(data, "_get", endless)
    with pytest.raises(DataError, match="more than 16777216 bytes arrived"):
        data.web_file("https://example.org/small.json", "0" * 64)
