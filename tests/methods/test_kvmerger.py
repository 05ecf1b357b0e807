"""KVMerger's budgets and protection, and the paper's sets worked by hand."""

import dataclasses
import math

import pytest
import torch
from policy_inputs import make_layer

from kvbench.errors import BudgetError
from kvbench.methods.base import LayerStates
from kvbench.methods.kvmerger import KVMerger, KVMergerBias


def hand_layer() -> LayerStates:
    """Eight unit keys, angles as given in degrees; values are one-hot; token 5 has most attention."""
    angles = torch.deg2rad(torch.tensor([0.0, 20.0, 40.0, 60.0, 80.0, 170.0, 180.0, 182.0]))
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(0)
    sums = torch.tensor([[1.0, 5.0, 2.0, 3.0, 4.0, 9.0, 6.0, 7.0]])
    return LayerStates(keys, torch.eye(8).unsqueeze(0), 3, 8, 1, column_sums=sums)


def sets_of(compressed) -> list[list[int]]:
    n = int(compressed.lengths[0])
    return [torch.nonzero(row).flatten().tolist() for row in compressed.values[0, :n]]


@pytest.mark.parametrize(
    ("linkage", "threshold", "protection", "expected"),
    [
        # Neighbours 20 degrees apart (cosine 0.94) chain into one set; 80 and 170 degrees do not meet.
        ("chain", 0.75, (0.0, 0.0), [[0, 1, 2, 3, 4], [5, 6, 7]]),
        # Anchored at token 4 (80 degrees), 60 and 40 degrees are within arccos 0.75 = 41.4, 20 is not.
        ("anchor", 0.75, (0.0, 0.0), [[0, 1], [2, 3, 4], [5, 6, 7]]),
        # arccos 0.95 = 18.2 degrees.
        ("chain", 0.95, (0.0, 0.0), [[0], [1], [2], [3], [4], [5, 6, 7]]),
        # arccos 0.98 = 11.5 degrees: 170 is within 10 of 180 but not of the anchor, 182.
        ("chain", 0.98, (0.0, 0.0), [[0], [1], [2], [3], [4], [5, 6, 7]]),
        ("anchor", 0.98, (0.0, 0.0), [[0], [1], [2], [3], [4], [5], [6, 7]]),
        # The last token and, among the others, the most attended (token 5) are protected and break the chain.
        ("chain", 0.75, (0.125, 0.125), [[0, 1, 2, 3, 4], [5], [6], [7]]),
        # Tokens 5 and 6 are: what is left of the second set is its last token alone.
        ("chain", 0.75, (0.0, 0.25), [[0, 1, 2, 3, 4], [5], [6], [7]]),
    ],
)
def test_sets_of_the_paper_by_hand(linkage, threshold, protection, expected):
    protected = {"recent_fraction": protection[0], "topk_fraction": protection[1]}
    policy = KVMerger(budget_mode="threshold", linkage=linkage, threshold=threshold, **protected)
    compressed = policy.compress(hand_layer(), 8)
    assert sets_of(compressed) == expected
    scores = hand_layer().column_sums[0].tolist()
    assert compressed.positions[0].tolist() == [max(s, key=lambda i: scores[i]) for s in expected]


def test_merged_slot_by_hand():
    policy = KVMerger(budget_mode="threshold", sigma=1.0, recent_fraction=0.0, topk_fraction=0.0)
    layer = hand_layer()
    compressed = policy.compress(layer, 8)
    squared = [2 - 2 * math.cos(math.radians(angle)) for angle in (0, 10, 12)]  # distances to the pivot, token 5
    g = [math.exp(-d / 2) for d in squared]
    expected = [3 * g_i / sum(g) for g_i in g]
    assert compressed.values[0, 1, 5:].tolist() == pytest.approx(expected, rel=1e-5)
    key = sum(w / 3 * layer.keys[0, 5 + i] for i, w in enumerate(expected))
    assert compressed.keys[0, 1].tolist() == pytest.approx(key.tolist(), rel=1e-5)


def test_exact_ties_go_to_the_later_pair():
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).unsqueeze(0)
    layer = LayerStates(keys, torch.eye(4).unsqueeze(0), 3, 8, 1, column_sums=torch.ones(1, 4))
    compressed = KVMerger(recent_fraction=0.0, topk_fraction=0.0, pivot="last").compress(layer, 3)
    assert compressed.positions[0].tolist() == [0, 1, 3]


def test_protected_tokens_survive_unmerged():
    layer = make_layer(2, 2, 100, correlated=True)
    compressed = KVMerger(budget=0.5, whole_first_layers=0, whole_last_layers=0).compress(layer, 50)
    assert torch.equal(compressed.keys[:, -17:], layer.keys[:, -17:])
    assert torch.equal(compressed.values[:, -17:], layer.values[:, -17:])
    for h in range(2):
        for position in layer.column_sums[h, :83].topk(12).indices.tolist():
            slot = compressed.positions[h].tolist().index(position)
            assert torch.equal(compressed.keys[h, slot], layer.keys[h, position])


