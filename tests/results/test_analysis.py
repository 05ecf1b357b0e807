"""The measures against plain loops, the variance test on known data, and files that are the same bytes each time."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvbench.analysis import THRESHOLDS, adjacent_cosines, attention_uniformity, kept_shares, measure_prompt, unrotated
from kvbench.analysis import main as analyse
from kvbench.results import analysis
from kvbench.results.analysis import variance_shares

LABELS = ["a"] * 10 + ["b"] * 10
PROFILE = np.array([0.2, 0.5, 0.8, 0.4])


def test_adjacent_cosines_by_loop():
    states = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for head, i in np.ndindex(2, 4):
        a, b = states[head, i].numpy(), states[head, i + 1].numpy()
        expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert adjacent_cosines(states)[head, i].item() == pytest.approx(expected, abs=1e-6)


def test_unrotated_undoes_transformers_rotation(tiny_gqa):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 2, 50, 16, generator=generator)
    cosines, sines = tiny_gqa.model.model.rotary_emb(keys, torch.arange(50)[None])
    _, rotated = apply_rotary_pos_emb(keys, keys, cosines, sines)
    assert not torch.allclose(rotated, keys, atol=0.1)
    assert torch.allclose(unrotated(rotated[0], cosines[0], sines[0]), keys[0], atol=1e-5)
    scaled = unrotated(1.5 * rotated[0], 1.5 * cosines[0], 1.5 * sines[0])  # YaRN's attention scaling
    assert torch.allclose(scaled, keys[0], atol=1e-5)


def test_kept_shares_count_runs():
    cosines = torch.tensor([[0.9, 0.9, 0.1, 0.8], [0.1, 0.1, 0.1, 0.1]])
    assert kept_shares(cosines, [0.75, 0.85]).tolist() == [[pytest.approx(0.4), pytest.approx(0.6)], [1.0, 1.0]]


def test_uniform_attention_has_entropy_one_and_a_sink_zero():
    n_tokens, n_window = 6, 3
    uniform, sink = torch.zeros(n_window, n_tokens), torch.zeros(n_window, n_tokens)
    for row in range(n_window):
        visible = n_tokens - n_window + row + 1
        uniform[row, :visible] = 1 / visible
    sink[:, 0] = 1.0
    entropy, first = attention_uniformity(torch.stack([uniform, sink]))
    assert entropy.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert first.tolist() == pytest.approx([(1 / 4 + 1 / 5 + 1 / 6) / 3, 1.0], abs=1e-6)


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
    same = measure_prompt(tiny_gqa, [7] * 40)[0]  # equal tokens have equal keys before RoPE
    assert same["keys_before"] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert max(same["keys_after"]) < 0.9999


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.setattr(analysis, "N_PERMUTATIONS", 300)
    return lambda scale, seed=0: np.random.default_rng(seed).normal(0, scale, (20, 4))


def test_the_claim_holds_where_only_layers_differ(noise):
    shares = variance_shares({"m": (PROFILE + noise(0.01), LABELS)})
    assert shares.layers > 0.95
    assert shares.p_datasets > 0.05
    assert shares.max_range < 0.02
    assert variance_shares({"m": (PROFILE + noise(0.01), ["a"] * 20)}).p_datasets == 1.0  # one set is no evidence


def test_the_claim_fails_where_data_sets_differ(noise):
    shifted = PROFILE + noise(0.01)
    shifted[10:] += 0.1
    shares = variance_shares({"m": (shifted, LABELS)})
    assert shares.p_datasets < 0.01
    assert shares.max_range == pytest.approx(0.1, abs=0.02)
    assert 0.02 < shares.datasets < 0.2


def test_shares_sum_to_one_and_match_a_plain_decomposition(noise):
    data = {"m": (PROFILE + noise(0.05), LABELS), "n": (PROFILE[::-1] + 0.3 + noise(0.05, 1), LABELS)}
    shares = variance_shares(data)
    assert shares.models + shares.layers + shares.datasets + shares.samples == pytest.approx(1.0)
    within = total = 0.0
    grand = np.concatenate([v.ravel() for v, _ in data.values()]).mean()
    for values, labels in data.values():
        total += ((values - grand) ** 2).sum()
        within += sum(((own - own.mean(0)) ** 2).sum() for own in (values[np.array(labels) == n] for n in "ab"))
    assert shares.samples == pytest.approx(within / total)


def test_measure_then_draw(tmp_path, capsys):
    folder = tmp_path / "analysis"
    measure = ["measure", "--model", "tiny-random", "--task", "passkey", "niah", "--limit", "2"]
    settings = ["--override", "task.lengths=[160]", "model.name='org/m'"]
    assert analyse(["--folder", str(folder), *measure, *settings]) == 0
    (path,) = folder.iterdir()
    assert str(path) == capsys.readouterr().out.strip()
    assert path.name.startswith("org_m-")  # a name with a slash gets a file all the same
    document = json.loads(path.read_text())
    assert (document["model"], len(document["samples"])) == ("org/m", 4)

    def drawn():
        assert analyse(["--folder", str(folder), "draw"]) == 0
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}

    files = drawn()
    assert sum(name.endswith((".png", ".svg")) for name in files) == 6
    rows = list(csv.DictReader((folder / "compression.csv").open()))
    assert len(rows) == 2 * 10 * len(THRESHOLDS)
    for name in files:
        (folder / name).unlink()
    assert drawn() == files


def test_the_committed_tables_come_from_the_committed_measurements(tmp_path):
    committed = Path(__file__).resolve().parents[2] / "results" / "analysis"
    shutil.copy(committed / "smollm2-135m.json", tmp_path)
    assert analyse(["--folder", str(tmp_path), "draw"]) == 0
    for path in tmp_path.glob("*.csv"):
        assert path.read_bytes() == (committed / path.name).read_bytes()


@pytest.mark.parametrize(
    ("folder", "words", "message"),
    [
        (".", ["measure", "--model", "nope"], "model=nope is unknown"),
        ("file/x", ["measure", "--model", "tiny-random"], "file/x cannot be used"),
        (".", ["draw"], "no measurements"),
    ],
)
def test_what_cannot_be_measured_or_drawn_is_one_line(folder, words, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert analyse(["--folder", str(tmp_path / folder), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvbench: ")
    assert message in line
