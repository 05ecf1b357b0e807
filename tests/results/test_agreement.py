"""Agreement with the full cache's own answers."""

import pytest
from report_records import make_record

from kvbench.results.agreement import agreement, reference_records


def rows(arm, answers):
    return [
        make_record(arm, f"s{i}", 1.0, token_ids=ids, prediction=text).to_dict()
        for i, (ids, text) in enumerate(answers)
    ]


def test_by_hand():
    full = rows("full", [([1, 2, 3, 4], "a b c d"), ([5, 6], "e f"), ([7], "g")])
    arm = rows("h2o@0.5", [([1, 2, 9, 4], "a b x d"), ([5, 6], "e f"), ([8], "h")])
    found = agreement(arm, reference_records(full + arm))
    assert (found.n, found.identical_share, found.first_divergence_tokens) == (3, pytest.approx(1 / 3), 1.0)
    assert found.equal_share == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert found.rouge_l == pytest.approx((0.75 + 1 + 0) / 3)


def test_the_full_cache_agrees_with_itself_and_missing_samples_do_not_count():
    full = rows("full", [([1], "a")])
    own = agreement(full, reference_records(full))
    assert (own.identical_share, own.first_divergence_tokens, own.rouge_l) == (1.0, None, 1.0)
    arm = rows("h2o@0.5", [([1], "a"), ([2], "b")])
    assert agreement(arm, reference_records(full)).n == 1
    assert agreement(arm, {}) is None
    failed = make_record("full", "s1", 0.0, status="failed").to_dict()
    assert agreement(arm, reference_records([*full, failed])).n == 1
