"""A run's folder: named by a hash of what defines the run, filled by appending, readable at any moment.

    runs/passkey-smollm2-135m-1a2b3c4d/
        config.json         what defines the run, and the full configuration of its first call
        environment.json    versions, device, commit
        records/<arm>.jsonl one line per sample

A second call with the same definition finds the same folder and computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvbench.errors import RecordError
from kvbench.records.read import read_prompts, read_record_file
from kvbench.records.schema import Record


def identity_hash(identity: dict[str, Any]) -> str:
    """First 10 hex digits of the SHA-256 of `identity` as canonical JSON."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def file_name(arm_key: str) -> str:
    """A file name for an arm key: unusual characters replaced, made unique again by a short hash if any were."""
    safe = re.sub(r"[^A-Za-z0-9@._=+-]", "_", arm_key)[:100]
    if safe != arm_key:
        safe += "-" + hashlib.sha256(arm_key.encode()).hexdigest()[:6]
    return safe + ".jsonl"


class RunFolder:
    """One run's folder.

    Args:
        root: folder of all runs; created if missing.
        label: readable start of the folder's name, e.g. "passkey-smollm2-135m".
        identity: what defines the run (model, task, protocol); equal identities share a folder.

    Raises:
        RecordError: if the folder cannot be created or written.
    """

    def __init__(self, root: Path, label: str, identity: dict[str, Any]):
        self.identity = identity
        label = re.sub(r"[^A-Za-z0-9._+-]+", "-", label)[:80]
        self.path = root / f"{label}-{identity_hash(identity)}"
        try:
            (self.path / "records").mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RecordError(
                f"run folder {self.path} cannot be written ({error.strerror}): choose another with output.root=DIR"
            ) from error

    def describe(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write `config.json` and `environment.json` unless an earlier call of the same run already did.

        Args:
            config: full configuration of this call, plain types.
            environment: versions, device, commit (see `kvbench.records.environment`).
        """
        self._write_once("config.json", {**self.identity, "config": config})
        self._write_once("environment.json", environment)

    def _write_once(self, name: str, content: dict[str, Any]) -> None:
        target = self.path / name
        if target.exists():
            return
        scratch = target.with_suffix(f".tmp{os.getpid()}")
        try:
            scratch.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
            os.replace(scratch, target)
        except OSError as error:
            raise RecordError(
                f"{target} cannot be written ({error.strerror}): free space or change output.root"
            ) from error

    def arm_file(self, arm_key: str) -> Path:
        """The record file of an arm."""
        return self.path / "records" / file_name(arm_key)

    def done(self, arm_key: str, retry_failed: bool = False) -> set[tuple[str, str]]:
        """(dataset, sample) pairs already recorded for an arm; failed ones too unless `retry_failed`."""
        records = read_record_file(self.arm_file(arm_key)).records
        return {(r["dataset"], r["sample"]) for r in records if r["status"] == "ok" or not retry_failed}

    def keep_prompts(self, prompts: Iterable[dict[str, str]]) -> None:
        """Keep the text of prompts for readers of the report; no table is made from it.

        Args:
            prompts: dictionaries with "dataset", "sample" and "prompt"; samples already kept are passed over.

        Raises:
            RecordError: if the file cannot be written.
        """
        path = self.path / "prompts.jsonl"
        known = read_prompts(self.path)
        new = [p for p in prompts if (p["dataset"], p["sample"]) not in known]
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in new)
        except OSError as error:
            raise RecordError(f"{path} cannot be written ({error.strerror}): free space and run again") from error

    def append(self, records: Iterable[Record]) -> None:
        """Append records, one line each, to their arms' files, and flush them to the disk.

        Each line is one `write` on a file opened for appending, so lines of two processes never interleave. A line that
        an earlier crash left half-written is closed first, so that it spoils nothing but itself.

        Raises:
            RecordError: if a line cannot be written (a full disk, for example); earlier lines stay valid.
        """
        for record in records:
            path = self.arm_file(record.arm)
            line = json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    if _ends_mid_line(descriptor):
                        line = b"\n" + line
                    _write_all(descriptor, line + b"\n")
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise RecordError(
                    f"record of {record.sample} for {record.arm} cannot be written to {path} ({error.strerror}): "
                    "what was recorded before stays valid; free space and run the same command again"
                ) from error


def _ends_mid_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
