"""Tables as Markdown, CSV and LaTeX: every cell with its interval, every published number with its source.

Nothing here depends on the clock or on the order of files: the same records give the same bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kvbench.paths import file_stem
from kvbench.results import merging
from kvbench.results.cells import AVERAGE_OF_NINE, Cell, Column, Table
from kvbench.results.merging import merging_effects
from kvbench.results.summary import number
from kvbench.results.verdict import verdict

MISSING = "no records"
READING = (
    "Scores are on the 0 to 100 scale, each data set by its own metric, with the 95 % bootstrap interval over samples "
    "(percentile, 10,000 resamples, fixed seed; averages resample within each data set). **Bold**: the best arm of its "
    "budget, only where it is separated from every other one: paired bootstrap and exact sign test both below 0.05 "
    "after Holm's correction over all pairs of arms in the column. \"all equal\": all samples score the same, so the "
    "bootstrap sees no spread; that is a sign of few samples, not of certainty. KL to the full cache likewise: "
    "its interval, and by how much it lies above that of the closest arm of its budget, paired by sample, with a star "
    "where both tests separate the two after Holm's correction over the pairs of arms of one budget."
)  # fmt: skip
DETAIL_HEADER = (
    "arm", "kept", "cache MiB", "KL to full", "above the closest", "gold NLL", "same answer", "equal tokens",
    "first difference", "ROUGE-L to full",
)  # fmt: skip
CLOSENESS = (
    ("identical_share", ".0%"), ("equal_share", ".1%"), ("first_divergence_tokens", ".1f"), ("rouge_l", ".3f"),
)  # fmt: skip
DETAIL_NOTE = (
    "Means over all samples; of KL, over data sets. Kept: slots over slots of the full cache. KL and NLL: nats a gold "
    "token. The last columns compare each arm's own answer with the full cache's; first difference: median over the "
    "answers that differ, in tokens. Arms that keep over two points more or less than asked, as with whole layers "
    "on top of the budget, compete with nobody."
)
CELL_COLUMNS = (
    "model", "arm", "method", "budget_requested", "budget_measured", "dataset", "metric", "n", "n_failed", "score",
    "low", "high", "best", "kl", "kl_low", "kl_high", "source", "note",
)  # fmt: skip
PAIR_COLUMNS = (
    "dataset", "measure", "first", "second", "n", "difference", "low", "high", "wins", "losses", "p_bootstrap",
    "p_sign", "p_bootstrap_holm", "p_sign_holm", "separated",
)  # fmt: skip
TEX_ESCAPES = {character: "\\" + character for character in "&%$#_{}"}
TEX_ESCAPES |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?")


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `<name>.md`, `.csv`, `-pairs.csv` and `.tex` into a folder, created if missing; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{table.spec.name}-{file_stem(table.spec.model)}"
    writers = {".md": markdown, ".csv": cells_csv, "-pairs.csv": pairs_csv, ".tex": latex}
    writers |= {"-merging.csv": merging_csv} if merging_effects(table) else {}
    texts = {stem.with_name(stem.name + suffix): write(table) for suffix, write in writers.items()}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return list(texts)


def heading(table: Table, column: Column) -> str:
    """A column's name with its number of samples where all arms have the same."""
    if column is table.average:
        return f"average of {len(table.averaged) or len(table.columns)} of {len(table.columns)}"
    sizes = _sizes(column)
    name = f"{column.name}, n = {min(sizes)}" if len(sizes) == 1 else column.name
    return f"{name}, below the gate" if column.below_gate else name


def gate_note(table: Table) -> str:
    """What the gate took out of the conclusions, and the average with it; empty if nothing."""
    if not (below := [column.name for column in table.columns if column.below_gate]):
        return ""
    means = []
    for arm in table.spec.arms:
        scores = [column.cells[arm.key].score for column in table.columns]
        present = [score for score in scores if score is not None]
        if present and len(present) == len(scores):
            means.append(f"{arm.key} {sum(present) / len(present):.2f}")
    everything = f" Mean over all {len(table.columns)} data sets: {', '.join(means)}." if means else ""
    return (
        f"Below the gate: on {', '.join(below)} the full cache itself scores under {table.spec.gate:g}, so what an arm "
        f"loses there says nothing: grey, not compared, not in the average.{everything}"
    )


