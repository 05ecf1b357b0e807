"""One self-contained HTML page about one or more runs; it asks nothing of the network and runs no foreign script.

Everything that a model or a data set wrote goes through the template's escaping, and a content security policy allows
one script and one style sheet by their hashes, so that even an escaped escape could not run.

The conclusion comes first; below it every arm's KL and score with intervals, the data sets, and every answer: two arms
of a sample side by side with their words compared, in a view that has an address of its own (after the "#"). Samples
are JSON in the page, and elements are made of them when they are looked at. Drawings are inline SVG and one small
script: vega and plotly would bring 0.9 MB and 1 to 4.5 MB of foreign script, which compile code while they run
and write styles, so that the policy above would have to go.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kvbench.commands import strict_json
from kvbench.metrics.longbench import CATEGORIES, DATASETS, base_dataset
from kvbench.metrics.text import first_divergence
from kvbench.records.read import model_name, read_environments, read_prompts, read_records, record_files
from kvbench.results.cells import Cell, Column, ExpectedArm, ExpectedColumn, Table, TableSpec, build_table
from kvbench.results.charts import heat, line_charts, panel
from kvbench.results.figures import FIGURES, needle_figure, needle_finding, save, style
from kvbench.results.summary import DEFAULT_GATE, REFERENCE_METHOD, RecordDict, grouped, summarise
from kvbench.results.tables import (
    DETAIL_HEADER,
    DETAIL_NOTE,
    MISSING,
    READING,
    detail_rows,
    environment_text,
    gate_note,
    heading,
    interval_text,
)  # fmt: skip
from kvbench.results.verdict import verdict

PROMPT_CHARACTERS = 4000  # of a longer prompt the beginning and the end are shown


def render_report(runs: Sequence[Path], mix_environments: bool = False, gate: float = DEFAULT_GATE) -> str:
    """The page; runs of one model share tables, and the same run folders give the same bytes."""
    by_model: dict[str, list[Path]] = {}
    for run in runs:
        by_model.setdefault(model_name(run), []).append(run)
    tables = [_table(model, group, mix_environments, gate) for model, group in by_model.items()]
    samples: list[list[Any]] = []
    arms = list(dict.fromkeys(arm.key for table in tables for arm in table.spec.arms))
    for table, group in zip(tables, by_model.values(), strict=True):
        prompts = {key: text for run in group for key, text in read_prompts(run).items()}
        samples += browser_samples(table, prompts, arms)
    data = strict_json({"arms": arms, "samples": samples}, ensure_ascii=False, separators=(",", ":"))
    templates = resources.files("kvbench.results") / "templates"
    names = ("report.html.j2", "report.css", "report.js")
    page, css, script = ((templates / name).read_text(encoding="utf-8") for name in names)
    n_runs, n_records = f"{len(runs)} run{'s' if len(runs) > 1 else ''}", sum(len(table.records) for table in tables)
    batch_s = sum(table.batch_s for table in tables)
    known = [arm for table in tables for arm in table.spec.arms if arm.method != REFERENCE_METHOD]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(page).render(
        title="kvbench: " + ", ".join(by_model),
        lead=f"{n_runs}, {len(samples)} samples, {n_records} answers; the batches took {batch_s:,.0f} s.",
        reading=READING.replace("**", ""), missing=MISSING, detail_header=DETAIL_HEADER, detail_note=DETAIL_NOTE,
        detail_rows=detail_rows, heading=heading, gate_note=gate_note, interval_text=interval_text, heat=heat,
        no_cell=Cell(), tables=[(table, by_category(table)) for table in tables], verdict=verdict, panel=panel,
        line_charts=line_charts, needle=_needle, budgets=sorted({arm.budget for arm in known}, reverse=True),
        methods=list(dict.fromkeys(arm.method for arm in known)),
        categories=list(dict.fromkeys(name for table in tables for name, _ in by_category(table) if name)),
        datasets=sorted({sample[1] for sample in samples}), arms=arms, n_samples=len(samples),
        runs=[_run_view(run) for run in runs], data=Markup(data.replace("<", "\\u003c")), style=Markup(css),
        script=Markup(script), style_hash=_csp_hash(css), script_hash=_csp_hash(script),
    )  # fmt: skip


def _table(model: str, runs: Sequence[Path], mix_environments: bool, gate: float) -> Table:
    summaries = summarise(row for run in runs for row in read_records(run))
    arms = tuple(ExpectedArm(s.arm, s.method, s.budget, "," not in s.arm) for s in summaries)
    columns = tuple(ExpectedColumn(run.name, run, f"the run that made {run.name}") for run in runs)
    return build_table(TableSpec("report", model, model, arms, columns, mix_environments, gate))


def by_category(table: Table) -> list[tuple[str, list[Column]]]:
    """The data sets by LongBench's categories, in their order; others ("" is their category) come first."""
    known = {column.name: DATASETS.get(base_dataset(column.name)) for column in table.columns}
    category = {name: data_set.category if data_set else "" for name, data_set in known.items()}
    found = [(name, [c for c in table.columns if category[c.name] == name]) for name in ("", *CATEGORIES)]
    return [(name, columns) for name, columns in found if columns]


def _needle(table: Table) -> dict[str, str] | None:
    """The heat maps of needle tasks as an image, with what they show in words."""
    with style():
        if not table.records or (figure := needle_figure(table)) is None:
            return None
        buffer = io.BytesIO()
        save(figure, buffer, "png")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"uri": uri, "caption": FIGURES["needle"][0], "finding": needle_finding(table)}


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


def browser_samples(table: Table, prompts: Mapping[tuple[str, str], str], arms: Sequence[str]) -> list[list[Any]]:
    """One row per sample of one model's runs, by data set and sample id, as the page's script reads it.

    Model, data set, id, answers, prompt (or None), score of the full cache as text, and of each arm, in the table's
    order: its place in `arms`, score as text, facts, whether the full cache is right and it wrong, and its answer.
    """
    rank = {arm.key: index for index, arm in enumerate(table.spec.arms)}
    samples = []
    for (dataset, sample), rows in sorted(grouped(table.records, "dataset", "sample").items()):
        rows.sort(key=lambda row: (rank.get(row["arm"], len(rank)), row["arm"]))
        full = next((r for r in rows if r["method"] == REFERENCE_METHOD and r["status"] == "ok"), None)
        prompt = prompts.get((dataset, sample))
        shown = [[arms.index(row["arm"]), *_arm(row, full)] for row in rows]
        text = None if prompt is None else shortened(prompt)
        samples.append([table.spec.model, dataset, sample, rows[0]["answers"], text, _score(full), shown])
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


def _arm(row: RecordDict, full: RecordDict | None) -> tuple[str, str, int, str]:
    if row["status"] != "ok":
        return "–", "failed", 0, row["reason"]
    facts = [f"{len(row['token_ids'])} tokens"]
    if row["budget_measured"] is not None:
        facts.append(f"{row['budget_measured']:.1%} kept, {row['cache_bytes'] / 2**20:.2f} MiB")
    if row["kl"] is not None:
        facts.append(f"KL {row['kl']:.3g}")
    if full is not None and row is not full:
        first = first_divergence(row["token_ids"], full["token_ids"])
        facts.append("same tokens as full" if first is None else f"differs from token {first + 1} on")
    return _score(row), " · ".join(facts), int(lost(full, row)), row["prediction"]


def _score(row: RecordDict | None) -> str:
    return "–" if row is None or row["score"] is None else f"{100 * row['score']:.1f}"


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
