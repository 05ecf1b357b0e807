"""Rows that grow and are chosen anew must hold what they held: slots, biases, states, ragged heads."""

from dataclasses import dataclass, field

import pytest
import torch

from kvbench.methods.base import CONSTANT, CompressedLayer, DecodeSlots, Policy
from kvbench.methods.full import Full
from kvbench.runtime.cache import RaggedCache

N_LAYERS, N_QUERY_HEADS, N_KV_HEADS, HEAD_DIM = 2, 4, 2, 8
PROMPTS = [5, 9, 7]


@dataclass
class Marks:
    marks: torch.Tensor
    offset: torch.Tensor = field(metadata=CONSTANT)


class Stepping(Policy):
    """Keeps its size: the new token replaces the first slot, and its state counts the steps."""

    name = "stepping"
    steps = True

    def compress(self, layer, budget_tokens):
        raise NotImplementedError  # rows are written by hand here: reaching this is a failure

    def step(self, slots: DecodeSlots, attention: torch.Tensor) -> None:
        slots.keys[:, 0], slots.values[:, 0] = slots.keys[:, -1], slots.values[:, -1]
        slots.state.marks[:, 0] += 1 + slots.step_index + slots.state.offset


def compressed(n_slots, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, N_KV_HEADS, n_slots, HEAD_DIM, generator=generator)
    layer = CompressedLayer(keys, values, torch.zeros(N_KV_HEADS, n_slots, dtype=torch.int64))
    if kind in ("bias", "ragged"):
        layer.bias = torch.randn(N_KV_HEADS, n_slots, generator=generator)
    if kind == "ragged":
        layer.lengths = torch.tensor([n_slots - 2, n_slots])
    if kind == "state":
        layer.state = Marks(torch.zeros(N_KV_HEADS, n_slots), torch.tensor(3))
    return layer


def filled(kind, which, **room):
    """Rows with the prompts `which`, in that order."""
    rows = RaggedCache(N_LAYERS, N_QUERY_HEADS, N_KV_HEADS, HEAD_DIM, torch.float32, "torch", max_rows=len(which))
    for index in which:
        rows.add_row(Stepping() if kind == "state" else Full(), PROMPTS[index], **room)
    for layer in range(N_LAYERS):
        for row, index in enumerate(which):
            rows.write(layer, row, compressed(PROMPTS[index], kind, seed=10 * index + layer))
    return rows


def step(rows, which, token):
    """One token for every row; what it is depends on the prompt the row began with and on the step alone."""
    outputs = []
    rows.make_room()
    for layer in range(N_LAYERS):
        generators = [torch.Generator().manual_seed(1000 * token + 10 * index + layer) for index in which]
        keys, values = (
            torch.stack([torch.randn(N_KV_HEADS, 1, HEAD_DIM, generator=g) for g in generators]) for _ in "kv"
        )
        query = torch.stack([torch.randn(N_QUERY_HEADS, 1, HEAD_DIM, generator=g) for g in generators])
        rows.update(keys, values, layer)
        outputs.append(rows.attend(layer, query, keys, values, 0.5))
    rows.advance()
    return torch.stack(outputs)


KINDS = ["plain", "bias", "ragged", "state"]


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_rows_are_as_if_they_had_been_there_from_the_start(kind):
    which = [0, 1, 2]
    rows = filled(kind, which)
    for token in range(3):
        step(rows, which, token)
    rows.choose([2, 0, 2])
    chosen = [2, 0, 2]
    expected = filled(kind, chosen)
    for token in range(3):
        step(expected, chosen, token)
    for token in range(3, 7):
        torch.testing.assert_close(step(rows, chosen, token), step(expected, chosen, token))
    rows.choose([0])
    assert rows.rows == 1
    torch.testing.assert_close(step(rows, [2], 7), step(expected, chosen, 7)[:, :1])
    assert rows.get_seq_length() == PROMPTS[2] + 8


@pytest.mark.parametrize("kind", KINDS)
def test_room_is_made_whenever_it_is_used_up(kind):
    which = [1, 0]
    ample = filled(kind, which)
    tight = filled(kind, which, room_tokens=3)
    for token in range(11):
        torch.testing.assert_close(step(tight, which, token), step(ample, which, token))
    assert tight.get_seq_length() == ample.get_seq_length() == 9 + 11


def test_copied_rows_are_independent():
    rows = filled("plain", [0, 1])
    step(rows, [0, 1], 0)
    rows.choose([0, 0])
    twins = step(rows, [0, 0], 1)
    torch.testing.assert_close(twins[:, 0], twins[:, 1])
    apart = step(rows, [0, 2], 2)  # they get different tokens now
    assert not torch.equal(apart[:, 0], apart[:, 1])
    reference = filled("plain", [0])
    for token in range(3):
        expected = step(reference, [0], token)
    torch.testing.assert_close(apart[:, :1], expected)


def test_choosing_all_rows_in_order_copies_nothing():
    rows = filled("plain", [0, 1])
    step(rows, [0, 1], 0)
    layer = rows._layers[0]
    rows.choose([0, 1])
    assert rows._layers[0] is layer


def test_rows_that_are_not_there_are_refused():
    rows = filled("plain", [0, 1])
    with pytest.raises(ValueError, match=r"rows \[0, 2\] are not at most 2 indices below 2"):
        rows.choose([0, 2])
    with pytest.raises(ValueError, match=r"rows \[0, 1, 0\] are not at most 2 indices"):
        rows.choose([0, 1, 0])
