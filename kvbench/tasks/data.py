"""Benchmark data that others wrote: fetched once and verified, unpacked with care, read so that every bad row is named.

    <cache>/data/longbench/data/<id>.jsonl          all of LongBench and LongBench-E
    <cache>/data/longbench/config/*.json            official prompts and lengths
    <cache>/data/zeroscrolls/<task>/<split>.jsonl   one folder per task
    <cache>/data/gsm8k/test.jsonl                   (`kvbench.tasks.gsm8k`)

Sources: hub data sets THUDM/LongBench (its data.zip) and tau/zero_scrolls (a zip per task); the configuration files are
those of the LongBench repository at `OFFICIAL_COMMIT`. `huggingface_hub` resolves addresses, sends the user's token,
shows progress, retries, and honours `HF_ENDPOINT` and `HF_HUB_OFFLINE`; what a killed process had is kept by us, beside
the hub's cache, since its own `hf_hub_download` starts over in a new process (pull request 4228).

JSONL is parsed here, line by line: `datasets` makes times of texts like "2020-01-01" and null of a missing field, and
does not say which line is bad. Parquet, the hub's other format, has types of its own and is read by `datasets`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, BinaryIO

from kvbench.errors import DataError
from kvbench.metrics.longbench import ROWS
from kvbench.paths import cache_folder, ensure_folder, user_path

logger = logging.getLogger(__name__)
Source = dict[str, Any]  # what the manifest keeps of where data came from

LONGBENCH_REPO = "THUDM/LongBench"
LONGBENCH_REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
OFFICIAL_COMMIT = "2e00731f8d0bff23dc4325161044d0ed8af94c1e"
OFFICIAL_URL = f"https://raw.githubusercontent.com/THUDM/LongBench/{OFFICIAL_COMMIT}/LongBench/config"
OFFICIAL_SHA256 = {
    "dataset2prompt.json": "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
    "dataset2maxlen.json": "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
    "model2maxlen.json": "2405c0b85b215a504fb6a8f69c4982db7e2be2d53d177c69891cdcf0fe78f3ce",
}
ZEROSCROLLS_REPO = "tau/zero_scrolls"
ZEROSCROLLS_REVISION = "main"  # its files changed in 2025; the manifest records commit and checksum of what was fetched

MAX_LINE_BYTES = 64 * 2**20  # the longest official rows (narrativeqa of both benchmarks) are a few megabytes
MAX_WEB_FILE_BYTES = 16 * 2**20
MAX_MEMBERS = 1000  # files in an archive
MAX_TOTAL_BYTES = 8 * 2**30  # unpacked; LongBench has well under 1 GiB
MAX_RATIO = 100  # unpacked over packed size of a file of more than SMALL_BYTES; text packs 3 to 10 times
SMALL_BYTES = 2**20


def longbench_folder() -> Path:
    """Folder with `data/<id>.jsonl` and `config/*.json`, fetched on first use; `DataError` if that is not possible.

    `KVBENCH_OFFICIAL_URL` replaces the address of the folder of configuration files, `HF_ENDPOINT` that of the hub.
    """
    identity = {"repo": LONGBENCH_REPO, "revision": LONGBENCH_REVISION, "official": OFFICIAL_SHA256}

    def write(folder: Path) -> Source:
        base = os.environ.get("KVBENCH_OFFICIAL_URL", OFFICIAL_URL).rstrip("/")
        (folder / "config").mkdir()
        for name, sha256 in OFFICIAL_SHA256.items():
            (folder / "config" / name).write_bytes(web_file(f"{base}/{name}", sha256))
        wanted = [f"data/{dataset}.jsonl" for dataset in ROWS]
        return _unpack_hub_file(LONGBENCH_REPO, LONGBENCH_REVISION, "data.zip", folder, wanted)

    return fetched(identity, write, "longbench", "data.root=DIR data.official=DIR")


def zeroscrolls_folder(task: str) -> Path:
    """Folder with `<task>/{validation,test}.jsonl` of one of the ten tasks, likewise."""
    identity = {"repo": ZEROSCROLLS_REPO, "revision": ZEROSCROLLS_REVISION, "task": task}

    def write(folder: Path) -> Source:
        wanted = [f"{task}/{split}.jsonl" for split in ("validation", "test")]
        return _unpack_hub_file(ZEROSCROLLS_REPO, ZEROSCROLLS_REVISION, f"{task}.zip", folder, wanted)

    return fetched(identity, write, f"zeroscrolls/{task}", "data.root=DIR")


def fetched(identity: Source, write: Callable[[Path], Source], what: str, settings: str) -> Path:
    """The cached folder `what`, written if needed (`paths.ensure_folder`); `settings` are what may be set instead."""
    folder = cache_folder() / "data" / what

    def waiting() -> None:
        logger.warning("another process is fetching %s; waiting for it", what)

    try:
        return ensure_folder(folder, identity, write, waiting)
    except DataError as error:
        raise DataError(
            f"{what} is not in the cache and cannot be fetched: {error}. Run `python -m kvbench.fetch {what}` where "
            f"there is a network and copy {folder} here, or set {settings}"
        ) from None


def _unpack_hub_file(repo_id: str, revision: str, filename: str, folder: Path, wanted: list[str]) -> Source:
    with _hub_file(repo_id, revision, filename) as (archive, source):
        if missing := sorted(set(wanted) - set(unpack(archive, folder, ".jsonl"))):
            raise DataError(f"{source['url']} lacks {', '.join(missing[:5])}: has its layout changed?")
    return source


@contextmanager
def _hub_file(repo_id: str, revision: str, filename: str) -> Iterator[tuple[Path, Source]]:
    """A file of a data set repository, from the hub's cache or the network, with its url, commit and SHA-256.

    Where the server names the SHA-256, as the hub does for large files, the content is compared with it. What was
    downloaded is deleted after use, also if it was refused.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    url = hf_hub_url(repo_id, filename, revision=revision, repo_type="dataset", endpoint=os.environ.get("HF_ENDPOINT"))
    cached = try_to_load_from_cache(repo_id, filename, revision=revision, repo_type="dataset")
    if isinstance(cached, str):
        yield Path(cached), {"url": url, "commit": None, "sha256": _file_sha256(Path(cached))}
        return
    with _network_errors(lambda: f"{url} cannot be had"):
        metadata = get_hf_file_metadata(url)
    # The name holds the content's identity, so that parts of two versions are never joined.
    identity = hashlib.sha256(f"{url} {metadata.etag} {metadata.size}".encode()).hexdigest()[:16]
    path = cache_folder() / "downloads" / f"{identity}-{Path(filename).name}"
    path.parent.mkdir(exist_ok=True)
    if not path.is_file():
        logger.warning("fetching %s (%s bytes)", url, metadata.size or "unknown")
        _download(url, path.with_name(f"{path.name}.partial"), metadata.size).replace(path)
    try:
        found = _file_sha256(path)
        if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") and found != metadata.etag:
            raise DataError(f"{url} arrived with SHA-256 {found}, the server names {metadata.etag}; fetch it again")
        yield path, {"url": url, "commit": metadata.commit_hash, "sha256": found}
    finally:
        path.unlink()


