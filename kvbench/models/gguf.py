"""Convert a Llama GGUF file to an ordinary safetensors checkpoint, once.

transformers reads GGUF, but slowly at every load: 20 s instead of 1. It dequantises to float32 and undoes llama.cpp's
row order of query and key projections (5.23: bit for bit what doing so by hand gives). Mended here are the
pre-tokenizer, which GGUF only names (transformers takes GPT-2's, SmolLM splits digits one by one), and decimals that
GGUF stores as float32.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from kvbench.errors import ModelError
from kvbench.models.checkpoint import quiet

CONVERTER_VERSION = 1
"""Part of the converted folder's identity: raise it whenever the weights, the configuration or token ids change."""

KNOWN = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}


def convert_llama_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file of a Llama model as a checkpoint folder that transformers loads without further settings.

    Args:
        file: the GGUF file, with a byte-level BPE ("gpt2") vocabulary.
        folder: an existing, empty folder.

    Raises:
        ModelError: if the architecture, the vocabulary type or the pre-tokenizer is not one of those known here.
    """
    from gguf import GGUFReader  # needed once per machine, not at every start

    fields = GGUFReader(str(file)).fields
    for key, known in KNOWN.items():
        if (found := fields[key].contents() if key in fields else None) != known:
            raise ModelError(f"{file.name}: {key} is {found!r}, known is {known}: use another file")
    with quiet(), redirect_stderr(StringIO()):  # it draws its bar over ours
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
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
    backend, add_bos = tokenizer.backend_tokenizer, fields.get("tokenizer.ggml.add_bos_token")
    backend.model.continuing_subword_prefix = backend.model.end_of_word_suffix = None
    # llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM: digits one by one, then GPT-2's byte level without a prefix space.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token, unk_token=tokenizer.unk_token, chat_template=tokenizer.chat_template,
        add_bos_token=bool(add_bos and add_bos.contents()), model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
