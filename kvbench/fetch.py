"""Fetch benchmark data ahead of a run, so that the run itself needs no network.

    python -m kvbench.fetch longbench                  LongBench and LongBench-E with the official prompts, 114 MB
    python -m kvbench.fetch zeroscrolls                all ten tasks of ZeroSCROLLS
    python -m kvbench.fetch zeroscrolls/qasper         one of them
    python -m kvbench.fetch gsm8k                      the test problems of GSM8K, 0.7 MB
    python -m kvbench.fetch ruler model=smollm2-135m task.length=4096 task.samples=20

RULER's rows are not fetched but generated, for a model's tokenizer; the settings are those of the run to come. A killed
download goes on where it stopped. The last line printed is one JSON document: the folder of each name. `KVBENCH_CACHE`
chooses the place, `HF_ENDPOINT` a mirror of the hub.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from kvbench.arguments import parse
from kvbench.commands import command
from kvbench.metrics.ruler import TASKS as RULER_TASKS
from kvbench.metrics.zeroscrolls import TASKS
from kvbench.tasks.data import longbench_folder, zeroscrolls_folder
from kvbench.tasks.gsm8k import gsm8k_folder
from kvbench.tasks.ruler import Ruler

FETCHERS: dict[str, Callable[[], Path]] = {
    "longbench": longbench_folder,
    **{f"zeroscrolls/{task}": partial(zeroscrolls_folder, task) for task in TASKS},
    "gsm8k": gsm8k_folder,
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, that of the process if none is given; returns the exit code, 2 after a mendable error."""
    words = parse("fetch", arguments).names
    chosen, settings = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    ruler = [f"ruler/{task}" for task in RULER_TASKS]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    known: dict[str, Callable[[], Path]] = {**FETCHERS, **{name: partial(_generated, name, settings) for name in ruler}}
    wanted = dict.fromkeys(name for word in chosen for name in known if name == word or name.startswith(f"{word}/"))
    print(json.dumps({name: str(known[name]()) for name in wanted}))
    return 0


def _generated(name: str, settings: Sequence[str]) -> Path:
    from kvbench.config import composed  # late: LongBench's files need no torch
    from kvbench.models.load import prepare_model
    from kvbench.plan import build_plan

    plan = build_plan(composed([f"task={name}", *settings]))
    return cast(Ruler, plan.task).rows_folder(prepare_model(plan.model).tokenizer)


if __name__ == "__main__":
    sys.exit(main())
