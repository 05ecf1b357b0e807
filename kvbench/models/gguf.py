"""A GGUF file as a checkpoint folder with safetensors weights in float32, so that it is read slowly only once.

transformers reads GGUF, but takes for GPT-2's every pre-tokenizer that the file only names, and passes over RoPE
factors that lie among the tensors. The pre-tokenizers known here are put right; all else is refused, for a model that
reads other tokens or positions than it was trained with answers all the same.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from kvbench.errors import ModelError
from kvbench.models.checkpoint import quiet

CONVERTER_VERSION = 1
"""Part of a converted folder's identity: raise it whenever the weights, the configuration or token ids change."""
INSTEAD = "use the model's folder with safetensors weights, model=FOLDER"
ROPE_FACTORS = "rope_freqs.weight"


def _split(digits: str) -> Any:
    """The pattern of Llama 3 and Qwen2 (their `tokenizer.json`), which differ in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    words = pre_tokenizers.Split(Regex(pattern.replace("DIGITS", digits)), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm() -> Any:
    """llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM: digits one by one, then GPT-2's byte level without a prefix space."""
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([digits, byte_level])


PRE_TOKENIZERS = {"smollm": _smollm, "llama-bpe": lambda: _split("{1,3}"), "qwen2": lambda: _split("")}
"""By their name in `tokenizer.ggml.pre`."""


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file as a checkpoint that transformers loads without further settings, to `folder`.

    transformers dequantises to float32 and undoes llama.cpp's row order of query and key projections (5.23: bit for bit
    what doing so by hand gives). Mended are decimals stored as float32 and the pre-tokenizer. A ModelError tells of
    files that cannot be read as they are meant.
    """
    pre_tokenizer, add_bos_token = _tokenizer_facts(file)
    with quiet(), redirect_stderr(StringIO()):  # it draws its bar over ours
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # a foreign file: it can make transformers raise anything
            raise ModelError(f"{file} cannot be read ({type(error).__name__}: {error}): {INSTEAD}") from error
    config = model.config
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    GenerationConfig(**special, pad_token_id=config.pad_token_id).save_pretrained(folder)
    for name in ("quantization_config", "unk_token_id", "_model_name_or_path"):
        vars(config).pop(name, None)
    config.architectures = [type(model).__name__]
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.7g}")
    config.save_pretrained(folder)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    backend = read.backend_tokenizer
    backend.model.continuing_subword_prefix = backend.model.end_of_word_suffix = None
    backend.pre_tokenizer = pre_tokenizer
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=read.bos_token, eos_token=read.eos_token, pad_token=read.pad_token,
        unk_token=read.unk_token, add_bos_token=add_bos_token, chat_template=read.chat_template,
        model_max_length=config.max_position_embeddings, clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip


def _tokenizer_facts(file: Path) -> tuple[Any, bool]:
    """The pre-tokenizer that a file names, and whether a BOS opens every text; a ModelError for what is not known."""
    try:
        reader = GGUFReader(file)
    except Exception as error:
        raise ModelError(f"{file} is no GGUF file ({error}): {INSTEAD}") from error

    def said(name: str) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{name}")
        return field.contents() if field is not None else None

    kind, pre = said("model"), said("pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(f"gpt2/{name}" for name in PRE_TOKENIZERS)
        raise ModelError(f"{file} has a tokenizer {kind}/{pre}, known are {known}: {INSTEAD}")
    if any(tensor.name == ROPE_FACTORS for tensor in reader.tensors):
        raise ModelError(f"{file} holds RoPE factors ({ROPE_FACTORS}) that transformers does not read: {INSTEAD}")
    add_bos = said("add_bos_token")
    return PRE_TOKENIZERS[pre](), pre == "llama-bpe" if add_bos is None else bool(add_bos)
