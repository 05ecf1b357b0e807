r"""Knorm: keep the keys of smallest L2 norm; no attention is needed at all.

Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (EMNLP 2024, arXiv
2406.11430); KnormPress of NVIDIA/kvpress. Keys of low norm tend to receive much attention, and the rotary embedding
does not change a norm, so the score is

$$S_j = -\lVert k_j \rVert_2.$$

It fires once; while decoding the cache grows.

The defaults are kvpress': every layer, no protected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.methods.base import LayerStates, with_whole_layers
from kvbench.methods.options import Count
from kvbench.methods.scored import ScoredPolicy


@dataclass(frozen=True, kw_only=True)
class Knorm(ScoredPolicy):
    """Low-norm keys; one selection at the end of the prompt.

    Attributes:
        recent_tokens: last tokens that are always kept. The method has no such window; give one to compare it fairly
            with methods that do.
        whole_first_layers: first layers left uncompressed; their slots count towards the budget. 0 as in
            NVIDIA/kvpress; Zefan-Cai/KVCache-Factory leaves 2.
    """

    recent_tokens: Count = 0
    whole_first_layers: Count = 0

    name: ClassVar[str] = "knorm"

    @property
    def last_tokens(self) -> int:
        """The recent window."""
        return self.recent_tokens

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """Give whole layers all T slots and spread the rest evenly."""
        if not self.whole_first_layers:
            return super().layer_budgets(n_tokens, n_layers)
        return with_whole_layers(self, n_tokens, n_layers, self.whole_first_layers, 0)

    def scores(self, layer: LayerStates) -> Tensor:
        """Negative L2 norm of each key, `(H_k, T)` fp32."""
        return -layer.keys.float().norm(dim=-1)
