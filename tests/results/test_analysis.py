"""From a model to files: measure once, draw from the measurements alone, the same bytes each time."""

import csv
import json

import pytest

from kvbench.analysis import main
from kvbench.results.analysis_collect import THRESHOLDS, measure_prompt


def test_every_layer_is_measured_in_range(tiny_gqa):
    layers = measure_prompt(tiny_gqa, list(range(3, 83)))
    assert len(layers) == 4
    for layer in layers:
        assert len(layer["keys_after"]) == len(layer["values"]) == 2
        assert all(-1 <= c <= 1 for name in ("keys_after", "keys_before", "values") for c in layer[name])
        assert len(layer["kept"]) == len(THRESHOLDS)
        assert layer["kept"] == sorted(layer["kept"])
        assert 0 < layer["entropy"] <= 1
    # A random model has keys that owe nothing to their neighbours; RoPE of the first layer's keys changes the cosines.
    assert layers[0]["keys_after"] != layers[0]["keys_before"]


def test_equal_tokens_have_equal_keys_before_rope(tiny_gqa):
    first = measure_prompt(tiny_gqa, [7] * 40)[0]
    assert first["keys_before"] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert max(first["keys_after"]) < 0.9999


def test_measure_then_draw(tmp_path, capsys):
    folder = tmp_path / "analysis"
    overrides = ["--override", "task.lengths=[160]"]
    measure = [
        "--folder",
        str(folder),
        "measure",
        "--model",
        "tiny-random",
        "--task",
        "passkey",
        "niah",
        "--limit",
        "2",
    ]
    assert main([*measure, *overrides]) == 0
    data = json.loads((folder / "tiny-random.json").read_text())
    assert len(data["samples"]) == 4
    assert main(["--folder", str(folder), "draw"]) == 0
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    assert sum(name.endswith((".png", ".svg")) for name in files) == 6
    rows = list(csv.DictReader((folder / "compression.csv").open()))
    assert len(rows) == 2 * 4 * len(THRESHOLDS)
    for name in files:
        (folder / name).unlink()
    assert main(["--folder", str(folder), "draw"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"} == files


def test_a_name_with_a_slash_gets_a_file_all_the_same(tmp_path, capsys):
    measure = ["measure", "--model", "tiny-random", "--task", "passkey", "--limit", "1"]
    settings = ["--override", "task.lengths=[128]", "model.n_layers=1", "model.name='org/m'"]
    assert main(["--folder", str(tmp_path), *measure, *settings]) == 0
    (path,) = tmp_path.iterdir()
    assert str(path) == capsys.readouterr().out.strip()
    assert path.name.startswith("org_m-")
    assert json.loads(path.read_text())["model"] == "org/m"


def test_what_cannot_be_measured_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--folder", str(tmp_path), "measure", "--model", "nope"], "Could not find 'model/nope'"),
        (["--folder", str(tmp_path / "file" / "x"), "measure", "--model", "tiny-random"], "file/x cannot be used"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("kvbench: ")
        assert words in line


def test_nothing_measured_is_one_line(tmp_path, capsys):
    assert main(["--folder", str(tmp_path), "draw"]) == 2
    assert capsys.readouterr().err.startswith("kvbench: no measurements")
