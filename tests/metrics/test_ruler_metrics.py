"""RULER's scorers equal the official evaluate.py on the same prediction files."""

import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.errors import MetricError
from kvbench.metrics import get_metric
from kvbench.metrics.ruler import TASKS


@pytest.mark.parametrize(
    ("prediction", "answers", "all_found", "any_found"),
    [
        ("7, 8", ["7", "8"], 1.0, 1.0),
        ("only 7", ["7", "8", "9"], 1 / 3, 1.0),
        ("PARIS", ["in Paris", "paris"], 0.5, 1.0),
        ("17", ["7"], 1.0, 1.0),  # within a longer number, too
        ("new\tyork", ["new york"], 0.0, 0.0),  # a tab becomes a line feed
        ("a\x00b", ["a\nb"], 1.0, 1.0),
        ("", ["x"], 0.0, 0.0),
        ("x", [], 0.0, 0.0),
    ],
)
def test_scores_by_hand(prediction, answers, all_found, any_found):
    for name, expected in (("string_match_all", all_found), ("string_match_part", any_found)):
        assert get_metric(name).score(prediction, answers, (), "")["score"] == pytest.approx(expected)


def test_the_mean_is_rounded_and_of_nothing_refused():
    for name in ("string_match_all", "string_match_part"):
        assert get_metric(name).aggregate([{"score": 1.0}, {"score": 0.0}, {"score": 0.0}]) == 33.33
        with pytest.raises(MetricError):
            get_metric(name).aggregate([])


def predictions(task: str, n_rows: int = 37) -> list[dict]:
    """Answers of every shape, and predictions that hold some of them in some form."""
    choose = random.Random(task)
    rows = []
    for index in range(n_rows):
        kinds = (str(choose.randrange(10**7)), f"Word-{choose.randrange(99)}", "Ünïcode", "a\tb", "New York", "ﬁ İ ß")
        answers = [choose.choice(kinds) for _ in range(choose.randrange(1, 11))]
        said = [choose.choice((a, a.upper(), a.lower(), a[:-1], f"\x07{a}", "")) for a in answers]
        prediction = choose.choice((" ", "\n", ", ", "\x00")).join(said)
        rows.append({
            "index": index, "input": "", "outputs": answers, "pred": choose.choice(("\t", "")) + prediction,
            "others": {"id": index},
        })  # fmt: skip
    return rows


@pytest.mark.skipif(importlib.util.find_spec("long_context_eval") is None, reason="make install has RULER's package")
def test_equal_to_the_official_scorer_on_all_13_files(tmp_path):
    spec = importlib.util.find_spec("long_context_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    files = {task: predictions(task) for task in TASKS}
    (tmp_path / "data").mkdir()
    for task, rows in files.items():
        lines = [json.dumps(row) for row in rows]
        (tmp_path / "data" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "nltk.py").write_text("class data:\n    find = staticmethod(print)\n")  # asks for a model it never uses
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(package.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "evaluate.py", "--data_dir", str(tmp_path / "data"), "--benchmark", "synthetic"]
    subprocess.run(command, cwd=package / "eval", env=environment, check=True, capture_output=True, timeout=300)
    singles = json.loads((tmp_path / "data" / "per_sample_scores.json").read_text())
    with (tmp_path / "data" / "summary.csv").open() as file:
        _, names, official, _ = csv.reader(file)
    means = dict(zip(names[1:], map(float, official[1:]), strict=True))
    assert list(means) == list(TASKS)
    for task, rows in files.items():
        metric = get_metric(TASKS[task])
        scores = [metric.score(row["pred"], row["outputs"], (), task) for row in rows]
        assert [100 * score["score"] for score in scores] == singles[task]
        assert metric.aggregate(scores) == means[task]
        assert 0 < means[task] < 100
