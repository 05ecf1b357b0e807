"""Conformance check of a compression method: does a policy keep the contract of `kvbench/methods/base.py`?

    python -m kvbench.check h2o                                       an installed method
    python -m kvbench.check my_methods.newest:Newest sinks=4          a class in a file, with options
    python -m kvbench.check my_methods.newest:Newest --json           the report as one JSON document

In a test of one's own:

    report = check_policy(Newest(sinks=4))
    assert report.passed, report

Each rule is a small function that looks at what the policy does and either says what it saw or raises `Broken` with
what it saw and what to change. A rule whose ground is missing because another one is broken is not run.
"""

from kvbench.check.rule import Broken, Finding, NotRun, Report, Rule
from kvbench.check.rules import RULES, check_policy

__all__ = ["RULES", "Broken", "Finding", "NotRun", "Report", "Rule", "check_policy"]
