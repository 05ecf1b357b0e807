"""Bad rows are named by file and line, whatever is wrong with them."""

import io
import tracemalloc
from pathlib import Path

import pytest

from kvbench.errors import DataError
from kvbench.tasks.jsonl import MAX_LINE_BYTES, count_field, parse_jsonl, read_jsonl, text_field, text_list_field


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


def test_fields_are_checked() -> None:
    row = {"text": "a", "list": ["a"], "count": 3, "surrogate": "\ud800", "bool": True, "mixed": ["a", 1], "less": -1}
    assert (text_field(row, "text", "f:1"), text_list_field(row, "list", "f:1"), count_field(row, "count", "f:1")) == (
        "a", ("a",), 3,
    )  # fmt: skip
    for check, field, problem in (
        (text_field, "none", "f:1: field 'none' is missing"),
        (text_field, "count", "must be a string, this is a int"),
        (text_field, "surrogate", "lone surrogate at character 0"),
        (text_list_field, "text", "must be a list of strings"),
        (text_list_field, "mixed", "must be a list of strings"),
        (count_field, "bool", "non-negative integer"),
        (count_field, "less", "non-negative integer"),
        (count_field, "text", "non-negative integer"),
    ):
        with pytest.raises(DataError, match=problem):
            check(row, field, "f:1")


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
