"""Archives and rows from elsewhere: plain files within limits, every bad row named, or nothing at all."""

import io
import stat
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from kvbench.errors import DataError
from kvbench.tasks import data
from kvbench.tasks.data import MAX_LINE_BYTES, Limits, Row, open_member, parse_jsonl, read_jsonl, read_rows, unpack


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def refused(tmp_path: Path, archive: Path, problem: str, limits: Limits | None = None) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(DataError, match=problem):
        unpack(archive, target, ".jsonl", limits or Limits())
    assert not list(target.iterdir())


def test_only_the_wanted_files_are_unpacked(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("data/", b""), ("data/a.jsonl", b"{}\n"), ("data/b.py", b"1"))
    target = tmp_path / "target"
    assert unpack(archive, target, ".jsonl") == ["data/a.jsonl"]
    assert [path.name for path in target.rglob("*")] == ["data", "a.jsonl"]


@pytest.mark.parametrize(
    "name",
    ["../a.jsonl", "/a.jsonl", "data/../../a.jsonl", "..\\a.jsonl", "C:\\a.jsonl", "C:a.jsonl", "\\\\host\\a.jsonl"],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = make_zip(tmp_path / "x.zip", ("fine.jsonl", b"{}"), (name, b"{}"))
    refused(tmp_path, archive, "leaves the folder")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_special_files_are_refused(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("link.jsonl")
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    refused(tmp_path, make_zip(tmp_path / "x.zip", (info, b"/etc/passwd")), "link or a special file")


def test_limits_hold(tmp_path: Path) -> None:
    text = b"x" * 3 * 2**20
    archive = make_zip(tmp_path / "x.zip", ("a.jsonl", text))
    refused(tmp_path, archive, "zip bomb")
    (tmp_path / "target").rmdir()
    refused(
        tmp_path, archive, "unpacks to 3145728 bytes, the limit is 3000000", Limits(total_bytes=3_000_000, ratio=1e9)
    )
    (tmp_path / "target").rmdir()
    many = make_zip(tmp_path / "y.zip", ("a.jsonl", b""), ("b.jsonl", b""))
    refused(tmp_path, many, "has 2 files, the limit is 1", Limits(members=1))
    assert unpack(archive, tmp_path / "target", ".jsonl", Limits(ratio=1e9)) == ["a.jsonl"]


def test_a_size_that_lies_is_told_from_the_checksum(tmp_path: Path) -> None:
    """The directory says 10 bytes, the packed data goes on: only 10 are read, and their checksum is wrong."""
    archive = make_zip(tmp_path / "x.zip", ("a.jsonl", b"y" * 100_000))
    content = bytearray(archive.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (10).to_bytes(4, "little")
    archive.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "target", ".jsonl")


def test_twice_the_same_name_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = make_zip(tmp_path / "x.zip", ("a.jsonl", b"1"), ("a.jsonl", b"2"))
    refused(tmp_path, archive, "two files named")


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("a.jsonl", bytes(range(256)) * 9))
    content = bytearray(archive.read_bytes())
    content[60] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "target", ".jsonl")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("a.jsonl", b"{}"))
    content = bytearray(archive.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    refused(tmp_path, archive, "encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, 99])
@pytest.mark.parametrize("damaged", [False, True])
def test_only_the_common_ways_of_packing_are_read(tmp_path: Path, method: int, damaged: bool) -> None:
    """zipfile lets LZMAError and bzip2's nameless OSError through, and LZMA may ask for 4 GiB."""
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED if method == 99 else method) as file:
        file.writestr("a.jsonl", b"{}" * 100)
    content = bytearray(archive.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 10 : directory + 12] = method.to_bytes(2, "little")
    if damaged:
        content[44:60] = b"\xff" * 16
    archive.write_bytes(content)
    refused(tmp_path, archive, f"packed by method {method}.* pack it anew with zip")


def test_one_member_can_be_read_in_place(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("t/test.jsonl", b"1\n2\n"))
    with open_member(archive, ("test.jsonl", "t/test.jsonl")) as (file, name):
        assert (file.readline(), name) == (b"1\n", "t/test.jsonl")
    with pytest.raises(DataError, match="has no no such; it has t/test"), open_member(archive, ("no such",)):
        pass
    with pytest.raises(DataError, match="does not exist"), open_member(tmp_path / "none.zip", ("a",)):
        pass


def rows(path: Path, content: bytes, **options: int) -> list[tuple[int, dict]]:
    path.write_bytes(content)
    return list(read_jsonl(path, **options))


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    content = '{"a": "one\u2028still one\x85"}\n{"a": "二"}'.encode()
    assert rows(tmp_path / "x.jsonl", content) == [(1, {"a": "one\u2028still one\x85"}), (2, {"a": "二"})]
    assert rows(tmp_path / "x.jsonl", b'{"a": 1}\r\n{"a": 2}\r\n') == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": ', "malformed JSON"),
        (b"", "the line is empty"),
        (b"   ", "the line is empty"),
        (b"[1]", "must be a JSON object, this is a list"),
        (b"null", "must be a JSON object, this is a NoneType"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
        ("﻿{}".encode(), "malformed JSON"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "malformed JSON"),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "longer than 999999 bytes"),
    ],
    ids=["cut", "empty", "blank", "list", "null", "latin-1", "byte order mark", "deep", "digits", "long"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(DataError, match=problem) as error:
        rows(path, b'{"a": 1}\n' + line + b'\n{"a": 3}\n', max_line_bytes=999_999)
    assert f"{path}:2: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_line_is_refused_before_it_is_read_whole() -> None:
    class Endless(io.BytesIO):
        """One line without an end."""

        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 <= size <= 2**20 + 1, "the line would fill the memory"
            return b"x" * size

    with pytest.raises(DataError, match="endless:1: the line is longer than 1048576 bytes"):
        list(parse_jsonl(Endless(), "endless", max_line_bytes=2**20))


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
        ("texts", "a", "must be a list of strings"),
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
    import datasets

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
