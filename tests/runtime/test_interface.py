"""Models of five families must reach the attention context, and give the logits they give without it."""

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvbench.errors import KvbenchError, ModelError
from kvbench.methods.base import LayerStates
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.observe import Observer

N_LAYERS = 2
N_QUERY_HEADS = 4
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}


def build(family: str, **options: object) -> PreTrainedModel:
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_QUERY_HEADS,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # attention far from uniform
        **options,
    )
    return model_class(config).eval()


def observer(on_layer: Callable[[LayerStates], None] = lambda states: None) -> Observer:
    return Observer(frozenset({"column_sums"}), 0, N_LAYERS, N_QUERY_HEADS, 0, on_layer)


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(3, 61, (1, 77), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_the_plain_model(family: str, implementation: str, prompt: Tensor) -> None:
    model = build(family)
    model.set_attn_implementation(implementation)
    expected = model(input_ids=prompt, use_cache=False).logits
    states: list[LayerStates] = []
    with attention_implementation(model):
        got = model(input_ids=prompt, use_cache=False, attention_context=observer(states.append)).logits
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(model(input_ids=prompt, use_cache=False).logits, expected)
    assert float((got - expected).norm() / expected.norm()) < 2e-6
    assert [layer.layer_index for layer in states] == list(range(N_LAYERS))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_would_be_ignored_is_refused(family: str, prompt: Tensor) -> None:
    model = build(family)
    n_tokens = prompt.shape[1]
    padding = torch.ones_like(prompt)
    padding[0, :3] = 0
    packed = torch.cat([torch.arange(30), torch.arange(n_tokens - 30)])[None]
    with attention_implementation(model):
        with pytest.raises(KvbenchError, match="ran without attention_context="):
            model(input_ids=prompt, use_cache=False)
        for options, message in [
            ({"attention_mask": padding}, "attention_mask hides 3 tokens"),
            ({"attention_mask": torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool)}, "attention_mask of shape"),
            ({"position_ids": packed}, "77 position_ids that describe several packed sequences"),
        ]:
            with pytest.raises(KvbenchError, match=re.escape(message)):
                model(input_ids=prompt, use_cache=False, attention_context=observer(), **options)
        model(input_ids=prompt, use_cache=False, attention_context=observer(), attention_mask=torch.ones_like(prompt))


def test_a_model_in_training_mode_with_dropout_is_refused(prompt: Tensor) -> None:
    model = build("llama", attention_dropout=0.1).train()
    with attention_implementation(model), pytest.raises(KvbenchError, match=re.escape("call model.eval() first")):
        model(input_ids=prompt, use_cache=False, attention_context=observer())


@torch.no_grad()
def test_a_prompt_longer_than_a_sliding_window_is_refused(prompt: Tensor) -> None:
    model = build("mistral", sliding_window=76)
    message = "77 tokens exceed the model's sliding window of 76"
    with attention_implementation(model), pytest.raises(ModelError, match=message):
        model(input_ids=prompt, use_cache=False, attention_context=observer())


def test_the_former_implementation_returns_after_an_exception_and_nested_blocks() -> None:
    model = build("llama")
    block = attention_implementation(model)
    block.__enter__()
    assert model.config._attn_implementation == "kvbench"
    assert not block.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert model.config._attn_implementation == "sdpa"
    other = build("qwen2")
    with attention_implementation(model):
        with attention_implementation(model), attention_implementation(other):
            pass
        assert (model.config._attn_implementation, other.config._attn_implementation) == ("kvbench", "sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_keeps_its_implementation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with (
        pytest.raises(ModelError, match="LlamaForCausalLM keeps its attention implementation 'sdpa'"),
        attention_implementation(model),
    ):
        pass


def test_importing_registers_nothing() -> None:
    code = (
        "import kvbench.runtime.attention, kvbench.runtime.observe; "
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS; "
        "assert 'kvbench' not in ALL_ATTENTION_FUNCTIONS.valid_keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
