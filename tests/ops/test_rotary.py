"""Frequencies from a configuration are the model's own; queries turned back by them are those before RoPE."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig

from kvbench.errors import ConfigError, ModelError
from kvbench.methods.base import LayerStates
from kvbench.methods.expected_attention import turn
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.observe import Observer, rotary_frequencies

SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama, wide heads": LlamaConfig(**SMALL, head_dim=32),
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "yarn": LlamaConfig(**SMALL, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "partial": Phi3Config(
        **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_frequencies_are_the_model_s(kind):
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    torch.testing.assert_close(rotary_frequencies(CONFIGS[kind], 40), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", ["llama", "llama3", "yarn"])
def test_observed_queries_turned_back_are_those_before_rope(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    input_ids = torch.randint(3, 300, (1, 40))
    states: list[LayerStates] = []
    needs = frozenset({"queries", "rotary_frequencies"})
    observer = Observer(needs, 0, 1, 4, 0, states.append, config=model.config)
    with torch.no_grad(), attention_implementation(model):
        model(input_ids=input_ids, attention_context=observer, use_cache=False)
    extras = states[0].extras
    angles = torch.arange(40).unsqueeze(-1) * extras["rotary_frequencies"]
    before = turn(extras["queries"], angles.cos(), -angles.sin()) / model.model.rotary_emb.attention_scaling
    layer = model.model.layers[0]
    expected = layer.self_attn.q_proj(layer.input_layernorm(model.model.embed_tokens(input_ids)))[0]
    torch.testing.assert_close(before, expected.view(40, 4, 16).transpose(0, 1), rtol=1e-4, atol=1e-5)
    assert float(extras["scaling"]) == pytest.approx(0.25)


def test_models_without_one_rotary_embedding_are_refused():
    with pytest.raises(ModelError, match="rope_parameters=None of PreTrainedConfig describe no rotary embedding"):
        rotary_frequencies(PreTrainedConfig(), 40)
    some = LlamaConfig(**SMALL)
    some.no_rope_layers = [1, 0]
    with pytest.raises(ModelError, match="describe no rotary embedding that all layers share"):
        rotary_frequencies(some, 40)


def test_an_observer_without_a_configuration_is_refused():
    with pytest.raises(ConfigError, match="config=None with need 'rotary_frequencies'"):
        Observer(frozenset({"rotary_frequencies"}), 0, 1, 6, 0, lambda states: None)
