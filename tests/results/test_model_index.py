"""The model card is read back with the hub's own library, which validates it."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from kvbench.export import main
from kvbench.records.folder import RunFolder
from kvbench.records.schema import Record


def make_run(root: Path, *records: Record, model: str = "tiny/model", **identity: Any) -> Path:
    folder = RunFolder(root, "run", {"model": {"name": model}, **identity})
    folder.describe({})
    folder.append(records)
    return folder.path


def record(sample: str, dataset: str = "qasper", arm: str = "h2o@0.35", score: float = 1.0, **fields: Any) -> Record:
    values: dict[str, Any] = {
        "method": arm.partition("@")[0], "budget": 0.35, "metric": "qa_f1", "score": score, "parts": {"score": score},
        "full_slots": 100, "slots_per_layer": [20, 14], "kl": 0.25, "gold_nll": 1.5, **fields,
    }  # fmt: skip
    return Record(sample=sample, dataset=dataset, arm=arm, **values)


def exported(tmp_path: Path, *runs: Path) -> list[Any]:
    assert main(["model-index", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    card = ModelCard.load(tmp_path / "out" / "tiny_model.md")
    assert card.data.model_name == "tiny/model"
    assert card.data.eval_results is not None
    return card.data.eval_results


def test_every_arm_s_score_and_fidelity_come_back_with_their_budget(tmp_path, capsys):
    run = make_run(
        tmp_path,
        record("a", score=1.0, options={"recent_share": 0.25}),
        record("b", score=0.5, options={"recent_share": 0.25}),
        record("c", status="failed", metric="", reason="no memory"),
        record("a", arm="full", budget=1.0, slots_per_layer=[50, 50], kl=0.0, score=0.75),
    )
    results = exported(tmp_path, run)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(document.values()) == [len(results)] == [6]
    found = {result.metric_name: result for result in results}
    assert set(found) == {f"{m} ({a})" for m in ("qa_f1", "kl_to_full", "gold_nll") for a in ("full", "h2o@0.35")}
    h2o = found["qa_f1 (h2o@0.35)"]
    assert (h2o.metric_type, h2o.metric_value, h2o.task_type) == ("qa_f1", 75.0, "text-generation")
    assert h2o.metric_args == {
        "method": "h2o", "budget": 0.35, "budget_measured": 0.34, "options": {"recent_share": 0.25}, "samples": 2,
        "samples_failed": 1,
    }  # fmt: skip
    assert found["kl_to_full (full)"].metric_value == 0.0
    assert (h2o.dataset_type, h2o.dataset_config, h2o.dataset_split) == ("THUDM/LongBench", "qasper", "test")


def test_runs_of_one_model_share_a_card_and_data_sets_keep_their_origin(tmp_path):
    first = make_run(tmp_path, record("a"), n=1)
    second = make_run(
        tmp_path,
        record(
            "q", dataset="zeroscrolls_qmsum", metric="rouge_geometric", score=None, parts={}, meta={"split": "test"}
        ),
        record("p", dataset="passkey", metric="needle", kl=None),
        n=2,
    )
    results = exported(tmp_path, first, second)
    origins = {(result.dataset_type, result.dataset_config, result.dataset_split) for result in results}
    assert origins == {
        ("THUDM/LongBench", "qasper", "test"), ("tau/zero_scrolls", "qmsum", "test"), ("kvbench-passkey", None, None),
    }  # fmt: skip
    names = {result.dataset_config or "passkey": set() for result in results}
    for result in results:
        names[result.dataset_config or "passkey"].add(result.metric_type)
    assert names["qmsum"] == {"kl_to_full", "gold_nll"}  # the test split has no references to score with
    assert names["passkey"] == {"needle", "gold_nll"}


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    failed = make_run(tmp_path / "f", record("a", status="failed", score=None, parts={}, kl=None, gold_nll=None))
    twice = [make_run(tmp_path, record("a"), protocol=n) for n in (1, 2)]
    (tmp_path / "file").write_text("")
    for words, message in (
        ([str(failed)], "no sample of tiny/model succeeded"),
        ([str(tmp_path / "none")], "run folder"),
        ([*map(str, twice)], "export them one by one"),
        ([str(twice[0]), "--out", str(tmp_path / "file")], "choose another place with --out DIR"),
    ):
        assert main(["model-index", *words]) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert message in err[-1]
        assert err[-1].startswith("kvbench: ")


def test_exporting_twice_does_not_double_results(tmp_path):
    run = make_run(tmp_path, record("a"))
    assert len(exported(tmp_path, run)) == len(exported(tmp_path, run)) == 3


@pytest.mark.parametrize(("name", "config"), [("qasper_e", "qasper_e"), ("narrativeqa", "narrativeqa")])
def test_longbench_data_sets_are_known_with_and_without_e(tmp_path, name, config):
    results = exported(tmp_path, make_run(tmp_path, record("a", dataset=name)))
    assert {result.dataset_config for result in results} == {config}
