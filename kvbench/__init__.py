"""kvbench: compare KV-cache compression methods on one prefill, with exact budgets and official metrics.

    import kvbench

    with kvbench.compress(model, kvbench.KVMerger(budget=0.35)) as cache:
        model.generate(**inputs, max_new_tokens=64)

Importing the package loads nothing else. `compress`, `CompressedCache` and the class of every method under
`kvbench.policies` are imported when they are first used.
"""

import importlib
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.library.cache import CompressedCache
    from kvbench.library.compress import compress
    from kvbench.policies.kvmerger import KVMerger

try:
    __version__ = version("kvbench")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0+unknown"

__all__ = ["CompressedCache", "KVMerger", "__version__", "compress"]


def _homes() -> dict[str, str]:
    """Module of each name that is imported on demand: methods are found by the entry points that register them."""
    homes = {"CompressedCache": "kvbench.library.cache", "compress": "kvbench.library.compress"}
    for entry_point in entry_points(group="kvbench.policies"):
        if entry_point.module.startswith("kvbench.policies."):
            homes[entry_point.attr] = entry_point.module
    return homes


def __getattr__(name: str) -> Any:
    home = None if name.startswith("_") else _homes().get(name)
    if home is None:
        raise AttributeError(f"module 'kvbench' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})
