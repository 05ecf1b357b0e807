"""One model over several GPUs of a host: `model.device_map=auto`, by accelerate.

    python -m kvbench model=llama2-13b-chat model.device_map=auto task=qasper

accelerate gives every GPU a run of consecutive layers and moves the hidden states from one to the next. Observation,
compression and cache of a layer happen where its keys are. Layers that do not fit on the GPUs are refused: carried to
and fro for every token they would make a measurement of the bus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers import PreTrainedModel

from kvbench.errors import ModelError

OFFLOADED = ("cpu", "disk", "meta")


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Spread a model that is in memory already over all GPUs of this machine; without any it stays where it is.

    Args:
        model: the model.

    Returns:
        The same model, its layers moved.
    """
    whole_blocks = list(model._no_split_modules or ())
    memory = get_balanced_memory(model, dtype=model.dtype, no_split_module_classes=whole_blocks)
    device_map = infer_auto_device_map(
        model, max_memory=memory, dtype=model.dtype, no_split_module_classes=whole_blocks
    )
    check_device_map(model.config.name_or_path or type(model).__name__, device_map)
    spread_model: PreTrainedModel = dispatch_model(model, device_map)
    return spread_model


def check_device_map(name: str, device_map: Mapping[str, Any]) -> None:
    """Refuse a map that leaves a part of a model off the GPUs although others are on one.

    Args:
        name: what the model is, for the message.
        device_map: device by module name, as accelerate makes it.

    Raises:
        ModelError: with the number of such parts.
    """
    left_out = [module for module, device in device_map.items() if str(device) in OFFLOADED]
    if left_out and len(left_out) < len(device_map):
        raise ModelError(
            f"{len(left_out)} of {len(device_map)} parts of {name} ({left_out[0]}, ...) do not fit on the "
            f"{torch.cuda.device_count()} GPUs: use more GPUs, or 16-bit weights with model.dtype=bfloat16"
        )


def input_device(model: PreTrainedModel) -> torch.device:
    """The device where a model wants its input ids: that of its embedding, or where accelerate runs it."""
    embedding: nn.Module = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    running_on = getattr(hook, "execution_device", None)
    if running_on is not None:
        return torch.device("cuda", running_on) if isinstance(running_on, int) else torch.device(running_on)
    return next(embedding.parameters()).device


def describe_placement(model: PreTrainedModel) -> str:
    """How many of a model's parts each device holds, e.g. "cuda:0 17, cuda:1 26"; empty if one device holds it all."""
    counts: dict[str, int] = {}
    for device in getattr(model, "hf_device_map", {}).values():
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} {count}" for name, count in counts.items()) if len(counts) > 1 else ""
