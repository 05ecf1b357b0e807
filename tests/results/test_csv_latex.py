"""Names in records are data: no spreadsheet runs them, no LaTeX obeys them."""

import csv
import io

import pytest
from report_records import ARMS, make_record, make_run, make_spec

from kvbench.results.cells import build_table
from kvbench.results.csv_latex import cells_csv, latex, pairs_csv


@pytest.fixture(params=["=cmd|'/c calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\\input{/etc/passwd}~^"])
def hostile(request, tmp_path):
    records = [make_record(arm, f"s{i}", i / 12, request.param) for arm in ARMS for i in range(12)]
    return request.param, build_table(make_spec((request.param, make_run(tmp_path, "a", records))))


def test_a_name_is_no_formula_and_numbers_stay_numbers(hostile):
    name, table = hostile
    for text, column in ((cells_csv(table), "dataset"), (pairs_csv(table), "dataset")):
        rows = list(csv.DictReader(io.StringIO(text)))
        for row in rows:
            for cell in row.values():
                if cell.startswith(("=", "+", "-", "@", "\t", "\r")):
                    float(cell)
        expected = name if name.startswith("\\") else "'" + name
        assert expected in {row[column] for row in rows}
    assert any(row["difference"].startswith("-") or float(row["difference"]) >= 0 for row in rows)


def test_a_name_is_no_command(hostile):
    name, table = hostile
    if name.startswith("\\"):
        assert "\\input" not in latex(table)
        assert "\\textbackslash{}input\\{/etc/passwd\\}\\textasciitilde{}\\textasciicircum{}" in latex(table)
