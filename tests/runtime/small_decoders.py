"""Random decoders of every family, two to four tiny layers, whose attention is far from uniform."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
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
from transformers.utils import ModelOutput

from kvbench.models.load import LoadedModel
from kvbench.models.random_llama import byte_tokenizer

VOCABULARY = 61
FULL, SLIDING = "full_attention", "sliding_attention"

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}

SHARP = {"query_pre_attn_scalar": 1}  # Gemma's own 256 makes attention of eight channels uniform

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": None}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"attn_logit_softcapping": None, **SHARP, "layer_types": [FULL] * 3}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**SHARP, "layer_types": [FULL] * 3}),
}


def build(family: str, **options: object) -> PreTrainedModel:
    """A model of three layers with four query and two KV heads; sliding layers only where `options` ask for them."""
    config_class, model_class, defaults = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **defaults, **options})
    return model_class(config).eval()


def loaded(model: PreTrainedModel) -> LoadedModel:
    """The model as our engines take it."""
    tokenizer = byte_tokenizer(512)
    return LoadedModel(
        name="small", model=model, tokenizer=tokenizer, device=model.device, dtype=model.dtype, max_context_tokens=512,
        max_prompt_tokens=None, chat_format="none", source="random weights",
    )  # fmt: skip


def prompt(n_tokens: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """`(rows, n_tokens)` random ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, n_tokens), generator=generator)


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts `(1, T_i)` as one left-padded batch."""
    longest = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    lengths = torch.tensor([[p.shape[1]] for p in prompts])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) >= longest - lengths).long()}


def assert_same_answers(model, expected: ModelOutput, inputs: dict[str, torch.Tensor], **options: object) -> None:
    """`generate` gives the tokens of `expected`, and, where it says them, its logits: more telling than the tokens."""
    output = model.generate(**inputs, **options)
    assert torch.equal(output.sequences, expected.sequences)
    if expected.logits is not None:
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-3)
