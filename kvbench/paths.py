"""Where kvbench keeps what it downloads, and how a folder gets there so that no reader ever sees half of it.

A cached folder is complete exactly when its manifest can be read and matches. The manifest is written last, into a
temporary folder beside the final one, which is then renamed; writers hold a file lock and look again once they have it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvbench.errors import DataError

MANIFEST = "kvbench_manifest.json"


def file_stem(name: str) -> str:
    """A file name for any name: unusual characters replaced, made unique again by a short hash if any were."""
    safe = re.sub(r"[^A-Za-z0-9@,._=+-]", "_", name)[:100]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def user_path(text: str) -> Path:
    """The path of a text that may begin with "~" or "~user"; an unknown user's stays as it is, as in a shell."""
    return Path(os.path.expanduser(text))


def config_folder() -> Path:
    """The folder with the YAML files: inside the package in a wheel, beside it in a source tree."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def published_folder() -> Path:
    """The folder with the published numbers: inside the package in a wheel, `results/reference` in a source tree."""
    packaged = Path(__file__).parent / "results" / "published"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "results" / "reference"


def cache_folder() -> Path:
    """`$KVBENCH_CACHE` if set, else `$XDG_CACHE_HOME/kvbench` unless relative, else `~/.cache/kvbench`; created."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    named = os.environ.get("KVBENCH_CACHE")
    folder = user_path(named) if named else (xdg if xdg.is_absolute() else user_path("~/.cache")) / "kvbench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cache folder {folder} cannot be created ({error}): set KVBENCH_CACHE to another") from None
    return folder


def complete_folder(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether `folder` was written to its end, from the same `identity`, and all its files have their recorded size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files_bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(manifest.get("identity") == identity and sizes == manifest["files_bytes"])


def ensure_folder(
    folder: Path,
    identity: dict[str, Any],
    write: Callable[[Path], dict[str, Any] | None],
    waiting: Callable[[], None] = lambda: None,
) -> Path:
    """Make sure that `folder` is complete, writing it at most once, whatever other processes do; returns it.

    Args:
        folder: the final folder.
        identity: what the content depends on (checksums, versions); JSON values.
        write: fills an empty folder; called only if needed. What it returns is kept in the manifest as "source".
        waiting: called once if another process is writing the folder, before waiting for it.
    """
    if complete_folder(folder, identity):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            waiting()
            held = lock.acquire()
        with held:
            if not complete_folder(folder, identity):
                _write(folder, identity, write)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error}): free space, or set KVBENCH_CACHE=DIR") from error
    return folder


def _write(folder: Path, identity: dict[str, Any], write: Callable[[Path], dict[str, Any] | None]) -> None:
    # A fixed name is safe under the lock, and what a killed process left there is found and removed.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        source = write(partial)
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        files_bytes = {file.relative_to(partial).as_posix(): file.stat().st_size for file in files}
        manifest = {"identity": identity, "source": source, "files_bytes": files_bytes}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if folder.exists():  # incomplete, or of another identity
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
