"""The table of differences between the engines: a row per arm, and exit code 1 where an fp32 token differs."""

import csv
import dataclasses
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = [
    "n_layers=4", "methods=[h2o,kvmerger,tova]", "budgets=[0.5]", "lengths=[40,50]", "samples=1", "new_tokens=3",
    "gold_tokens=2", "device=cpu", "dtypes=[float32]",
]  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import compare_engines

    return compare_engines


def rows(script, monkeypatch, folder) -> tuple[int, list[dict[str, str]]]:
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", *SMALL, f"csv={folder / 'engines.csv'}"])
    code = script.main()
    return code, list(csv.DictReader((folder / "engines.csv").open()))


def test_every_arm_that_a_budget_allows_has_a_row(script, monkeypatch, tmp_path, capsys):
    code, table = rows(script, monkeypatch, tmp_path)
    assert code == 0
    assert [row["arm"] for row in table] == ["full", "h2o@0.5", "tova@0.5"]
    assert {(row["equal tokens"], row["tokens"], row["equal slots"]) for row in table} == {("6", "6", "2")}
    assert all(float(row["max KL diff"]) < 1e-5 for row in table)
    printed = capsys.readouterr()
    assert "| float32 | tova@0.5 | torch |" in printed.out
    assert "left out: budget 0.5 of 40 tokens in 4 layers" in printed.err


def test_other_tokens_are_counted_and_told_by_the_exit_code(script, monkeypatch, tmp_path):
    original = script.FusedEngine.run

    def wrong(engine, *arguments):
        for result in original(engine, *arguments):
            if result.arm.key == "tova@0.5":
                result = dataclasses.replace(result, token_ids=[-1, *result.token_ids[1:]], kl=[2.0, *result.kl[1:]])
            yield result

    monkeypatch.setattr(script.FusedEngine, "run", wrong)
    code, table = rows(script, monkeypatch, tmp_path)
    assert code == 1
    assert [(row["equal tokens"], row["max KL diff"]) for row in table[-1:]] == [("4", "2.0e+00")]
