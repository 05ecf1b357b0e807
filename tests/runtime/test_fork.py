"""Forking a layer into arms: the same slots as each policy alone, in the order of the arms, on both kinds of device."""

import pytest
import torch

from kvbench.errors import BudgetError
from kvbench.methods.base import LayerStates
from kvbench.methods.cam import CaM
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.methods.kvmerger import KVMerger
from kvbench.runtime.fused import LayerFork

POLICIES = (Full(), H2O(budget=0.5), CaM(budget=0.35), KVMerger(budget=0.5, whole_first_layers=0))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_tokens", [40, 300])
def test_every_arm_gets_what_it_would_get_alone(device, n_tokens):
    written = []
    fork = LayerFork(POLICIES, n_tokens, 6, lambda *what: written.append(what))
    for layer_index in range(6):
        keys, values = torch.randn(2, 2, n_tokens, 16).to(device)
        states = LayerStates(keys, values, layer_index, 6, 4, column_sums=torch.rand(4, n_tokens).to(device))
        fork(states)
        for policy, (arm, layer, kept) in zip(POLICIES, written[-4:], strict=True):
            assert (POLICIES[arm], layer) == (policy, layer_index)
            alone = policy.compress(states, policy.layer_budgets(n_tokens, 6)[layer_index])
            for name in ("keys", "values", "positions"):
                assert torch.equal(getattr(kept, name), getattr(alone, name))
        assert torch.equal(states.keys, keys)
    assert len(written) == 24


def test_impossible_budget_is_refused_before_a_layer_is_computed():
    with pytest.raises(BudgetError, match="h2o needs at least 4"):
        LayerFork([H2O(budget=0.1)], 20, 6, lambda *what: None)