def interval_text(cell: Cell) -> str:
    """The interval in square brackets, or why there is none."""
    if cell.interval is None:
        return "[one sample]" if cell.n == 1 else ""
    return "[all equal]" if cell.interval.flat else f"[{cell.interval.low:.1f}, {cell.interval.high:.1f}]"


def kl_text(cell: Cell, missing: str = "-") -> str:
    """KL to the full cache with its interval."""
    ends = "" if cell.kl_interval is None else f" [{cell.kl_interval.low:.2g}, {cell.kl_interval.high:.2g}]"
    return missing if cell.kl is None else f"{cell.kl:.3g}{ends}"


def above_text(cell: Cell, missing: str = "") -> str:
    """How much further from the full cache the arm is than the closest of its budget, with the paired interval."""
    if (above := cell.kl_above) is None:
        return "closest" if cell.closest else missing
    ends = "" if above.interval is None else f" [{above.interval.low:.2g}, {above.interval.high:.2g}]"
    return f"{above.difference:+.2g}{ends}{'*' if above.separated else ''}"


def detail_rows(table: Table) -> list[list[str]]:
    """Budgets, bytes and closeness to the full cache of every arm, as text, after `DETAIL_HEADER`."""
    rows = []
    for s in (table.summaries[arm.key] for arm in table.spec.arms if arm.key in table.summaries):
        mib, closeness = None if s.cache_bytes is None else s.cache_bytes / 2**20, table.agreements.get(s.arm, {})
        cell = table.overall.cells.get(s.arm, Cell()) if table.overall else Cell()
        kl = kl_text(cell) if cell.kl is not None else number(s.kl, ".3g")
        shares = (number(closeness.get(name), spec) for name, spec in CLOSENESS)
        if s.n:
            texts = number(s.budget_measured, ".2%"), number(mib, ".2f"), kl, above_text(cell)
            rows.append([s.arm, *texts, number(s.gold_nll, ".3f"), *shares])
    return rows


def environment_text(environment: Mapping[str, Any]) -> str:
    """Versions, commit and device of one environment."""
    said = environment.get
    packages = value if isinstance(value := said("packages"), dict) else {}
    devices = value if isinstance(value := said("devices"), list) else []
    device = said("device") or ", ".join(map(str, devices)) or "CPU"
    return (
        f"kvbench {said('kvbench')} at {said('commit')}, torch {packages.get('torch')}, "
        f"transformers {packages.get('transformers')}, {device}, {said('torch_threads')} threads"
    )


def markdown(table: Table) -> str:
    """The table with everything a reader needs to judge it."""
    footnotes: dict[str, str] = {}
    lines = [f"# {table.spec.title} · {table.spec.model}", "", *verdict(table), "", READING, ""]
    lines += _pipe(["arm", *(heading(table, column) for column in table.all_columns)], _score_rows(table, footnotes))
    lines += ["", note] if (note := gate_note(table)) else []
    gaps = [column for column in table.columns if any(cell.score is None for cell in column.cells.values())]
    if gaps:
        lines += ["", f"Cells with {MISSING} (or failed samples) are filled by:", ""]
        lines += [f"- {column.name}: `{column.command}`" for column in gaps]
    if details := [[f"`{row[0]}`", *row[1:]] for row in detail_rows(table)]:
        lines += ["", "## Budgets, closeness to the full cache", "", *_pipe(DETAIL_HEADER, details)]
        lines += ["", DETAIL_NOTE, "", f"All batches together took {table.batch_s:.0f} s."]
    if effects := merging_effects(table):
        lines += ["", "## Merging against its own base", "", *_pipe(merging.HEADER, merging.merging_rows(effects))]
        lines += ["", merging.NOTE]
    lines += _sources(table, footnotes)
    if table.runs:
        lines += ["", "## Runs", ""]
        for name, (config, environments) in sorted(table.runs.items()):
            made_in = "; ".join(dict.fromkeys(map(environment_text, environments)))
            lines.append(f"- `{name}`: {made_in or 'environment unknown'}{_limits(config)}")
        if table.doubts:
            lines += ["", *(f"**{line}**" for line in table.doubts)]
    return "\n".join(lines).rstrip() + "\n"