def _download(url: str, partial: Path, size_bytes: int | None) -> Path:
    def so_far() -> str:
        had = f"{partial.stat().st_size} of {size_bytes or 'unknown'} bytes"
        return f"{url} could be fetched only in part ({had}; the same command goes on from there)"

    with partial.open("ab") as file, _network_errors(so_far):
        if size_bytes is not None and file.tell() > size_bytes:
            file.truncate(0)
        _get(url, file, resume_size=file.tell(), expected_size=size_bytes)
    return partial


def web_file(url: str, sha256: str) -> bytes:
    """The content of a small file whose checksum is known; `DataError` if it cannot be had or is another."""

    class SmallFile(io.BytesIO):
        def write(self, data: Any, /) -> int:
            if self.tell() + len(data) > MAX_WEB_FILE_BYTES:
                raise DataError(f"more than {MAX_WEB_FILE_BYTES} bytes arrived: this is not the pinned file")
            return super().write(data)

    content = SmallFile()
    with _network_errors(lambda: f"{url} cannot be had"):
        _get(url, content)
    if (found := hashlib.sha256(content.getvalue()).hexdigest()) != sha256:
        raise DataError(f"{url} has SHA-256 {found}, expected {sha256}: this is not the pinned file")
    return content.getvalue()


def _get(url: str, file: BinaryIO, **options: Any) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    user = build_hf_headers() if "resume_size" in options else {}  # the token is for the hub alone
    # Compressed on the way, the sizes would not be those of the file.
    http_get(url, file, headers={**user, "Accept-Encoding": "identity"}, **options)


