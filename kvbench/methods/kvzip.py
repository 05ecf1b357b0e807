r"""KVzip: keep what the model looks at while it repeats the context, whatever may be asked later.

Source: Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction" (NeurIPS 2025, arXiv
2505.23416), algorithm 1; official code snu-mllab/KVzip, `attention/score.py` (`_threshold`, `_threshold_uniform`). With
i running over the tokens that repeat the context, and over the query heads of a group,

$$S_j = \max_i A_{ij}.$$

The scores come from a second pass, `kvbench.runtime.reconstruct`, whose time each record names; since the prompt that
is repeated must not hold the question, the method runs under `protocol.compress=before_question` only.

Deviations: the slots kept are exact (there: all scores strictly above a threshold, so one fewer and no ties), ties go
to the more recent token, and the first 4 tokens are kept in every head (there: the whole system prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.methods.options import Positive
from kvbench.methods.scored import ScoredPolicy, allocate_by_scores, protect_first, take_marked
from kvbench.ops.selection import largest_of_all


@dataclass(frozen=True, kw_only=True)
class KVzip(ScoredPolicy):
    """Reconstruction scores; one selection at the end of the context.

    Attributes:
        selection: over which keys the best are chosen: those of all layers ("global", the official default), those of
            a layer ("layerwise"), or those of a head ("uniform").
        start_tokens: first tokens always kept in every head.
    """

    selection: Literal["global", "layerwise", "uniform"] = "global"
    start_tokens: Positive = 4

    name: ClassVar[str] = "kvzip"
    needs: ClassVar[frozenset[str]] = frozenset({"reconstruction"})

    @property
    def allocates(self) -> bool:
        """Whether layers share one ranking."""
        return self.selection == "global"

    @property
    def first_tokens(self) -> int:
        """The start tokens."""
        return self.start_tokens

    def scores(self, layer: LayerStates) -> Tensor:
        """Highest attention while the context is repeated, `(H_k, T)` fp32."""
        return layer.observed("reconstruction")

    def preference(self, layer: LayerStates) -> Tensor:
        """The layer's scores, infinity for the start tokens."""
        return protect_first(self.scores(layer), self.start_tokens)

    def allocate(self, preferences: Sequence[Tensor], n_tokens: int, n_kv_heads: int) -> list[int]:
        """How many of the best scores of all layers lie in each."""
        return allocate_by_scores(preferences, len(preferences) * n_kv_heads * self.budget_tokens(n_tokens))

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the best of each head, or of all heads together."""
        if self.selection == "uniform":
            return super().compress(layer, budget_tokens)
        n_slots = budget_tokens if self.allocates else layer.n_kv_heads * budget_tokens
        return take_marked(layer, largest_of_all(self.preference(layer), n_slots))