def _score_rows(table: Table, footnotes: dict[str, str]) -> Iterable[list[str]]:
    for arm in table.spec.arms:
        shown = [_greyed(_cell(c.cells.get(arm.key, Cell()), len(_sizes(c)) > 1), c) for c in table.all_columns]
        yield [f"`{arm.key}`", *shown]
        if numbers := table.published.get(arm.key):
            nine = AVERAGE_OF_NINE if len(table.averaged) in (0, len(table.columns)) else None
            names = [nine if column is table.average else column.name for column in table.all_columns]
            yield ["published", *(" / ".join(_cite(p, footnotes) for p in numbers if p.dataset == n) for n in names)]


def _greyed(text: str, column: Column) -> str:
    return f"*({text})*" if column.below_gate else text  # Markdown has no grey


def _sizes(column: Column) -> set[int]:
    return {cell.n for cell in column.cells.values() if cell.score is not None}


def _cite(published: Any, footnotes: dict[str, str]) -> str:
    return f"{published.score} [{footnotes.setdefault(published.source, _letters(len(footnotes)))}]"


def _letters(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else _letters(index // 26 - 1) + _letters(index % 26)


def _cell(cell: Cell, show_n: bool) -> str:
    if cell.score is None:
        return f"{cell.n_failed} failed" if cell.n_failed else MISSING
    score = f"**{cell.score:.2f}**" if cell.best else f"{cell.score:.2f}"
    notes = ([f"n = {cell.n}"] if show_n else []) + ([f"{cell.n_failed} failed"] if cell.n_failed else [])
    return " ".join([score, interval_text(cell), *(f"({note})" for note in notes)]).strip()


def _sources(table: Table, footnotes: dict[str, str]) -> list[str]:
    unplaced = [
        f"- {p.method} at {p.budget}, {p.dataset}: {_cite(p, footnotes)}{f' ({p.note})' if p.note else ''}"
        for p in table.unplaced
    ]
    if not footnotes:
        return []
    lines = ["", "## Published numbers", "", *(f"- [{label}] {source}" for source, label in footnotes.items())]
    notes = [
        f"- {p.method} at {p.budget}, {p.dataset}, {p.score}: {p.note}"
        for arm in table.spec.arms for p in table.published.get(arm.key, []) if p.note
    ]  # fmt: skip
    if unplaced:
        lines += ["", "Not comparable cell by cell, as the source does not state the model:", "", *unplaced]
    return lines + (["", "Doubts and conflicts:", "", *notes] if notes else [])


def _limits(config: Mapping[str, Any]) -> str:
    """Settings that make a run differ from the published protocol, as the end of a sentence."""
    prompt = config.get("model", {}).get("max_prompt_tokens")
    answer = config.get("protocol", {}).get("max_new_tokens")
    cut = f", prompts of at most {prompt} tokens" if prompt else ""
    return cut + (f", answers of at most {answer} tokens" if answer else "")


def _pipe(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (header, align, *rows)]


def cells_csv(table: Table) -> str:
    """One line per arm and data set, ours and published, in full precision."""
    rows: list[Sequence[object]] = []
    for key, method, budget, _ in table.spec.arms:
        measured = number(getattr(table.summaries.get(key), "budget_measured", None), ".4f")
        for column in table.all_columns:
            cell = column.cells.get(key, Cell())
            ends = [number(end, ".4f") for end in (cell.score, *(cell.interval or (None, None)))]
            kl_ends = [number(end, ".6g") for end in (cell.kl, *(cell.kl_interval or (None, None)))]
            note = f"{MISSING}; fill with: {column.command}" if cell.score is None and column.command else ""
            note = note or (f"full cache below the gate of {table.spec.gate:g}" if column.below_gate else "")
            name = f"average of {', '.join(table.averaged)}" if column is table.average else column.name
            rows.append((
                table.spec.model, key, method, f"{budget:g}", measured, name, column.metric, cell.n, cell.n_failed,
                *ends, int(cell.best), *kl_ends, "records", note,
            ))  # fmt: skip
        rows += [_published_row(p, key) for p in table.published.get(key, [])]
    return _csv(CELL_COLUMNS, [*rows, *(_published_row(p, "") for p in table.unplaced)])


def _published_row(p: Any, arm: str) -> Sequence[object]:
    return p.model, arm, p.method, p.budget, "", p.dataset, "", "", "", p.score, *[""] * 6, p.source, p.note


def pairs_csv(table: Table) -> str:
    """One line per data set, measure ("score" or "kl") and pair of arms: the paired difference and both tests."""
    rows = [
        (
            column.name, measure, c.first, c.second, c.n, format(c.difference, spec),
            *(number(end, spec) for end in c.interval or (None, None)), c.wins, c.losses,
            *(f"{p:.5f}" for p in (c.p_bootstrap, c.p_sign, c.p_bootstrap_holm, c.p_sign_holm)), int(c.separated),
        )
        for column in table.all_columns
        for measure, spec, pairs in (("score", ".4f", column.comparisons), ("kl", ".6g", column.kl_comparisons))
        for c in pairs
    ]  # fmt: skip
    return _csv(PAIR_COLUMNS, rows)


def merging_csv(table: Table) -> str:
    """One line per arm that merges and its base, in full precision."""
    rows = []
    for effect in merging_effects(table):
        row = dataclasses.asdict(effect)
        for name in ("score_interval", "kl_interval"):
            row[f"{name}_low"], row[f"{name}_high"] = row.pop(name) or (None, None)
        rows.append(row)
    return _csv(list(rows[0]), [list(row.values()) for row in rows])


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    frame = pd.DataFrame([[_harmless(cell) for cell in row] for row in rows], columns=list(header), dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def _harmless(cell: object) -> object:
    """The cell; an apostrophe before a text that spreadsheets would run (anyone may have written the records)."""
    harmless = not isinstance(cell, str) or not cell.startswith(FORMULA_STARTS) or NUMBER.fullmatch(cell)
    return cell if harmless else f"'{cell}"


def latex(table: Table) -> str:
    """The scores as a `tabular` for the booktabs package."""
    columns = table.all_columns
    header = ["arm", *(_tex(heading(table, column)) for column in columns)]
    keys = [arm.key for arm in table.spec.arms]
    rows = [[_tex(key), *(_tex_cell(c.cells.get(key, Cell()), c.below_gate) for c in columns)] for key in keys]
    frame = pd.DataFrame(rows, columns=pd.Index(header, dtype=object), dtype=object)
    tabular = frame.to_latex(index=False, escape=False, column_format="l" + "r" * len(columns))
    return f"% {_tex(table.spec.title)}; needs \\usepackage{{booktabs,xcolor}}\n{tabular}"


def _tex_cell(cell: Cell, grey: bool) -> str:
    if cell.score is None:
        return f"\\emph{{{MISSING}}}"
    score = f"\\textbf{{{cell.score:.2f}}}" if cell.best else f"{cell.score:.2f}"
    interval = interval_text(cell)
    text = f"{score} {{\\scriptsize {interval}}}" if interval else score
    return f"\\textcolor{{gray}}{{{text}}}" if grey else text


def _tex(text: str) -> str:
    return " ".join("".join(TEX_ESCAPES.get(character, character) for character in text).split())
