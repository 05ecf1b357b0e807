"""Load a checkpoint folder: safetensors weights only, and never code that comes with the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging

from kvbench.errors import ModelError

FLOATS = ("F64", "F32", "F16", "BF16")
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def open_checkpoint(folder: Path) -> tuple[PreTrainedTokenizerBase, int, tuple[int, ...]]:
    """Tokenizer, positions of the model, ids that end an answer; a ModelError if the folder is unsafe or incomplete."""
    check_folder(folder)
    with _loading(folder):
        config = AutoConfig.from_pretrained(folder, **SAFE)
        if (folder / "generation_config.json").is_file():
            stops = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        else:
            stops = GenerationConfig.from_model_config(config).eos_token_id
        ids = tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)
        tokenizer = AutoTokenizer.from_pretrained(folder, **SAFE)
        return tokenizer, int(config.get_text_config().max_position_embeddings), ids


def load_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device, device_map: str | None) -> PreTrainedModel:
    """Load a model from a folder that `open_checkpoint` accepted; a ModelError unless the weights are just its own."""
    # Weights go straight to a GPU, not through CPU memory.
    places: Any = device_map or (None if device.type == "cpu" else {"": device})
    options = {"dtype": dtype, "device_map": places, "use_safetensors": True, "output_loading_info": True, **SAFE}
    with _loading(folder), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model, loading = loaded
    problems = {  # with which transformers would go on: with random values, without them, with bare integers
        "lacks {} weights ({}): download all its *.safetensors files": loading["missing_keys"],
        f"holds {{}} weights that {type(model).__name__} with this config.json has not ({{}}): download config.json "
        "and *.safetensors of one model": loading["unexpected_keys"],
        "holds {} weights in integers or float8 ({}), without the quantization_config that would tell their scale: use "
        "weights in float32, bfloat16 or float16": _integer_weights(folder, model),
    }
    for problem, keys in problems.items():
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise ModelError(f"model folder {folder} {problem.format(len(keys), some)}")
    return model


def _integer_weights(folder: Path, model: PreTrainedModel) -> list[str]:
    """Weights that a file stores in a type which is no ordinary floating-point one, unless the model is quantised."""
    if getattr(model.config, "quantization_config", None) is not None:
        return []
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:  # which is no mapping
            keys = [key for key in tensors.keys() if key in floating or key.endswith(".weight")]  # noqa: SIM118  no mapping
            found += [key for key in keys if tensors.get_slice(key).get_dtype() not in FLOATS]
    return found


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the folder is foreign: what it holds can make transformers raise anything
        problem = f"cannot be loaded ({type(error).__name__}: {error})"
        raise ModelError(f"model folder {folder} {problem}: check that it is complete and fits this machine") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bar over the weights, and its table of those that do not fit, out of the output."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def check_folder(folder: Path) -> None:
    """Refuse folders that are incomplete, hold only pickled weights, or need their own code, by a ModelError."""
    if problem := _problem(folder):
        raise ModelError(f"model folder {folder} {problem}")


def _problem(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"has no readable config.json ({error}): download it again"
    if not isinstance(config, dict):
        return "has a config.json that is no JSON object: download it again"
    if not any(folder.glob("*.safetensors")):
        if pickled := sorted(file.name for ending in ("bin", "pt", "pth") for file in folder.glob(f"*.{ending}")):
            problem = f"has only pickled weights ({pickled[0]}), which can run code when read"
            return f"{problem}: convert them to *.safetensors"
        return "has no *.safetensors file: download the weights in that format, no other is read"
    if (folder / "adapter_config.json").exists():  # transformers would load the adapter, and the base that it names
        return "has an adapter (adapter_config.json): merge it into the weights and save them, or remove that file"
    quantization = config.get("quantization_config")
    if quantization is not None:
        known = {"bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING}
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if not isinstance(method, str) or method not in known:  # transformers would take the weights as they are
            names = ", ".join(sorted(known))
            return f"has quant_method {method!r}, known are {names}: use weights that are not quantised"
    if "auto_map" in config and (name := config.get("model_type")) not in CONFIG_MAPPING:
        problem = f"(model_type {name!r}) needs its own Python code, which is never run here"
        return f"{problem}: use a model that transformers knows"
    return ""
