"""Importing the package costs nothing, every method is one of its names, and the built wheel works alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvbench
from kvbench.methods.registry import load_policies

ROOT = Path(__file__).resolve().parent.parent


def test_importing_the_package_imports_no_library():
    code = "import sys, kvbench; print([m for m in ('torch', 'transformers', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_method_of_ours_is_a_name_of_the_package():
    ours = [policy for policy in load_policies().values() if policy.__module__.startswith("kvbench.")]
    assert len(ours) >= 5
    for policy in ours:
        assert getattr(kvbench, policy.__name__) is policy
        assert policy.__name__ in dir(kvbench)
    assert all(getattr(kvbench, name) for name in kvbench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'KVMergre'"):
        _ = kvbench.KVMergre


def test_the_wheel_alone_runs_from_any_folder(tmp_path):
    """From another folder, with nothing of the source tree in sight."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path / "wheels", ROOT], check=True, timeout=300)
    (wheel,) = (tmp_path / "wheels").glob("kvbench-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, timeout=300)
    code = "import sys, kvbench.cli, kvbench.paths as c; print(c.config_folder()); sys.exit(kvbench.cli.main())"
    run = [
        "model=tiny-random", "task=passkey", "task.limit=1", "task.lengths=[128]", "method=h2o", "budget=0.5",
        "protocol.max_new_tokens=2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code, *run]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "site" / "kvbench" / "configs")
    assert json.loads(done.stdout.splitlines()[-1])["arms"][0]["n"] == 1
    console = [sys.executable, str(tmp_path / "site" / "bin" / "kvbench")]
    listed = subprocess.run(
        [*console, "ls"], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert "\npasskey " in listed.stdout
    code = "from kvbench.results.cells import *; from kvbench.paths import *; f = published_folder(); print(f)"
    command = [sys.executable, "-c", f"{code}; print(len(read_published(f)))"]
    published = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
    folder, n_numbers = published.stdout.split()
    assert folder == str(tmp_path / "site" / "kvbench" / "results" / "published")
    assert int(n_numbers) > 80
