"""LongBench: official prompts from real rows (where there are some), and every kind of bad row named."""

import hashlib
import json
import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from longbench_rows import row, stand_in_official, write_rows

from kvbench.errors import ConfigError, DataError
from kvbench.metrics import get_metric
from kvbench.metrics.longbench import DATASETS, ROWS
from kvbench.tasks.longbench import LongBench, dataset_fields


def task(dataset: str, /, **fields: Any) -> LongBench:
    return LongBench(**{"name": dataset, **dataset_fields(dataset), **fields})


@pytest.fixture
def qasper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LongBench:
    monkeypatch.delenv("KVBENCH_DATA", raising=False)
    official = stand_in_official(tmp_path / "official", monkeypatch)
    return task("qasper", root=str(tmp_path), official=str(official))


def test_the_official_rules_of_each_data_set() -> None:
    # Official pred.py leaves these without a chat wrapper; its samsum branch stops at a newline too.
    no_chat = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    for dataset in ROWS:
        values, base = dataset_fields(dataset), dataset.removesuffix("_e")
        assert (values["dataset"], values["chat"]) == (dataset, base not in no_chat)
        assert values["first_line_only"] == (base in {"trec", "triviaqa", "samsum", "lsht"})  # eval.py
        assert values["stop_newline"] == (base == "samsum")
        chinese = base.endswith("_zh") or base in {"dureader", "vcsum", "lsht"}
        assert values["language"] == ("zh" if chinese else "en")


@pytest.mark.shared
@pytest.mark.parametrize("dataset", DATASETS)
def test_real_rows_render_as_the_official_code_does(dataset: str, shared_data: Path) -> None:
    official = shared_data / "longbench_official"
    rows_file = shared_data / "longbench_samples" / f"{dataset}.jsonl"
    samples = task(dataset, root=str(rows_file.parent), official=str(official)).samples()
    rows = [json.loads(line) for line in rows_file.read_bytes().splitlines()]
    template = json.loads((official / "dataset2prompt.json").read_text(encoding="utf-8"))[dataset]
    limit = json.loads((official / "dataset2maxlen.json").read_text())[dataset]
    assert len(samples) == len(rows) >= 4
    for sample, fields in zip(samples, rows, strict=True):
        assert (sample.id, sample.prompt) == (fields["_id"], template.format(**fields))
        assert sample.answers == tuple(fields["answers"])
        assert sample.all_classes == tuple(fields["all_classes"] or ())
        assert (sample.length, sample.max_new_tokens) == (fields["length"], limit)
        assert (sample.truncation, sample.answer_prefix) == ("middle", "")
        assert (sample.question_start is not None) == bool(fields["input"])
        if fields["input"]:
            before, after = sample.prompt[: sample.question_start], sample.prompt[sample.question_start :]
            assert before.endswith(fields["context"])
            assert fields["input"] in after


WHOLE = {  # data sets of which all 200 official rows are at hand, and the SHA-256 of the file
    "multi_news": "5e79ca4f3d715af95eb684c3a6beaecb8b7542b76f2a891bf8657d82084af1ad",
    "multifieldqa_zh": "2e4e7360f4d9094815e81eb99dc84ee147a37db801dc9c84ed2bcdc83e0a2c7f",
    "passage_retrieval_zh": "c3d4a0cb03f9ec5b5c056b5f528b8c46518df2f6379e43a061825c6ff290c06c",
}


@pytest.mark.shared
@pytest.mark.parametrize("dataset", WHOLE)
def test_a_whole_data_set_is_read_in_official_order_and_its_gold_answers_score_100(
    dataset: str, shared_data: Path
) -> None:
    file = shared_data / "longbench_full" / f"{dataset}.jsonl"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == WHOLE[dataset]
    roots = os.pathsep.join(str(shared_data / name) for name in ("longbench_full", "longbench_samples"))
    samples = task(dataset, root=roots, official=str(shared_data / "longbench_official")).samples()
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert [sample.id for sample in samples] == [fields["_id"] for fields in rows]
    assert len({sample.id for sample in samples}) == ROWS[dataset] == 200
    known = (shared_data / "longbench_samples" / f"{dataset}.jsonl").read_bytes().splitlines()
    by_id = {fields["_id"]: fields for fields in rows}
    assert all(by_id[fields["_id"]] == fields for fields in map(json.loads, known))  # from another source
    metric = get_metric(DATASETS[dataset].metric)
    scores = [metric.score(sample.answers[0], sample.answers, sample.all_classes, dataset) for sample in samples]
    # ROUGE-L of equal texts is 0.999999995 upstream too (the 1e-8 in its denominator).
    assert metric.aggregate(scores) == pytest.approx(100, abs=0 if dataset != "multi_news" else 1e-6)
    theirs = [metric.score(other.answers[0], sample.answers, (), dataset) for sample, other in pairwise(samples)]
    assert metric.aggregate(theirs) < 30


def test_of_several_folders_the_first_that_has_the_file_counts(
    qasper: LongBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "b" / "data" / "qasper.jsonl", row(1))
    write_rows(tmp_path / "c" / "qasper.jsonl", row(1), row(2))
    monkeypatch.setenv("KVBENCH_DATA", os.pathsep.join(str(tmp_path / name) for name in "abc"))
    assert len(replace(qasper, root=None).samples()) == 1
    with pytest.raises(DataError, match=r"a.qasper\.jsonl nor .*, nor in another"):
        replace(qasper, root=os.pathsep.join((str(tmp_path / "a"), str(tmp_path / "d")))).samples()


