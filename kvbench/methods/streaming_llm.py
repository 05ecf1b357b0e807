"""StreamingLLM: keep the first tokens (attention sinks) and the most recent ones, whatever anyone attends to.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024, arXiv 2309.17453); official
code mit-han-lab/streaming-llm, `streaming_llm/kv_cache.py`: 4 start tokens and the most recent ones, a rolling cache of
constant size. It is what CaM merges on top of, with four sinks in place of half the slots.

Deviation: keys keep the rotation of their original positions, as in NVIDIA/kvpress. The official code rotates them anew
by their index in the cache at every step, which lets a stream run past the context a model was trained for; prompts
here lie within it, and every other method keeps original positions too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, DecodeSlots, LayerStates, Policy
from kvbench.methods.options import require_count


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Start and recent tokens, of constant size while decoding.

    Slots are ordered [start, recent], prompt positions ascending. While decoding, the recent slots are a ring: the
    token that leaves before new token `step_index` is in ring slot `step_index mod recent`.

    Attributes:
        start_tokens: first tokens always kept; all other slots are the recent window.
    """

    start_tokens: int = 4

    name: ClassVar[str] = "streaming_llm"
    steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the options; raises `ConfigError`."""
        super().__post_init__()
        require_count("start_tokens", self.start_tokens, minimum=0)

    @property
    def minimum_tokens(self) -> int:
        """The start tokens and one recent token."""
        return self.start_tokens + 1

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the first and the most recent tokens; see `Policy.compress`. No attention is needed."""
        n_tokens, device = layer.n_tokens, layer.keys.device
        recent = budget_tokens - self.start_tokens
        kept = torch.cat(
            [torch.arange(self.start_tokens, device=device), torch.arange(n_tokens - recent, n_tokens, device=device)]
        )
        positions = kept.expand(layer.n_kv_heads, -1)
        return CompressedLayer(layer.keys.index_select(1, kept), layer.values.index_select(1, kept), positions)

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        """Put the new token in the place of the oldest recent one. Device operations only."""
        n_slots = slots.keys.shape[1] - 1
        recent = n_slots - self.start_tokens
        leaving = (self.start_tokens + slots.step_index.remainder(recent)).reshape(1)
        slots.move_new_token(leaving)
