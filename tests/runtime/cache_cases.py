"""Two small policies and a small model, to fill caches with and to decode through them."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.methods.base import CONSTANT, CompressedLayer, LayerStates, Policy
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.cache import RaggedCache

N_HEADS, HEAD_DIM, N_LAYERS = 6, 16, 3


@dataclass(frozen=True, kw_only=True)
class Whole(Policy):
    """Keeps everything."""

    name: ClassVar[str] = "whole"

    def compress(self, layer, budget_tokens):
        positions = torch.arange(layer.n_tokens).expand(layer.n_kv_heads, -1)
        return CompressedLayer(layer.keys, layer.values, positions)


@dataclass
class Scores:
    scores: torch.Tensor
    seed: torch.Tensor = field(metadata=CONSTANT)


@dataclass(frozen=True, kw_only=True)
class OldestOut(Policy):
    """Keeps the last slots; a new token replaces the oldest. State counts attention, as H2O's does."""

    name: ClassVar[str] = "oldest_out"
    steps: ClassVar[bool] = True

    def compress(self, layer, budget_tokens):
        kept = slice(layer.n_tokens - budget_tokens, None)
        positions = torch.arange(layer.n_tokens)[kept].expand(layer.n_kv_heads, -1)
        scores = torch.zeros(layer.n_kv_heads, budget_tokens)
        return CompressedLayer(
            layer.keys[:, kept],
            layer.values[:, kept],
            positions,
            state=Scores(scores, torch.tensor(7)),
        )

    def step(self, slots, attention):
        n_heads, n_slots, _ = slots.keys.shape
        assert slots.state.scores.shape == (n_heads, n_slots)
        assert (slots.state.scores[:, -1] == 0).all()
        assert int(slots.state.seed) == 7
        slots.state.scores += attention.unflatten(0, (n_heads, -1)).mean(1)
        oldest = (slots.step_index % (n_slots - 1)).view(1)
        for tensor in (slots.keys, slots.values, slots.state.scores):
            tensor.index_copy_(1, oldest, tensor[:, -1:].clone())


def make_model(n_kv_heads, **options):
    torch.manual_seed(n_kv_heads)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=N_HEADS * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=256,
        attn_implementation="eager",
        initializer_range=0.2,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def make_cache(model, **options):
    config = model.config
    return RaggedCache(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        HEAD_DIM,
        torch.float32,
        **options,
    )


def states_of(past, layer_index, n_query_heads=N_HEADS):
    layer = past.layers[layer_index]
    return LayerStates(layer.keys[0], layer.values[0], layer_index, N_LAYERS, n_query_heads)


def add_prompt(cache, policy, past, n_tokens, room_tokens):
    row = cache.add_row(policy, n_tokens, room_tokens)
    for index in range(N_LAYERS):
        states = states_of(past, index)
        cache.write(index, row, policy.compress(states, policy.budget_tokens(n_tokens)))
    return row


@torch.no_grad()
def decode(model, cache, tokens):
    """Feed `tokens (B, n)` one by one; returns the logits `(B, n, vocabulary)`."""
    logits = []
    with attention_implementation(model):
        for column in tokens.unbind(1):
            out = model(
                input_ids=column[:, None],
                position_ids=cache.position_ids,
                past_key_values=cache,
                use_cache=True,
                attention_context=cache,
            )
            assert out.past_key_values is cache
            cache.advance()
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)
