"""List what can be named: `kvbench ls methods`, `tasks`, `models`, `arms`, `engines`, `experiments`; and completion.

One line each, from docstrings and from the first comment of YAML files. Nothing here imports torch.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore

from kvbench import catalogue
from kvbench.arguments import LISTED, SHELLS, parse
from kvbench.commands import command
from kvbench.config import ARMS_OF_CLASSES, GROUPS, group_options, settings
from kvbench.errors import ConfigError, printable

NOTES = {
    "tasks": "A LongBench data set also goes by its short name: task=qasper.",
    "models": "Others need no name here: model=ORGANISATION/MODEL of the hub, model=FOLDER, model=FILE.gguf.",
    "methods": "Others: method=module:Class or method=file.py:Class.",
}


def rows(what: str) -> list[tuple[str, str]]:
    """Name and summary of everything of a kind, in order."""
    if what == "methods":
        return [(name, method.summary) for name, method in catalogue.methods().items()]
    (group,) = (group for group, plural in GROUPS.items() if plural == what)
    files, names = catalogue.files(group), group_options(group)
    aliases = {name for name in names if f"longbench/{name}" in names and name not in files}
    return [(name, files.get(name) or _stored(group, name)) for name in names if name not in aliases]


def complete_setting(prefix: str, **_: Any) -> list[str]:
    """What `kvbench run PREFIX` may go on with: settings, the options of a group, the methods of a list."""
    key, equals, value = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name in settings()]
    before, names = "", []
    if key in GROUPS:
        names = group_options(key)
    elif key == "methods":
        before = value[: max(value.rfind("["), value.rfind(",")) + 1] or "["
        names = group_options("method")
    elif isinstance(settings().get(key), bool):
        names = ["true", "false"]
    return [f"{key}={before}{name}" for name in names]


def _stored(group: str, name: str) -> str:
    """What is known of an option without a file: its class's first line, and its metric."""
    if group == "arms":
        return ARMS_OF_CLASSES[name]
    node = ConfigStore.instance().repo[group][f"{name}.yaml"].node
    metric = node.get("metric") if hasattr(node, "get") else None
    summary = catalogue.summary(str(node.get("_target_", "")))
    return f"{summary}, scored by {metric}" if metric else summary


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) == 1 and words[0] in SHELLS:
        return _completion(words[0])
    chosen = parse("ls", words).what or LISTED[:3]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
    for number, what in enumerate(chosen):
        found = rows(what)
        longest = max(len(name) for name, _ in found)
        if len(chosen) > 1:
            print("\n" * (number > 0) + f"{what}:")
        for name, summary in found:
            print(printable(f"{name:<{longest}}  {summary}")[:width].rstrip())
        if what in NOTES and sys.stdout.isatty():
            print(NOTES[what])
    return 0


def _completion(shell: str) -> int:
    try:
        from argcomplete import shellcode
    except ImportError as error:
        raise ConfigError(f"the package argcomplete cannot be imported ({error}): pip install argcomplete") from error
    print(shellcode(["kvbench"], shell=shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
