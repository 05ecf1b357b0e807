"""No published number without a source."""

from pathlib import Path

import pytest

from kvbench.errors import DataError
from kvbench.results.published import lookup, read_published, unplaced

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
HEADER = "model,method,budget,dataset,score,source,note\n"


def test_every_published_number_names_its_source_and_is_a_number():
    numbers = read_published(REFERENCE)
    assert len(numbers) > 80
    for number in numbers:
        assert len(number.source) > 20, number
        assert 0 <= float(number.score) <= 100, number


def test_a_number_without_a_source_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text(HEADER + "m,h2o,0.5,qasper,1.0,someone said so,\nm,h2o,0.5,trec,2.0, ,\n")
    with pytest.raises(DataError, match=r"x\.csv line 3 has no source"):
        read_published(tmp_path)
    (tmp_path / "x.csv").write_text("model,score\nm,1\n")
    with pytest.raises(DataError, match="columns"):
        read_published(tmp_path)


def test_contradicting_sources_are_both_there_and_say_so():
    found = lookup(read_published(REFERENCE), "llama2-7b-chat", "h2o", 0.5, ["narrativeqa", "average of 9"])
    assert sorted(p.score for p in found) == ["17.48", "17.85", "33.49", "34.00"]
    assert all("conflict" in p.note for p in found)


def test_lookup_minds_model_method_budget_and_data_set():
    numbers = read_published(REFERENCE)
    assert [p.score for p in lookup(numbers, "llama2-7b-chat", "kvmerger", 0.5, ["trec"])] == ["64.00"]
    assert lookup(numbers, "llama2-7b-chat", "kvmerger", 0.35, ["trec"]) == []
    assert lookup(numbers, "llama2-13b-chat", "kvmerger", 0.5, ["trec"]) == []


def test_numbers_without_a_model_belong_to_no_cell_but_to_an_experiment():
    numbers = read_published(REFERENCE)
    assert {p.score for p in unplaced(numbers, "pivot")} == {"24.20", "22.12"}
    assert len(unplaced(numbers, "zeroscrolls")) == 6
    assert unplaced(numbers, "longbench") == []
