"""Prepare a model ahead of a run, so that the run itself needs no network.

    python -m kvbench.models.fetch                  the default model
    python -m kvbench.models.fetch llama2-7b-chat   another one of configs/model

The last line printed is one JSON document: name, folder and source.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from kvbench.commands import command
from kvbench.models.config import named_config
from kvbench.models.load import LOCATORS
from kvbench.models.local import Checkpoint, check_folder

DEFAULT_MODEL = "smollm2-135m"


def prepare(name: str, report: Callable[[str], None]) -> dict[str, str | None]:
    """Make sure that a model's files are on this machine.

    Args:
        name: a file of `configs/model`, without its ending.
        report: told what takes time.

    Returns:
        "name", "folder" (None for models that are made, not fetched) and "source".

    Raises:
        KvbenchError: if the name is unknown, or the model cannot be had.
    """
    config = named_config(name)
    if config.effective_source not in LOCATORS:
        return {"name": name, "folder": None, "source": "random weights: nothing to fetch"}
    checkpoint: Checkpoint = LOCATORS[config.effective_source](config, report)
    check_folder(checkpoint.folder)
    return {"name": name, "folder": str(checkpoint.folder), "source": checkpoint.source}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the command; None for those of the process.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m kvbench.models.fetch", description="Prepare a model.")
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL, help="a file of configs/model, without .yaml")
    name = parser.parse_args(arguments).name
    console = Console(stderr=True)
    with console.status(f"preparing {name}") as status:

        def report(message: str) -> None:
            console.print(f"{name}: {message}", highlight=False, markup=False)
            status.update(Text(message))

        prepared = prepare(name, report)
    print(json.dumps(prepared))
    return 0


if __name__ == "__main__":
    sys.exit(main())
