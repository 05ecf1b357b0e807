"""The former home of the methods: whatever imports `kvbench.policies.NAME` still gets `kvbench.methods.NAME`."""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Moved(MetaPathFinder, Loader):
    """Finds modules of the old name under the new one."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = spec.name.replace(__name__, "kvbench.methods", 1)
        logging.getLogger(__name__).warning("%s is now %s: change the import", spec.name, new)
        return importlib.import_module(new)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it was executed under its new name."""


sys.meta_path.append(_Moved())
