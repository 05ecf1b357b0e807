"""Write the report page: `python -m kvbench.report RUN... [--output report.html]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvbench.commands import command
from kvbench.errors import RecordError
from kvbench.results.page import render_report
from kvbench.results.summary import DEFAULT_GATE


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    about = "Write one self-contained HTML page about one or more runs."
    parser = argparse.ArgumentParser(prog="python -m kvbench.report", description=about)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, e.g. runs/*")
    parser.add_argument("--output", type=Path, help="file to write; default: RUN/report.html, or report.html for many")
    parser.add_argument("--mix-environments", action="store_true", help="let answers of several stand side by side")
    gate_help = "score of the full cache below which RULER's columns rank no methods; default %(default)g"
    parser.add_argument("--gate", type=float, default=DEFAULT_GATE, metavar="SCORE", help=gate_help)
    options = parser.parse_args(arguments)
    output = options.output or (options.runs[0] / "report.html" if len(options.runs) == 1 else Path("report.html"))
    page = render_report(options.runs, options.mix_environments, options.gate)
    try:
        output.write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise RecordError(f"{output} cannot be written ({error.strerror}): name another with --output") from error
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
