"""The per-user cache folder, and how something is put there so that no reader ever sees half of it.

A folder is complete exactly when its manifest can be read and matches: the manifest is written last, into a temporary
folder beside the final one, which is then renamed.  Writers hold a file lock and look again once they have it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "kvbench_manifest.json"


def cache_folder() -> Path:
    """The cache folder: `$KVBENCH_CACHE`, else `$XDG_CACHE_HOME/kvbench`, else `~/.cache/kvbench`; it may not exist."""
    if named := os.environ.get("KVBENCH_CACHE"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "kvbench"
    return Path.home() / ".cache" / "kvbench"


def complete_folder(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether `folder` was written to its end, from the same `identity`, and all its files have their recorded size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files_bytes"]}
    except (OSError, ValueError, KeyError):
        return False
    return bool(manifest.get("identity") == identity and sizes == manifest["files_bytes"])


def ensure_folder(folder: Path, identity: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Make sure that `folder` is complete, writing it at most once, whatever other processes do.

    Args:
        folder: the final folder.
        identity: what the content depends on (checksums, versions); JSON values.
        write: fills an empty folder; called only if needed.

    Returns:
        `folder`.
    """
    if complete_folder(folder, identity):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if complete_folder(folder, identity):
            return folder
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            write(temporary)
            files_bytes = {
                file.relative_to(temporary).as_posix(): file.stat().st_size
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            }
            manifest = {"identity": identity, "files_bytes": files_bytes}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            if folder.exists():  # incomplete, or of another identity
                shutil.rmtree(folder)
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
