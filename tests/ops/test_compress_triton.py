"""The kernels of selecting, dividing and merging against torch, on a GPU or under Triton's interpreter."""

import dataclasses

import pytest
import torch
from policy_inputs import make_layer, relative_rms

from kvbench.methods.base import LayerStates, slot_state
from kvbench.methods.h2o import H2O
from kvbench.methods.kvmerger import KVMerger, KVMergerBias
from kvbench.ops import merging, segments, selection


@pytest.fixture(scope="module")
def kernels(triton_device):
    """The module of kernels, imported late: without triton the tests skip."""
    from kvbench.ops import compress_triton

    return compress_triton


def on(layer: LayerStates, device: torch.device) -> LayerStates:
    moved = {name: getattr(layer, name).to(device) for name in ("keys", "values", "column_sums")}
    return dataclasses.replace(layer, **moved)


@pytest.mark.parametrize(
    ("n_tokens", "n_recent", "n_top", "n_slots", "share_heads", "dtype"),
    [
        (45, 7, 5, 20, False, torch.float32), (33, 0, 0, 1, False, torch.float32),
        (17, 17, 0, 17, False, torch.float32), (40, 1, 9, 23, True, torch.float32),
        (40, 1, 9, 23, False, torch.bfloat16),
    ],
)  # fmt: skip
def test_chain_starts(kernels, triton_device, monkeypatch, n_tokens, n_recent, n_top, n_slots, share_heads, dtype):
    monkeypatch.setattr(kernels, "MAX_ROW_BLOCK", 32)  # several blocks a row
    layer = on(make_layer(2, 2, n_tokens, head_dim=12, seed=2, correlated=True, dtype=dtype), triton_device)
    scores = layer.column_sums.mean(0, keepdim=True) if share_heads else layer.column_sums
    arguments = (layer.keys, scores, n_recent, n_top, n_slots, share_heads)
    expected = segments.exact_chain_starts(*arguments)
    assert torch.equal(kernels.exact_chain_starts(*arguments), expected)
    assert expected.shape == (2, n_slots + 1)


def test_ties_in_scores_and_cosines_go_to_the_later(kernels, triton_device):
    keys = torch.eye(4, device=triton_device)[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3, 0, 0])].unsqueeze(0)
    scores = torch.zeros(1, 11, device=triton_device)
    scores[0, [1, 4, 6]] = 1.0
    for n_top, n_slots in [(0, 8), (1, 7), (2, 7), (0, 3)]:
        arguments = (keys, scores, 0, n_top, n_slots, False)
        assert torch.equal(kernels.exact_chain_starts(*arguments), segments.exact_chain_starts(*arguments))


@pytest.mark.parametrize(
    ("options", "half"),
    [
        ({}, False), ({}, True), ({"mean_distance": True}, False), ({"scale_values": False, "sigma": 0.8}, False),
        ({"merge": False}, False),
    ],
    ids=str,
)  # fmt: skip
def test_merge_segments(kernels, triton_device, options, half):
    # On the CPU float16: Triton's interpreter (3.7.1) truncates to bfloat16 where the GPU rounds.
    half_dtype = torch.bfloat16 if triton_device.type == "cuda" else torch.float16
    dtype = half_dtype if half else torch.float32
    layer = on(make_layer(2, 2, 75, head_dim=24, seed=4, correlated=True, dtype=dtype), triton_device)
    # One set longer than a block of scores, single tokens, and a head with fewer sets than the other.
    starts = torch.tensor([[0, 1, 2, 5, 45, 70, 75], [0, 40, 41, 75, 75, 75, 75]], device=triton_device)
    scores = layer.column_sums.clone()
    scores[0, 60:] = 5.0  # equal scores in a set: the latest is the pivot
    scores[0, [10, 40]] = 9.0  # the same in different blocks of scores
    settings = {"sigma": 5.0, "mean_distance": False, "scale_values": True, "merge": True, **options}
    expected = merging.merge_segments(layer.keys, layer.values, scores, starts, **settings)
    merged = merging.merge_segments(layer.keys, layer.values, scores, starts, **settings, kernels="triton")
    assert torch.equal(merged.counts, expected.counts)
    assert torch.equal(merged.pivots, expected.pivots)
    assert merged.pivots[0, 3:5].tolist() == [40, 69]
    limit = 0.2 * torch.finfo(dtype).eps if half else 1e-6  # a few results may round to the other side
    for head, n_sets in enumerate([6, 3]):
        assert relative_rms(merged.keys[head, :n_sets], expected.keys[head, :n_sets]) < limit
        assert relative_rms(merged.values[head, :n_sets], expected.values[head, :n_sets]) < limit
    assert merged.keys.dtype == dtype


