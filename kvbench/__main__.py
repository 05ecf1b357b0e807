# PYTHON_ARGCOMPLETE_OK
"""`kvbench COMMAND ...` (see `kvbench --help`) and `python -m kvbench ...`, which is `kvbench run ...`."""

import os
import sys
from importlib import import_module

from kvbench.commands import command


def main() -> int:
    """Entry point of `python -m kvbench`; returns the exit code. Words of another command are taken too."""
    # Set before torch is loaded. Threads that spin while they wait make everything several times slower on a machine
    # that others use too: two samples of the demo took 104 s spinning and 26 s sleeping, on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from kvbench.arguments import COMMANDS, parser

    name = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in COMMANDS else ""
    chosen = COMMANDS[name or "run"]
    words = sys.argv[2:] if name else sys.argv[1:]
    sys.argv = [f"kvbench {name or 'run'}", *words]
    if chosen.own_words:
        return int(import_module(f"kvbench.{chosen.module}").main())
    options = parser(name).parse_args(words)  # what is mistaken is told before the module brings torch
    if name == "check":
        from kvbench.catalogue import method

        method(options.target)
    return int(import_module(f"kvbench.{chosen.module}").main(words))


@command
def console() -> int:
    """Entry point of `kvbench`: as `main`, but without a word it says what there is."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # as with python -m: module:Class is looked for in the current directory
    from kvbench import __version__
    from kvbench.arguments import COMMANDS, overview
    from kvbench.errors import ConfigError, nearest

    if "_ARGCOMPLETE" in os.environ:
        from argcomplete import autocomplete

        from kvbench.ls import complete_setting

        autocomplete(overview(complete_setting), always_complete_options=False)
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("-h", "--help"):
        overview().print_help()
        return 0
    if first == "--version":
        print(f"kvbench {__version__}")
        return 0
    if first not in COMMANDS and "=" not in first and not first.startswith("-"):
        said = nearest(first, COMMANDS) or f" there are {', '.join(COMMANDS)}"
        raise ConfigError(f"{first!r} is no command of kvbench:{said}")
    return main()


if __name__ == "__main__":
    sys.exit(command(main)())
