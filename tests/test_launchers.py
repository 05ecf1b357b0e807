"""Jobs in other processes, really started: Ray, submitit's local executor and joblib; what happens there comes back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from kvbench.cli import main
from kvbench.commands import EXIT_FAILED_SAMPLES, EXIT_MEND
from kvbench.config import config_folder, register
from kvbench.records.read import read_calls, read_records

SMOKE = [
    "model=tiny-random", "task=passkey", "task.limit=4", "task.lengths=[300]", "protocol.max_new_tokens=6",
    "protocol.gold_tokens=4", "method=h2o", "budget=0.5", "engine.max_rows=3",
]  # fmt: skip
LAUNCHERS = {
    "ray": ["hydra/launcher=ray"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
    "joblib": ["hydra/launcher=processes"],
}
BROKEN = """
import os
from dataclasses import dataclass
from typing import ClassVar
from kvbench.methods.h2o import H2O

@dataclass(frozen=True, kw_only=True)
class Broken(H2O):
    name: ClassVar[str] = "broken"

    def compress(self, layer, budget_tokens):
        raise RuntimeError("broken on purpose")
"""


@pytest.fixture(scope="module")
def ray_workers(tmp_path_factory):
    """Two workers for all tests that use Ray: starting them takes longer than the jobs."""
    import ray

    policies = tmp_path_factory.mktemp("policies")
    (policies / "broken.py").write_text(BROKEN)
    (policies / "deadly.py").write_text(BROKEN.replace('raise RuntimeError("broken on purpose")', "os._exit(9)"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(policies))
        ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run folder and the last line of a run in one process."""
    folder = tmp_path_factory.mktemp("plain")
    assert kvbench(folder, *SMOKE).returncode == 0
    (run,) = (folder / "runs").glob("passkey-*")
    return run


def kvbench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: launchers start threads and processes that write to its output."""
    command = [sys.executable, "-m", "kvbench", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def records(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    times = ("seconds", "recorded_at", "call")
    return {(r["sample"], r["arm"]): {k: v for k, v in r.items() if k not in times} for r in read_records(run)}


def error_line(call: subprocess.CompletedProcess[str]) -> str:
    (line,) = (line for line in call.stderr.splitlines() if line.startswith("kvbench: "))
    return line


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_workers_share_a_run_and_give_its_records(launcher, plain, tmp_path, request):
    if launcher == "ray":
        request.getfixturevalue("ray_workers")
    call = kvbench(tmp_path, "-m", *SMOKE, "shard=range(2)", *LAUNCHERS[launcher])
    assert call.returncode == 0, call.stderr
    document = json.loads(call.stdout.splitlines()[-1])
    assert document["shards"] == ["1/2", "2/2"]
    assert (document["n_samples"], document["arms"][0]["n"]) == (4, 4)
    shared = tmp_path / document["run"]
    assert shared.name == plain.name
    assert records(shared) == records(plain)
    calls = read_calls(shared)
    processes = {call["process"] for call in calls}
    assert [len(calls), len(processes)] == [2, 2]  # the caller's own process would be the same twice


def test_a_refusal_in_workers_is_one_line_and_the_exit_code(ray_workers, tmp_path):
    call = kvbench(tmp_path, "-m", *SMOKE, "budget=0.002", "shard=range(2)", "hydra/launcher=ray")
    assert call.returncode == EXIT_MEND
    assert "0.002" in error_line(call)


def test_failed_samples_in_a_worker_reach_the_exit_code(ray_workers, tmp_path):
    broken = "method._target_=broken.Broken"
    call = kvbench(tmp_path, "-m", *SMOKE, broken, "shard=range(2)", "hydra/launcher=ray")
    assert call.returncode == EXIT_FAILED_SAMPLES
    (arm,) = json.loads(call.stdout.splitlines()[-1])["arms"]
    assert (arm["n"], arm["n_failed"]) == (0, 4)


def test_a_worker_that_dies_for_good_ends_the_call_in_one_line(ray_workers, tmp_path):
    deadly = ["method._target_=deadly.Broken", "hydra/launcher=ray", "hydra.launcher.remote.max_retries=0"]
    call = kvbench(tmp_path, "-m", *SMOKE, *deadly)
    assert call.returncode == EXIT_MEND
    assert "Ray gave up" in error_line(call)


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvbench", "-m", *SMOKE, "shard=range(2)", "hydra/launcher=ray"])
    assert main() == EXIT_MEND
    assert "pip install 'kvbench[ray]'" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["ray", "slurm", "processes"])
def test_every_launcher_composes(name):
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("config", overrides=[f"hydra/launcher={name}"], return_hydra_config=True)
    assert config.hydra.launcher._target_.startswith("hydra_plugins.")


@pytest.mark.parametrize(("name", "extra"), [("submitit_slurm", "slurm"), ("joblib", "joblib")])
def test_a_missing_plug_in_is_answered_with_its_extra(name, extra):
    from kvbench.commands import one_line

    error = ValueError(f"In 'hydra/launcher/x': Could not load 'hydra/launcher/{name}'.\nConfig search path: a")
    assert f"pip install 'kvbench[{extra}]'" in one_line(error)
