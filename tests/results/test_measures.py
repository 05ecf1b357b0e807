"""The measures against plain loops and against transformers' own rotation."""

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvbench.results.analysis_measures import adjacent_cosines, attention_uniformity, kept_shares, unrotated


def test_adjacent_cosines_by_loop():
    states = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for head in range(2):
        for i in range(4):
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
