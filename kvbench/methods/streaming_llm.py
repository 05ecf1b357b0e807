r"""StreamingLLM: keep the first tokens (attention sinks) and the most recent ones, whatever anyone attends to.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024, arXiv 2309.17453); official
code mit-han-lab/streaming-llm, `streaming_llm/kv_cache.py`: 4 start tokens and the most recent ones, a rolling cache of
constant size:

$$\{1, \dots, s\} \cup \{T - m + s + 1, \dots, T\}, \qquad s = \mathtt{start\_tokens}.$$

It is what CaM merges on top of, with four sinks in place of half the slots.

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
from kvbench.methods.options import Count


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Start and recent tokens, of constant size while decoding.

    Slots are ordered [start, recent], prompt positions ascending. While decoding, the recent slots are a ring: the
    token that leaves before new token `step_index` is in ring slot `step_index mod recent`.

    Attributes:
        start_tokens: first tokens always kept (4 in paper and official code); all other slots are the recent window.
    """

    start_tokens: Count = 4

    name: ClassVar[str] = "streaming_llm"
    steps: ClassVar[bool] = True

    @property
    def minimum_tokens(self) -> int:
        """The start tokens and one recent token."""
        return self.start_tokens + 1

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the first and the most recent tokens; no attention is needed."""
        tokens = torch.arange(layer.n_tokens, device=layer.keys.device)
        kept = torch.cat([tokens[: self.start_tokens], tokens[layer.n_tokens - budget_tokens + self.start_tokens :]])
        positions = kept.expand(layer.n_kv_heads, -1)
        return CompressedLayer(layer.keys.index_select(1, kept), layer.values.index_select(1, kept), positions)

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        """Put the new token in the place of the oldest recent one. Device operations only."""
        ring = slots.step_index.remainder(slots.n_slots - self.start_tokens)
        slots.move_new_token((self.start_tokens + ring).reshape(1))
