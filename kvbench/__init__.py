"""kvbench: compare KV-cache compression methods on one prefill, with exact budgets and official metrics.

    import kvbench

    with kvbench.compress(model, kvbench.KVMerger(budget=0.35)) as cache:
        model.generate(**inputs, max_new_tokens=64)

Importing the package loads nothing else. `compress`, `CompressedCache` and the class of every method under
`kvbench.methods` are imported when they are first used.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.methods.kvmerger import KVMerger
    from kvbench.runtime.compressed_cache import CompressedCache
    from kvbench.runtime.generate import compress

try:
    __version__ = version("kvbench")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0+unknown"

__all__ = ["CompressedCache", "KVMerger", "__version__", "compress"]


def __getattr__(name: str) -> Any:
    if name in ("CompressedCache", "compress"):
        return getattr(importlib.import_module("kvbench.runtime.generate"), name)
    if name[:1].isupper():  # a class; `from kvbench import paths` asks here first, and shall not load torch
        from kvbench.methods.registry import load_policies

        for policy in load_policies().values():
            if policy.__name__ == name:
                return policy
    raise AttributeError(f"module 'kvbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    from kvbench.methods.registry import load_policies

    return sorted({*globals(), *__all__, *(policy.__name__ for policy in load_policies().values())})
