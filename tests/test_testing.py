"""Every method passes the check, and every deliberate mistake breaks the rule it is meant for, alone."""

import importlib.util
import json
import sys
from functools import cache, partial
from pathlib import Path
from unittest import SkipTest

import pytest
import wrong_policies
from wrong_policies import MISTAKES, Newest, Shares, Stepper

from kvbench.check import main
from kvbench.methods.registry import build_policy, load_policies
from kvbench.testing import RULES, Broken, check_policy, policy_checks

ROOT = Path(__file__).resolve().parents[1]
findings_of = cache(partial(check_policy, on_fail=None))  # several tests look at the same findings


@cache
def page_script():
    spec = importlib.util.spec_from_file_location("docs_conformance", ROOT / "scripts" / "docs_conformance.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize("method", load_policies())
def test_every_method_passes(method):
    findings = check_policy(build_policy(method))
    start = "|".join(page_script().row(method, findings).split("|")[:3])  # the rest tells, and may be older
    page = (ROOT / "docs" / "conformance.md").read_text()
    assert f"\n{start}|" in page or f"| `{method}` |" not in page, "run scripts/docs_conformance.py"
    assert [finding.rule for finding in findings] == list(RULES)
    assert {finding.seen for finding in findings if finding.status == "not run"} <= {
        "one-shot: the policy declares no step",
        "layer_budgets decides: the policy does not allocate",
        "exact_budget is false: a threshold may compress at any budget",
    }


def test_a_method_with_ragged_heads_and_no_exact_budget_passes():
    findings = check_policy(build_policy("kvmerger", {"budget_mode": "threshold", "threshold": 0.9}))
    seen = {finding.rule: finding.seen for finding in findings}
    assert seen["lengths"].startswith("ragged in ")
    assert seen["full_budget"].startswith("exact_budget is false")


@pytest.mark.parametrize("check", policy_checks(Stepper, Shares))
def test_the_policy_that_the_mistakes_are_made_in_is_sound(check):
    check()


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_a_mistake_breaks_its_rule_and_no_other(kind):
    broken = [finding for finding in findings_of(kind) if finding.status == "broken"]
    assert [finding.rule for finding in broken] == [MISTAKES[kind]], broken
    assert broken[0].seen
    assert len(broken[0].remedy) > 10
    assert "\n" not in broken[0].seen + broken[0].remedy


def test_every_rule_has_a_mistake_that_breaks_it():
    assert len(MISTAKES) == 37
    assert set(MISTAKES.values()) == set(RULES)


WORDS = {
    "Undeclared": "needs declares nothing, so only that is there",
    "PerQueryHead": "keys (6, 4, 16), expected (2, 4, 16)",
    "Greedy": "MHA 4/4, 40 tokens, budget 0.1, layer 16, float32: 20 slots in all heads, expected 16",
    "Upcast": "bfloat16: values are torch.float32",
    "Scribbling": "layer.column_sums was written to",
    "Unseeded": "the global generator of torch has moved",
    "Rebinding": "slots.keys was rebound",
    "ReadingBack": "__bool__",
    "MaskIndexing": "a boolean mask as index",
    "Unvalidated": "call super().__post_init__() first",
}


@pytest.mark.parametrize("name", WORDS)
def test_messages_name_the_case_and_the_remedy(name):
    kind = getattr(wrong_policies, name)
    (broken,) = (finding for finding in findings_of(kind) if finding.status == "broken")
    assert WORDS[name] in str(broken)
    if name in ("Greedy", "Rebinding"):  # the same in a test of one's own
        with pytest.raises(Broken) as error:
            check_policy(kind)
        assert str(error.value) == f"{kind()} breaks 1 of 27 rules\n{broken}"


def test_a_rule_without_ground_is_not_run_and_says_what_it_needs():
    seen = {finding.rule: finding for finding in findings_of(wrong_policies.Demanding)}
    assert seen["compress"][2:4] == ("not run", "needs needs, allocate")
    assert seen["engines"].status == "not run"


def test_checks_for_pytest_have_names_raise_and_skip():
    checks = {check.__name__: check for check in policy_checks(wrong_policies.Greedy)}
    assert list(checks) == [f"Greedy-{rule}" for rule in RULES]
    with pytest.raises(Broken, match="20 slots in all heads, expected 16"):
        checks["Greedy-exact_budget"]()
    with pytest.raises(SkipTest, match="needs exact_budget"):
        checks["Greedy-full_budget"]()


def test_the_command_prints_a_row_per_rule_and_exits_with_0_or_1(capsys):
    assert main(["wrong_policies:Newest", "budget=0.3"]) == 0
    out = capsys.readouterr().out
    assert "Newest(budget=0.3)" in out
    assert all(rule in out for rule in RULES)
    assert "20 rules kept, 0 broken, 7 not run" in out
    assert main([f"{wrong_policies.__file__}:Greedy"]) == 1
    out = capsys.readouterr().out
    assert "remedy: keep budget_tokens slots per KV head" in " ".join(out.replace("│", " ").split())


def test_json_is_one_document(capsys):
    assert main(["h2o", "recent_share=0.25", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert "recent_share=0.25" in document["policy"]
    assert [finding["rule"] for finding in document["findings"]] == list(RULES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["h20"], "unknown method 'h20': did you mean h2o?"),
        (["nowhere.at_all:Policy"], "nowhere.at_all:Policy cannot be loaded"),
        (["nowhere.py:Policy"], "nowhere.py:Policy cannot be loaded"),
        (["kvbench.methods.h2o:H3O"], "cannot be loaded"),
        (["kvbench.methods.h2o:torch"], "is not a subclass of kvbench.methods.base.Policy"),
        (["kvbench.methods.h2o:H2O", "sinks=4"], "unknown option sinks for method kvbench.methods.h2o:H2O: choose"),
        (["kvbench.methods.base:Policy"], "cannot be built"),
        (["h2o", "recent_share=2"], "recent_share=2 is not a number from 0 to 1"),
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
    (tmp_path / "own_methods.py").write_text(Path(wrong_policies.__file__).read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(tmp_path)
    assert main(["own_methods:TupleOption"]) == 1
    assert "comes back from JSON" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_page_names_broken_rules_and_what_applies():
    greedy = findings_of(wrong_policies.Greedy)
    sound, greedy = page_script().page({"newest": check_policy(Newest), "greedy": greedy}).splitlines()[-2:]
    assert sound.startswith("| `newest` | 20 of 20 | keys and values only | 10 %, 20 %, 35 %, 50 %, 100 %: exact |")
    assert "(broken: exact_budget)" in greedy
    assert "MHA 4/4, 40 tokens, budget 0.1" in greedy
