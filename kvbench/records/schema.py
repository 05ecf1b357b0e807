"""What one record says: one JSON line per (sample, arm).

A record is the only thing tables, statistics and reports are made from, so everything they need is in it or in the two
files beside it (`config.json`, `calls.jsonl`). `schema` is raised when the meaning of a field changes; a reader
refuses records from a newer version and says so.
"""

from __future__ import annotations

import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any, get_type_hints

from kvbench.fields import fits

SCHEMA_VERSION = 1
HASHES = ("question_sha256", "model_sha256", "method_sha256")


@dataclass
class Record:
    """What one arm did with one sample."""

    sample: str  # sample id, unique within `dataset`
    dataset: str
    arm: str  # arm key, e.g. "kvmerger@0.35"; unique within a run
    method: str  # policy name
    budget: float  # requested fraction of the full cache
    options: dict[str, Any] = field(default_factory=dict)  # policy options that differ from their defaults
    status: str = "ok"  # or "failed"
    reason: str = ""  # why it failed
    metric: str = ""
    score: float | None = None  # in [0, 1]; None if failed or not scored
    parts: dict[str, float] = field(default_factory=dict)  # all the metric returned, for those that average more
    prediction: str = ""  # generated text
    token_ids: list[int] = field(default_factory=list)  # of it, stop token not included
    finish: str = ""  # "stop" or "length"
    answers: list[str] = field(default_factory=list)  # reference answers
    all_classes: list[str] = field(default_factory=list)  # label set of classification tasks
    length: int | None = None  # the data set's own length field
    gold_nll: float | None = None  # mean negative log-likelihood of the gold answer's tokens, nats
    gold_tokens: int = 0  # number of gold tokens behind `gold_nll` and `kl`
    kl: float | None = None  # mean KL(full || arm) over the same tokens, nats
    kl_per_token: list[float] = field(default_factory=list)
    n_prompt_tokens: int = 0  # T, after truncation
    truncated_tokens: int = 0  # tokens cut from the prompt
    compressed_tokens: int = 0  # tokens that were in the cache when it was compressed
    slots_per_layer: list[int] = field(default_factory=list)  # kept at the end of compression, over KV heads
    full_slots: int = 0  # slots of the full cache, over all layers and heads
    budget_measured: float | None = None  # sum of `slots_per_layer` over `full_slots`
    cache_bytes: int = 0  # allocated for the kept slots (keys, values, bias, policy state)
    full_bytes: int = 0  # of the full cache's keys and values
    seconds: float = 0.0  # this arm's share of the wall time of prefill, compression and decoding
    engine: dict[str, Any] = field(default_factory=dict)  # settings and what was used (kernels, batch rows, notes)
    meta: dict[str, Any] = field(default_factory=dict)  # the sample's (length and depth of a needle, category, ...)
    call: str = ""  # id of the call that made it; this and the hashes are empty in records of earlier versions
    question_sha256: str = ""  # what was asked; see `kvbench.records.provenance`, as for the next two
    model_sha256: str = ""  # what answered
    method_sha256: str = ""  # what compressed
    recorded_at: float = field(default_factory=lambda: round(time.time(), 3))  # seconds since 1970
    schema: int = SCHEMA_VERSION  # version of this format

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)


def checked(line: Any) -> dict[str, Any] | None:
    """The JSON value of a line as a record with all its fields; None if it lacks one, or has one of another type."""
    if not isinstance(line, dict):
        return None
    record = dict(line)
    for spec in fields(Record):
        if spec.name not in record:  # a field without a default gets MISSING, which fits no annotation
            record[spec.name] = spec.default if spec.default_factory is MISSING else spec.default_factory()
        if not fits(record[spec.name], _annotations()[spec.name]):
            return None
    if record["score"] is not None:
        record["parts"] = {"score": record["score"], **record["parts"]}  # metrics average the parts
    return record


@cache
def _annotations() -> dict[str, Any]:
    return get_type_hints(Record)
