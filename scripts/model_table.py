"""Write `docs/models.md`: what the model check says of every decoder of the installed transformers, each built tiny.

    python scripts/model_table.py

Run it after a change of the check or of transformers' version; `tests/models/test_architectures.py` compares every row,
and what is supported with `generate`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvbench.errors import ModelError
from kvbench.runtime.model_check import check_model, layer_windows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
WINDOW_TOKENS = 16

SIZES: dict[str, Any] = {
    "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
    "is_decoder": True, "sliding_window": WINDOW_TOKENS, "use_sliding_window": True, "max_window_layers": 1,
    "attention_chunk_size": WINDOW_TOKENS,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512, "n_inner": 48, "rotary_dim": 4,
    "d_model": 32, "ffn_dim": 48, "decoder_layers": 2, "encoder_layers": 2, "num_layers": 2, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
}  # fmt: skip
"""Given to every configuration that has a field of that name."""

FULL, SLIDING = "full_attention", "sliding_attention"
LATENT = {"num_key_value_heads": 4}
OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 16},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots3_note_text": LATENT,
    "dots1": {"n_shared_experts": 1},
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": [SLIDING, FULL], "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 8, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW_TOKENS},
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8},
    "minicpm3": LATENT,
    "qwen2": {"layer_types": [FULL, SLIDING]},
    "qwen2_moe": {"layer_types": [FULL, SLIDING]},
    "xlstm": {"v_head_dim": None},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What single architectures want beside or instead of `SIZES`; None leaves a field at its default."""


def architectures() -> list[str]:
    """Model types, one for each class of `AutoModelForCausalLM`."""
    return sorted({class_name: name for name, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}.values())


def build(name: str) -> PreTrainedModel | None:
    """A model of two tiny layers with random weights; None where `SIZES` do not make one."""
    try:
        config_class = CONFIG_MAPPING[name]
        default = config_class()
        fields = {*default.to_dict(), *default.attribute_map}
        options = {key: value for key, value in SIZES.items() if key in fields} | OF_ITS_OWN.get(name, {})
        config = config_class(**{key: value for key, value in options.items() if value is not None})
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            n_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
        if n_parameters > 4_000_000:
            return None
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config).eval()
        with torch.no_grad():
            model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    except Exception:
        return None
    return model


def row(name: str, model: PreTrainedModel) -> str:
    """The table's line about one architecture.

    Args:
        name: its model type.
        model: from `build`.
    """
    try:
        window = check_model(model).window_tokens
    except ModelError as error:
        reason = str(error).rpartition(": ")[0]
        reason = reason.replace(f"{type(model).__name__} ", "").removeprefix("is not supported (").removesuffix(")")
        reason = re.sub(r" by [\d.]+% of their norm", "", reason)  # no number that differs between machines
        return f"| `{name}` | {type(model).__name__} | refused | | {reason} |"
    if window is None:
        windows = "none"
    elif None in layer_windows(model.config):
        windows = "some layers: left alone by `compress()`; in a run up to the window"
    else:
        windows = "all layers: up to the window"
    return f"| `{name}` | {type(model).__name__} | supported | {windows} | |"


def page() -> str:
    """The whole page."""
    rows = {name: model and row(name, model) for name in architectures() for model in [build(name)]}
    built = [line for line in rows.values() if line]
    return INTRODUCTION.format(
        version=transformers.__version__,
        n_built=len(built),
        n_supported=sum("| supported |" in line for line in built),
        missing=", ".join(f"`{name}`" for name, line in rows.items() if not line),
        rows="\n".join(built),
    )


INTRODUCTION = """# Models

A model is checked once before anything is measured with it, by one check for both engines and `compress()`
(`kvbench.runtime.model_check`). What its configuration tells is refused by name: encoders, other parts, layers
that keep something else than keys and values. Then twelve random tokens and four steps through our attention must give
the logits of the model's own forward pass, which finds what no configuration tells. A refusal is one line, exit code 2,
before the first sample.

**Sliding windows.** In a run, prompt and answer of every sample have to fit into the shortest window of the model; else
the run is refused before its first sample: lower `model.max_prompt_tokens`. `compress()` leaves layers with a window
alone, which already hold no more than it, and compresses the others; where all layers have one, it compresses all and
takes prompts and answers up to the window.

**LongRoPE** (Phi-3 of 128k tokens) has two sets of rotary frequencies. A run whose prompts and answers do not all lie
on one side of `original_max_position_embeddings` is refused: the longest row of a batch would decide for the others.

**Weights.** A folder is refused if its files lack weights of the model, hold weights that the model has not, or hold
integers in place of numbers, and if it names a `quant_method` that transformers does not know.

The table: every decoder of transformers {version} that can be built tiny with one set of sizes ({n_built}; supported
are {n_supported}), each with two layers of random weights and, where it has one, a sliding window of 16 tokens.
Supported means that tokens and their likelihoods are those of `generate` at full budget in both engines and in
`compress()`. `scripts/model_table.py` writes it, `tests/models/test_architectures.py` checks it.

| model type | class | verdict | sliding windows | why not |
|---|---|---|---|---|
{rows}

Not built: {missing}. They meet the same check when they are loaded.
"""


def main() -> None:
    """Replace the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
