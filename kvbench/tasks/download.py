"""Download a file from the Hugging Face hub or another server, so that a killed download goes on where it stopped.

`huggingface_hub` resolves addresses, sends the user's token, shows progress, retries, and honours `HF_ENDPOINT` and
`HF_HUB_OFFLINE`. What a killed process had is kept by us, beside the hub's cache: since its pull request 4228 the hub's
own `hf_hub_download` starts over in a new process.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from kvbench.errors import DataError
from kvbench.paths import cache_folder

logger = logging.getLogger(__name__)

MAX_WEB_FILE_BYTES = 16 * 2**20
SHA256 = re.compile(r"[0-9a-f]{64}")
# The transport errors of the HTTP library that the hub is built on, whichever it is in the installed version.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
NETWORK_ERRORS = (TRANSPORT_ERROR, OfflineModeIsEnabled, OSError)


@dataclass(frozen=True)
class HubFile:
    """A file of the hub on this disk.

    Attributes:
        path: where it is.
        url: its address on the hub.
        sha256: its checksum.
        commit: the commit that `revision` stood for; None if it came from the hub's cache.
        temporary: whether it is ours to delete after use (a file in the hub's own cache is not).
    """

    path: Path
    url: str
    sha256: str
    commit: str | None
    temporary: bool


def hub_file(repo_id: str, filename: str, revision: str) -> HubFile:
    """Get a file of a data set repository: from the hub's cache if it is there, else from the network.

    Args:
        repo_id: e.g. "THUDM/LongBench".
        filename: path in the repository.
        revision: commit, branch or tag.

    Returns:
        The file. If the server names its SHA-256, as the hub does for large files, the content was compared with it.

    Raises:
        DataError: if the file cannot be had or its checksum is wrong.
    """
    url = hf_hub_url(repo_id, filename, revision=revision, repo_type="dataset", endpoint=os.environ.get("HF_ENDPOINT"))
    cached = try_to_load_from_cache(repo_id, filename, revision=revision, repo_type="dataset")
    if isinstance(cached, str):
        return HubFile(Path(cached), url, file_sha256(Path(cached)), None, temporary=False)
    try:
        metadata = get_hf_file_metadata(url)
    except NETWORK_ERRORS as error:
        raise DataError(f"{url} cannot be had: {_reason(error)}") from None
    # The name holds the content's identity, so that parts of two versions are never joined.
    identity = hashlib.sha256(f"{url} {metadata.etag} {metadata.size}".encode()).hexdigest()[:16]
    folder = cache_folder() / "downloads"
    folder.mkdir(exist_ok=True)
    path = folder / f"{identity}-{Path(filename).name}"
    if not path.is_file():
        logger.warning("fetching %s (%s bytes)", url, metadata.size or "unknown")
        _download(url, path.with_name(path.name + ".partial"), metadata.size)
        path.with_name(path.name + ".partial").replace(path)
    found = file_sha256(path)
    if SHA256.fullmatch(metadata.etag or "") and found != metadata.etag:
        path.unlink()
        raise DataError(f"{url} arrived with SHA-256 {found}, the server names {metadata.etag}; fetch it again")
    return HubFile(path, url, found, metadata.commit_hash, temporary=True)


def _download(url: str, partial: Path, size_bytes: int | None) -> None:
    """Append to `partial` what is missing of it."""
    with partial.open("ab") as file:
        if size_bytes is not None and file.tell() > size_bytes:
            file.truncate(0)
        try:
            # Compressed on the way, the sizes would not be those of the file.
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            http_get(url, file, resume_size=file.tell(), expected_size=size_bytes, headers=headers)
        except NETWORK_ERRORS as error:
            raise DataError(
                f"{url} could be fetched only in part ({partial.stat().st_size} of {size_bytes or 'unknown'} bytes): "
                f"{_reason(error)}; the same command goes on from there"
            ) from None


class _SmallFile(io.BytesIO):
    """A file in memory that takes no more than `MAX_WEB_FILE_BYTES`."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > MAX_WEB_FILE_BYTES:
            raise DataError(f"more than {MAX_WEB_FILE_BYTES} bytes arrived: this is not the pinned file")
        return super().write(data)


def web_file(url: str, sha256: str) -> bytes:
    """Get a small file whose content is known.

    Args:
        url: http or https address.
        sha256: the expected checksum.

    Raises:
        DataError: if it cannot be had or is another content.
    """
    content = _SmallFile()
    try:
        http_get(url, content, headers={"Accept-Encoding": "identity"})
    except NETWORK_ERRORS as error:
        raise DataError(f"{url} cannot be had: {_reason(error)}") from None
    found = hashlib.sha256(content.getvalue()).hexdigest()
    if found != sha256:
        raise DataError(f"{url} has SHA-256 {found}, expected {sha256}: this is not the pinned file")
    return content.getvalue()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return text[:300]