@contextmanager
def _network_errors(what: Callable[[], str]) -> Iterator[None]:
    """One line for whatever the network does; `what` is asked when it has happened."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport: type[Exception] = HfHubHTTPError.__mro__[1]  # of the HTTP library that the hub is built on, whichever
    try:
        yield
    except OfflineModeIsEnabled:
        raise DataError(f"{what()}: HF_HUB_OFFLINE is set") from None
    except (transport, OSError) as error:
        raise DataError(f"{what()}: {(str(error).strip() or type(error).__name__)[:300]}") from None


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path, suffix: str) -> list[str]:
    """Unpack the files of a zip whose names end in `suffix` into an empty folder; returns their names, in its order.

    `DataError` if the archive is damaged (`zipfile` checks every member's CRC-32), or, before anything is written, if a
    member is refused or a limit exceeded.
    """
    with _opened(archive) as file:
        members = [member for member in _checked(file, archive) if member.filename.endswith(suffix)]
        for member in members:
            target = folder / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open(member) as packed, target.open("xb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)
    return [member.filename for member in members]


@contextmanager
def open_member(archive: Path, names: tuple[str, ...]) -> Iterator[tuple[IO[bytes], str]]:
    """Open the first file of these names inside of a zip, as safely; yields it with the name found."""
    with _opened(archive) as file:
        present = {member.filename: member for member in _checked(file, archive)}
        if (found := next((name for name in names if name in present), None)) is None:
            files = ", ".join(list(present)[:8]) or "no files"
            raise DataError(f"{archive} has no {' or '.join(names)}; it has {files}")
        with file.open(present[found]) as member:
            yield member, found


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
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


def _checked(file: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    members = [member for member in file.infolist() if not member.filename.endswith("/")]  # is_dir trips over ""
    total_bytes = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS:
        raise DataError(f"{archive} has {len(members)} files, the limit is {MAX_MEMBERS}: not a data set archive")
    if total_bytes > MAX_TOTAL_BYTES:
        raise DataError(f"{archive} unpacks to {total_bytes} bytes, the limit is {MAX_TOTAL_BYTES}: refused")
    seen: set[str] = set()
    for member in members:
        if problem := _member_problem(member):
            raise DataError(f"{archive} has {member.filename!r}, {problem}")
        if member.filename in seen:
            raise DataError(f"{archive} has two files named {member.filename!r}: refused")
        seen.add(member.filename)
    return members


def _member_problem(member: zipfile.ZipInfo) -> str | None:
    windows, method = PureWindowsPath(member.filename), member.compress_type  # the former splits at both kinds of slash
    outside = PurePosixPath(member.filename).is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if not member.filename or outside or "\0" in member.filename:
        return "a name that is empty or leaves the folder: refused"
    # The upper half holds the Unix mode where a Unix tool made the archive, else 0.
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        return "which is a link or a special file: refused"
    if member.flag_bits & 0x1:
        return "which is encrypted: refused"
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # a damaged byte can name any; LZMA may ask for 4 GiB
        return f"packed by method {method}: only stored and deflated files (0 and 8) are read, pack it anew with zip"
    if member.file_size > max(SMALL_BYTES, MAX_RATIO * member.compress_size):
        return f"of {member.file_size} bytes packed into {member.compress_size}: refused as a zip bomb"
    return None


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, row) of a file of rows: JSONL, or Parquet by its ending; `DataError` as `read_jsonl`."""
    if path.suffix != ".parquet":
        yield from read_jsonl(path)
        return
    import datasets  # takes a second

    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from enumerate(rows, start=1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); fetch it again") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    r"""Yield (line number from 1, row) for every line of a UTF-8 file; `DataError` at the first that is no JSON object.

    Lines end at "\n" alone, as their writers meant.
    """
    try:
        with path.open("rb") as file:
            yield from parse_jsonl(file, str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def parse_jsonl(file: IO[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same for a file that is open in binary mode; `name` is what errors call it."""
    line_number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        line_number += 1
        if len(line) > MAX_LINE_BYTES:  # refused before it fills the memory
            problem = f"the line is longer than {MAX_LINE_BYTES} bytes"
            raise DataError(f"{name}:{line_number}: {problem}; is this a JSONL file (one row per line)?")
        yield line_number, _parse(line, f"{name}:{line_number}")
    if line_number == 0:
        raise DataError(f"{name} is empty; fetch it again")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        if not (text := line.decode("utf-8")).strip():
            raise DataError(f"{where}: the line is empty; remove it")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise DataError(f"{where}: JSON is nested too deeply to be a data row") from None
    except ValueError as error:  # JSONDecodeError, or an integer with too many digits
        raise DataError(f"{where}: malformed JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")
    return row


def named_folders(root: str | None) -> tuple[Path, ...]:
    """The folders that `data.root` or else `KVBENCH_DATA` names, several joined as in PATH, in the order to look in."""
    named = root or os.environ.get("KVBENCH_DATA") or ""
    return tuple(user_path(part) for part in named.split(os.pathsep) if part)


@dataclass(frozen=True)
class Row:
    """A row and its place ("file:line"); its fields are checked when they are taken, and `DataError` names them."""

    fields: dict[str, Any]
    where: str

    def any(self, field: str) -> Any:
        """The value of a field that must be there."""
        if field not in self.fields:
            present = ", ".join(str(name)[:40] for name in list(self.fields)[:12]) or "none"
            raise DataError(f"{self.where}: field {field!r} is missing (fields: {present})")
        return self.fields[field]

    def text(self, field: str) -> str:
        """A string without lone surrogates, which no tokenizer or file takes."""
        value = self.any(field)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: field {field!r} must be a string, this is a {type(value).__name__}")
        self._check_encodable(field, value)
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of such strings."""
        value = self.any(field)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise DataError(f"{self.where}: field {field!r} must be a list of strings")
        for item in value:
            self._check_encodable(field, item)
        return tuple(value)

    def count(self, field: str) -> int:
        """A non-negative integer."""
        value = self.any(field)
        if type(value) is not int or value < 0:
            wanted = f"field {field!r} must be a non-negative integer"
            raise DataError(f"{self.where}: {wanted}, this is {str(value)[:40]!r}")
        return value

    def _check_encodable(self, field: str, value: str) -> None:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{self.where}: field {field!r} has a lone surrogate at character {error.start}") from None
