"""What the sample browser of the report page shows, as plain data: each arm's output beside the full cache's.

Records hold token ids, not token texts, and a report loads no tokenizer: the first differing token is counted from the
ids, and the word in which the texts first differ is what gets marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from kvbench.metrics.fidelity import first_divergence
from kvbench.results.agreement import REFERENCE_METHOD
from kvbench.results.summary import RecordDict

PROMPT_CHARACTERS = 4000  # of a longer prompt the beginning and the end are shown
_WORD = re.compile(r"\S+")


def shortened(prompt: str, limit: int = PROMPT_CHARACTERS) -> str:
    """The prompt, or its two ends with the number of characters left out between them."""
    if len(prompt) <= limit:
        return prompt
    half = limit // 2
    return f"{prompt[:half]}\n\n[… {len(prompt) - 2 * half:,} characters left out …]\n\n{prompt[-half:]}"


def lost(full: RecordDict | None, arm: RecordDict) -> bool:
    """Whether the full cache is right and the arm wrong: it scores at most half of what the full cache does."""
    if full is None or arm is full or not full["score"] or arm["score"] is None:
        return False
    return bool(arm["score"] <= full["score"] / 2)


def marked_parts(text: str, full_text: str) -> list[dict[str, Any]]:
    """The text in pieces, the word in which it first differs from the full cache's marked."""
    if text == full_text:
        return [{"text": text, "marked": False}]
    common = next((i for i, (a, b) in enumerate(zip(text, full_text, strict=False)) if a != b), None)
    start = end = min(len(text), len(full_text)) if common is None else common
    for word in _WORD.finditer(text):
        if word.end() > start or (word.end() == start == len(text)):
            start, end = min(word.start(), start), word.end()
            break
    pieces = [(text[:start], False), (text[start:end] or "⌫", True), (text[end:], False)]
    return [{"text": piece, "marked": marked} for piece, marked in pieces if piece]


def browser_samples(
    records: Iterable[RecordDict], prompts: dict[tuple[str, str], str], arm_order: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry per sample, in the order of data set and sample id, with its arms in the table's order.

    Args:
        records: records of one model's runs.
        prompts: see `read_prompts`.
        arm_order: arm keys.
    """
    rank = {key: index for index, key in enumerate(arm_order)}
    by_sample: dict[tuple[str, str], list[RecordDict]] = {}
    for row in records:
        by_sample.setdefault((row["dataset"], row["sample"]), []).append(row)
    samples = []
    for (dataset, sample), rows in sorted(by_sample.items()):
        rows.sort(key=lambda row: (rank.get(row["arm"], len(rank)), row["arm"]))
        full = next((r for r in rows if r["method"] == REFERENCE_METHOD and r["status"] == "ok"), None)
        prompt = prompts.get((dataset, sample))
        losers = [row["arm"] for row in rows if lost(full, row)]
        samples.append({
            "id": sample, "dataset": dataset, "answers": rows[0]["answers"], "lost": json.dumps(losers),
            "n_lost": len(losers), "full_score": _score(full), "arms": [_arm(row, full) for row in rows],
            "prompt": None if prompt is None else shortened(prompt),
        })  # fmt: skip
    return samples


def _arm(row: RecordDict, full: RecordDict | None) -> dict[str, Any]:
    if row["status"] != "ok":
        parts = [{"text": row["reason"], "marked": False}]
        return {"key": row["arm"], "facts": "failed", "lost": False, "parts": parts}
    facts = [f"score {_score(row)}", f"{len(row['token_ids'])} tokens"]
    if row["budget_measured"] is not None:
        facts.append(f"{row['budget_measured']:.1%} kept, {row['cache_bytes'] / 2**20:.2f} MiB")
    if row["kl"] is not None:
        facts.append(f"KL {row['kl']:.4f}")
    parts = [{"text": row["prediction"], "marked": False}]
    if full is not None and row is not full:
        first = first_divergence(row["token_ids"], full["token_ids"])
        facts.append("same tokens as full" if first is None else f"differs from token {first + 1} on")
        parts = marked_parts(row["prediction"], full["prediction"])
    return {"key": row["arm"], "facts": " · ".join(facts), "lost": lost(full, row), "parts": parts}


def _score(row: RecordDict | None) -> str:
    return "–" if row is None or row["score"] is None else f"{100 * row['score']:.1f}"
