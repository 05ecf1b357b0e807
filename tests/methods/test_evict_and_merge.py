"""The parts that merging methods share: who is evicted, which kept key is nearest, sums without atomics."""

import pytest
import torch
from policy_inputs import make_layer, relative_rms

from kvbench.methods.keepkv import KeepKV
from kvbench.ops import merging
from kvbench.ops.merging import nearest_kept, sum_by_slot
from kvbench.ops.selection import other_positions
from kvbench.reference.merged import keep_and_evict, most_similar


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
    layer = make_layer(4, 2, 40, seed=2)
    policy = KeepKV(recent_share=recent_share, merge=False)
    compressed = policy.compress(layer, n_slots)
    for head, scores in enumerate(policy.scores(layer).tolist()):
        assert compressed.positions[head].tolist() == keep_and_evict(scores, n_slots, 4, recent_share)[0]
        assert torch.equal(compressed.keys[head], layer.keys[head, compressed.positions[head]])
    assert compressed.bias is None
