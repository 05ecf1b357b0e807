"""A run's folder: named by a hash of what defines the run, filled by appending, readable at any moment.

    runs/passkey-smollm2-135m-1a2b3c4d/
        config.json         what defines the run, and the full configuration of its first call
        calls.jsonl         one line per call: which arms, how many samples, where, and in what environment
        prompts.jsonl       the text of the prompts
        records/<arm>.jsonl one line per sample
        shards/2-of-8/      the same files without config.json, from calls with shard=2/8

A second call with the same definition finds the same folder and computes only what is missing, or was made by another
text, model or method (`kvbench.records.provenance`); what was recorded is never overwritten. Every shard appends to
files of its own: on a network file system two machines that append to one file can overwrite each other's lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from kvbench.commands import strict_json
from kvbench.errors import RecordError
from kvbench.records.read import read_config, read_prompts, read_records
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
    """One run's folder, `path`, made below `root`; a RecordError, as from all methods, if it cannot be written.

    Args:
        root: folder of all runs.
        label: readable start of the folder's name, e.g. "passkey-smollm2-135m".
        identity: what defines the run (model, task, protocol); equal identities share a folder.
        shard: the shard whose files this object writes (to `home`, a folder in `path`), e.g. "2-of-8"; it reads all.
    """

    def __init__(self, root: Path, label: str, identity: dict[str, Any], shard: str | None = None):
        self.identity = identity
        label = re.sub(r"[^A-Za-z0-9._+-]+", "-", label)[:80]
        self.path = root / f"{label}-{identity_hash(identity)}"
        self.home = self.path / "shards" / shard if shard else self.path
        try:
            (self.path / "records").mkdir(parents=True, exist_ok=True)
            (self.home / "records").mkdir(parents=True, exist_ok=True)
            probe = self.home / f".write-probe-{uuid4().hex}"  # two machines may give two processes one number
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            problem = f"run folder {self.path} cannot be written ({error.strerror})"
            raise RecordError(f"{problem}: choose another with output.root=DIR") from error

    def describe(self, config: dict[str, Any]) -> None:
        """Write the full configuration of this call to `config.json` unless an earlier call did so, to its end."""
        with suppress(RecordError):
            read_config(self.path)
            return
        target = self.path / "config.json"
        scratch = target.with_suffix(f".tmp{uuid4().hex}")
        content = strict_json({**self.identity, "config": config}, indent=2, ensure_ascii=False, default=str)
        try:
            with scratch.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(content + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        except OSError as error:
            problem = f"{target} cannot be written ({error.strerror})"
            raise RecordError(f"{problem}: free space or change output.root") from error

    def recorded(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """The run's records that may stand side by side, by dataset, sample and arm, those of all shards."""
        return {(r["dataset"], r["sample"], r["arm"]): r for r in read_records(self.path)}

    def note_call(self, call: dict[str, Any]) -> None:
        """Note what a call sets out to do and in what environment (see `read_calls`): records name it by its id."""
        _append_line(self.home / "calls.jsonl", call)

    def keep_prompts(self, prompts: Iterable[dict[str, str]]) -> None:
        """Keep the text of prompts ("dataset", "sample", "prompt") for readers of the report; known ones stay."""
        known = read_prompts(self.path)
        for prompt in prompts:
            if (prompt["dataset"], prompt["sample"]) not in known:
                _append_line(self.home / "prompts.jsonl", prompt, flush=False)

    def append(self, records: Iterable[Record]) -> None:
        """Append records, one line each, to their arms' files, and flush them to the disk."""
        for record in records:
            _append_line(self.home / "records" / file_name(record.arm), record.to_dict())


def _append_line(path: Path, value: dict[str, Any], flush: bool = True) -> None:
    """Append one line by one `write` on a file opened for appending: lines of two processes never interleave.

    A line that an earlier crash left half-written is closed first, so that it spoils nothing but itself.
    """
    data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            while data:
                data = data[os.write(descriptor, data) :]
            if flush:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RecordError(
            f"{path} cannot be written ({error.strerror}): what was recorded before stays valid; free space and run "
            "the same command again"
        ) from error
