"""Reports of several methods as one page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.check.rule import NOT_RUN, PASSED, Report

COLUMNS = {
    "needs": "needs",
    "exact budget": "exact_budget",
    "heads": "lengths",
    "positions and keys": "positions",
    "bias": "bias",
    "while decoding": "declares_step",
}
"""Column of the table -> the rule whose finding stands in it."""

INTRODUCTION = """# Conformance of every method

What `python -m kvbench.check METHOD` says of each installed method with its default options; the rules are on
[Write a method](plugins.md#the-rules). "Kept" counts rules that the method keeps, of those that apply to it: a one-shot
method has no step to look at. Written by `scripts/docs_conformance.py`.
"""


def conformance_page(reports: Sequence[Report]) -> str:
    """The page as Markdown.

    Args:
        reports: one per method, in the order of the table.
    """
    head = ["method", "kept", *COLUMNS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *map(conformance_row, reports)]
    return f"{INTRODUCTION}\n" + "\n".join(lines) + "\n"


def conformance_row(report: Report) -> str:
    """A method's line of the table; broken rules are named."""
    findings = {finding.rule: finding for finding in report.findings}
    applying = [finding for finding in report.findings if finding.status != NOT_RUN]
    kept = f"{sum(finding.status == PASSED for finding in applying)} of {len(applying)}"
    if report.broken:
        kept += f" (broken: {', '.join(finding.rule for finding in report.broken)})"
    cells = [findings[rule].seen.replace("|", "\\|") for rule in COLUMNS.values()]
    return f"| {' | '.join([f'`{report.method}`', kept, *cells])} |"
