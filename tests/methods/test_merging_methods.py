"""Parts of the methods that merge evicted tokens into kept ones, and merges worked by hand."""

import pytest
import torch
from policy_inputs import causal_attention, make_layer, relative_rms
from twins import assert_as_twin

from kvbench.methods.d2o import D2O
from kvbench.methods.keepkv import KeepKV
from kvbench.methods.weightedkv import WeightedKV
from kvbench.ops import merging
from kvbench.ops.merging import nearest_kept, sum_by_slot
from kvbench.ops.selection import other_positions
from kvbench.reference.merged import most_similar


@pytest.mark.parametrize("block", [1024, 7, 1])
def test_nearest_kept_key_as_in_the_loop_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(merging, "BLOCK_TOKENS", block)
    layer = make_layer(2, 2, 50, seed=5, correlated=True)
    kept = torch.stack([torch.arange(0, 50, 3), torch.arange(33, 50)])
    evicted = other_positions(kept, 50)
    cosines, slots = nearest_kept(layer.keys, kept, evicted)
    for head in range(2):
        assert sorted(kept[head].tolist() + evicted[head].tolist()) == list(range(50))
        expected = [most_similar(layer.keys[head], e, kept[head].tolist()) for e in evicted[head].tolist()]
        assert kept[head, slots[head]].tolist() == [c for c, _ in expected]
        assert relative_rms(cosines[head], torch.tensor([cosine for _, cosine in expected])) < 1e-6


def test_rows_are_summed_by_slot():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 40, 5, generator=generator)
    slots = torch.randint(7, (3, 40), generator=generator)
    slots[slots == 2] = 3  # a slot that nobody joins
    sums = sum_by_slot(rows, slots, 7)
    for head in range(3):
        for slot in range(7):
            assert relative_rms(sums[head, slot], rows[head, slots[head] == slot].sum(0)) < 1e-6
    assert not sums[:, 2].any()
    assert torch.equal(sum_by_slot(rows[:, :0], slots[:, :0], 7), torch.zeros(3, 7, 5))


@pytest.mark.parametrize("recent_share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n_slots", [6, 7, 20, 39])
def test_sinks_recent_and_best_tokens_stay(n_slots, recent_share):
    assert_as_twin(KeepKV(recent_share=recent_share, merge=False), make_layer(4, 2, 40, seed=2), n_slots)


def test_a_token_below_the_mean_cosine_is_dropped_and_one_above_is_averaged_by_its_cosine():
    layer = make_layer(1, 1, 6, head_dim=2)
    layer.keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [-0.8, 0.6], [0.0, -1.0]]])
    layer.values = torch.arange(6.0).reshape(1, 6, 1).expand(1, 6, 2)
    layer.column_sums = torch.tensor([[9.0, 8.0, 2.0, 1.0, 1.0, 9.0]])
    compressed = D2O(start_tokens=1, recent_share=0.3).compress(layer, 3)
    assert compressed.positions.tolist() == [[0, 1, 5]]
    # nearest cosines: token 2 0.8 (to 1), token 3 0.8 (to 0), token 4 0.6 (to 1); their mean is 0.733
    torch.testing.assert_close(compressed.values[0, :, 0], torch.tensor([(0 + 0.8 * 3) / 2, (1 + 0.8 * 2) / 2, 5.0]))
    torch.testing.assert_close(compressed.keys[0], torch.tensor([[0.82, 0.24], [0.24, 0.82], [0.0, -1.0]]))


def test_values_go_forwards_by_their_weight():
    layer = make_layer(1, 1, 10)
    layer.values = torch.arange(10.0).reshape(1, 10, 1).expand(1, 10, 16)
    layer.column_sums = layer.query_counts * torch.tensor([[1, 1, 1, 1, 1, 3, 9, 1, 2, 1.0]])
    compressed = WeightedKV(budget=0.4, start_tokens=1, recent_share=0.25).compress(layer, 4)
    assert compressed.positions.tolist() == [[0, 5, 6, 9]]
    expected = [0.0, (1 + 2 + 3 + 4 + 3 * 5) / 7, 6.0, (7 + 2 * 8 + 9) / 4]
    torch.testing.assert_close(compressed.values[0, :, 0], torch.tensor(expected))


@pytest.mark.parametrize(("group_reduce", "expected"), [("mean", 0.4), ("max", 0.6), ("first", 0.2)])
def test_a_group_s_query_heads_share_one_row(group_reduce, expected):
    layer = make_layer(2, 1, 20)
    layer.window_attention = torch.tensor([0.2, 0.6]).reshape(2, 1, 1).expand(2, 8, 20)
    window = KeepKV(group_reduce=group_reduce, observation_tokens=5, row_scale="softmax").window(layer)
    torch.testing.assert_close(window, torch.full((1, 5, 20), expected))


def test_a_token_s_estimate_counts_only_the_queries_that_see_it():
    layer = make_layer(2, 2, 30, seed=1)
    visible = torch.ones(30, 30).tril()[-8:]
    layer.window_attention = (0.25 * visible).expand(2, 8, 30)
    policy = KeepKV(observation_tokens=8, row_scale="softmax")
    torch.testing.assert_close(policy.attention_estimates(layer), torch.full((2, 30), 0.25))


def test_raw_exponentials_that_overflow_have_the_same_ratios():
    layer = make_layer(4, 2, 60, seed=2, correlated=True)
    expected = KeepKV(budget=0.4).compress(layer, 24)
    layer.extras["window_logsumexp"] = layer.extras["window_logsumexp"] + 100.0  # exp(100) is no fp32 number
    got = KeepKV(budget=0.4).compress(layer, 24)
    assert torch.equal(got.positions, expected.positions)
    assert relative_rms(got.values, expected.values) < 1e-3
    softmax = KeepKV(budget=0.4, row_scale="softmax").compress(layer, 24)
    assert not torch.equal(got.positions, softmax.positions)  # queries of large logits decide


def test_merging_equal_keys_loses_nothing():
    generator = torch.Generator().manual_seed(3)
    distinct, queries = torch.randn(2, 9, 16, generator=generator), torch.randn(4, 45, 16, generator=generator)
    layer = make_layer(4, 2, 45, seed=4)
    layer.keys = distinct.repeat(1, 5, 1)
    layer.window_attention = causal_attention(queries, layer.keys)[:, -1:]  # one query: equal keys, equal weights
    policy = KeepKV(budget=0.5, observation_tokens=1)
    compressed = policy.compress(layer, 22)
    kept = [{int(p) % 9 for p in head} for head in compressed.positions]
    assert kept == [set(range(9))] * 2  # an equal key was kept for every evicted one
    assert float(compressed.bias.exp().sum()) == pytest.approx(2 * 45)  # every token has its vote
    probe = torch.randn(2, 7, 16, generator=generator)
    full = torch.softmax(probe @ layer.keys.transpose(1, 2), -1) @ layer.values
    small = torch.softmax(probe @ compressed.keys.transpose(1, 2) + compressed.bias.unsqueeze(1), -1)
    assert relative_rms(small @ compressed.values, full) < 1e-5
