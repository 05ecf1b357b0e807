"""`python -m kvbench.check METHOD [option=value ...]`: the rules of `kvbench.testing` on one policy, as a table.

Exit codes: 0 all rules kept, 1 a rule is broken, 2 nothing could be checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbench.commands import command, strict_json
from kvbench.errors import ConfigError
from kvbench.methods.base import Policy
from kvbench.methods.registry import build_policy
from kvbench.testing import BROKEN, NOT_RUN, PASSED, Finding, check_policy

_MARKS = {PASSED: ("ok", "green"), BROKEN: ("BROKEN", "bold red"), NOT_RUN: ("not run", "dim")}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    about = "Check that a compression method keeps the contract of a policy."
    parser = argparse.ArgumentParser(prog="python -m kvbench.check", description=about)
    parser.add_argument("target", help="a method name (h2o), module:Class, or file.py:Class")
    parser.add_argument("options", nargs="*", metavar="option=value", help="options of the method")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    words = parser.parse_args(arguments)
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
    options = _options(settings)
    if ":" not in target:
        return build_policy(target, options)
    source, _, name = target.rpartition(":")
    try:
        kind = getattr(_module(source), name)
    except (ImportError, AttributeError, SyntaxError, ValueError, OSError) as error:
        remedy = "write module:Class, with the module's folder in the current directory or installed, or file.py:Class"
        raise ConfigError(f"{target} cannot be loaded ({error}): {remedy}") from error
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise ConfigError(f"{target} is not a subclass of kvbench.methods.base.Policy: derive it from that class")
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"unknown option {', '.join(unknown)} for {target}: choose among {', '.join(known)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"{target} cannot be built ({error}): define compress() and give options defaults") from error


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = spec_from_file_location(f"kvbench_checked_{Path(source).stem}", source)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # where dataclasses and Hydra look a class up
    spec.loader.exec_module(module)
    return module


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
