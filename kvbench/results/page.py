"""One self-contained HTML page about one or more runs; it asks nothing of the network and runs no foreign script.

Everything that a model or a data set wrote goes through the template's escaping, and a content security policy allows
one script and one style sheet by their hashes, so that even an escaped escape could not run.

The sample browser shows each arm's output beside the full cache's. Records hold token ids, not token texts: the
first differing token is counted from the ids, and the word in which the texts first differ is what gets marked.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kvbench.commands import strict_json
from kvbench.metrics.text import first_divergence
from kvbench.records.read import model_name, read_environments, read_prompts, read_records, record_files
from kvbench.results.cells import Cell, ExpectedArm, ExpectedColumn, Table, TableSpec, build_table
from kvbench.results.figures import FIGURES, drawn, save
from kvbench.results.summary import DEFAULT_GATE, REFERENCE_METHOD, RecordDict, grouped, summarise
from kvbench.results.tables import (
    DETAIL_HEADER,
    MISSING,
    READING,
    detail_rows,
    environment_text,
    gate_note,
    heading,
    interval_text,
)  # fmt: skip

PROMPT_CHARACTERS = 4000  # of a longer prompt the beginning and the end are shown
_WORD = re.compile(r"\S+")


def render_report(runs: Sequence[Path], mix_environments: bool = False, gate: float = DEFAULT_GATE) -> str:
    """The page; runs of one model share tables, and the same run folders give the same bytes."""
    by_model: dict[str, list[Path]] = {}
    for run in runs:
        by_model.setdefault(model_name(run), []).append(run)
    tables = [_table(model, group, mix_environments, gate) for model, group in by_model.items()]
    samples: list[dict[str, Any]] = []
    for table, group in zip(tables, by_model.values(), strict=True):
        prompts = {key: text for run in group for key, text in read_prompts(run).items()}
        samples += browser_samples(table, prompts)
    templates = resources.files("kvbench.results") / "templates"
    names = ("report.html.j2", "report.css", "report.js")
    page, css, script = ((templates / name).read_text(encoding="utf-8") for name in names)
    n_runs, n_records = f"{len(runs)} run{'s' if len(runs) > 1 else ''}", sum(len(table.records) for table in tables)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(page).render(
        title="kvbench: " + ", ".join(by_model), lead=f"{n_runs}, {len(samples)} samples, {n_records} records.",
        reading=READING.replace("**", ""), missing=MISSING, detail_header=DETAIL_HEADER, detail_rows=detail_rows,
        heading=heading, gate_note=gate_note, interval_text=interval_text, no_cell=Cell(), tables=tables,
        figures=[figure for table in tables for figure in _figures(table)],
        datasets=sorted({sample["dataset"] for sample in samples}),
        arms=list(dict.fromkeys(a.key for table in tables for a in table.spec.arms if a.method != REFERENCE_METHOD)),
        samples=samples, runs=[_run_view(run) for run in runs],
        style=Markup(css), script=Markup(script), style_hash=_csp_hash(css), script_hash=_csp_hash(script),
    )  # fmt: skip


def _table(model: str, runs: Sequence[Path], mix_environments: bool, gate: float) -> Table:
    summaries = summarise(row for run in runs for row in read_records(run))
    arms = tuple(ExpectedArm(s.arm, s.method, s.budget, "," not in s.arm) for s in summaries)
    columns = tuple(ExpectedColumn(run.name, run, f"the run that made {run.name}") for run in runs)
    return build_table(TableSpec("report", model, model, arms, columns, mix_environments, gate))


def _figures(table: Table) -> Iterable[dict[str, str]]:
    for name, figure in drawn(table):
        buffer = io.BytesIO()
        save(figure, buffer, "svg")
        uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
        yield {"uri": uri, "alt": f"{FIGURES[name][0]}, {table.spec.model}"}


def _run_view(run: Path) -> dict[str, Any]:
    environments = read_environments(run)
    checksums = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()) for path in record_files(run)}
    data = data_checksums(read_records(run), read_prompts(run))
    return {
        "name": run.name,
        "lines": list(dict.fromkeys(map(environment_text, environments))),
        "checksums": "\n".join(f"{checksum.hexdigest()}  {name}" for name, checksum in checksums.items()),
        "data": "\n".join(f"{checksum}  {dataset}" for dataset, checksum in data.items()),
        "config": (run / "config.json").read_text(encoding="utf-8", errors="replace").strip(),
        "environment": "\n".join(strict_json(environment, indent=2) for environment in environments),
    }


def data_checksums(records: Iterable[RecordDict], prompts: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """One checksum per data set over all of its samples that were answered, whatever the order and the arms.

    Two runs that show the same ones put the same prompts and answers to their models: SHA-256 in hex over one JSON line
    `[sample, prompt, answers]` per sample, sorted by sample; a prompt that was not kept counts as null.
    """
    checksums = {}
    for dataset, rows in sorted(grouped(records, "dataset").items()):
        answers = {row["sample"]: list(row.get("answers") or []) for row in rows}
        lines = (json.dumps([sample, prompts.get((dataset, sample)), answers[sample]]) for sample in sorted(answers))
        checksums[dataset] = hashlib.sha256("".join(f"{line}\n" for line in lines).encode("ascii")).hexdigest()
    return checksums


def browser_samples(table: Table, prompts: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    """One entry per sample of one model's runs, by data set and sample id, with its arms in the table's order."""
    rank = {arm.key: index for index, arm in enumerate(table.spec.arms)}
    samples = []
    for (dataset, sample), rows in sorted(grouped(table.records, "dataset", "sample").items()):
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


def marked_parts(text: str, full_text: str | None = None) -> list[dict[str, Any]]:
    """The text in pieces, the word in which it first differs from the full cache's (if there is one) marked."""
    if full_text is None or text == full_text:
        return [{"text": text, "marked": False}]
    common = next((i for i, (a, b) in enumerate(zip(text, full_text, strict=False)) if a != b), None)
    start = end = min(len(text), len(full_text)) if common is None else common
    for word in _WORD.finditer(text):
        if word.end() > start or (word.end() == start == len(text)):
            start, end = min(word.start(), start), word.end()
            break
    pieces = [(text[:start], False), (text[start:end] or "⌫", True), (text[end:], False)]
    return [{"text": piece, "marked": marked} for piece, marked in pieces if piece]


def _arm(row: RecordDict, full: RecordDict | None) -> dict[str, Any]:
    if row["status"] != "ok":
        return {"key": row["arm"], "facts": "failed", "lost": False, "parts": marked_parts(row["reason"])}
    facts = [f"score {_score(row)}", f"{len(row['token_ids'])} tokens"]
    if row["budget_measured"] is not None:
        facts.append(f"{row['budget_measured']:.1%} kept, {row['cache_bytes'] / 2**20:.2f} MiB")
    if row["kl"] is not None:
        facts.append(f"KL {row['kl']:.4f}")
    if full is not None and row is not full:
        first = first_divergence(row["token_ids"], full["token_ids"])
        facts.append("same tokens as full" if first is None else f"differs from token {first + 1} on")
    parts = marked_parts(row["prediction"], full["prediction"] if full else None)
    return {"key": row["arm"], "facts": " · ".join(facts), "lost": lost(full, row), "parts": parts}


def _score(row: RecordDict | None) -> str:
    return "–" if row is None or row["score"] is None else f"{100 * row['score']:.1f}"


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
