import importlib.util
import json
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.errors import ConfigError, MetricError
from kvbench.metrics import get_metric, metric_names
from kvbench.metrics.longbench import DATASETS, code_sim, code_sim_levenshtein
from kvbench.metrics.text import CHINESE_PUNCTUATION, chinese_words, normalize_answer

CASES = json.loads((Path(__file__).parent / "golden_longbench.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['dataset']}-{case['note']}")
def test_golden(case):
    metric = get_metric(case.get("metric") or DATASETS[case["dataset"]][0])
    result = metric.score(case["prediction"], case["answers"], case.get("all_classes", ()), case["dataset"])
    assert result == {"score": pytest.approx(case["score"], abs=1e-12)}


def test_first_line_rule_holds_for_longbench_e():
    prediction = "yes\nQuestion: no?"
    assert get_metric("qa_f1").score(prediction, ["yes"], (), "triviaqa_e") == {"score": 1.0}
    assert get_metric("qa_f1").score(prediction, ["yes"], (), "qasper_e")["score"] < 1.0


def test_aggregate_is_the_mean_times_100_unrounded():
    metric = get_metric("qa_f1")
    assert metric.aggregate([{"score": 1.0}, {"score": 0.0}, {"score": 0.0}]) == 100 / 3
    with pytest.raises(MetricError, match="0 scored predictions"):
        metric.aggregate([])


def test_synthetic_metrics_are_registered():
    assert get_metric("needle").score("It is 4711.", ["4711"], (), "passkey") == {"score": 1.0}
    assert get_metric("first_word").score("birds, of course", ["oak", "birds"], (), "few_shot") == {"score": 1.0}


def test_unknown_metric_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'rouge' is unknown; known are qa_f1, .*code_sim_levenshtein"):
        get_metric("rouge")


def test_every_dataset_has_a_registered_metric():
    assert {metric for metric, _ in DATASETS.values()} <= set(metric_names())
    assert len(DATASETS) == 21
    assert sum(rows for _, rows in DATASETS.values()) == 4750
    assert all(get_metric(name).name == name and get_metric(name).definition for name in metric_names())


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
    import difflib

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


def test_chinese_words_concatenate_to_the_text():
    text = "会议讨论了 harbour 的费用，12.5元。"
    words = chinese_words(text)
    assert "".join(words) == text
    assert "会议" in words


def test_jieba_is_silent_and_lazy():
    program = (
        "import sys\n"
        "import kvbench.metrics\n"
        "assert 'jieba' not in sys.modules and 'rouge_score' not in sys.modules and 'torch' not in sys.modules\n"
        "from kvbench.metrics.text import chinese_words\n"
        "chinese_words('会议')\n"
    )
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_loading_jieba_leaves_its_log_level_alone():
    chinese_words("会议")
    logger = logging.getLogger("jieba")
    logger.setLevel(logging.WARNING)
    chinese_words("讨论")
    assert logger.level == logging.WARNING


def test_punctuation_list_has_upstream_gaps():
    assert "》" in CHINESE_PUNCTUATION
    assert "《" not in CHINESE_PUNCTUATION
    assert "·" not in CHINESE_PUNCTUATION


def test_normalize_answer():
    assert normalize_answer(" The  cat's\tan hat, A.") == "cats hat"
    assert normalize_answer("theatre") == "theatre"


def test_code_lines_too_long_for_difflib_are_refused():
    with pytest.raises(MetricError, match="takes 22,500,000,000 pairs"):
        get_metric("code_sim").score("a" * 150_000, ["b" * 150_000], (), "lcc")
