"""Where kvbench keeps what it downloads: one folder per user, shared by models and data sets."""

from __future__ import annotations

import os
from pathlib import Path

from kvbench.errors import DataError


def cache_folder() -> Path:
    """The cache folder, created if missing.

    `$KVBENCH_CACHE` if set, else `$XDG_CACHE_HOME/kvbench`, else `~/.cache/kvbench`. As the XDG base directory
    specification asks, a relative `$XDG_CACHE_HOME` is ignored.

    Raises:
        DataError: if the folder cannot be created.
    """
    named = os.environ.get("KVBENCH_CACHE")
    xdg = os.environ.get("XDG_CACHE_HOME")
    if named:
        folder = Path(named).expanduser()
    elif xdg and Path(xdg).is_absolute():
        folder = Path(xdg) / "kvbench"
    else:
        folder = Path("~").expanduser() / ".cache" / "kvbench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cache folder {folder} cannot be created ({error}); set KVBENCH_CACHE to a writable one"
        ) from None
    return folder
