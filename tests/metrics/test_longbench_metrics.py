import difflib
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.errors import MetricError
from kvbench.metrics import get_metric, metric_names
from kvbench.metrics.longbench import (
    CATEGORIES,
    DATASETS,
    KVMERGER_DATASETS,
    ROWS,
    averages,
    bucket_mean,
    code_sim,
    code_sim_levenshtein,
    length_buckets,
)

CASES = json.loads((Path(__file__).parent / "golden_longbench.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['dataset']}-{case['note']}")
def test_golden(case):
    metric = get_metric(case.get("metric") or DATASETS[case["dataset"]].metric)
    result = metric.score(case["prediction"], case["answers"], case.get("all_classes", ()), case["dataset"])
    assert result == {"score": pytest.approx(case["score"], abs=1e-12)}


def test_the_table():
    assert {known.metric for known in DATASETS.values()} <= set(metric_names())
    assert (len(DATASETS), sum(known.rows for known in DATASETS.values())) == (21, 4750)
    assert (len(ROWS), sum(known.rows_e for known in DATASETS.values())) == (21 + 13, 3668)
    assert {known.category for known in DATASETS.values()} == set(CATEGORIES)


@pytest.mark.skipif(
    importlib.util.find_spec("Levenshtein") is not None,
    reason="python-Levenshtein is installed, so fuzzywuzzy does not use difflib here",
)
@pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher")
@settings(max_examples=200, deadline=None)
@given(*[st.text("abc (\u00e4", max_size=30)] * 2)
def test_code_sim_is_fuzzywuzzy_with_difflib(line, answer):
    from fuzzywuzzy import fuzz

    assert code_sim(line, answer) == fuzz.ratio(line, answer) / 100


def test_code_sim_uses_the_junk_heuristic_on_long_answers():
    answer = "return value_of(first, second) " * 8
    line = "return value_of(second, first) " * 8
    without = difflib.SequenceMatcher(None, line, answer, autojunk=False).ratio()
    assert code_sim(line, answer) == round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100
    assert code_sim(line, answer) != round(100 * without) / 100


def test_importable_levenshtein_changes_nothing(monkeypatch):
    impostor = types.ModuleType("Levenshtein")
    impostor.ratio = lambda first, second: 1.0
    monkeypatch.setitem(sys.modules, "Levenshtein", impostor)
    assert code_sim("tide", "diet") == 0.25
    assert code_sim_levenshtein("tide", "diet") == 0.5


def test_code_lines_too_long_for_difflib_are_refused():
    with pytest.raises(MetricError, match="takes 22,500,000,000 pairs"):
        get_metric("code_sim").score("a" * 150_000, ["b" * 150_000], (), "lcc")


SCORES = {dataset: float(number) for number, dataset in enumerate(DATASETS)}


ENGLISH = [name for name, known in DATASETS.items() if known.language == "en"]


def named(scores):
    return {average.name: average for average in averages(scores)}


def test_overall_is_the_mean_of_six_categories():
    found = named(SCORES)
    groups = [[SCORES[name] for name in ENGLISH if DATASETS[name].category == category] for category in CATEGORIES]
    overall = found["English overall"]
    assert overall.value == pytest.approx(sum(sum(group) / len(group) for group in groups) / 6)
    assert overall.value != pytest.approx(sum(SCORES[name] for name in ENGLISH) / len(ENGLISH))
    assert (overall.parts, overall.missing) == (CATEGORIES, ())
    assert found["Chinese code"].value == found["English code"].value == 19.5
    assert len(found) == 15


def test_missing_sets_are_named():
    found = named({name: 10.0 for name in ENGLISH if name not in ("musique", "lcc", "repobench-p")})
    assert found["English multi-document QA"].missing == ("musique",)
    assert found["English code"].value is None
    assert found["English overall"].value == 10.0
    assert found["English overall"].missing == ("musique", "lcc", "repobench-p")
    assert "code" not in found["English overall"].parts
    # code alone makes no Chinese average
    assert set(named({"lcc": 1.0, "qasper": 2.0})) == {
        *(f"English {name}" for name in (*CATEGORIES, "overall")), "KVMerger paper's nine",
    }  # fmt: skip
    assert list(named({})) == ["KVMerger paper's nine"]


def test_kvmerger_nine():
    # H2O at 50 %, Llama-2-7B-chat, of the paper's table; its cells average 33.486.
    cells = (24.48, 25.37, 17.85, 20.04, 32.17, 63.00, 30.57, 80.89, 7.00)
    names = "gov_report multi_news narrativeqa qasper multifieldqa_en trec 2wikimqa triviaqa passage_retrieval_en"
    assert " ".join(KVMERGER_DATASETS) == names
    average = named(dict(zip(KVMERGER_DATASETS, cells, strict=True)))["KVMerger paper's nine"]
    assert average.value == pytest.approx(33.4856, abs=1e-4)
    assert average.missing == ()
    alone = named({"trec": 3.0})["KVMerger paper's nine"]
    assert alone.missing == tuple(name for name in KVMERGER_DATASETS if name != "trec")
    assert named({})["KVMerger paper's nine"].value is None


def test_length_buckets_are_averaged_and_rounded_as_numpy_does():
    buckets = length_buckets([3999, 4000, 7999, 8000], [0.1, 0.2, 0.3, 0.4])
    assert buckets == {"0-4k": [0.1], "4-8k": [0.2, 0.3], "8k+": [0.4]}
    # The official script rounds numpy's float: 0.015 becomes 0.02 there and 0.01 in Python.
    assert round(100 * 0.00015, 2) == 0.01
    assert round(bucket_mean([0.00015]), 2) == 0.02
    assert math.isnan(bucket_mean([]))