def test_protected_tokens_that_cut_everything_apart_stay_within_the_budget():
    layer = make_layer(1, 1, 60, correlated=True)
    layer.column_sums = (torch.arange(60) % 2).float().unsqueeze(0)  # every other token is a heavy one
    policy = KVMerger(recent_fraction=0.0, topk_fraction=0.4)
    assert policy.protected_counts(60, 30) == (0, 14)  # 24 protected tokens would leave 25 runs and only 6 slots
    compressed = policy.compress(layer, 30)
    for position in range(33, 60, 2):
        slot = compressed.positions[0].tolist().index(position)
        assert torch.equal(compressed.values[0, slot], layer.values[0, position])


def test_protection_schedule():
    def counts(budget: float, slots: int | None = None, **options) -> tuple[int, int]:
        return KVMerger(budget=budget, **options).protected_counts(1000, slots)

    assert counts(0.5) == (170, 120)
    assert counts(0.35) == (80, 20)
    assert counts(0.425) == (125, 70)
    assert counts(0.2) == (80, 20)
    assert counts(0.9) == (170, 120)
    assert counts(0.5, recent_fraction=0.3, topk_fraction=0.01) == (300, 10)
    assert counts(0.5, slots=411) == (170, 120)
    assert counts(0.5, slots=206) == (85, 60)  # half of 410 + 1: both shares are halved
    assert counts(0.5, slots=1) == (0, 0)


def test_whole_layers_count_towards_the_budget():
    policy = KVMerger(budget=0.35)
    budgets = policy.layer_budgets(1000, 32)
    assert [i for i, slots in enumerate(budgets) if slots == 1000] == [0, 1, 31]
    assert sum(budgets) == 32 * 350
    assert set(budgets[2:31]) == {282, 283}
    for index in (0, 1, 31):
        layer = make_layer(2, 2, 40, layer_index=index, n_layers=32)
        assert torch.equal(policy.compress(layer, 40).keys, layer.keys)
    assert KVMergerBias(budget=0.35).layer_budgets(1000, 32) == [350] * 32
    assert KVMerger(budget=1.0).layer_budgets(77, 4) == [77] * 4


def test_impossible_budget_names_value_limit_and_remedy():
    message = (
        r"budget 0.05 of 1000 tokens in 32 layers = 1600 .* 3000 for 3 whole layers and at least 29 .* whole_first"
    )
    with pytest.raises(BudgetError, match=message):
        KVMerger(budget=0.05).layer_budgets(1000, 32)
    with pytest.raises(BudgetError, match="whole_first_layers"):
        KVMerger(budget=0.5, whole_first_layers=3).layer_budgets(1000, 3)


def test_bias_variant_differs_in_defaults_only():
    assert KVMergerBias.name == "kvmerger_bias"
    same = KVMerger(value_scale="log_bias", whole_first_layers=0, whole_last_layers=0)
    assert dataclasses.asdict(KVMergerBias()) == dataclasses.asdict(same)
    assert KVMergerBias().options() == {}
    assert same.options() == {"value_scale": "log_bias", "whole_first_layers": 0, "whole_last_layers": 0}


def test_half_precision_is_rounded_once():
    layer = make_layer(4, 2, 90, correlated=True, dtype=torch.bfloat16)
    exact = dataclasses.replace(layer, keys=layer.keys.float(), values=layer.values.float())
    half, single = (KVMerger(budget=0.5).compress(states, 40) for states in (layer, exact))
    assert half.keys.dtype == torch.bfloat16
    assert torch.equal(half.keys, single.keys.bfloat16())
    assert torch.equal(half.values, single.values.bfloat16())


def test_random_pivots_depend_on_seed_and_layer():
    scores = torch.zeros(2, 50)
    layers = [make_layer(2, 2, 50, seed=seed, layer_index=index) for seed, index in [(0, 3), (1, 3), (0, 4)]]
    drawn = [KVMerger(pivot="random").pivot_scores(scores, layer) for layer in layers]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_identical_keys_and_zero_keys_stay_finite():
    for keys in (torch.ones(1, 30, 4), torch.zeros(1, 30, 4)):
        layer = LayerStates(keys, torch.randn(1, 30, 4), 3, 8, 1, column_sums=torch.rand(1, 30))
        for options in ({}, {"sigma_mode": "mean_distance"}, {"budget_mode": "threshold"}, {"linkage": "anchor"}):
            compressed = KVMerger(**options).compress(layer, 10)
            assert torch.cat([compressed.keys, compressed.values]).isfinite().all()
