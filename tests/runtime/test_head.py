"""The output matrix with rows filled up: the same logits, and nothing left behind."""

import pytest
import torch
from torch import nn

from kvbench.runtime.patches import padded_head


class Model:
    """As much of a model as the block asks for; it notes how many rows its output matrix sees."""

    def __init__(self):
        torch.manual_seed(0)
        self.head = nn.Linear(12, 40, bias=False)
        self.seen = []
        self.head.register_forward_hook(lambda module, arguments, output: self.seen.append(len(arguments[0])))

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(("n_rows", "seen"), [(1, 1), (2, 4), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8)])
@pytest.mark.parametrize("shape", [(1, 12), (12,)])
def test_same_logits_from_a_multiple_of_four_rows(n_rows, seen, shape):
    model = Model()
    hidden = torch.randn(n_rows, *shape)
    expected = hidden @ model.head.weight.T
    with padded_head(model):
        for _ in range(2):
            logits = model.head(hidden)
            assert logits.shape == expected.shape
            torch.testing.assert_close(logits, expected)
    assert model.seen == [seen, seen]


def test_nothing_is_left_after_an_error():
    model = Model()
    before = len(model.head._forward_hooks), len(model.head._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), padded_head(model):
        raise ZeroDivisionError
    assert (len(model.head._forward_hooks), len(model.head._forward_pre_hooks)) == before
    model.head(torch.randn(3, 12))
    assert model.seen == [3]


def test_a_model_without_an_output_matrix_is_left_alone():
    model = Model()
    model.get_output_embeddings = lambda: None
    with padded_head(model):
        model.head(torch.randn(3, 12))
    assert model.seen == [3]
