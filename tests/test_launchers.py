"""Jobs in other processes, really started: Ray, submitit's local executor and joblib; what happens there comes back."""

import json
import re
import subprocess
import sys
from unittest.mock import ANY

import pytest
from rich.console import Console

from kvbench.cli import main
from kvbench.commands import EXIT_FAILED_SAMPLES, EXIT_MEND, one_line
from kvbench.config import composed
from kvbench.plan import build_plan
from kvbench.records.read import read_calls, read_records
from kvbench.run import run_plan

SMOKE = [
    "model=tiny-random", "task=passkey", "task.limit=4", "task.lengths=[300]", "protocol.max_new_tokens=6",
    "protocol.gold_tokens=4", "method=h2o", "budget=0.5", "engine.max_rows=4",
]  # fmt: skip
RAY = ["shard=range(2)", "hydra/launcher=ray"]
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
    deadly: bool = False

    def compress(self, layer, budget_tokens):
        if self.deadly:
            os._exit(9)
        raise RuntimeError("broken on purpose")
"""


@pytest.fixture(scope="module")
def ray_workers(tmp_path_factory):
    """Two workers for all tests that use Ray: starting them takes longer than the jobs."""
    import ray

    policies = tmp_path_factory.mktemp("policies")
    (policies / "broken.py").write_text(BROKEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(policies))
        ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
        ray.shutdown()


def kvbench(folder, *arguments):
    """The command line in a process of its own: launchers start threads and processes that write to its output."""
    command = [sys.executable, "-m", "kvbench", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """The command line in this process, for jobs that run elsewhere; its exit code and output."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["kvbench", "-m", *SMOKE, *arguments])
        return main(), *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run in one process."""
    plan = build_plan(composed([*SMOKE, f"output.root={tmp_path_factory.mktemp('plain')}"]))
    return run_plan(plan, Console(quiet=True)).folder


def records(run):
    times = ("seconds", "recorded_at", "call")
    return {(r["sample"], r["arm"]): {k: v for k, v in r.items() if k not in times} for r in read_records(run)}


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
    assert len(calls) == len({call["process"] for call in calls}) == 2  # the caller's own process would be one twice


def test_what_goes_wrong_in_a_worker_reaches_the_line_and_the_exit_code(ray_workers, here):
    code, _, err = here(*RAY, "budget=0.002")
    assert (code, re.findall("^kvbench: .*0.002", err, re.MULTILINE)) == (EXIT_MEND, [ANY])
    broken = ["method._target_=broken.Broken", "hydra/launcher=ray"]
    code, out, _ = here(*broken, "shard=range(2)")
    _, arm = json.loads(out.splitlines()[-1])["arms"]
    assert (code, arm["n"], arm["n_failed"]) == (EXIT_FAILED_SAMPLES, 0, 4)
    code, _, err = here(*broken, "+method.deadly=true", "hydra.launcher.remote.max_retries=0")
    assert (code, re.findall("^kvbench: Ray gave up", err, re.MULTILINE)) == (EXIT_MEND, [ANY])


def test_without_the_package_the_remedy_is_named(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = here(*RAY)
    assert code == EXIT_MEND
    assert "pip install 'kvbench[ray]'" in err


def test_the_launcher_that_needs_a_cluster_composes():
    assert composed(["hydra/launcher=slurm"], hydra_too=True).hydra.launcher._target_.startswith("hydra_plugins.")


@pytest.mark.parametrize(("name", "extra"), [("submitit_slurm", "slurm"), ("joblib", "joblib")])
def test_a_missing_plug_in_is_answered_with_its_extra(name, extra):
    error = ValueError(f"In 'hydra/launcher/x': Could not load 'hydra/launcher/{name}'.\nConfig search path: a")
    assert f"pip install 'kvbench[{extra}]'" in one_line(error)
