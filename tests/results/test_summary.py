"""Summaries come from records alone and keep data sets, failures and budgets apart."""

import pytest

from kvbench.records.schema import Record
from kvbench.results.summary import summarise


def record(arm="h2o@0.5", score=1.0, dataset="a", metric="qa_f1", status="ok", **fields):
    method = arm.split("@")[0]
    budget = float(arm.split("@")[1]) if "@" in arm else 1.0
    defaults = {
        "parts": {"score": score}, "score": score, "slots_per_layer": [5, 5], "full_slots": 20, "cache_bytes": 100,
        "seconds": 1.5, "gold_nll": 0.5, "kl": 0.25, "sample": f"s{score}{dataset}",
    }  # fmt: skip
    if status != "ok":
        defaults = {"sample": "bad"}
    return Record(
        arm=arm, method=method, budget=budget, dataset=dataset, metric=metric, status=status, **{**defaults, **fields}
    ).to_dict()


def test_one_line_per_arm_full_cache_first_then_falling_budget():
    rows = [record("kvmerger@0.35"), record("h2o@0.35"), record("h2o@0.5"), record("full")]
    assert [s.arm for s in summarise(rows)] == ["full", "h2o@0.5", "h2o@0.35", "kvmerger@0.35"]


def test_means_and_measured_budget():
    (line,) = summarise([record(score=1.0), record(score=0.0, gold_nll=1.5, slots_per_layer=[10, 10])])
    assert (line.n, line.score, line.gold_nll, line.seconds) == (2, 50.0, 1.0, 3.0)
    assert line.budget_measured == pytest.approx(30 / 40)


def test_failed_samples_are_counted_and_never_scored():
    (line,) = summarise([record(score=1.0), record(status="failed")])
    assert (line.n, line.n_failed, line.score) == (1, 1, 100.0)
    (line,) = summarise([record(status="failed")])
    assert (line.n, line.score, line.gold_nll, line.budget_measured) == (0, None, None, None)


def test_data_sets_are_averaged_unweighted():
    rows = [record(score=1.0, dataset="a"), record(score=0.0, dataset="b"), record(score=0.5, dataset="b")]
    assert summarise(rows)[0].score == pytest.approx((100 + 25) / 2)
