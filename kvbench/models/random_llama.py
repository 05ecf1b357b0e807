"""A Llama of any shape with seeded random weights: for tests (tiny) and for timing (real shapes), no download.

Weights are drawn with variance 1 / fan-in, embeddings with variance 1, so that attention is neither uniform nor
one-hot at any size and logits differ clearly between tokens.  Draws happen on the target device: the same seed gives
the same weights on the same kind of device, and a model of 13 billion parameters takes seconds on a GPU.
"""

from __future__ import annotations

import psutil
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from kvbench.errors import ConfigError
from kvbench.models.byte_tokenizer import MIN_VOCAB_SIZE, byte_tokenizer
from kvbench.models.config import ModelConfig


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The byte tokenizer of a random model.

    Raises:
        ConfigError: if the vocabulary is too small for it.
    """
    if config.vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"model.vocab_size={config.vocab_size} is below {MIN_VOCAB_SIZE}, the byte tokenizer's size")
    return byte_tokenizer(config.max_context_tokens)


def build_random_llama(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> LlamaForCausalLM:
    """Build the model on `device`.

    Args:
        config: the shape fields and `seed` are read.
        tokenizer: names the special tokens.
        dtype: dtype of the weights.
        device: where the weights are created.

    Raises:
        ConfigError: if the device has no memory for the weights.
    """
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_query_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context_tokens,
        tie_word_embeddings=False,
        dtype=dtype,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    nn.Module.to(model, dtype)
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if weights_bytes > free_bytes:  # an operating system may promise more than it has, and end the process later
        raise ConfigError(
            f"the weights of model {config.name} take {weights_bytes:,} bytes, {device} has {free_bytes:,}: lower "
            "model.n_layers, model.hidden_size, model.intermediate_size or model.vocab_size"
        )
    model.to_empty(device=device)
    # Rotary frequencies are not weights: `to_empty` leaves them undefined, so they are computed again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=shape).to(device)
    draw_weights(model, config.seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Fill all weights of `model` in place, from a generator of its own.

    Args:
        model: matrices named `embed_tokens` get variance 1, other matrices 1 / fan-in, vectors (norms) become 1.
        seed: seed of the generator.
    """
    generator: torch.Generator | None = None
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(seed)
        std = 1.0 if "embed_tokens" in name else parameter.shape[1] ** -0.5
        parameter.normal_(0.0, std, generator=generator)
