"""Selecting and copying kept slots, and links and starts of merging sets, on small inputs worked by hand."""

import torch
from policy_inputs import make_layer

from kvbench.ops import segments, selection
from kvbench.ops.segments import anchored_links, mergeable_cosines, protected_tokens, unit_keys
from kvbench.ops.selection import largest_by_recency


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


def test_largest_prefers_the_later_of_equals():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0, 1.0, 1.0, 1.0, 1.0]])
    assert largest_by_recency(scores, 2).nonzero().tolist() == [[0, 2], [0, 3], [1, 0], [1, 4]]
    per_row = torch.tensor([[1], [3]])
    assert largest_by_recency(scores, per_row).nonzero().tolist() == [[0, 3], [1, 0], [1, 3], [1, 4]]
    assert not largest_by_recency(scores, 0).any()


def test_protected_tokens_are_recent_or_most_attended():
    scores = torch.tensor([[5.0, 1.0, 4.0, 4.0, 9.0, 9.0]])
    assert protected_tokens(scores, n_recent=2, n_top=2)[0].tolist() == [True, False, False, True, True, True]
    assert not protected_tokens(scores, 0, 0).any()
    assert protected_tokens(scores, 6, 0).all()


def test_protected_tokens_cannot_be_linked():
    units = unit_keys(torch.ones(1, 5, 3))
    protected = torch.tensor([[False, False, True, False, False]])
    cosines = mergeable_cosines(units, protected, share_heads=False)
    assert cosines.isfinite()[0].tolist() == [False, True, False, False, True]


def test_shared_cosines_are_means_over_heads():
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    cosines = mergeable_cosines(unit_keys(keys), torch.zeros(1, 2, dtype=torch.bool), share_heads=True)
    assert cosines.shape == (1, 2)
    assert cosines[0, 1] == 0.5


def test_starts_of_ragged_heads_are_padded_with_the_length():
    links = torch.tensor([[False, True, False, True, True], [False, True, True, True, True]])
    assert segments.segment_starts(links, 2).tolist() == [[0, 2, 5], [0, 5, 5]]


def test_anchored_links_without_remembered_cosines_are_the_same(monkeypatch):
    units = unit_keys(torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(3)).cumsum(1))
    protected = torch.zeros(2, 60, dtype=torch.bool)
    protected[:, ::13] = True
    table = segments.cosine_table(units, False)
    remembered = [anchored_links(table, protected, threshold) for threshold in (0.9, 0.2, 0.9)]
    monkeypatch.setattr(segments, "CACHED_OFFSETS", 2)
    table = segments.cosine_table(units, False)
    assert torch.equal(anchored_links(table, protected, 0.9), remembered[0])
    assert torch.equal(anchored_links(table, protected, 0.2), remembered[1])
    assert torch.equal(remembered[0], remembered[2])
    assert 0 < remembered[0].sum() < remembered[1].sum()
