"""Checksums of what was asked: two runs that show the same ones put the same prompts and answers to their models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def data_checksums(records: Iterable[Mapping[str, Any]], prompts: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """One checksum per data set over all of its samples that were answered, whatever the order and the arms.

    Args:
        records: records of a run, as dictionaries.
        prompts: the prompts' texts by (dataset, sample); a prompt that was not kept counts as null.

    Returns:
        By data set: SHA-256 in hex over one JSON line `[sample, prompt, answers]` per sample, sorted by sample.
    """
    samples: dict[str, dict[str, list[str]]] = {}
    for record in records:
        samples.setdefault(record["dataset"], {})[record["sample"]] = list(record.get("answers") or [])
    checksums = {}
    for dataset, answers in sorted(samples.items()):
        digest = hashlib.sha256()
        for sample, wanted in sorted(answers.items()):
            line = json.dumps([sample, prompts.get((dataset, sample)), wanted], ensure_ascii=True) + "\n"
            digest.update(line.encode("ascii"))
        checksums[dataset] = digest.hexdigest()
    return checksums
