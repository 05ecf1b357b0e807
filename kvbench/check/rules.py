"""All rules, in the order in which they are looked at, and the check itself."""

from __future__ import annotations

from kvbench.check import class_rules, engine_rules, layer_rules, pure_rules, step_rules
from kvbench.check.rule import Report, Rule, apply_rules
from kvbench.check.subject import Subject
from kvbench.methods.base import Policy

_SOUND = ("shapes", "dtypes", "lengths")
_PURE = ("inputs", "deterministic", "generators")
_STEPS = ("steps", "in_place")

RULES = (
    Rule("dataclass", class_rules.frozen_dataclass),
    Rule("name", class_rules.has_name),
    Rule("needs", class_rules.needs_can_be_met),
    Rule("bad_budgets", class_rules.refuses_bad_budgets),
    Rule("options", class_rules.options_round_trip, ("dataclass",)),
    Rule("declares_step", class_rules.declares_step),
    Rule("layer_budgets", class_rules.divides_budget),
    Rule("compress", layer_rules.compresses, ("needs", "layer_budgets")),
    Rule("shapes", layer_rules.shapes, ("compress",)),
    Rule("dtypes", layer_rules.dtypes, ("compress",)),
    Rule("lengths", layer_rules.lengths, ("shapes",)),
    Rule("exact_budget", layer_rules.exact_budget, ("shapes", "lengths")),
    Rule("positions", layer_rules.positions, _SOUND),
    Rule("bias", layer_rules.bias, _SOUND),
    Rule("finite", layer_rules.finite, _SOUND),
    Rule("inputs", pure_rules.inputs_untouched, ("compress",)),
    Rule("deterministic", pure_rules.deterministic, ("compress",)),
    Rule("generators", pure_rules.global_generators, ("compress",)),
    Rule("full_budget", layer_rules.full_budget, (*_SOUND, "exact_budget", "positions", "bias", "finite", *_PURE)),
    Rule("steps", step_rules.steps, (*_SOUND, "declares_step", "bias")),
    Rule("in_place", step_rules.steps_in_place, ("steps",)),
    Rule("new_tokens", step_rules.keeps_new_tokens, _STEPS),
    Rule("step_finite", step_rules.step_stays_finite, (*_STEPS, "finite")),
    Rule("step_pure", step_rules.step_is_pure, _STEPS),
    Rule("no_host_reads", step_rules.step_reads_nothing_back, _STEPS),
    Rule("engines", engine_rules.engines_agree, (*_SOUND, *_PURE, *_STEPS, "bias", "finite", "step_pure")),
)
"""The rules; each comes after those it needs."""


def check_policy(policy: Policy) -> Report:
    """Look at a policy with every rule.

    Args:
        policy: the policy with the options to check; its budget is tried beside 10, 20, 35, 50 and 100 %.

    Returns:
        The report; it takes a second or two.
    """
    findings = apply_rules(RULES, Subject(policy))
    return Report(str(getattr(policy, "name", type(policy).__name__)), repr(policy), findings)
