"""Write `docs/conformance.md`: what the conformance check says of every installed method.

    python scripts/docs_conformance.py

Run it after adding a method or changing what one does; `tests/test_testing.py` asks for a row of every method with the
number of rules that it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvbench.methods.registry import build_policy, load_policies
from kvbench.testing import BROKEN, NOT_RUN, PASSED, Finding, check_policy

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conformance.md"
COLUMNS = {
    "needs": "needs", "exact budget": "exact_budget", "heads": "lengths", "positions and keys": "positions",
    "bias": "bias", "while decoding": "declares_step",
}  # fmt: skip
"""Column of the table -> the rule whose finding stands in it."""
INTRODUCTION = """# Conformance of every method

What `python -m kvbench.check METHOD` says of each installed method with its default options; the rules are on
[Write a method](plugins.md#the-rules). "Kept" counts rules that the method keeps, of those that apply to it: a one-shot
method has no step to look at. Written by `scripts/docs_conformance.py`.
"""


def page(findings: Mapping[str, Sequence[Finding]]) -> str:
    """The page as Markdown, from the findings by method."""
    head = ["method", "kept", *COLUMNS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(row(*item) for item in findings.items())]
    return f"{INTRODUCTION}\n" + "\n".join(lines) + "\n"


def row(method: str, findings: Sequence[Finding]) -> str:
    """A method's line of the table; broken rules are named."""
    applying = [finding for finding in findings if finding.status != NOT_RUN]
    kept = f"{sum(finding.status == PASSED for finding in applying)} of {len(applying)}"
    if broken := [finding.rule for finding in applying if finding.status == BROKEN]:
        kept += f" (broken: {', '.join(broken)})"
    seen = {finding.rule: finding.seen.replace("|", "\\|") for finding in findings}
    return f"| {' | '.join([f'`{method}`', kept, *(seen[rule] for rule in COLUMNS.values())])} |"


if __name__ == "__main__":
    findings = {name: check_policy(build_policy(name), on_fail=None) for name in load_policies()}
    PAGE.write_text(page(findings), encoding="utf-8")
