"""The trials' shortcut, one forced chunk for all arms, gives the engine's numbers; their report compares in pairs."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvbench.methods.full import Full
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.requests import Arm, Request

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def trials():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import plus_trials

        yield plus_trials
    finally:
        sys.path.remove(str(SCRIPTS))


def test_a_forced_chunk_is_what_the_engine_measures_token_by_token(trials):
    loaded = load_model(named_config("tiny-random", device="cpu"))
    small = ":question_queries=4:kernel_tokens=3"
    methods = [
        "snapkv:observation_tokens=4",
        "kvmerger_bias",
        "kvmerger_plus" + small,
        f"kvmerger_plus{small}:refit=both",
    ]
    arms = tuple(trials.make_arms(methods, [0.4]))
    ids = torch.randint(3, 250, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    item = trials.Item("random", tuple(ids[:50]), tuple(ids[50:]))
    job = Request(0, item.ids, 50, item.gold, arms, Arm.of(Full()), (2,), 1)
    answers = list(FusedEngine().run(loaded, [job]))
    for measured, expected in zip(trials.trial(loaded, item, arms), answers, strict=True):
        assert measured["arm"] == expected.arm.key
        assert measured["kl"] == pytest.approx(sum(expected.kl[1:]) / 9, abs=2e-6)
        assert measured["nll"] == pytest.approx(sum(expected.gold_nll[1:]) / 9, abs=1e-4)


def test_the_report_pairs_every_arm_with_ours(tmp_path, trials):
    with (tmp_path / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, trials.FIELDS, restval="0")
        writer.writeheader()
        for sample in range(8):
            for arm, kl in [("h2o@0.5", 0.5 + 0.01 * sample), ("kvmerger_plus@0.5", 0.2)]:
                writer.writerow({"kind": "text", "sample": sample, "arm": arm, "budget": 0.5, "kl": kl})
    command = [sys.executable, str(SCRIPTS / "plus_report.py"), str(tmp_path / "trials.csv")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| h2o@0.5 | 0.5350 | -0.3350 |" in output
    assert "| 8/8 | 0.008 |" in output
    assert "| kvmerger_plus@0.5 | 0.2000 | | | |" in output
