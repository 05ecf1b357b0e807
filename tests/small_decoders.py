"""Random decoders of every family, two to four tiny layers, whose attention is far from uniform; prompts; an answer."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvbench.models.load import LoadedModel, byte_tokenizer
from kvbench.runtime.requests import Answer, Arm, Request

VOCABULARY = 61
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
SHARP = {"query_pre_attn_scalar": 1, "layer_types": [FULL] * 3}  # Gemma's own 256 makes attention of 8 channels uniform
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"sliding_window": None},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": None, **SHARP},
    "gemma3_text": SHARP,
}


def build(family: str, **options: object) -> PreTrainedModel:
    """A model of three layers with four query and two KV heads; sliding layers only where `options` ask for them."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES.get(family, {}), **options})
    return AutoModelForCausalLM.from_config(config).eval()


def loaded(model: PreTrainedModel) -> LoadedModel:
    """The model as our engines take it."""
    return LoadedModel(
        name="small", model=model, tokenizer=byte_tokenizer(512), device=model.device, dtype=model.dtype,
        max_context_tokens=512, max_prompt_tokens=None, chat_format="none", source="random weights",
    )  # fmt: skip


def ask(engine, model, ids, policy, new_tokens, gold=()) -> Answer:
    """What an engine answers to the prompt `ids (1, T)` with one arm."""
    arm = Arm.of(policy)
    ids = tuple(ids[0].tolist())
    request = Request(0, ids, len(ids), tuple(gold), (arm,), arm, (2,), new_tokens, new_tokens)
    [answer] = engine.run(loaded(model), [request])
    assert isinstance(answer, Answer), answer
    return answer


def prompt(n_tokens: int, seed: int = 0) -> torch.Tensor:
    """`(1, n_tokens)` random ids without special tokens."""
    return torch.randint(3, VOCABULARY, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts `(1, T_i)` as one left-padded batch."""
    longest = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    lengths = torch.tensor([[p.shape[1]] for p in prompts])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) >= longest - lengths).long()}


def assert_same_answers(model, expected, inputs, **options) -> None:
    """`generate` gives the tokens of `expected`, and, where it says them, its logits: more telling than the tokens."""
    output = model.generate(**inputs, **options)
    assert torch.equal(output.sequences, expected.sequences)
    if expected.logits is not None:
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-3)
