"""The command line of the check. Exit codes: 0 all rules kept, 1 a rule is broken, 2 nothing could be checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbench import strict_json
from kvbench.check.rule import BROKEN, NOT_RUN, PASSED, Report
from kvbench.check.rules import check_policy
from kvbench.check.target import policy_from
from kvbench.commands import command

EXIT_BROKEN = 1
_MARKS = {PASSED: ("ok", "green"), BROKEN: ("BROKEN", "bold red"), NOT_RUN: ("not run", "dim")}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the command; None for those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kvbench.check", description="Check that a compression method keeps the contract of a policy."
    )
    parser.add_argument("target", help="a method name (h2o), or module:Class")
    parser.add_argument("options", nargs="*", metavar="option=value", help="options of the method")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    words = parser.parse_args(arguments)
    report = check_policy(policy_from(words.target, words.options))
    if words.json:
        print(strict_json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 120))
    return 0 if report.passed else EXIT_BROKEN


def show(report: Report, console: Console) -> None:
    """Print a report: one row per rule, the demand and the remedy below a broken one, then one line of verdict."""
    table = Table("rule", "", "seen", title=Text(report.policy), title_justify="left")
    for finding in report.findings:
        mark, style = _MARKS[finding.status]
        seen = Text(finding.seen)
        if finding.status == BROKEN:
            seen = Text(f"{finding.statement}\nseen: {finding.seen}\nremedy: {finding.remedy}")
        table.add_row(finding.rule, Text(mark, style), seen)
    console.print(table)
    n_passed = sum(finding.status == PASSED for finding in report.findings)
    n_not_run = sum(finding.status == NOT_RUN for finding in report.findings)
    verdict = f"{n_passed} rules kept, {len(report.broken)} broken, {n_not_run} not run"
    console.print(Text(verdict, "green" if report.passed else "bold red"))
