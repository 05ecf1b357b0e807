"""The built wheel works alone: from another folder, with nothing of the source tree in sight."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_alone_runs_from_any_folder(tmp_path):
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True, timeout=300)
    (wheel,) = wheels.glob("kvbench-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=300)
    result = subprocess.run(
        [
            sys.executable, "-m", "kvbench", "model=tiny-random", "task=passkey", "task.limit=1",
            "task.lengths=[200]", "method=h2o", "budget=0.5", "protocol.max_new_tokens=4",
        ],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["arms"][0]["n"] == 1
    located = subprocess.run(
        [sys.executable, "-c", "import kvbench.config as c; print(c.config_folder())"],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(located.stdout.strip()) == site / "kvbench" / "configs"
