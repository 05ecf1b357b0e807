"""LongBench: official prompts from real rows (where there are some), and every kind of bad row named."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from longbench_rows import row, stand_in_official, write_rows

from kvbench.errors import ConfigError, DataError
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
