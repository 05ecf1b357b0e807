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


@dataclass
class Record:
    """What one arm did with one sample.

    Attributes:
        sample: sample id, unique within `dataset`.
        dataset: data set name.
        arm: arm key, e.g. "kvmerger@0.35"; unique within a run.
        method: policy name.
        budget: requested fraction of the full cache.
        options: policy options that differ from their defaults.
        status: "ok" or "failed".
        reason: why it failed; empty if it did not.
        metric: metric name.
        score: in [0, 1]; None if failed or not scored.
        parts: everything the metric returned (score included), for metrics that aggregate more than a mean.
        prediction: generated text.
        token_ids: generated token ids, stop token not included.
        finish: "stop" or "length".
        answers: reference answers.
        all_classes: label set of classification tasks.
        length: the data set's own length field.
        gold_nll: mean negative log-likelihood of the gold answer's tokens, nats.
        gold_tokens: number of gold tokens behind `gold_nll` and `kl`.
        kl: mean KL(full || arm) over the same tokens, nats.
        kl_per_token: the single values.
        n_prompt_tokens: T, after truncation.
        truncated_tokens: tokens cut from the prompt.
        compressed_tokens: tokens that were in the cache when it was compressed.
        slots_per_layer: slots kept at the end of compression, summed over KV heads.
        full_slots: slots of the full cache, over all layers and heads.
        budget_measured: sum of `slots_per_layer` over `full_slots`.
        cache_bytes: bytes allocated for the kept slots (keys, values, bias, policy state).
        full_bytes: bytes of the full cache's keys and values.
        seconds: this arm's share of the wall time of prefill, compression and decoding.
        engine: engine settings and what was really used (kernels, batch rows, notes such as a halved batch).
        meta: the sample's `meta` (length and depth of a needle, category, ...).
        call: id of the call that made it (`calls.jsonl`); this and the hashes are empty in records of earlier versions.
        question_sha256: what was asked; see `kvbench.records.provenance`, as for the next two.
        model_sha256: what answered.
        method_sha256: what compressed.
        recorded_at: when the record was made, seconds since 1970.
        schema: version of this format.
    """

    sample: str
    dataset: str
    arm: str
    method: str
    budget: float
    options: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""
    metric: str = ""
    score: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    prediction: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: str = ""
    answers: list[str] = field(default_factory=list)
    all_classes: list[str] = field(default_factory=list)
    length: int | None = None
    gold_nll: float | None = None
    gold_tokens: int = 0
    kl: float | None = None
    kl_per_token: list[float] = field(default_factory=list)
    n_prompt_tokens: int = 0
    truncated_tokens: int = 0
    compressed_tokens: int = 0
    slots_per_layer: list[int] = field(default_factory=list)
    full_slots: int = 0
    budget_measured: float | None = None
    cache_bytes: int = 0
    full_bytes: int = 0
    seconds: float = 0.0
    engine: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    call: str = ""
    question_sha256: str = ""
    model_sha256: str = ""
    method_sha256: str = ""
    recorded_at: float = field(default_factory=lambda: round(time.time(), 3))
    schema: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)


HASHES = ("question_sha256", "model_sha256", "method_sha256")


def checked(line: Any) -> dict[str, Any] | None:
    """A record as a dictionary with all its fields, or None if it lacks one without a default or has one of other type.

    Args:
        line: what a line of a record file holds.
    """
    if not isinstance(line, dict):
        return None
    record = dict(line)
    for spec in fields(Record):
        if spec.name not in record:
            if spec.default is MISSING and spec.default_factory is MISSING:
                return None
            record[spec.name] = spec.default if spec.default_factory is MISSING else spec.default_factory()
        if not fits(record[spec.name], _annotations()[spec.name]):
            return None
    if record["score"] is not None:
        record["parts"] = {"score": record["score"], **record["parts"]}  # metrics average the parts
    return record


@cache
def _annotations() -> dict[str, Any]:
    return get_type_hints(Record)
