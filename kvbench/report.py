"""Write the report page: `python -m kvbench.report RUN... [--output report.html]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kvbench.arguments import parse
from kvbench.commands import command
from kvbench.errors import RecordError
from kvbench.results.page import render_report
from kvbench.results.summary import DEFAULT_GATE


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse("report", arguments)
    output = options.output or (options.runs[0] / "report.html" if len(options.runs) == 1 else Path("report.html"))
    page = render_report(options.runs, options.mix_environments, DEFAULT_GATE if options.gate is None else options.gate)
    try:
        output.write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise RecordError(f"{output} cannot be written ({error.strerror}): name another with --output") from error
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
