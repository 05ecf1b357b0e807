r"""KeyDiff: keep the keys that point furthest away from where most keys point; no attention is needed at all.

Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments" (arXiv 2504.15364). The score of a key after RoPE is its negative cosine with the
mean of all keys of its head, each scaled to length 1 first:

$$S_j = -\cos\left(k_j,\ \frac{1}{T} \sum_{i=1}^{T} \frac{k_i}{\lVert k_i \rVert}\right).$$

Deviation: one selection over the whole prompt, as KeyDiffPress of NVIDIA/kvpress does it (in the paper the prompt comes
in blocks and the cache is cut back after each). No token is protected, there as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.methods.scored import ScoredPolicy
from kvbench.ops.segments import unit_keys


@dataclass(frozen=True, kw_only=True)
class KeyDiff(ScoredPolicy):
    """Keys unlike the mean key; one selection at the end of the prompt, no options besides the budget."""

    name: ClassVar[str] = "keydiff"

    def scores(self, layer: LayerStates) -> Tensor:
        """Negative cosine of each key with the mean of the unit keys, `(H_k, T)` fp32."""
        units = unit_keys(layer.keys)
        return -(units @ unit_keys(units.mean(1, keepdim=True)).transpose(1, 2)).squeeze(-1)
