"""The scripts beside the package run and print what they promise; no time is asserted."""

import csv
import dataclasses
import json
import math
import os
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

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TINY = ["--quick", "--model", "tiny-random"]


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run_script(name, *arguments):
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# ---- bench_speed.py --------------------------------------------------------------------------------------------------


def test_the_speed_benchmark_prints_every_row_with_its_raw_times_and_what_follows_from_them(tmp_path):
    arguments = [*TINY, "--repeats", "1", "--cpu-model", "tiny-random", "--arms", "full,h2o@0.5"]
    done = run_script("bench_speed.py", *arguments, "--rows", "2,4,5,6,7", "--threads", "1", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    assert document["models"]["main"]["name"] == "tiny-random"
    assert document["models"]["main"]["arms"] == ["full", "h2o@0.5"]
    assert set(document["versions"]) >= {"torch", "transformers"}
    assert document["device"]
    assert [row["row"] for row in document["rows"]] == [2, 4, 4, 5, 6, 6, 7]
    for row in document["rows"]:
        assert not row["failed"]
        assert row["peak_bytes"] > 0
        for times in row["seconds"].values():
            assert times["raw"] == [pytest.approx(times["p50"])]
    fork, peer, batched, cache, arms, column_sums, further = document["rows"]
    seconds = [{name: times["p50"] for name, times in row["seconds"].items()} for row in document["rows"]]
    assert fork["value"] == pytest.approx((seconds[0]["forked"] - seconds[0]["observed"]) / seconds[0]["plain"])
    assert peer["value"] is None
    assert "--peer" in peer["note"]
    assert batched["value"] == pytest.approx(seconds[2]["sample"])
    assert batched["details"]["settings"]["batch_samples"] == 2
    assert cache["value"] == pytest.approx(max(cache["details"]["ratios"].values()))
    assert cache["details"]["ratios"]["full"] == pytest.approx(1.0)
    slots = 128 * 4 * 2  # half of 256 tokens, 4 layers, 2 KV heads; each with the score that H2O keeps
    assert cache["details"]["bytes"]["h2o@0.5"] >= slots * (2 * 16 * 4 + 4)
    assert arms["value"] == pytest.approx(seconds[4]["arms"] / seconds[4]["full"])
    assert column_sums["details"]["observe"] == ["torch"]
    assert further["value"] == pytest.approx(seconds[6]["arms"] / seconds[6]["full"] - 1)


def test_a_row_that_cannot_be_measured_is_recorded_and_the_run_fails(capsys):
    import bench_speed

    assert bench_speed.main([*TINY, "--rows", "5", "--arms", "full,h2o@0.001"]) == 1
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["failed"], row["value"]) == (True, None)
    assert "BudgetError" in row["note"]


def test_a_peer_without_its_environment_says_how_to_install_it(capsys):
    import bench_speed

    with pytest.raises(SystemExit, match="2"):
        bench_speed.main(["--peer", "--quick"])
    assert "kvpress==0.5.5" in capsys.readouterr().err


def test_a_row_judges_its_value_by_its_target_and_its_spread_by_the_repeats():
    from speed_timing import Row

    def met(value, **options):
        return Row(1, "q", "c", {}, lambda t: value, **options).record()["met"]

    assert [met(1.0, target=1.5), met(2.0, target=1.5), met(1.0)] == [True, False, None]
    assert [met(31.0, target=30.0, at_least=True), met(29.0, target=30.0, at_least=True)] == [True, False]
    assert met(math.nan, must_run=True) is False
    seconds = {"ours": [1.0, 2.0, 4.0], "plain": [1.0, 1.0, 2.0]}
    record = Row(1, "q", "c", seconds, lambda t: t["ours"] / t["plain"]).record()
    assert record["value"] == pytest.approx(2.0)
    assert record["spread"] == pytest.approx({"p20": 1.4, "p50": 2.0, "p80": 2.0})


# ---- compare_engines.py ----------------------------------------------------------------------------------------------


def engine_rows(monkeypatch, folder):
    import compare_engines

    small = [
        "n_layers=4", "methods=[h2o,kvmerger,tova]", "budgets=[0.5]", "lengths=[40,50]", "samples=1", "new_tokens=3",
        "gold_tokens=2", "device=cpu", "dtypes=[float32]", f"csv={folder / 'engines.csv'}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", *small])
    return compare_engines.main(), list(csv.DictReader((folder / "engines.csv").open()))


