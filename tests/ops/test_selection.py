"""Selecting and copying kept slots: by hand in torch, then the kernels against torch."""

import dataclasses

import pytest
import torch
from policy_inputs import make_layer

from kvbench.methods.base import slot_state
from kvbench.methods.h2o import H2O
from kvbench.ops import selection


def test_positions_by_hand():
    ranks = torch.tensor([[9.0, 1.0, 5.0, 5.0, 5.0, 7.0, 8.0], [0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 9.0]])
    assert selection.heavy_and_recent(ranks, 3, 2).tolist() == [[0, 3, 4, 5, 6], [2, 3, 4, 5, 6]]
    assert selection.heavy_and_recent(ranks, 0, 2).tolist() == [[5, 6], [5, 6]]
    assert selection.heavy_and_recent(ranks, 5, 2).tolist() == [list(range(7))] * 2


def test_kept_slots_are_copies_at_the_positions():
    layer = make_layer(2, 2, 9)
    positions = torch.tensor([[0, 4, 8], [1, 2, 3]])
    keys, values, scores = selection.keep_slots(layer.keys, layer.values, layer.column_sums, positions)
    assert torch.equal(keys[1], layer.keys[1, 1:4])
    assert torch.equal(values[0], layer.values[0, [0, 4, 8]])
    assert torch.equal(scores[1], layer.column_sums[1, 1:4])


@pytest.mark.parametrize(("n_tokens", "heavy", "recent"), [(45, 9, 8), (33, 0, 5), (33, 25, 8)])
def test_kernels_equal_torch(triton_device, monkeypatch, n_tokens, heavy, recent):
    from kvbench.ops import compress_triton as selection_triton

    monkeypatch.setattr(selection_triton, "MAX_ROW_BLOCK", 32)  # several blocks a row
    layer = make_layer(2, 2, n_tokens, head_dim=12)
    ranks = layer.column_sums.round(decimals=1).to(triton_device)  # rounded: some ranks are equal
    keys, values = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (layer.keys, layer.values))
    arguments = (keys.to(triton_device), values.to(triton_device), ranks)
    positions = selection.heavy_and_recent(ranks, heavy, recent)
    assert torch.equal(selection_triton.heavy_and_recent(ranks, heavy, recent), positions)
    kept = selection_triton.keep_slots(*arguments, positions)
    assert all(map(torch.equal, kept, selection.keep_slots(*arguments, positions)))


def test_h2o_with_kernels_equals_h2o_without(triton_device):
    layer = make_layer(4, 2, 40)
    moved = {name: getattr(layer, name).to(triton_device) for name in ("keys", "values", "column_sums")}
    layer = dataclasses.replace(layer, **moved)
    for normalise in (False, True):
        kernel, plain = (
            H2O(budget=0.5, normalise_by_count=normalise).compress(dataclasses.replace(layer, kernels=kernels), 20)
            for kernels in ("triton", "torch")
        )
        assert torch.equal(kernel.positions, plain.positions)
        assert torch.equal(kernel.keys, plain.keys)
        kept, state = slot_state(kernel.state), slot_state(plain.state)
        assert all(torch.equal(kept[name], state[name]) for name in state)