def test_strided_inputs(kernels, triton_device):
    layer = on(make_layer(2, 2, 50, seed=9, correlated=True), triton_device)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (layer.keys, layer.values)]
    settings = {"sigma": 5.0, "mean_distance": False, "scale_values": True, "merge": True}
    starts = kernels.exact_chain_starts(strided[0], layer.column_sums, 5, 3, 20, False)
    assert torch.equal(starts, segments.exact_chain_starts(layer.keys, layer.column_sums, 5, 3, 20, False))
    merged = merging.merge_segments(*strided, layer.column_sums, starts, **settings, kernels="triton")
    expected = merging.merge_segments(layer.keys, layer.values, layer.column_sums, starts, **settings)
    assert relative_rms(merged.keys, expected.keys) < 1e-6
    assert relative_rms(merged.values, expected.values) < 1e-6


@pytest.mark.parametrize(
    "policy",
    [
        KVMerger(), KVMerger(budget=0.6, scope="layer"), KVMergerBias(budget=0.35),
        KVMerger(budget_mode="threshold", threshold=0.8, pivot="random"),
    ],
    ids=lambda policy: f"{policy.name} {policy.options()}",
)  # fmt: skip
def test_policy_with_kernels_equals_policy_without(triton_device, policy):
    layer = on(make_layer(4, 2, 50, seed=1, correlated=True), triton_device)
    slots = policy.layer_budgets(50, 8)[3]
    kernel = policy.compress(dataclasses.replace(layer, kernels="triton"), slots)
    plain = policy.compress(layer, slots)
    lengths = [slots] * 2 if plain.lengths is None else plain.lengths.tolist()
    assert (kernel.lengths is None) == (plain.lengths is None)
    for head, n_sets in enumerate(lengths):
        assert torch.equal(kernel.positions[head, :n_sets], plain.positions[head, :n_sets])
        assert relative_rms(kernel.keys[head, :n_sets], plain.keys[head, :n_sets]) < 1e-6
        assert relative_rms(kernel.values[head, :n_sets], plain.values[head, :n_sets]) < 1e-6


@pytest.mark.parametrize(("n_tokens", "heavy", "recent"), [(45, 9, 8), (33, 0, 5), (33, 25, 8)])
def test_selection(kernels, triton_device, monkeypatch, n_tokens, heavy, recent):
    monkeypatch.setattr(kernels, "MAX_ROW_BLOCK", 32)  # several blocks a row
    layer = make_layer(2, 2, n_tokens, head_dim=12)
    ranks = layer.column_sums.round(decimals=1).to(triton_device)  # rounded: some ranks are equal
    keys, values = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (layer.keys, layer.values))
    arguments = (keys.to(triton_device), values.to(triton_device), ranks)
    positions = selection.heavy_and_recent(ranks, heavy, recent)
    assert torch.equal(kernels.heavy_and_recent(ranks, heavy, recent), positions)
    kept = kernels.keep_slots(*arguments, positions)
    assert all(map(torch.equal, kept, selection.keep_slots(*arguments, positions)))


def test_h2o_with_kernels_equals_h2o_without(triton_device):
    layer = on(make_layer(4, 2, 40), triton_device)
    for normalise in (False, True):
        kernel, plain = (
            H2O(budget=0.5, normalise_by_count=normalise).compress(dataclasses.replace(layer, kernels=kernels), 20)
            for kernels in ("triton", "torch")
        )
        assert torch.equal(kernel.positions, plain.positions)
        assert torch.equal(kernel.keys, plain.keys)
        kept, state = slot_state(kernel.state), slot_state(plain.state)
        assert all(torch.equal(kept[name], state[name]) for name in state)
