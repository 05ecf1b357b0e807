"""What every method owes its callers, whatever it keeps: exact budgets, the same answer twice, untouched inputs."""

import copy
import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import make_layer

from kvbench.errors import BudgetError
from kvbench.methods.base import CompressedLayer, LayerStates, Policy, constant_state, slot_state
from kvbench.methods.registry import build_policy, load_policies
from kvbench.methods.snapkv import SnapKV
from kvbench.testing import decode_slots

N_LAYERS = 6
SHORT_PROMPTS = {  # windows and whole layers that leave something to choose on prompts of some fifty tokens
    "kvmerger": {"whole_first_layers": 1, "whole_last_layers": 0},
    "snapkv": {"observation_tokens": 4, "kernel_tokens": 3},
    "knorm": {"whole_first_layers": 1},
    "pyramidkv": {"observation_tokens": 4},
    "adakv": {"base": SnapKV(observation_tokens=4)},
    "d2o": {"start_tokens": 1, "whole_first_layers": 1, "whole_last_layers": 0},
    "expected_attention": {"future_tokens": 16},
}
COMPRESSED = [name for name in load_policies() if name != "full"]


def method(name: str, budget: float) -> Policy:
    return build_policy(name, {"budget": budget, **SHORT_PROMPTS.get(name, {})})


def model_layers(heads: tuple[int, int], n_tokens: int, dtype: torch.dtype = torch.float32) -> list[LayerStates]:
    return [
        make_layer(
            *heads, n_tokens, seed=index, correlated=True, layer_index=index, n_layers=N_LAYERS, head_dim=8, dtype=dtype
        )
        for index in range(N_LAYERS)
    ]


def compress_all(policy: Policy, layers: list[LayerStates]) -> list[CompressedLayer]:
    budgets = policy.layer_budgets(layers[0].n_tokens, N_LAYERS)
    return [policy.compress(layer, slots) for layer, slots in zip(layers, budgets, strict=True)]


def tensors(compressed: CompressedLayer) -> dict[str, torch.Tensor]:
    named = {name: getattr(compressed, name) for name in ("keys", "values", "positions", "lengths", "bias")}
    named.update(slot_state(compressed.state) | constant_state(compressed.state))
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@pytest.mark.parametrize("name", COMPRESSED)
@settings(max_examples=8, deadline=None)
@given(
    n_tokens=st.integers(41, 75), budget=st.floats(0.35, 1.0), heads=st.sampled_from([(2, 2), (4, 2), (3, 1), (6, 3)])
)
def test_the_slots_kept_are_the_budget_to_the_last_one(name, n_tokens, budget, heads):
    policy = method(name, budget)
    layers = model_layers(heads, n_tokens)
    compressed = compress_all(policy, layers)
    assert sum(c.n_slots for c in compressed) == N_LAYERS * heads[1] * policy.budget_tokens(n_tokens)
    for layer in compressed:
        lengths = [layer.keys.shape[1]] * heads[1] if layer.lengths is None else layer.lengths.tolist()
        assert max(lengths) == layer.keys.shape[1]
        for head, length in enumerate(lengths):
            kept = layer.positions[head, :length].tolist()
            assert kept == sorted(set(kept))  # each token once, in order
            assert kept[0] >= 0
            assert kept[-1] < n_tokens


@pytest.mark.parametrize("name", COMPRESSED)
def test_results_repeat_and_inputs_are_not_modified(name):
    layers = model_layers((4, 2), 53)
    before = copy.deepcopy(layers)
    policy = method(name, 0.4)
    first, second = compress_all(policy, layers), compress_all(policy, layers)
    for one, other in zip(first, second, strict=True):
        assert tensors(one).keys() == tensors(other).keys()
        assert all(torch.equal(tensor, tensors(other)[key]) for key, tensor in tensors(one).items())
    if policy.steps:
        slots = decode_slots(first[0])
        policy.step(slots, torch.rand(4, slots.keys.shape[1]))
    for layer, original in zip(layers, before, strict=True):
        for field, tensor in vars(original).items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(getattr(layer, field), tensor), field
        assert all(torch.equal(layer.extras[key], tensor) for key, tensor in original.extras.items())


@pytest.mark.parametrize("name", COMPRESSED)
def test_half_precision_is_stored_and_fp32_is_counted(name):
    for compressed in compress_all(method(name, 0.4), model_layers((4, 2), 53, torch.bfloat16)):
        assert compressed.keys.dtype == compressed.values.dtype == torch.bfloat16
        assert compressed.bias is None or compressed.bias.dtype == torch.float32
        assert all(tensor.dtype == torch.float32 for tensor in slot_state(compressed.state).values())


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_whole_budget_keeps_the_prompt_as_it_is(name):
    layers = model_layers((4, 2), 41)
    for layer, compressed in zip(layers, compress_all(method(name, 1.0), layers), strict=True):
        assert torch.equal(compressed.keys, layer.keys)
        assert torch.equal(compressed.values, layer.values)
        assert torch.equal(compressed.positions, torch.arange(41).expand(2, -1))
        assert compressed.bias is None or not compressed.bias.any()


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_a_refused_budget_is_told_helps(name):
    options = {"whole_first_layers": 2} if name == "knorm" else {}
    for budget, n_tokens, n_layers in itertools.product((0.01, 0.2, 0.35, 0.5, 0.99), (1, 7, 32, 40, 97), (1, 3, 8)):
        policy = build_policy(name, {"budget": budget, **options})
        try:
            policy.layer_budgets(n_tokens, n_layers)
        except BudgetError as error:
            message = str(error)
            if larger := re.search(r"raise the budget to (0\.\d+)", message):
                dataclasses.replace(policy, budget=float(larger[1])).layer_budgets(n_tokens, n_layers)
            else:
                assert "set budget=1, which keeps everything" in message
            if longer := re.search(r"use prompts of at least (\d+) tokens", message):
                policy.layer_budgets(int(longer[1]), n_layers)
            for option in re.findall(r"whole_\w+_layers", message):
                assert getattr(policy, option) > 0
