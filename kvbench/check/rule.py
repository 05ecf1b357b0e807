"""What a rule is, and what a report says about it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kvbench.check.subject import Subject

PASSED, BROKEN, NOT_RUN = "passed", "broken", "not run"


class Broken(Exception):
    """The policy breaks a rule.

    Args:
        seen: what was observed, in one line, with the case it was observed in.
        remedy: what to change in the policy.
    """

    def __init__(self, seen: str, remedy: str):
        super().__init__(seen)
        self.seen = seen
        self.remedy = remedy


class NotRun(Exception):
    """A rule does not apply to the policy; the message says why."""


@dataclass(frozen=True)
class Rule:
    """One thing every policy has to do.

    Attributes:
        name: short name in reports.
        look: says what it saw; raises `Broken` or `NotRun`.
        after: names of rules without which this one has no ground.
    """

    name: str
    look: Callable[[Subject], str]
    after: tuple[str, ...] = ()

    @property
    def statement(self) -> str:
        """What the rule demands: the first line of its function's docstring."""
        return (self.look.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class Finding:
    """What came of one rule.

    Attributes:
        rule: the rule's name.
        statement: what it demands.
        status: "passed", "broken" or "not run".
        seen: what was observed, or why the rule was not run.
        remedy: what to change; empty unless broken.
    """

    rule: str
    statement: str
    status: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """The findings about one policy.

    Attributes:
        method: the policy's name.
        policy: the policy as text, options included.
        findings: one per rule, in order.
    """

    method: str
    policy: str
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings of broken rules."""
        return tuple(finding for finding in self.findings if finding.status == BROKEN)

    @property
    def passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.broken

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "method": self.method,
            "policy": self.policy,
            "passed": self.passed,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        lines = [f"{self.policy} breaks {len(self.broken)} of {len(self.findings)} rules"]
        lines += [f"{f.rule}: {f.statement} Seen: {f.seen}. {f.remedy}" for f in self.broken]
        return "\n".join(lines)


def apply_rules(rules: Iterable[Rule], subject: Subject) -> tuple[Finding, ...]:
    """Look at a policy with every rule.

    Args:
        rules: in an order in which each rule comes after those it needs.
        subject: the policy.

    Returns:
        One finding per rule. An exception that a rule did not expect is the policy's, and breaks the rule.
    """
    findings: dict[str, Finding] = {}
    for rule in rules:
        missing = [name for name in rule.after if findings[name].status == BROKEN or _lacks_ground(findings[name])]
        if missing:
            findings[rule.name] = Finding(rule.name, rule.statement, NOT_RUN, f"needs {', '.join(missing)}")
            continue
        try:
            findings[rule.name] = Finding(rule.name, rule.statement, PASSED, rule.look(subject))
        except NotRun as reason:
            findings[rule.name] = Finding(rule.name, rule.statement, NOT_RUN, str(reason))
        except Broken as broken:
            findings[rule.name] = Finding(rule.name, rule.statement, BROKEN, broken.seen, broken.remedy)
        except Exception as error:  # foreign code: whatever it raises is a finding
            remedy = "mend the exception; a policy may raise ConfigError when built and BudgetError in layer_budgets"
            findings[rule.name] = Finding(rule.name, rule.statement, BROKEN, describe(error), remedy)
    return tuple(findings.values())


def describe(error: BaseException) -> str:
    """An exception in one line, with the place it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def _lacks_ground(finding: Finding) -> bool:
    return finding.status == NOT_RUN and finding.seen.startswith("needs ")
