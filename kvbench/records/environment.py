"""The environment a run was measured in: versions, device, commit.

Bug reports paste it: `python -m kvbench.records.environment`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvbench import __version__

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "accelerate", "datasets", "hydra-core", "numpy", "pandas", "scipy",
    "rouge", "rouge-score", "rouge-chinese", "fuzzywuzzy", "python-Levenshtein", "jieba", "gguf",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Versions of everything that can move a number, the device, and the commit of a source checkout.

    Returns:
        Plain JSON types; a package that is not installed has version None.
    """
    return {
        "kvbench": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(describe_environment(), indent=2))
