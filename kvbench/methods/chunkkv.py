r"""ChunkKV: keep whole chunks of neighbouring tokens, the same in every head, by the scores of another method.

Source: Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference" (arXiv
2502.00299); ChunkKVPress of NVIDIA/kvpress. With $S^h_j$ the base's score of token j in head h,
a chunk C of neighbouring tokens has the score

$$S_C = \frac{1}{|C|} \sum_{j \in C} \sum_{h=1}^{H_k} S^h_j,$$

and the best chunks are kept. Chunks are counted from the first token; the last one may be shorter.

Deviations: what the base method protects is kept and takes no part in the means, as in the paper, where the observation
window is appended (kvpress lets the window's raised scores lift the chunk they fall into); the first chunk that does
not fit is filled up by the scores of its tokens, so that the slots are the budget exactly (kvpress rounds down to whole
chunks). The paper's reuse of one layer's choice in the next is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.methods.options import Positive
from kvbench.methods.scored import OverScores, ScoredPolicy, take_slots
from kvbench.methods.snapkv import SnapKV

PAPERS_BASE = SnapKV(kernel_tokens=1)


@dataclass(frozen=True, kw_only=True)
class ChunkKV(OverScores):
    """Whole chunks over the scores of another method; one selection at the end of the prompt.

    Attributes:
        chunk_tokens: tokens of a chunk; 20 in kvpress.
    """

    base: ScoredPolicy = PAPERS_BASE
    chunk_tokens: Positive = 20

    name: ClassVar[str] = "chunkkv"

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the best chunks, and of the first that does not fit the best tokens (ties: the more recent)."""
        first, last, device = self.base.first_tokens, self.base.last_tokens, layer.keys.device
        end = layer.n_tokens - last
        scores = self.base.scores(layer).sum(0)[first:end]
        chunks = torch.arange(first, end, device=device) // self.chunk_tokens
        padding = (first, -end % self.chunk_tokens)
        sums, sizes = (pad(x, padding).unflatten(0, (-1, self.chunk_tokens)).sum(1) for x in (scores, scores * 0 + 1))
        tokens = torch.arange(end - first - 1, -1, -1, device=device)  # the most recent first; then stable sorts
        for keys in (scores, chunks, (sums / sizes)[chunks]):
            tokens = tokens[keys[tokens].sort(descending=True, stable=True).indices]
        chosen = first + tokens[: budget_tokens - first - last].sort().values
        ends = [torch.arange(first, device=device), chosen, torch.arange(end, layer.n_tokens, device=device)]
        return take_slots(layer, torch.cat(ends).expand(layer.n_kv_heads, -1))
