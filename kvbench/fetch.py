"""Fetch benchmark data ahead of a run, so that the run itself needs no network.

    python -m kvbench.fetch longbench                  LongBench and LongBench-E with the official prompts, 114 MB
    python -m kvbench.fetch zeroscrolls                all ten tasks of ZeroSCROLLS
    python -m kvbench.fetch zeroscrolls/qasper         one of them
    python -m kvbench.fetch gsm8k                      the test problems of GSM8K, 0.7 MB

A killed download goes on where it stopped. The last line printed is one JSON document: the folder of each name.
`KVBENCH_CACHE` chooses the place, `HF_ENDPOINT` a mirror of the hub.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kvbench.commands import command
from kvbench.metrics.zeroscrolls import TASKS
from kvbench.tasks.data import longbench_folder, zeroscrolls_folder
from kvbench.tasks.gsm8k import gsm8k_folder

FETCHERS: dict[str, Callable[[], Path]] = {
    "longbench": longbench_folder,
    **{f"zeroscrolls/{task}": partial(zeroscrolls_folder, task) for task in TASKS},
    "gsm8k": gsm8k_folder,
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, that of the process if none is given; returns the exit code, 2 after a mendable error."""
    parser = argparse.ArgumentParser(prog="python -m kvbench.fetch", description="Fetch benchmark data.")
    names = ["zeroscrolls", *FETCHERS]
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    chosen = parser.parse_args(arguments).names
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    wanted = dict.fromkeys(name for word in chosen for name in FETCHERS if name == word or name.startswith(f"{word}/"))
    print(json.dumps({name: str(FETCHERS[name]()) for name in wanted}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
