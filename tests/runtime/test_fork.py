"""Forking a layer into arms: the same slots as each policy alone, in the order of the arms, on both kinds of device."""

import pytest
import torch

from kvbench.errors import BudgetError
from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.methods.cam import CaM
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.methods.kvmerger import KVMerger
from kvbench.runtime.fused import CONCURRENT_TOKENS, LayerFork

POLICIES = (Full(), H2O(budget=0.5), CaM(budget=0.35), KVMerger(budget=0.5, whole_first_layers=0))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def random_states(n_tokens: int, layer_index: int, device: str) -> LayerStates:
    generator = torch.Generator().manual_seed(layer_index)
    keys, values = (torch.randn(2, n_tokens, 16, generator=generator) for _ in range(2))
    sums = torch.rand(4, n_tokens, generator=generator)
    return LayerStates(keys.to(device), values.to(device), layer_index, 6, 4, column_sums=sums.to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_tokens", [40, 300])
def test_every_arm_gets_what_it_would_get_alone(device, n_tokens):
    written: list[tuple[int, int, CompressedLayer]] = []
    fork = LayerFork(POLICIES, n_tokens, 6, lambda *what: written.append(what))
    for layer_index in range(6):
        states = random_states(n_tokens, layer_index, device)
        before = states.keys.clone()
        fork(states)
        assert torch.equal(states.keys, before)
    assert [(arm, layer) for arm, layer, _ in written] == [(arm, layer) for layer in range(6) for arm in range(4)]
    assert n_tokens <= CONCURRENT_TOKENS
    for arm, layer_index, compressed in written:
        policy = POLICIES[arm]
        alone = policy.compress(
            random_states(n_tokens, layer_index, device), policy.layer_budgets(n_tokens, 6)[layer_index]
        )
        assert torch.equal(compressed.keys, alone.keys)
        assert torch.equal(compressed.values, alone.values)
        assert torch.equal(compressed.positions, alone.positions)


def test_impossible_budget_is_refused_before_a_layer_is_computed():
    with pytest.raises(BudgetError, match="h2o needs at least 4"):
        LayerFork([H2O(budget=0.1)], 20, 6, lambda *what: None)
