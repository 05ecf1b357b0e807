"""Convert a Llama GGUF file to an ordinary safetensors checkpoint, once.

Transformers reads GGUF itself, but slowly at every load, and its GGUF tokenizer loses the pre-tokenizer of SmolLM
models (digits one by one).  Here the tensors are dequantised with the `gguf` package and written in float32 under the
names of `LlamaForCausalLM`, beside `config.json`, `generation_config.json` and a complete tokenizer.

Three things in which GGUF differs from a Hugging Face checkpoint:

* The rows of the query and key projections are interleaved for another rotary layout
  (`LlamaModel.permute` in llama.cpp's `convert_hf_to_gguf.py`); `unpermute_rotary` undoes it.
* There is no output matrix where the embedding is tied.
* The pre-tokenizer is only named (`tokenizer.ggml.pre`), so it is built here from its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from kvbench.errors import ModelError

if TYPE_CHECKING:  # imported where a file is read: needed once per machine, not at every start
    from gguf import GGUFReader

CONVERTER_VERSION = 1
"""Part of the converted folder's identity: raise it whenever the files written here change."""

CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of special tokens (`TokenType.CONTROL` in the `gguf` package)."""

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_llama_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file as a checkpoint folder that transformers loads without further settings.

    Args:
        file: the GGUF file of a Llama model with a byte-level BPE ("gpt2") vocabulary.
        folder: an existing, empty folder.

    Raises:
        ModelError: if the architecture, the vocabulary type or the pre-tokenizer is not one of those known here.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _expect(file, fields, "general.architecture", ("llama",))
    _expect(file, fields, "tokenizer.ggml.model", ("gpt2",))
    _expect(file, fields, "tokenizer.ggml.pre", tuple(_PRE_TOKENIZERS))
    config = llama_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    save_file(state_dict(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    build_tokenizer(fields).save_pretrained(folder)


def llama_config(fields: dict[str, Any], *, tied: bool) -> LlamaConfig:
    """The model configuration that the metadata `fields` of a GGUF file describe."""
    n_query_heads = fields["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=n_query_heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.embedding_length"] // n_query_heads,
        max_position_embeddings=fields["llama.context_length"],
        # Stored as float32: seven digits bring back the decimal number that was meant (1e-05).
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


def state_dict(reader: GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    """All weights in float32 under the names of `LlamaForCausalLM`.

    Raises:
        ModelError: if a tensor is unknown.
    """
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        name = parameter_name(tensor.name)
        if name.endswith("q_proj.weight"):
            values = unpermute_rotary(values, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = unpermute_rotary(values, config.num_key_value_heads or config.num_attention_heads)
        weights[name] = values
    return weights


def parameter_name(gguf_name: str) -> str:
    """The transformers name of a tensor, e.g. `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    raise ModelError(f"GGUF tensor {gguf_name} is no tensor of a Llama model: convert the file with other tools")


def unpermute_rotary(weight: Tensor, n_heads: int) -> Tensor:
    """Undo llama.cpp's row order of a query or key projection.

    GGUF pairs rows (2i, 2i + 1) of a head for the rotation; transformers pairs (i, i + D/2).

    Args:
        weight: `(n_heads * D, hidden)`.
        n_heads: heads of this projection.

    Returns:
        `(n_heads * D, hidden)`, contiguous: row i of a head comes from row 2i, row i + D/2 from row 2i + 1.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden).contiguous()


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata `fields` of a GGUF file describe, chat template included."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = _PRE_TOKENIZERS[fields["tokenizer.ggml.pre"]]()
    backend.decoder = decoders.ByteLevel()
    special = [
        token
        for token, token_type in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if token_type == CONTROL_TOKEN
    ]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        add_bos_token=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Digits one by one, then GPT-2's byte level without a prefix space (llama.cpp: `LLAMA_VOCAB_PRE_TYPE_SMOLLM`)."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_PRE_TOKENIZERS = {"smollm": _smollm_pre_tokenizer}


def _expect(file: Path, fields: dict[str, Any], key: str, known: tuple[str, ...]) -> None:
    if fields.get(key) not in known:
        raise ModelError(f"{file.name}: {key} is {fields.get(key)!r}, known are {', '.join(known)}: use another file")
