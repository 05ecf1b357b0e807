"""`python -m kvbench.check METHOD [option=value ...]`: the rules of `kvbench.testing` on one policy, as a table.

Exit codes: 0 all rules kept, 1 a rule is broken, 2 nothing could be checked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbench.arguments import parse
from kvbench.commands import command, strict_json
from kvbench.errors import ConfigError
from kvbench.methods.base import Policy
from kvbench.methods.registry import build_policy
from kvbench.testing import BROKEN, NOT_RUN, PASSED, Finding, check_policy

_MARKS = {PASSED: ("ok", "green"), BROKEN: ("BROKEN", "bold red"), NOT_RUN: ("not run", "dim")}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = parse("check", arguments)
    policy = policy_from(words.target, words.options)
    findings = check_policy(policy, on_fail=None)
    passed = all(finding.status != BROKEN for finding in findings)
    if words.json:
        method = str(getattr(policy, "name", type(policy).__name__))
        report = {
            "method": method,
            "policy": repr(policy),
            "passed": passed,
            "findings": [f._asdict() for f in findings],
        }
        print(strict_json(report, ensure_ascii=False))
    else:
        _show(repr(policy), findings, Console(width=None if sys.stdout.isatty() else 120))
    return 0 if passed else 1


def _show(policy: str, findings: Sequence[Finding], console: Console) -> None:
    """One row per rule, the demand and the remedy below a broken one, then one line of verdict."""
    table = Table("rule", "", "seen", title=Text(policy), title_justify="left")
    for finding in findings:
        seen = f"{finding.statement}\nseen: {finding.seen}\nremedy: {finding.remedy}"
        mark = Text(*_MARKS[finding.status])
        table.add_row(finding.rule, mark, Text(seen if finding.status == BROKEN else finding.seen))
    console.print(table)
    kept, broken, not_run = (sum(f.status == status for f in findings) for status in (PASSED, BROKEN, NOT_RUN))
    verdict = f"{kept} rules kept, {broken} broken, {not_run} not run"
    console.print(Text(verdict, "bold red" if broken else "green"))


def policy_from(target: str, settings: Sequence[str] = ()) -> Policy:
    """Build a policy from a method name, "module:Class" or "file.py:Class", and options as "name=value"."""
    return build_policy(target, _options(settings))


def _options(settings: Sequence[str]) -> dict[str, Any]:
    try:
        overrides = OverridesParser.create().parse_overrides(list(settings))
    except HydraException as error:
        raise ConfigError(f"options {' '.join(settings)} cannot be read: write name=value") from error
    if sweeps := [override.input_line for override in overrides if override.is_sweep_override()]:
        raise ConfigError(f"{sweeps[0]} gives several values: check one policy at a time")
    return {override.key_or_group: override.value() for override in overrides}


if __name__ == "__main__":
    sys.exit(main())