def test_every_arm_that_a_budget_allows_has_a_row_of_the_engines_differences(monkeypatch, tmp_path, capsys):
    code, table = engine_rows(monkeypatch, tmp_path)
    assert code == 0
    assert [row["arm"] for row in table] == ["full", "h2o@0.5", "tova@0.5"]
    assert {(row["equal tokens"], row["tokens"], row["equal slots"]) for row in table} == {("6", "6", "2")}
    assert all(float(row["max KL diff"]) < 1e-5 for row in table)
    printed = capsys.readouterr()
    assert "| float32 | tova@0.5 | torch |" in printed.out
    assert "left out: budget 0.5 of 40 tokens in 4 layers" in printed.err


def test_other_tokens_are_counted_and_told_by_the_exit_code(monkeypatch, tmp_path):
    original = FusedEngine.run

    def wrong(engine, *arguments):
        for result in original(engine, *arguments):
            if result.arm.key == "tova@0.5":
                result = dataclasses.replace(result, token_ids=[-1, *result.token_ids[1:]], kl=[2.0, *result.kl[1:]])
            yield result

    monkeypatch.setattr(FusedEngine, "run", wrong)
    code, table = engine_rows(monkeypatch, tmp_path)
    assert code == 1
    assert (table[-1]["equal tokens"], table[-1]["max KL diff"]) == ("4", "2.0e+00")


# ---- gpu_hours.py ----------------------------------------------------------------------------------------------------


def test_the_gpu_hours_of_the_page_follow_from_measured_numbers():
    import gpu_hours

    speeds = {
        model: gpu_hours.Speed.of(json.loads((gpu_hours.SPEED / file).read_text()))
        for model, file in gpu_hours.MODELS.items()
    }
    for speed in speeds.values():
        assert speed.seconds(3500, 128, 0, 7) == pytest.approx(speed.sample_s, rel=0.04)
    parts = {"needle": gpu_hours.experiment_parts("needle", ["llama2-7b-chat"])}
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for line in gpu_hours.table(parts, speeds)[:3]:
        assert line in page


@pytest.mark.parametrize(
    ("work", "seconds"),
    [((3500, 1, 0, 7), 0.5), ((1750, 1, 0, 7), 0.25), ((3500, 101, 0, 7), 1.5), ((3500, 101, 0, 9), 1.7),
     ((3500, 1, 64, 7), 0.66)],
)  # fmt: skip
def test_each_part_of_the_arithmetic_counts(work, seconds):
    import gpu_hours

    speed = gpu_hours.Speed("a GPU", 3500, fork_s=0.5, step_s=0.01, arm_token_s=0.001, cache_share=0.25, sample_s=0)
    assert speed.seconds(*work) == pytest.approx(seconds)


# ---- plus_trials.py, plus_report.py ----------------------------------------------------------------------------------


def test_a_forced_chunk_is_what_the_engine_measures_token_by_token():
    import plus_trials

    loaded = load_model(named_config("tiny-random", device="cpu"))
    small = ":question_queries=4:kernel_tokens=3"
    methods = ["snapkv:observation_tokens=4", "kvmerger_bias", f"kvmerger_plus{small}"]
    arms = tuple(plus_trials.make_arms([*methods, f"{methods[-1]}:refit=both"], [0.4]))
    ids = torch.randint(3, 250, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    item = plus_trials.Item("random", tuple(ids[:50]), tuple(ids[50:]))
    request = Request(0, item.ids, 50, item.gold, arms, Arm.of(Full()), (2,), 1)
    answers = list(FusedEngine().run(loaded, [request]))
    for measured, expected in zip(plus_trials.trial(loaded, item, arms), answers, strict=True):
        assert measured["arm"] == expected.arm.key
        assert measured["kl"] == pytest.approx(sum(expected.kl[1:]) / 9, abs=2e-6)
        assert measured["nll"] == pytest.approx(sum(expected.gold_nll[1:]) / 9, abs=1e-4)


def test_the_report_of_the_trials_pairs_every_arm_with_ours(tmp_path):
    import plus_trials

    with (tmp_path / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, plus_trials.FIELDS, restval="0")
        writer.writeheader()
        for sample in range(8):
            for arm, kl in [("h2o@0.5", 0.5 + 0.01 * sample), ("kvmerger_plus@0.5", 0.2)]:
                writer.writerow({"kind": "text", "sample": sample, "arm": arm, "budget": 0.5, "kl": kl})
    done = run_script("plus_report.py", tmp_path / "trials.csv")
    assert done.returncode == 0, done.stderr
    for line in ("| h2o@0.5 | 8 | 0.5350 | -0.3350 |", "| 8/8 | 0.008 |", "| kvmerger_plus@0.5 | 8 | 0.2000 | | | | |"):
        assert line in done.stdout
