"""Summaries come from records alone and keep data sets, failures and budgets apart."""

import io

import pytest
from report_records import make_record
from rich.console import Console

from kvbench.records.schema import Record
from kvbench.results.summary import agreements, summarise
from kvbench.results.terminal import print_tables

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e[bold red][link=http://x]name[/link]"


def record(arm="h2o@0.5", score=1.0, dataset="a", **fields):
    return make_record(arm, f"s{score}", score, dataset, **fields).to_dict()


def failed():
    return Record("bad", "a", "h2o@0.5", "h2o", 0.5, status="failed", reason="too long").to_dict()


def test_one_line_per_arm_full_cache_first_then_falling_budget():
    rows = [record("kvmerger@0.35"), record("h2o@0.35"), record("h2o@0.5"), record("full")]
    assert [s.arm for s in summarise(rows)] == ["full", "h2o@0.5", "h2o@0.35", "kvmerger@0.35"]


def test_means_and_measured_budget():
    (line,) = summarise([record(gold_nll=0.5), record(score=0.0, gold_nll=1.5, slots_per_layer=[50, 25])])
    assert (line.n, line.score, line.gold_nll) == (2, 50.0, 1.0)
    assert line.budget_measured == pytest.approx(125 / 200)


def test_failed_samples_are_counted_and_never_scored():
    (line,) = summarise([record(), failed()])
    assert (line.n, line.n_failed, line.score) == (1, 1, 100.0)
    (line,) = summarise([failed()])
    assert (line.n, line.score, line.gold_nll, line.budget_measured) == (0, None, None, None)


def test_data_sets_are_averaged_unweighted():
    rows = [record(), record(score=0.0, dataset="b"), record(score=0.5, dataset="b")]
    assert summarise(rows)[0].score == pytest.approx((100 + 25) / 2)


def answered(arm, answers):
    rows = enumerate(answers)
    return [make_record(arm, f"s{i}", 1.0, token_ids=ids, prediction=text).to_dict() for i, (ids, text) in rows]


def test_agreement_by_hand():
    full = answered("full", [([1, 2, 3, 4], "a b c d"), ([5, 6], "e f"), ([7], "g")])
    arm = answered("h2o@0.5", [([1, 2, 9, 4], "a b x d"), ([5, 6], "e f"), ([8], "h")])
    assert agreements(full + arm)["h2o@0.5"] == pytest.approx({
        "identical_share": 1 / 3, "first_divergence_tokens": 1.0, "equal_share": (3 / 4 + 1 + 0) / 3,
        "rouge_l": (0.75 + 1 + 0) / 3,
    })  # fmt: skip


def test_the_full_cache_agrees_with_itself_and_missing_samples_do_not_count():
    full, arm = answered("full", [([1], "a")]), answered("h2o@0.5", [([1], "a"), ([2], "b")])
    bad = make_record("full", "s1", 0.0, status="failed").to_dict()
    same = {"identical_share": 1, "equal_share": 1, "first_divergence_tokens": None, "rouge_l": 1}
    assert agreements([*full, *arm, bad]) == {"full": same, "h2o@0.5": same}
    assert agreements(arm) == {}


def test_a_table_below_the_gate_is_dim_and_says_so():
    def printed(metric: str, full: float, gate: float) -> str:
        records = [make_record(arm, "s0", full, metric=metric).to_dict() for arm in ("full", "h2o@0.5")]
        output = io.StringIO()
        print_tables(records, "m", "question", Console(file=output, width=120, force_terminal=True), gate)
        return output.getvalue()

    below = printed("string_match_all", 0.5, 60.0)
    assert "\x1b[2m" in below
    assert "the full cache scores below" in below
    for other in (printed("string_match_all", 0.5, 50.0), printed("qa_f1", 0.5, 60.0)):
        assert "below" not in other
        assert "\x1b[2m" not in other


def test_names_in_records_are_shown_not_obeyed():
    hostile = make_record("full", "s1", 1.0, dataset=HOSTILE)
    hostile.arm = HOSTILE
    output = io.StringIO()
    print_tables([hostile.to_dict()], "model", "question", Console(file=output, width=400, force_terminal=False))
    text = output.getvalue()
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert text.count("\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\u202e[bold red][link=http://x]name[/link]") == 2
