"""Read zip files that came from elsewhere: nothing leaves the target folder, nothing swells beyond its limits.

`zipfile` checks every member's CRC-32 when it is read to the end, so a member that could be read whole is intact.
"""

from __future__ import annotations

import errno
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from kvbench.errors import DataError


@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Attributes:
        members: number of files.
        total_bytes: sum of unpacked sizes; LongBench unpacks to well under 1 GiB.
        ratio: unpacked over packed size of a member of more than `small_bytes`; text packs 3 to 10 times.
        small_bytes: members up to this size may have any ratio.
    """

    members: int = 1000
    total_bytes: int = 8 * 2**30
    ratio: float = 100.0
    small_bytes: int = 2**20


def unpack(archive: Path, folder: Path, suffix: str, limits: Limits = Limits()) -> list[str]:
    """Unpack the files of a zip whose names end in `suffix` into `folder`.

    Args:
        archive: the zip file.
        folder: an empty folder.
        suffix: e.g. ".jsonl"; other files are left in the archive.
        limits: what the archive may hold.

    Returns:
        Names of the files written, relative to `folder`, in the archive's order.

    Raises:
        DataError: if the archive is damaged, a name points outside of the folder, a member is no plain file, or a limit
            is exceeded. Nothing is written in the last three cases.
    """
    with _opened(archive) as file:
        members = [member for member in _checked(file, archive, limits) if member.filename.endswith(suffix)]
        for member in members:
            target = folder / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open(member) as packed, target.open("xb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)
    return [member.filename for member in members]


@contextmanager
def open_member(
    archive: Path,
    names: tuple[str, ...],
    limits: Limits = Limits(),
) -> Iterator[tuple[IO[bytes], str]]:
    """Open one file inside of a zip for reading.

    Args:
        archive: the zip file.
        names: possible names; the first that exists is opened.
        limits: as in `unpack`.

    Yields:
        The open file and the name found.

    Raises:
        DataError: as in `unpack`, also from within the `with` block; or if no member has one of these names.
    """
    with _opened(archive) as file:
        present = {member.filename: member for member in _checked(file, archive, limits)}
        found = next((name for name in names if name in present), None)
        if found is None:
            raise DataError(
                f"{archive} has no {' or '.join(names)}; it has {', '.join(list(present)[:8]) or 'no files'}"
            )
        with file.open(present[found]) as member:
            yield member, found


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The open archive; every way in which zipfile says "damaged" becomes one error."""
    try:
        with zipfile.ZipFile(archive) as file:
            yield file
    # NotImplementedError: zipfile's word for a format version it does not know, which a damaged byte can name
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{archive} does not exist") from None
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a damaged offset, before the beginning
            raise
        raise DataError(f"{archive} is damaged or cut short ({error}); remove it and fetch it again") from None


def _checked(file: zipfile.ZipFile, archive: Path, limits: Limits) -> list[zipfile.ZipInfo]:
    """The archive's plain files, after all checks that need no unpacking."""
    members = [member for member in file.infolist() if not member.filename.endswith("/")]  # is_dir trips over ""
    if len(members) > limits.members:
        raise DataError(f"{archive} has {len(members)} files, the limit is {limits.members}: not a data set archive")
    total_bytes = sum(member.file_size for member in members)
    if total_bytes > limits.total_bytes:
        raise DataError(f"{archive} unpacks to {total_bytes} bytes, the limit is {limits.total_bytes}: refused")
    seen: set[str] = set()
    for member in members:
        name = member.filename
        if not _stays_inside(name):
            raise DataError(f"{archive} has a file named {name!r}, which is empty or leaves the folder: refused")
        # The upper half holds the Unix mode where a Unix tool made the archive, else 0.
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise DataError(f"{archive} has {name!r}, which is a link or a special file: refused")
        if member.flag_bits & 0x1:
            raise DataError(f"{archive} has {name!r}, which is encrypted: refused")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(  # a damaged byte can name any, and LZMA may then ask for 4 GiB
                f"{archive} has {name!r} packed by method {member.compress_type}: only stored and deflated files are "
                "read (methods 0 and 8), pack it anew with zip"
            )
        if member.file_size > limits.small_bytes and member.file_size > limits.ratio * member.compress_size:
            raise DataError(
                f"{archive} has {name!r} of {member.file_size} bytes packed into {member.compress_size}, more than "
                f"{limits.ratio:g} times: refused as a zip bomb"
            )
        if name in seen:
            raise DataError(f"{archive} has two files named {name!r}: refused")
        seen.add(name)
    return members


def _stays_inside(name: str) -> bool:
    """Whether a member's name is a relative path, not empty and without "..", on Unix and on Windows."""
    windows = PureWindowsPath(name)
    return not (
        not name
        or PurePosixPath(name).is_absolute()
        or windows.drive
        or windows.root
        or ".." in windows.parts  # splits at both kinds of slash
        or "\0" in name
    )
