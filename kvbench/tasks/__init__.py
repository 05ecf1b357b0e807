"""Sources of samples: LongBench, RULER, ZeroSCROLLS, GSM8K, texts made up on the spot, documents of our own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any


def register_benchmarks(task_folder: Path) -> None:
    """Put the benchmarks' tasks into Hydra's store, each from its row in the benchmark's table.

    A LongBench task also goes by its short name (`task=qasper` for `task=longbench/qasper`); ZeroSCROLLS shares names
    with LongBench and is always written out. A file in `task_folder` (`configs/task`) wins over a task of its name.
    """
    from hydra.core.config_store import ConfigStore

    from kvbench.tasks import longbench, ruler, zeroscrolls

    store = ConfigStore.instance()
    for benchmark in (longbench, ruler, zeroscrolls):
        folder = benchmark.__name__.rpartition(".")[2]
        for name, node in benchmark.config_nodes().items():
            if not (task_folder / folder / f"{name}.yaml").is_file():
                store.store(group=f"task/{folder}", name=name, node=node, provider="kvbench")
            if name.startswith("_"):  # what a file of one's own can begin with
                continue
            # Hydra lists a group without its subfolders, so glob(longbench/*) needs the long name in the group, too.
            store.store(group="task", name=f"{folder}/{name}", node=node, provider="kvbench")
            if folder == "longbench" and not (task_folder / f"{name}.yaml").is_file():
                store.store(group="task", name=name, node=node, provider="kvbench")


def __getattr__(name: str) -> Any:
    if name in ("mix", "mini"):  # until 0.1 modules of their own, which copies of configs/task/*.yaml name
        from kvbench.tasks import base, synthetic

        home = base if name == "mix" else synthetic
        logging.getLogger(__name__).warning("%s.%s is now %s: change _target_", __name__, name, home.__name__)
        return home
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