@pytest.mark.shared
def test_official_oddities_survive(shared_data: Path) -> None:
    places = {"root": str(shared_data / "longbench_samples"), "official": str(shared_data / "longbench_official")}
    names = ("narrativeqa", "passage_count", "lcc", "multi_news")
    narrative, count, code, news = (task(name, **places).samples()[0].prompt for name in names)
    assert len(re.findall(r"\bas(?=concisely\b)", narrative)) == 2  # the missing space is official
    assert count.endswith("The final answer is: ")
    assert code.endswith("Next line of code:\n")
    assert "NEWLINE_CHAR" in news
    samples = task("samsum", **places).samples()
    assert all(sample.stop_newline and sample.min_new_tokens == 1 and not sample.chat for sample in samples)


def test_a_row_becomes_a_sample(qasper: LongBench, tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper.jsonl", row(1), row(2, input=""), row(3, answers=["only"]))
    first, second, third = qasper.samples()
    assert first.prompt == (
        "Read this.\n\nClaim 1 is that braces {like} {0} are {input} safe."
        "\n\n Now answer. \n\nQuestion: What is claim 1?\n\nAnswer:"
    )
    assert first.prompt[first.question_start :] == "\n\n Now answer. \n\nQuestion: What is claim 1?\n\nAnswer:"
    assert (second.question_start, third.answers) == (None, ("only",))
    assert (first.metric, first.max_new_tokens, first.chat, first.min_new_tokens) == ("qa_f1", 128, True, 0)
    assert first.meta["category"] == "single-document QA"


def test_rows_may_come_as_parquet(qasper: LongBench, tmp_path: Path) -> None:
    rows = [row(1), row(2, input=""), row(3, answers=["only"])]
    path = write_rows(tmp_path / "qasper.jsonl", *rows)
    expected = qasper.samples()
    path.unlink()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "qasper.parquet")
    assert qasper.samples() == expected


def test_longbench_e_rows_use_the_prompts_of_the_plain_id(qasper: LongBench, tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper_e.jsonl", row(1), row(2, dataset="qasper_e"))
    samples = replace(qasper, dataset="qasper_e").samples()
    assert [(sample.dataset, sample.max_new_tokens) for sample in samples] == [("qasper_e", 128)] * 2


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        *((row(2, **{field: ...}), f"field '{field}' is missing") for field in row()),
        (row(2, input=None), "'input' must be a string"),
        (row(2, answers="a"), "'answers' must be a list of strings"),
        (row(2, answers=[]), "'answers' is empty"),
        (row(2, length="10"), "'length' must be a non-negative integer"),
        (row(2, all_classes=[1]), "'all_classes' must be a list of strings"),
        (row(2, dataset="hotpotqa"), "a row of 'hotpotqa', expected 'qasper'"),
        (row(1), "_id 'id-1' was seen in line 1"),
        (json.dumps(row(2)).replace("What", "\\ud800"), "lone surrogate"),
    ],
)
def test_a_bad_row_is_named(qasper: LongBench, tmp_path: Path, bad: Any, problem: str) -> None:
    path = write_rows(tmp_path / "qasper.jsonl", row(1), bad, row(3))
    with pytest.raises(DataError, match=problem) as error:
        qasper.samples()
    assert f"{path}:2" in str(error.value)


def test_classification_needs_its_classes(qasper: LongBench, tmp_path: Path) -> None:
    write_rows(tmp_path / "trec.jsonl", row(1, dataset="trec", all_classes=["a", "b"]), row(2, dataset="trec"))
    with pytest.raises(DataError, match=r"trec\.jsonl:2: field 'all_classes' is empty"):
        task("trec", root=qasper.root, official=qasper.official).samples()


def test_a_changed_official_file_is_refused(qasper: LongBench, tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper.jsonl", row(1))
    changed = tmp_path / "official" / "dataset2prompt.json"
    changed.write_text(changed.read_text().replace("Read", "Reed"))
    found = hashlib.sha256(changed.read_bytes()).hexdigest()[:12]
    with pytest.raises(DataError, match=f"dataset2prompt.json has SHA-256 {found}"):
        qasper.samples()


def test_no_data_says_where_it_looked(qasper: LongBench, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qasper\.jsonl nor .*data/qasper\.jsonl exists; set data.root=DIR"):
        qasper.samples()
    with pytest.raises(DataError, match=r"set data\.official=DIR"):
        replace(qasper, official=str(tmp_path / "none")).samples()


def test_other_places_of_the_data(qasper: LongBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(DataError, match=r"longbench is not in the cache and cannot be fetched: .*HF_HUB_OFFLINE is"):
        task("qasper").samples()
    write_rows(tmp_path / "data" / "qasper.jsonl", row(1))
    (tmp_path / "official").rename(tmp_path / "config")  # found beside the rows
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    assert [sample.id for sample in task("qasper").samples()] == ["id-1"]


def test_rules_that_the_scorer_fixes_cannot_be_configured_away(qasper: LongBench) -> None:
    with pytest.raises(ConfigError, match="first_line_only=True for qasper"):
        replace(qasper, first_line_only=True).samples()
    with pytest.raises(ConfigError, match="no data set 'nq'"):
        replace(qasper, dataset="nq").samples()
