"""The full policy keeps everything and refuses to pretend otherwise."""

import pytest
import torch
from policy_inputs import make_layer

from kvbench.errors import ConfigError
from kvbench.methods.full import Full


def test_everything_is_kept():
    layer = make_layer(4, 2, 19)
    policy = Full()
    assert policy.layer_budgets(19, 3) == [19, 19, 19]
    compressed = policy.compress(layer, 19)
    assert torch.equal(compressed.keys, layer.keys)
    assert torch.equal(compressed.values, layer.values)
    assert torch.equal(compressed.positions, torch.arange(19).expand(2, -1))
    assert compressed.n_slots == 38
    assert not policy.steps
    assert not policy.needs


def test_other_budgets_are_refused():
    with pytest.raises(ConfigError, match=r"budget=0\.5 with method full"):
        Full(budget=0.5)
