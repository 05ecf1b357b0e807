"""Load a model and its tokenizer as a configuration says, in two steps: all but the weights, then those.

    loaded = load_model(named_config("smollm2-135m"))

The configuration's `source` alone decides which code finds the weights (`fetch.LOCATORS`); "random" ones are drawn.
With `model.device_map=auto` accelerate gives every GPU of a host a run of consecutive layers and moves the hidden
states from one to the next; observation, compression and cache of a layer happen where its keys are. Layers that do not
fit on the GPUs are refused: carried to and fro for every token they would make a measurement of the bus.

Source "random" is a Llama of any shape with a byte tokenizer, for tests and timing. Its weights are drawn with variance
1 / fan-in, embeddings with variance 1, so that attention is neither uniform nor one-hot at any size and logits differ
clearly between tokens; on the target device, so the same seed gives the same weights on the same kind of device, and a
model of 13 billion parameters takes seconds on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kvbench.errors import ConfigError, ModelError
from kvbench.models.checkpoint import load_checkpoint, open_checkpoint
from kvbench.models.config import DEVICES, ModelConfig
from kvbench.models.fetch import LOCATORS, Report

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


OFFLOADED = ("cpu", "disk", "meta")


@dataclass(kw_only=True)
class PreparedModel:
    """A model without its weights; what has a name of `ModelConfig` means the same."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    device: torch.device  # of the embedding: where input ids go
    dtype: torch.dtype
    max_context_tokens: int  # positions the model has, prompt and new tokens together
    max_prompt_tokens: int | None
    chat_format: str
    source: str  # of the weights: a path, "hub id@commit", a package with its checksum, or a seed
    stop_token_ids: tuple[int, ...] = ()  # ids that end an answer, as the model's configuration says
    folder: Path | None = None  # of the weights; None for weights that are drawn
    parse_special_tokens: bool = False
    protect_special_tokens: bool = False


@dataclass(kw_only=True)
class LoadedModel(PreparedModel):
    """A model ready to run: in evaluation mode, no parameter requires a gradient."""

    model: PreTrainedModel


def print_nothing(message: str) -> None:
    """Report to nobody."""


def prepare_model(config: ModelConfig, device: str = "auto", report: Report = print_nothing) -> PreparedModel:
    """Find the model that `config` describes, and read everything but its weights.

    A `device` other than "auto" replaces the configuration's own; `report` is told what takes long.
    """
    place = resolve_device(config.device if device == "auto" else device)
    folder: Path | None = None
    stops: tuple[int, ...] = ()
    if config.effective_source == "random":
        tokenizer = build_tokenizer(config)
        context, source = config.max_context_tokens, f"random weights, seed {config.seed}"
    else:
        folder, source = LOCATORS[config.effective_source](config, report)
        tokenizer, context, stops = open_checkpoint(folder)
    if config.chat_format == "template" and not tokenizer.chat_template:
        raise ModelError(f"model {config.name} ({source}) has no chat template: use model.chat_format=none (or llama2)")
    return PreparedModel(
        name=config.name, tokenizer=tokenizer, device=place, dtype=resolve_dtype(config.dtype, place),
        max_context_tokens=context, max_prompt_tokens=config.max_prompt_tokens, chat_format=config.chat_format,
        source=source, stop_token_ids=stops, folder=folder, parse_special_tokens=config.parse_special_tokens,
        protect_special_tokens=config.protect_special_tokens,
    )  # fmt: skip


def load_model(config: ModelConfig, device: str = "auto", report: Report = print_nothing) -> LoadedModel:
    """Prepare a model and load its weights; see `prepare_model` and `load_weights`."""
    return load_weights(config, prepare_model(config, device, report), report)


def load_weights(config: ModelConfig, prepared: PreparedModel, report: Report = print_nothing) -> LoadedModel:
    """Load the weights of a model that was prepared from `config`; see `load_checkpoint` and `build_random_llama`."""
    if prepared.folder is None:
        tokenizer, dtype, device = prepared.tokenizer, prepared.dtype, prepared.device
        model: PreTrainedModel = build_random_llama(config, tokenizer, dtype, device)
        if config.device_map is not None:
            model = _spread(config.name, model)
    else:
        report(f"loading {config.name} on {prepared.device}")
        model = load_checkpoint(prepared.folder, prepared.dtype, prepared.device, config.device_map)
        check_device_map(config.name, getattr(model, "hf_device_map", {}))
    if placement := describe_placement(model):
        report(f"{config.name} is spread over {placement} (parts)")
    model.eval().requires_grad_(False)
    return LoadedModel(**{**vars(prepared), "device": input_device(model)}, model=model)


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" stands for here; a ConfigError if there is none."""
    if not DEVICES.fullmatch(device):
        raise ConfigError(f"device={device!r} is unknown: use auto, cpu, cuda or cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    n_devices = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= n_devices:
        raise ConfigError(f"device={device} asks for a CUDA device, this machine has {n_devices}: use device=cpu")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights: "auto" is float32 on CPU (where 16 bit decodes slower) and bfloat16 on CUDA."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    return cast(torch.dtype, getattr(torch, dtype))


def _spread(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """Spread a model that is in memory already over all GPUs of this machine; without any it stays where it is."""
    options: dict[str, Any] = {"dtype": model.dtype, "no_split_module_classes": list(model._no_split_modules or ())}
    device_map = infer_auto_device_map(model, max_memory=get_balanced_memory(model, **options), **options)
    check_device_map(name, device_map)
    return cast(PreTrainedModel, dispatch_model(model, device_map))


def check_device_map(name: str, device_map: Mapping[str, Any]) -> None:
    """Refuse a map (device by module) that leaves a part of model `name` off the GPUs although others are on one."""
    left_out = [module for module, device in device_map.items() if str(device) in OFFLOADED]
    if left_out and len(left_out) < len(device_map):
        raise ModelError(
            f"{len(left_out)} of {len(device_map)} parts of {name} ({left_out[0]}, ...) do not fit on the "
            f"{torch.cuda.device_count()} GPUs: use more GPUs, or 16-bit weights with model.dtype=bfloat16"
        )


def input_device(model: PreTrainedModel) -> torch.device:
    """The device where a model wants its input ids: that of its embedding, or where accelerate runs it."""
    embedding = model.get_input_embeddings()
    running_on = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if running_on is None:
        return next(embedding.parameters()).device
    return torch.device("cuda", running_on) if isinstance(running_on, int) else torch.device(running_on)


def describe_placement(model: PreTrainedModel) -> str:
    """How many of a model's parts each device holds, e.g. "cuda:0 17, cuda:1 26"; empty if one device holds it all."""
    devices = getattr(model, "hf_device_map", {}).values()
    counts = Counter(f"cuda:{device}" if isinstance(device, int) else str(device) for device in devices)
    return ", ".join(f"{name} {count}" for name, count in counts.items()) if len(counts) > 1 else ""
