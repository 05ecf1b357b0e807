"""Every method passes the conformance check, and every deliberate mistake breaks the rule it is meant for, alone."""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import wrong_policies
import wrong_steps
from wrong_policies import Newest, Stepper

from kvbench.check import RULES, check_policy
from kvbench.check.cli import main
from kvbench.check.page import conformance_page, conformance_row
from kvbench.methods.base import Policy
from kvbench.methods.registry import build_policy, load_policies

report_of = cache(check_policy)  # several tests look at the same report
CONFORMANCE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"

MISTAKES = {
    kind: (kind.__doc__ or "").partition(":")[0]
    for kind in (*vars(wrong_policies).values(), *vars(wrong_steps).values())
    if isinstance(kind, type) and issubclass(kind, Policy) and kind not in (Policy, Newest, Stepper)
}


@pytest.mark.parametrize("method", load_policies())
def test_every_method_passes(method):
    report = check_policy(build_policy(method))
    assert report.passed, report
    start = "|".join(conformance_row(report).split("|")[:3])  # method and rules kept; the rest tells, and may be older
    assert f"\n{start}|" in CONFORMANCE.read_text(encoding="utf-8"), "run scripts/docs_conformance.py"
    assert len(report.findings) == len(RULES)
    assert {finding.seen for finding in report.findings if finding.status == "not run"} <= {
        "one-shot: the policy declares no step",
        "exact_budget is false: a threshold may compress at any budget",
    }


def test_a_method_with_ragged_heads_and_no_exact_budget_passes():
    report = check_policy(build_policy("kvmerger", {"budget_mode": "threshold", "threshold": 0.9}))
    assert report.passed, report
    seen = {finding.rule: finding.seen for finding in report.findings}
    assert seen["lengths"].startswith("ragged in ")
    assert seen["full_budget"].startswith("exact_budget is false")


@pytest.mark.parametrize("kind", [Newest, Stepper])
def test_the_policies_that_the_mistakes_are_made_in_are_sound(kind):
    report = check_policy(kind())
    assert report.passed, report


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_a_mistake_breaks_its_rule_and_no_other(kind):
    report = report_of(kind())
    assert [finding.rule for finding in report.broken] == [MISTAKES[kind]], report
    (finding,) = report.broken
    assert finding.seen
    assert len(finding.remedy) > 10
    assert "\n" not in finding.seen + finding.remedy


def test_every_rule_has_a_mistake_that_breaks_it():
    assert set(MISTAKES.values()) == {rule.name for rule in RULES}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (wrong_policies.Undeclared, "needs declares nothing, so only that is there"),
        (wrong_policies.PerQueryHead, "keys (6, 4, 16), expected (2, 4, 16)"),
        (
            wrong_policies.Greedy,
            "MHA 4/4, 40 tokens, budget 0.1, layer 16, float32: 20 slots in all heads, expected 16",
        ),
        (wrong_policies.Upcast, "bfloat16: values are torch.float32"),
        (wrong_policies.Scribbling, "layer.column_sums was written to"),
        (wrong_policies.Unseeded, "the global generator of torch has moved"),
        (wrong_steps.Rebinding, "slots.keys was rebound"),
        (wrong_steps.ReadingBack, "__bool__"),
        (wrong_steps.MaskIndexing, "a boolean mask as index"),
        (wrong_policies.Unvalidated, "call super().__post_init__() first"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_messages_name_the_case_and_the_remedy(kind, words):
    assert words in str(report_of(kind()))


def test_a_rule_without_ground_is_not_run_and_says_what_it_needs():
    report = report_of(wrong_policies.Demanding())
    seen = {finding.rule: (finding.status, finding.seen) for finding in report.findings}
    assert seen["compress"] == ("not run", "needs needs")
    assert seen["engines"][0] == "not run"


def test_the_command_prints_a_row_per_rule_and_exits_with_0_or_1(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["wrong_policies:Newest", "budget=0.3"]) == 0
    out = capsys.readouterr().out
    assert "Newest(budget=0.3)" in out
    assert all(rule.name in out for rule in RULES)
    assert "20 rules kept, 0 broken, 6 not run" in out
    assert main(["wrong_policies:Greedy"]) == 1
    out = capsys.readouterr().out
    assert "remedy: keep budget_tokens slots per KV head" in " ".join(out.replace("│", " ").split())


def test_json_is_one_document(capsys):
    assert main(["h2o", "recent_share=0.25", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert "recent_share=0.25" in document["policy"]
    assert [finding["rule"] for finding in document["findings"]] == [rule.name for rule in RULES]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["h20"], "unknown method 'h20': choose one of"),
        (["nowhere.at_all:Policy"], "nowhere.at_all:Policy cannot be loaded"),
        (["kvbench.methods.h2o:H3O"], "cannot be loaded"),
        (["kvbench.methods.h2o:math"], "is not a subclass of kvbench.methods.base.Policy"),
        (["kvbench.methods.h2o:H2O", "sinks=4"], "unknown option sinks for kvbench.methods.h2o:H2O: choose among"),
        (["kvbench.methods.base:Policy"], "cannot be built"),
        (["h2o", "recent_share=2"], "recent_share=2 is not in"),
        (["h2o", "recent_share"], "cannot be read: write name=value"),
        (["h2o", "recent_share=0.1,0.2"], "gives several values"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("kvbench: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch, capsys):
    source = Path(wrong_policies.__file__).read_text(encoding="utf-8")
    (tmp_path / "own_methods.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(tmp_path)
    assert main(["own_methods:TupleOption"]) == 1
    assert "comes back from JSON" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_page_names_broken_rules_and_what_applies():
    page = conformance_page([report_of(Newest()), report_of(wrong_policies.Greedy())])
    sound, greedy = page.splitlines()[-2:]
    assert sound.startswith("| `newest` | 20 of 20 | keys and values only | 10 %, 20 %, 35 %, 50 %, 100 %: exact |")
    assert "(broken: exact_budget)" in greedy
    assert "MHA 4/4, 40 tokens, budget 0.1" in greedy
