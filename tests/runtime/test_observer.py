"""What an observer hands to policies: every layer's states, observed as asked, and the model's own frequencies."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig

from kvbench.errors import ConfigError, ModelError
from kvbench.methods.expected_attention import turn
from kvbench.ops.observe import observe
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.observe import Observer, rotary_frequencies


def states_of(n_tokens=33):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, n_tokens, n, 16, generator=generator).transpose(1, 2) for n in (6, 2, 2)]


def test_each_layer_is_reported_with_views():
    layers = []
    observer = Observer(frozenset({"column_sums", "window_attention"}), 4, 2, 6, 7, layers.append)
    query, keys, values = states_of()
    expected = observe(query[0], keys[0], values[0], 0.25, column_sums=True, window_tokens=4)
    for layer_index in (0, 1):
        output = observer.attend(layer_index, query, keys, values, 0.25)
        assert output.is_contiguous()
        assert torch.equal(output, expected.output.transpose(0, 1)[None])
    assert [layer.layer_index for layer in layers] == [0, 1]
    assert observer.kernels_used == {"torch"}
    layer = layers[1]
    assert (layer.n_layers, layer.n_query_heads, layer.seed) == (2, 6, 7)
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == (keys.data_ptr(), values.data_ptr())
    assert layer.keys.shape == (2, 33, 16)
    assert torch.equal(layer.column_sums, expected.column_sums)
    assert torch.equal(layer.window_attention, expected.window_attention)


def test_only_what_is_needed_is_computed():
    layers = []
    observer = Observer(frozenset(), 32, 1, 6, 0, layers.append)
    observer.attend(0, *states_of(), 0.25)
    assert (layers[0].column_sums, layers[0].window_attention, observer.kernels_used) == (None, None, {"sdpa"})


def test_what_cannot_be_observed_is_refused():
    observer = Observer(frozenset({"column_sums"}), 0, 1, 6, 0, lambda states: None)
    query, keys, values = states_of()
    with pytest.raises(ModelError, match="prefill of 2 prompts"):
        observer.attend(0, *(x.expand(2, -1, -1, -1) for x in (query, keys, values)), 0.25)
    with pytest.raises(ModelError, match="32 queries over 33 keys"):
        observer.attend(0, query[:, :, 1:], keys, values, 0.25)
    for need, message in [
        ("hidden_states", r"needs=\['hidden_states'\] cannot be observed"),
        ("window_attention", "window_tokens=0 is below 1"),
        ("rotary_frequencies", "config=None with need 'rotary_frequencies'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Observer(frozenset({need}), 0, 1, 6, 0, lambda states: None)


SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama, wide heads": LlamaConfig(**SMALL, head_dim=32),
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "yarn": LlamaConfig(**SMALL, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "partial": Phi3Config(**SMALL, rope_parameters=PARTIAL),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_frequencies_are_the_model_s(kind):
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    torch.testing.assert_close(rotary_frequencies(CONFIGS[kind], 40), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", ["llama", "llama3", "yarn"])
def test_observed_queries_turned_back_are_those_before_rope(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    input_ids, layers = torch.randint(3, 300, (1, 40)), []
    needs = frozenset({"queries", "rotary_frequencies"})
    observer = Observer(needs, 0, 1, 4, 0, layers.append, config=model.config)
    with torch.no_grad(), attention_implementation(model):
        model(input_ids=input_ids, attention_context=observer, use_cache=False)
    extras = layers[0].extras
    angles = torch.arange(40).unsqueeze(-1) * extras["rotary_frequencies"]
    before = turn(extras["queries"], angles.cos(), -angles.sin()) / model.model.rotary_emb.attention_scaling
    layer = model.model.layers[0]
    expected = layer.self_attn.q_proj(layer.input_layernorm(model.model.embed_tokens(input_ids)))[0]
    torch.testing.assert_close(before, expected.view(40, 4, 16).transpose(0, 1), rtol=1e-4, atol=1e-5)
    assert float(extras["scaling"]) == pytest.approx(0.25)


def test_models_without_one_rotary_embedding_are_refused():
    some = LlamaConfig(**SMALL)
    some.no_rope_layers = [1, 0]
    with pytest.raises(ModelError, match="rope_parameters=None of PreTrainedConfig describe no rotary embedding"):
        rotary_frequencies(PreTrainedConfig(), 40)
    with pytest.raises(ModelError, match="describe no rotary embedding that all layers share"):
        rotary_frequencies(some, 40)
