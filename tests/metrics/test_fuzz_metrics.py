import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.metrics import get_metric, metric_names

DATASETS = ("hotpotqa", "trec", "lcc")
SURROGATES = st.text(st.characters(codec=None, categories=("Cs", "Nd", "Lo", "Po", "Zs", "Cc")), max_size=20)
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "Paragraph ",
            "段落",
            "12",
            "3.5%",
            "99%",
            ".",
            "..",
            "\n",
            " ",
            ",",
            "A",
            "the",
            "`",
            "#",
            "//",
            "会议",
            "．",
            "½",
        ]
    ),
    max_size=12,
).map("".join)
TEXTS = st.one_of(st.text(max_size=30), SURROGATES, FRAGMENTS)


@pytest.mark.parametrize("name", metric_names())
def test_any_strings_score_between_0_and_1(name):
    metric = get_metric(name)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS, st.lists(TEXTS, max_size=3), st.lists(TEXTS, max_size=4), st.sampled_from(DATASETS))
    def check(prediction, answers, all_classes, dataset):
        score = metric.score(prediction, answers, all_classes, dataset)
        assert "score" in score
        assert all(type(value) is float and math.isfinite(value) and 0.0 <= value <= 1.0 for value in score.values())
        assert metric.score(prediction, answers, all_classes, dataset) == score
        total = metric.aggregate([score, score])
        assert 0.0 <= total <= 100.0 + 1e-9

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check()


@pytest.mark.parametrize("name", metric_names())
def test_no_answers_score_0(name):
    assert get_metric(name).score("anything", (), ("anything",), "hotpotqa")["score"] == 0.0
