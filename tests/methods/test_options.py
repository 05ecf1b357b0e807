"""Option checks accept the ends they name and nothing beyond; group reductions by hand."""

import pytest
import torch

from kvbench.errors import ConfigError
from kvbench.methods.options import reduce_groups, require_bool, require_choice, require_count, require_number


@pytest.mark.parametrize("value", [0.0, 1, 0.5])
def test_numbers_inside(value):
    require_number("share", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_numbers_outside(value):
    with pytest.raises(ConfigError, match=r"share=.* is not in \[0, 1\]"):
        require_number("share", value, 0.0, 1.0)


def test_open_ends():
    with pytest.raises(ConfigError, match=r"share=0.0 is not in \(0, 1\]"):
        require_number("share", 0.0, 0.0, 1.0, include_low=False)
    with pytest.raises(ConfigError, match=r"share=1.0 is not in \[0, 1\)"):
        require_number("share", 1.0, 0.0, 1.0, include_high=False)


def test_counts_choices_and_switches():
    require_count("n", 3, minimum=3)
    require_choice("mode", "a", ("a", "b"))
    require_bool("merge", False)
    for value in (2, 3.0, True, "3"):
        with pytest.raises(ConfigError, match="is not an integer >= 3"):
            require_count("n", value, minimum=3)
    with pytest.raises(ConfigError, match="mode='c' is not one of a, b"):
        require_choice("mode", "c", ("a", "b"))
    with pytest.raises(ConfigError, match="merge=1 is not true or false"):
        require_bool("merge", 1)


def test_group_reductions():
    scores = torch.tensor([[1.0, 5.0], [3.0, 1.0], [0.0, 0.0], [2.0, 4.0]])
    assert reduce_groups(scores, 2, "mean").tolist() == [[2.0, 3.0], [1.0, 2.0]]
    assert reduce_groups(scores, 2, "max").tolist() == [[3.0, 5.0], [2.0, 4.0]]
    assert reduce_groups(scores, 2, "first").tolist() == [[1.0, 5.0], [0.0, 0.0]]
    with pytest.raises(ConfigError, match="group_reduce='median' is not one of mean, max, first"):
        reduce_groups(scores, 2, "median")
