"""A model's rotary frequencies, read from its configuration, for methods that turn queries to other positions.

RoPE (Su et al., arXiv 2104.09864) turns channel pair i of a token at position t by the angle `t * frequency_i`. The
pairs are taken to be (i, i + R / 2) of the first R channels, as in Llama, Mistral, Qwen, Phi-3 and Gemma.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvbench.errors import ModelError

FULL_ATTENTION = "full_attention"


def rotary_frequencies(config: PreTrainedConfig, n_tokens: int) -> Tensor:
    """Angles per position by which a model's layers of full attention turn queries and keys.

    Args:
        config: the model's text configuration.
        n_tokens: prompt length T; some kinds of RoPE have other frequencies for long prompts.

    Returns:
        `(R / 2,)` fp32 radians per token on the CPU; R is D unless only part of the channels turns.

    Raises:
        ModelError: if the configuration does not describe one rotary embedding for all these layers.
    """
    parameters: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    layer_type = {}
    if parameters and FULL_ATTENTION in parameters:
        parameters, layer_type = parameters[FULL_ATTENTION], {"layer_type": FULL_ATTENTION}
    if not parameters or "rope_type" not in parameters or 0 in (getattr(config, "no_rope_layers", None) or ()):
        raise ModelError(
            f"rope_parameters={parameters!r} of {type(config).__name__} describe no rotary embedding that all layers "
            "share: use a method that does not turn queries, or a model like Llama, Mistral, Qwen, Phi-3 or Gemma"
        )
    kind = parameters["rope_type"]
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"), seq_len=n_tokens, **layer_type)[0].float()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_turning = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, n_turning, 2, dtype=torch.float32) / n_turning)
