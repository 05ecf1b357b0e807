"""One self-contained HTML page about one or more runs; it asks nothing of the network and runs no foreign script.

Everything that a model or a data set wrote goes through the template's escaping, and a content security policy allows
one script and one style sheet by their hashes, so that even an escaped escape could not run.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kvbench import strict_json
from kvbench.records.read import model_name, read_environments, read_prompts, read_records, record_files
from kvbench.results.browser import browser_samples
from kvbench.results.cells import Cell, Column, ExpectedArm, ExpectedColumn, Table, TableSpec, build_table
from kvbench.results.checksums import data_checksums
from kvbench.results.figures import figure_functions, style
from kvbench.results.summary import summarise
from kvbench.results.text import (
    DETAIL_HEADER,
    READING,
    detail_rows,
    environment_text,
    heading,
    interval_text,
    table_columns,
)

CAPTIONS = {
    "budget": "Score and KL to the full cache against the measured budget",
    "needle": "Score over prompt length and depth of the needle",
    "cost": "Cache memory and time for each arm (the arms of a fused batch share its time equally)",
}


def render_report(runs: Sequence[Path], mix_environments: bool = False) -> str:
    """The page.

    Args:
        runs: run folders; those of one model share tables.
        mix_environments: whether answers of several environments may stand side by side.

    Returns:
        HTML, the same bytes for the same run folders.

    Raises:
        RecordError: if a folder is no run folder, or environments are mixed without leave.
    """
    by_model: dict[str, list[Path]] = {}
    for run in runs:
        by_model.setdefault(model_name(run), []).append(run)
    tables = [_table(model, group, mix_environments) for model, group in by_model.items()]
    samples: list[dict[str, Any]] = []
    for table, group in zip(tables, by_model.values(), strict=True):
        prompts = {key: text for run in group for key, text in read_prompts(run).items()}
        samples += browser_samples(table.records, prompts, [arm.key for arm in table.spec.arms])
    css, script = _asset("report.css"), _asset("report.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("report.html.j2")).render(
        title="kvbench: " + ", ".join(by_model),
        lead=f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {len(samples)} samples, "
        f"{sum(len(table.records) for table in tables)} records.",
        reading=READING.replace("**", ""),
        tables=[_table_view(table) for table in tables],
        figures=[figure for table in tables for figure in _figures(table)],
        datasets=sorted({sample["dataset"] for sample in samples}),
        arms=[arm.key for arm in {a.key: a for t in tables for a in t.spec.arms}.values() if arm.method != "full"],
        samples=samples,
        runs=[_run_view(run) for run in runs],
        style=Markup(css),
        script=Markup(script),
        style_hash=_csp_hash(css),
        script_hash=_csp_hash(script),
    )


def _table(model: str, runs: Sequence[Path], mix_environments: bool) -> Table:
    summaries = summarise([row for run in runs for row in read_records(run)])
    arms = tuple(ExpectedArm(s.arm, s.method, s.budget, "," not in s.arm) for s in summaries)
    columns = tuple(ExpectedColumn(run.name, run, f"the run that made {run.name}") for run in runs)
    return build_table(TableSpec("report", model, model, arms, columns, mix_environments))


def _table_view(table: Table) -> dict[str, Any]:
    columns = table_columns(table)
    return {
        "model": table.spec.model,
        "score_header": ["arm", *(f"{heading(table, c)}{' · ' + c.metric if c.metric else ''}" for c in columns)],
        "score_rows": [
            {"arm": arm.key, "cells": [_cell_view(column, arm.key) for column in columns]} for arm in table.spec.arms
        ],
        "detail_header": DETAIL_HEADER,
        "detail_rows": detail_rows(table),
        "doubts": table.doubts,
    }


def _cell_view(column: Column, arm: str) -> dict[str, Any]:
    cell = column.cells.get(arm, Cell())
    return {
        "score": "no records" if cell.score is None else f"{cell.score:.2f}",
        "interval": interval_text(cell),
        "best": cell.best,
        "note": f"{cell.n_failed} failed" if cell.n_failed else "",
    }


def _figures(table: Table) -> list[dict[str, str]]:
    found = []
    with style():
        for name, draw in figure_functions().items():
            figure = draw(table) if table.records else None
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
                uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
                found.append({"uri": uri, "alt": f"{CAPTIONS[name]}, {table.spec.model}"})
    return found


def _run_view(run: Path) -> dict[str, Any]:
    environments = read_environments(run)
    files = record_files(run)
    return {
        "name": run.name,
        "lines": list(dict.fromkeys(map(environment_text, environments))),
        "checksums": "\n".join(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(run)}" for path in files
        ),
        "data": "\n".join(
            f"{checksum}  {dataset}"
            for dataset, checksum in data_checksums(read_records(run), read_prompts(run)).items()
        ),
        "config": (run / "config.json").read_text(encoding="utf-8", errors="replace").strip(),
        "environment": "\n".join(strict_json.dumps(environment, indent=2) for environment in environments),
    }


def _asset(name: str) -> str:
    return resources.files("kvbench.report").joinpath("templates", name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
