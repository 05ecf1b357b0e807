"""Metrics are found by name, in this package and in others, score any text, and run on packages that are sound."""

import base64
import hashlib
import math
import warnings
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.errors import ConfigError, MetricError
from kvbench.metrics import BestAnswerMetric, get_metric, metric_names
from kvbench.metrics import base as metrics_base
from kvbench.metrics.base import check_environment, scorer_versions

SURROGATES = st.text(st.characters(codec=None, categories=("Cs", "Nd", "Lo", "Po", "Zs", "Cc")), max_size=20)
FRAGMENTS = [
    "Paragraph ",
    "\n",
    " ",
    *["段落", "12", "3.5%", "99%", "..", ",", "A", "the", "`", "#", "//", "会议", "．", "½"],
]
TEXTS = st.one_of(st.text(max_size=30), SURROGATES, st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))


@pytest.mark.parametrize("name", metric_names())
def test_any_strings_score_between_0_and_1(name):
    metric = get_metric(name)
    assert metric.name == name
    assert metric.definition
    assert metric.score("anything", (), ("anything",), "hotpotqa")["score"] == 0.0

    @settings(max_examples=60, deadline=None)
    @given(
        TEXTS, st.lists(TEXTS, max_size=3), st.lists(TEXTS, max_size=4), st.sampled_from(("hotpotqa", "trec", "lcc"))
    )
    def check(prediction, answers, all_classes, dataset):
        score = metric.score(prediction, answers, all_classes, dataset)
        assert "score" in score
        assert all(type(value) is float and math.isfinite(value) and 0.0 <= value <= 1.0 for value in score.values())
        assert metric.score(prediction, answers, all_classes, dataset) == score
        assert 0.0 <= metric.aggregate([score, score]) <= 100.0 + 1e-9

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check()


def test_a_comparison_that_gives_no_number_is_not_taken_for_zero():
    broken = BestAnswerMetric("broken", "NaN for one answer", lambda p, a, c: math.nan if a == "bad" else 0.5)
    for answers in (("bad", "good"), ("good", "bad"), ("bad",)):
        assert math.isnan(broken.score("text", answers, (), "")["score"])
    assert broken.score("text", ("good",), (), "") == {"score": 0.5}


def test_aggregate_is_the_mean_times_100_unrounded_and_an_unknown_metric_is_refused():
    metric = get_metric("qa_f1")
    assert metric.aggregate([{"score": 1.0}, {"score": 0.0}, {"score": 0.0}]) == 100 / 3
    with pytest.raises(MetricError, match="0 scored predictions"):
        metric.aggregate([])
    with pytest.raises(ConfigError, match=r"'rouge' is unknown; known are qa_f1, .*code_sim_levenshtein"):
        get_metric("rouge")


half = BestAnswerMetric("half", "always 0.5", lambda p, a, c: 0.5)  # as another distribution would define it
impostor = BestAnswerMetric("qa_f1", "always 1", lambda p, a, c: 1.0)


def test_metrics_of_other_distributions_are_found_and_checked(monkeypatch):
    monkeypatch.setattr(metrics_base, "_metrics", metrics_base._metrics.__wrapped__)

    def offered(name, value):
        monkeypatch.setattr(metrics_base, "entry_points", lambda group: [EntryPoint(name, value, group)])
        return get_metric(name)

    assert offered("half", f"{__name__}:half") is half
    for name, member, problem in (
        ("half", "whole", "cannot be loaded"),
        ("whole", "half", "no metric of that name"),
        ("half", "BestAnswerMetric", "no metric of that name"),
        ("qa_f1", "impostor", "claims a name that another metric has"),
    ):
        with pytest.raises(ConfigError, match=f"entry point {name} = .*{problem}"):
            offered(name, f"{__name__}:{member}")


def install(folder, name, version, files):
    """Write files and their recorded checksums as an installer does."""
    record = ""
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "RECORD").write_text(f"{record}{information.name}/RECORD,,\n")


def test_an_environment_whose_rouge_is_not_its_own_is_refused(tmp_path):
    check_environment()  # this one is sound
    files = {"rouge/__init__.py": "one = 1\n", "rouge/rouge.py": "two = 2\n"}
    others = {path: text + "other = 1\n" for path, text in files.items()}
    for folder in ("absent", "intact", "before", "after"):
        (tmp_path / folder).mkdir()
    install(tmp_path / "intact", "rouge", "1.0.1", files)
    install(tmp_path / "before", "rouge-chinese", "1.0.3", others)  # overwritten in turn by the right files: harmless
    install(tmp_path / "before", "rouge", "1.0.1", files)
    for folder in ("absent", "intact", "before"):
        check_environment([str(tmp_path / folder)])
    install(tmp_path / "after", "rouge", "1.0.1", files)
    install(tmp_path / "after", "rouge-chinese", "1.0.3", others)
    with pytest.raises(MetricError, match=r"of the installed package rouge is overwritten by rouge-chinese; run: pip"):
        check_environment([str(tmp_path / "after")])
    changed = tmp_path / "intact" / "rouge" / "rouge.py"
    for change, state in (
        (lambda: changed.write_text("two = 3\n"), "overwritten; run: pip"),
        (changed.unlink, "missing"),
    ):
        change()  # the file is missing after rouge-chinese was uninstalled
        with pytest.raises(MetricError, match=f"rouge/rouge.py of the installed package rouge is {state}"):
            check_environment([str(tmp_path / "intact")])


def test_versions():
    assert scorer_versions()["jieba"] == "0.42.1"
    assert set(scorer_versions()) == {"jieba", "rouge_score", "Unidecode"}
