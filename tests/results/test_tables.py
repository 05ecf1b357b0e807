"""Cells, bold print, missing cells, published numbers, and files that are the same bytes for the same records."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from report_records import ARMS, make_record, make_run, make_spec

from kvbench.errors import DataError
from kvbench.results.cells import PUBLISHED, TableSpec, build_table, read_published
from kvbench.results.figures import write_figures
from kvbench.results.tables import cells_csv, latex, markdown, pairs_csv, write_table

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"

SCORES = {"full": 0.9, "h2o@0.5": 0.3, "kvmerger@0.5": 0.6, "kvmerger@0.35": 0.2}


def steady(dataset="qasper", n=12, arms=ARMS):
    """Every sample agrees on the order of the arms."""
    return [make_record(arm, f"s{i}", SCORES[arm] + i / 200, dataset) for arm in arms for i in range(n)]


@pytest.fixture
def build(tmp_path):
    """A table of one data set from records."""
    return lambda records, **spec: build_table(make_spec(("qasper", make_run(tmp_path, "a", records)), **spec))


@pytest.fixture
def table(build):
    return build(steady())


def test_best_is_separated_and_the_full_cache_does_not_compete(table):
    cells = table.columns[0].cells
    assert [key for key, cell in cells.items() if cell.best] == ["kvmerger@0.5"]
    assert cells["kvmerger@0.5"].score == pytest.approx(100 * (0.6 + 5.5 / 200))
    assert "**62.75** [" in markdown(table)
    assert "\\textbf{62.75}" in latex(table)


def test_the_full_cache_wins_nothing_even_against_an_arm_that_keeps_as_much(build):
    levels = {"full": 0.8, "h2o@1": 0.1}
    records = [make_record(arm, f"s{i}", level + i / 200) for arm, level in levels.items() for i in range(12)]
    table = build(records, arms=("full", "h2o@1"))
    assert table.columns[0].comparisons[0].separated
    assert not any(cell.best for cell in table.columns[0].cells.values())


def test_no_winner_where_samples_disagree_or_the_best_misses_its_budget(tmp_path):
    mixed = [make_record(arm, f"s{i}", (i + shift) % 2) for shift, arm in enumerate(ARMS) for i in range(12)]
    large = [replace(r, slots_per_layer=[30, 30]) if r.arm == "kvmerger@0.5" else r for r in steady()]
    for name, records in (("mixed", mixed), ("large", large)):
        table = build_table(make_spec(("qasper", make_run(tmp_path, name, records))))
        assert not any(cell.best for cell in table.columns[0].cells.values())
        assert "| **" not in markdown(table)


def test_missing_cells_say_so_and_name_their_command(tmp_path):
    failed = make_record("h2o@0.5", "s99", 0.0, status="failed", parts={})
    run = make_run(tmp_path, "a", [*steady(arms=ARMS[:2]), failed])
    text = markdown(build_table(make_spec(("qasper", run), ("trec", tmp_path / "none"))))
    assert "(1 failed)" in text
    assert "| `kvmerger@0.5` | no records | no records |" in text
    assert "- qasper: `make qasper`" in text
    assert "- trec: `make trec`" in text
    empty = build_table(make_spec(("trec", tmp_path / "none")))
    assert markdown(empty).count("no records |") == len(ARMS)
    assert write_figures(empty, tmp_path / "figures") == []


def test_average_is_over_the_data_sets_all_arms_share(tmp_path):
    runs = [("qasper", make_run(tmp_path, "a", steady())), ("trec", make_run(tmp_path, "b", steady("trec", 8)))]
    partial = make_run(tmp_path, "c", steady("triviaqa", arms=ARMS[:1]))
    table = build_table(make_spec(*runs, ("triviaqa", partial)))
    assert table.averaged == ("qasper", "trec")
    assert "average of 2 of 3" in markdown(table)
    single = [column.cells["h2o@0.5"].score for column in table.columns[:2]]
    assert table.average.cells["h2o@0.5"].score == pytest.approx(sum(single) / 2)
    assert table.average.cells["kvmerger@0.5"].best


def test_an_average_of_single_samples_carries_no_verdict(tmp_path):
    one_sample = {name: steady(name)[::12] for name in map("data{}".format, range(12))}
    table = build_table(make_spec(*((name, make_run(tmp_path, name, rows)) for name, rows in one_sample.items())))
    assert {cell.n for cell in table.average.cells.values()} == {12}
    assert table.average.comparisons == []
    assert not any(cell.best or cell.interval for cell in table.average.cells.values())


def test_published_numbers_stand_beside_ours_with_their_source(tmp_path):
    numbers = [
        ("llama2-7b-chat", "h2o", "0.5", "qasper", "20.04", "some paper", "conflict: 19", ""),
        ("llama2-7b-chat", "h2o", "0.5", "qasper", "19.00", "some review", "", ""),
        ("llama2-7b-chat", "h2o", "0.35", "qasper", "1.00", "other budget", "", ""),
        ("not stated", "h2o", "0.5", "average of 7", "14.36", "a third paper", "", "test"),
    ]
    published = pd.DataFrame(numbers, columns=[*PUBLISHED, "file"])
    table = build_table(make_spec(("qasper", make_run(tmp_path, "a", steady()))), published)
    text = markdown(table)
    assert "| published | 20.04 [a] / 19.00 [b] |" in text
    assert "- [a] some paper" in text
    assert "conflict: 19" in text
    assert "average of 7: 14.36 [c]" in text
    assert "other budget" not in text
    rows = list(csv.DictReader(io.StringIO(cells_csv(table))))
    assert [r["source"] for r in rows if r["score"] == "20.04"] == ["some paper"]
    assert all(r["source"] for r in rows)


def test_csv_files_hold_every_cell_and_pair(table):
    rows = list(csv.DictReader(io.StringIO(cells_csv(table))))
    assert [(r["arm"], r["n"]) for r in rows] == [(arm, "12") for arm in ARMS]
    assert float(rows[1]["low"]) < float(rows[1]["score"]) < float(rows[1]["high"])
    pairs = list(csv.DictReader(io.StringIO(pairs_csv(table))))
    assert [p["measure"] for p in pairs] == ["score"] * 6 + ["kl"]
    assert {p["separated"] for p in pairs if p["measure"] == "score"} == {"1"}
    assert [float(pairs[-1][name]) for name in ("difference", "low", "high")] == [0, 0, 0]
    assert [float(rows[-1][name]) for name in ("kl", "kl_low", "kl_high")] == [0.65] * 3


def test_the_markdown_begins_with_the_verdict_and_has_no_time_by_arm(table):
    text = markdown(table)
    assert (
        "KL to the full cache (n = 12): at 50 %, h2o is closest, but separated from no other"
        in text.split("Scores are")[0]
    )
    assert "s a sample" not in text
    assert "All batches together took 24 s." in text
    assert "| `h2o@0.5` | 50.00% | 0.00 | 0.5 [0.5, 0.5] | closest |" in text
    assert "| +0 [0, 0] |" in text


def test_files_are_rebuilt_byte_for_byte(tmp_path):
    places = [{"length_tokens": length, "depth": depth} for depth in (0.0, 0.5) for length in (100, 200)]
    grid = [make_record(a, f"n{i}", SCORES[a], "niah", meta=meta) for a in ARMS for i, meta in enumerate(places)]
    run, other = make_run(tmp_path, "a", steady()), make_run(tmp_path, "b", grid)

    def build(name):
        table = build_table(make_spec(("qasper", run), ("niah", other)))
        paths = write_table(table, tmp_path / name) + write_figures(table, tmp_path / name)
        return {path.name: path.read_bytes() for path in paths}

    first = build("one")
    assert len([name for name in first if name.endswith((".png", ".svg"))]) == 6
    for path in (run / "records").glob("*.jsonl"):  # the order of lines is an accident of the run
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert first == build("two")
    order = [(r["dataset"], r["sample"], r["arm"]) for r in build_table(make_spec(("qasper", run))).records]
    assert order == sorted(order)  # sums of floats depend on the order of their terms


def test_every_published_number_names_its_source_and_is_a_number():
    numbers = read_published(REFERENCE)
    assert len(numbers) > 80
    assert (numbers.source.str.len() > 20).all()
    assert numbers.score.astype(float).between(0, 100).all()


def test_a_number_without_a_source_is_refused(tmp_path):
    header = ",".join(PUBLISHED)
    (tmp_path / "x.csv").write_text(f"{header}\nm,h2o,0.5,qasper,1.0,someone said so,\nm,h2o,0.5,trec,2.0, ,\n")
    with pytest.raises(DataError, match=r"x\.csv line 3 has no source"):
        read_published(tmp_path)
    (tmp_path / "x.csv").write_text("model,score\nm,1\n")
    with pytest.raises(DataError, match="columns"):
        read_published(tmp_path)


def test_published_numbers_are_found_by_model_method_budget_and_data_set(tmp_path):
    numbers = read_published(REFERENCE)

    def found(dataset, model="llama2-7b-chat"):
        spec = make_spec((dataset, tmp_path / "none"), model=model)
        return {arm: [p.score for p in own] for arm, own in build_table(spec, numbers).published.items() if own}

    assert found("trec")["kvmerger@0.5"] == ["64.00"]
    assert "kvmerger@0.35" not in found("trec")
    assert "kvmerger@0.5" not in found("trec", "llama2-13b-chat")
    conflict = numbers[(numbers.model == "llama2-7b-chat") & (numbers.method == "h2o") & (numbers.budget == "0.5")]
    conflict = conflict[conflict.dataset.isin(["narrativeqa", "average of 9"])]
    assert sorted(conflict.score) == ["17.48", "17.85", "33.49", "34.00"]  # contradicting sources both say so
    assert conflict.note.str.contains("conflict").all()


@pytest.mark.parametrize(("experiment", "n"), [("pivot", 2), ("zeroscrolls", 6), ("longbench", 0)])
def test_numbers_without_a_model_belong_to_no_cell_but_to_an_experiment(experiment, n):
    table = build_table(TableSpec(experiment, "m", "", (), ()), read_published(REFERENCE))
    assert len(table.unplaced) == n
    assert markdown(table).count("Not comparable cell by cell") == bool(n)


@pytest.mark.parametrize(
    "name", ["=cmd|'/c calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "=\ud800", "\\input{/etc/passwd}~^"]
)
def test_names_in_records_are_data_for_spreadsheets_and_latex(name, tmp_path):
    records = [make_record(arm, f"s{i}", i / 12, name) for arm in ARMS for i in range(12)]
    table = build_table(make_spec((name, make_run(tmp_path, "a", records))))
    for text in (cells_csv(table), pairs_csv(table)):
        rows = list(csv.DictReader(io.StringIO(text)))
        for cell in (cell for row in rows for cell in row.values()):
            if cell.startswith(("=", "+", "-", "@", "\t", "\r")):
                float(cell)  # numbers stay numbers
        assert (name if name.startswith("\\") else "'" + name) in {row["dataset"] for row in rows}
    assert len(write_table(table, tmp_path / "tables")) == 4
    assert "\\input" not in latex(table)
    if name.startswith("\\"):
        assert "\\textbackslash{}input\\{/etc/passwd\\}\\textasciitilde{}\\textasciicircum{}" in latex(table)


def ruler_records(dataset: str, full: float, other: float, n: int = 12):
    levels = {"full": full, "h2o@0.5": other, "kvmerger@0.5": full}
    return [
        make_record(arm, f"s{i}", level, dataset, metric="string_match_all")
        for arm, level in levels.items() for i in range(n)
    ]  # fmt: skip


def test_a_gated_data_set_on_which_the_full_cache_fails_ranks_nobody(tmp_path):
    levels = {"able": (0.9, 0.1), "unable": (0.5, 0.0), "fair": (0.6, 0.2)}
    runs = [(name, make_run(tmp_path, name, ruler_records(name, *pair))) for name, pair in levels.items()]
    spec = make_spec(*runs, arms=("full", "h2o@0.5", "kvmerger@0.5"))
    table = build_table(spec)
    able, unable, fair = table.columns
    assert [column.below_gate for column in table.columns] == [False, True, False]
    assert able.cells["kvmerger@0.5"].best
    assert fair.comparisons
    assert not unable.comparisons
    assert not any(cell.best for cell in unable.cells.values())
    assert table.averaged == ("able", "fair")
    assert table.average.cells["h2o@0.5"].score == pytest.approx(15)
    text = markdown(table)
    assert "unable, n = 12, below the gate | fair, n = 12 | average of 2 of 3" in text
    assert "*(50.00 [all equal])*" in text
    assert "on unable the full cache itself scores under 60" in text
    assert "Mean over all 3 data sets: full 66.67, h2o@0.5 10.00, kvmerger@0.5 66.67." in text
    assert r"\textcolor{gray}{50.00 {\scriptsize [all equal]}}" in latex(table)
    rows = list(csv.DictReader(io.StringIO(cells_csv(table))))
    assert [r["note"] for r in rows if r["dataset"] == "unable"] == ["full cache below the gate of 60"] * 3
    lower = build_table(replace(spec, gate=50))
    assert not any(column.below_gate for column in lower.columns)
    assert "elow the gate" not in markdown(lower)


def test_longbench_has_no_gate(build):
    table = build([make_record("full", "a", 0.1), make_record("h2o@0.5", "a", 0.0)])
    assert not table.columns[0].below_gate
