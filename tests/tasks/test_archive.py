"""Archives from elsewhere: plain files inside of the folder, within limits, intact, or nothing at all."""

import stat
import zipfile
from pathlib import Path

import pytest

from kvbench.errors import DataError
from kvbench.tasks.archive import Limits, open_member, unpack


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
