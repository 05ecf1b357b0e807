import pytest

from kvbench.metrics.averages import (
    CHINESE_CATEGORIES,
    ENGLISH_CATEGORIES,
    KVMERGER_DATASETS,
    kvmerger_average,
    longbench_averages,
    zeroscrolls_average,
)
from kvbench.metrics.longbench import DATASETS
from kvbench.metrics.zeroscrolls import TASKS

ENGLISH = [dataset for datasets in ENGLISH_CATEGORIES.values() for dataset in datasets]
SCORES = {dataset: float(number) for number, dataset in enumerate(DATASETS)}


def test_categories_hold_every_dataset_once_and_code_twice():
    chinese = [dataset for datasets in CHINESE_CATEGORIES.values() for dataset in datasets]
    assert sorted([*ENGLISH, *chinese]) == sorted([*DATASETS, "lcc", "repobench-p"])


def test_overall_is_the_mean_of_six_categories():
    averages = {average.name: average for average in longbench_averages(SCORES)}
    categories = [
        sum(SCORES[dataset] for dataset in datasets) / len(datasets) for datasets in ENGLISH_CATEGORIES.values()
    ]
    overall = averages["English overall"]
    assert overall.value == pytest.approx(sum(categories) / 6)
    assert overall.value != pytest.approx(sum(SCORES[dataset] for dataset in ENGLISH) / len(ENGLISH))
    assert overall.complete
    assert averages["Chinese code"].value == averages["English code"].value == 19.5
    assert averages["English overall"].label == (
        "English overall: mean of single-document QA, multi-document QA, summarization, few-shot, synthetic, code"
    )


def test_missing_sets_are_named():
    scores = {dataset: 10.0 for dataset in ENGLISH if dataset not in ("musique", "lcc", "repobench-p")}
    averages = {average.name: average for average in longbench_averages(scores)}
    assert averages["English multi-document QA"].missing == ("musique",)
    assert averages["English code"].value is None
    assert averages["English overall"].value == 10.0
    assert averages["English overall"].missing == ("musique", "lcc", "repobench-p")
    assert "INCOMPLETE, missing musique, lcc, repobench-p" in averages["English overall"].label
    assert "code" not in averages["English overall"].parts


def test_code_alone_makes_no_chinese_average():
    assert [average.name for average in longbench_averages({"lcc": 1.0, "qasper": 2.0})][-1] == "English overall"
    assert longbench_averages({}) == ()


def test_kvmerger_nine():
    # H2O at 50 %, Llama-2-7B-chat, of the paper's table; its cells average 33.486.
    cells = (24.48, 25.37, 17.85, 20.04, 32.17, 63.00, 30.57, 80.89, 7.00)
    names = "gov_report multi_news narrativeqa qasper multifieldqa_en trec 2wikimqa triviaqa passage_retrieval_en"
    assert " ".join(KVMERGER_DATASETS) == names
    average = kvmerger_average(dict(zip(KVMERGER_DATASETS, cells, strict=True)))
    assert average.value == pytest.approx(33.4856, abs=1e-4)
    assert average.complete
    assert kvmerger_average({"trec": 3.0}).missing == tuple(name for name in KVMERGER_DATASETS if name != "trec")
    assert kvmerger_average({}).value is None


def test_zeroscrolls_average():
    scores = {task: float(number) for number, task in enumerate(TASKS)}
    assert zeroscrolls_average(scores).value == 4.5
    del scores["quality"]
    assert zeroscrolls_average(scores).missing == ("quality",)
    assert zeroscrolls_average(scores).value == pytest.approx(39 / 9)
