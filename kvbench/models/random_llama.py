"""A Llama of any shape with seeded random weights, and its byte tokenizer: for tests and timing, no download.

Weights are drawn with variance 1 / fan-in, embeddings with variance 1, so that attention is neither uniform nor
one-hot at any size and logits differ clearly between tokens.  Draws happen on the target device: the same seed gives
the same weights on the same kind of device, and a model of 13 billion parameters takes seconds on a GPU.
"""

from __future__ import annotations

import psutil
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kvbench.errors import ConfigError
from kvbench.models.config import ModelConfig

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
MIN_VOCAB_SIZE = 259  # three special tokens and 256 bytes

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]\n{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def byte_tokenizer(max_context_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per UTF-8 byte; ids 0, 1, 2 are pad, bos, eos; a BOS opens every encoded text."""
    tokens = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    # Without merges the pattern that splits words changes no id, and takes two thirds of the time.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, add_bos_token=True,
        chat_template=CHAT_TEMPLATE, model_max_length=max_context_tokens, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The byte tokenizer of a random model; a ConfigError if the vocabulary is too small for it."""
    if config.vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"model.vocab_size={config.vocab_size} is below {MIN_VOCAB_SIZE}, the byte tokenizer's size")
    return byte_tokenizer(config.max_context_tokens)


def build_random_llama(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> LlamaForCausalLM:
    """Build the model on `device`, from the shape fields and `seed` of `config`; a ConfigError if it does not fit."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_query_heads,
        num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        max_position_embeddings=config.max_context_tokens, tie_word_embeddings=False, dtype=dtype, **special,
    )  # fmt: skip
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
    _draw_weights(model, config.seed)
    model.generation_config = GenerationConfig(**special)
    return model


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int) -> None:
    """Fill all weights in place: variance 1 for `embed_tokens`, 1 / fan-in for other matrices, ones for vectors."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            std = 1.0 if "embed_tokens" in name else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, std, generator=generator)
