"""docs/lm_eval.md and its folder: the data fit the tasks, and the arguments it lists are the model's."""

import json
import re
import runpy
import sys
from pathlib import Path

from omegaconf import OmegaConf

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_example_s_data_fit_its_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["write_data.py", "256"])
    runpy.run_path(str(DOCS / "lm_eval" / "write_data.py"), run_name="__main__")
    for name in ("kvbench_fewshot", "kvbench_passkey"):
        task = OmegaConf.load(DOCS / "lm_eval" / f"{name}.yaml")
        assert task.task == name
        rows = [json.loads(line) for line in Path(task.dataset_kwargs.data_files.test).read_text("utf-8").splitlines()]
        assert len(rows) == 20
        wanted = {field for text in (task.doc_to_text, task.doc_to_target) for field in re.findall(r"\w+", text)}
        assert {"context", "answer"} <= wanted
        for row in rows:
            assert {"context", "answer"} <= set(row)
            assert row["answer"] in row.get("choices", [row["answer"]])
            assert len(row.get("choices", [0] * 4)) == 4
            assert not row["context"][-1].isspace()


def test_the_page_s_arguments_are_the_model_s():
    page = (DOCS / "lm_eval.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
    source = (DOCS.parent / "kvbench" / "integrations" / "lm_eval.py").read_text(encoding="utf-8")
    signature = source.partition("class CompressedCacheLM")[2].partition("def __init__(")[2].partition("):")[0]
    assert named == set(re.findall(r"(\w+):", signature)) - {"batch_size", "max_batch_size", "device", "options"}
