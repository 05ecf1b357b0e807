"""Projections of one input as one product: the same numbers, fewer products, and a model left as it was."""

import pytest
import torch
from torch import nn

from kvbench.runtime.patches import PackedProjections


class Block(nn.Module):
    """Attention projections as transformers names them, and one layer more."""

    def __init__(self, bias=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        sizes = {"q_proj": 12, "k_proj": 4, "v_proj": 4}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(8, size, bias=bias))
        self.o_proj = nn.Linear(12, 8, bias=bias)

    def forward(self, hidden):
        queries, keys, values = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        return hidden + self.o_proj(queries * torch.cat([keys, values, keys * values], -1))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def inside(model):
    """What can be seen of a model's modules: classes and attributes."""
    return [(type(module), sorted(vars(module))) for module in model.modules()]


def count_products(monkeypatch):
    from kvbench.runtime import patches

    seen = []
    monkeypatch.setattr(patches, "linear", lambda *a: seen.append(a[1].shape[0]) or nn.functional.linear(*a))
    return seen


@pytest.mark.parametrize("bias", [False, True])
def test_same_numbers_by_one_product_a_group(bias, monkeypatch):
    model = nn.Sequential(Block(bias, 0), Block(bias, 1))
    hidden = torch.randn(7, 1, 8)
    with torch.no_grad():
        expected, before, looks = model(hidden), state(model), inside(model)
        packed = PackedProjections(model)
        assert len(packed.packs) == 2
        seen = count_products(monkeypatch)
        for _ in range(2):
            with packed.active():
                torch.testing.assert_close(model(hidden), expected)
                assert state(model).keys() == before.keys()
            torch.testing.assert_close(model(hidden), expected)
    assert seen == [20] * 4
    assert inside(model) == looks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_are_moved_once_and_another_object_finds_them():
    model = Block()
    PackedProjections(model)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    again = PackedProjections(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    hidden = torch.randn(3, 1, 8)
    with torch.no_grad(), again.active():
        inner = model(hidden)
    with torch.no_grad():
        torch.testing.assert_close(inner, model(hidden))
        model.k_proj.weight.fill_(0.5)  # in place, so the pack sees it, too
        with again.active():
            torch.testing.assert_close(model.k_proj(hidden), hidden.sum(-1, keepdim=True).expand(3, 1, 4) * 0.5)


def test_order_of_calls_and_inputs_does_not_matter():
    model = Block()
    one, other = torch.randn(2, 3, 1, 8)
    with torch.no_grad():
        calls = [("v_proj", one), ("q_proj", other), ("k_proj", one), ("v_proj", other), ("q_proj", one)]
        expected = [getattr(model, name)(hidden) for name, hidden in calls]
        with PackedProjections(model).active():
            for (name, hidden), wanted in zip(calls, expected, strict=True):
                torch.testing.assert_close(getattr(model, name)(hidden), wanted)


def test_an_error_inside_leaves_the_model_as_it_was():
    model = Block()
    packed = PackedProjections(model)
    looks = inside(model)
    with pytest.raises(RuntimeError, match="shape"), packed.active():
        model(torch.randn(3, 1, 9))
    assert inside(model) == looks


class Other(nn.Linear):
    """Stands for a quantised or adapted layer."""


@pytest.mark.parametrize("spoil", ["class", "forward", "bias", "dtype", "shared"])
def test_layers_that_one_product_cannot_serve_are_left_alone(spoil):
    model = Block()
    if spoil == "class":
        model.k_proj = Other(8, 4, bias=False)
    elif spoil == "forward":
        model.k_proj.forward = lambda hidden: hidden[..., :4]
    elif spoil == "bias":
        model.k_proj = nn.Linear(8, 4, bias=True)
    elif spoil == "dtype":
        model.k_proj = model.k_proj.double()
    else:
        model.k_proj = model.v_proj
    assert PackedProjections(model).packs == []
