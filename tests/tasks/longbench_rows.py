"""Rows and a stand-in for the official configuration, of our own making, for tests that need no third-party text."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from kvbench.tasks import longbench

TEMPLATES = {
    "qasper": "Read this.\n\n{context}\n\n Now answer. \n\nQuestion: {input}\n\nAnswer:",
    "gov_report": "Sum up.\n\n{context}\n\nSummary:",
    "trec": "Types follow.\n{context}\n{input}",
    "samsum": "Chats follow.\n\n{context}\n\n{input}",
}
LENGTHS = {"qasper": 128, "gov_report": 512, "trec": 64, "samsum": 128}


def row(number: int = 1, **fields: Any) -> dict[str, Any]:
    """A valid qasper row with some fields replaced; a field set to `...` is left out."""
    valid = {
        "_id": f"id-{number}", "context": f"Claim {number} is that braces {{like}} {{0}} are {{input}} safe.",
        "input": f"What is claim {number}?", "answers": [f"answer {number}", "another"], "length": 10 * number,
        "dataset": "qasper", "language": "en", "all_classes": None,
    }  # fmt: skip
    return {name: value for name, value in {**valid, **fields}.items() if value is not ...}


def write_rows(path: Path, *rows: Any) -> Path:
    """Write rows (or ready lines) as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def stand_in_official(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write our own templates, and pin their checksums in place of the official ones."""
    folder.mkdir(parents=True, exist_ok=True)
    pinned = {}
    for name, content in (("dataset2prompt.json", TEMPLATES), ("dataset2maxlen.json", LENGTHS)):
        (folder / name).write_text(json.dumps(content))
        pinned[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(longbench, "OFFICIAL_SHA256", pinned)
    return folder
