"""Read a JSONL file that somebody else wrote: every bad row is named by file and line, none ends in a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kvbench.errors import DataError

# The longest official rows (LongBench narrativeqa, ZeroSCROLLS narrative_qa) are a few megabytes.
MAX_LINE_BYTES = 64 * 2**20


def read_jsonl(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, dict[str, Any]]]:
    r"""Yield (line number from 1, row) for every line; lines end at "\n" alone, as their writers meant.

    Args:
        path: a UTF-8 file with one JSON object per line.
        max_line_bytes: a longer line is refused before it fills the memory.

    Raises:
        DataError: if the file cannot be read or is empty, or at the first line that is not a JSON object in UTF-8.
    """
    try:
        with path.open("rb") as file:
            yield from parse_jsonl(file, str(path), max_line_bytes)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def parse_jsonl(
    file: IO[bytes], name: str, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same for an open file.

    Args:
        file: open for reading in binary mode.
        name: what errors call it.
        max_line_bytes: as in `read_jsonl`.

    Raises:
        DataError: as `read_jsonl`.
    """
    line_number = 0
    while line := file.readline(max_line_bytes + 1):
        line_number += 1
        if len(line) > max_line_bytes:
            raise DataError(
                f"{name}:{line_number}: the line is longer than {max_line_bytes} bytes; "
                "is this a JSONL file (one row per line)?"
            )
        yield line_number, _parse(line, f"{name}:{line_number}")
    if line_number == 0:
        raise DataError(f"{name} is empty; fetch it again")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise DataError(f"{where}: the line is empty; remove it")
    try:
        row = json.loads(text)
    except RecursionError:
        raise DataError(f"{where}: JSON is nested too deeply to be a data row") from None
    except ValueError as error:  # JSONDecodeError, or an integer with too many digits
        raise DataError(f"{where}: malformed JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")
    return row


def text_field(row: dict[str, Any], field: str, where: str) -> str:
    """The string in `row[field]`.

    Args:
        row: a parsed row.
        field: the field's name.
        where: "file:line" for the error.

    Raises:
        DataError: if the field is missing, no string, or holds a lone surrogate (no tokenizer or file takes one).
    """
    value = any_field(row, field, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be a string, this is a {type(value).__name__}")
    return _encodable(value, field, where)


def text_list_field(row: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    """The strings in the list `row[field]`; arguments and errors as `text_field`."""
    value = any_field(row, field, where)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: field {field!r} must be a list of strings")
    return tuple(_encodable(item, field, where) for item in value)


def count_field(row: dict[str, Any], field: str, where: str) -> int:
    """The non-negative integer in `row[field]`; arguments and errors as `text_field`."""
    value = any_field(row, field, where)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{where}: field {field!r} must be a non-negative integer, this is {str(value)[:40]!r}")
    return value


def any_field(row: dict[str, Any], field: str, where: str) -> Any:
    """The value of `row[field]`; arguments as `text_field`.

    Raises:
        DataError: if the field is missing.
    """
    if field not in row:
        present = ", ".join(str(name)[:40] for name in list(row)[:12]) or "none"
        raise DataError(f"{where}: field {field!r} is missing (fields: {present})")
    return row[field]


def _encodable(value: str, field: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {field!r} has a lone surrogate at character {error.start}") from None
    return value
