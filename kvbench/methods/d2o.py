r"""D2O: H2O with sinks; of the evicted tokens, those similar enough to a kept one are recalled and merged into it.

Source: Wan et al., "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language
Models" (ICLR 2025, arXiv 2406.13035); official code AIoT-MLSys-Lab/d2o. The base keeps 4 first tokens, the heavy
hitters by accumulated attention, and a recent window. An evicted token's nearest kept token is the one with the highest
cosine u of the keys; it merges if u is at least the mean of these cosines, the threshold's first value. A kept token c
becomes, with the set E of those that join it, and for values alike,

$$\tilde k_c = \frac{k_c + \sum_{e \in E} u_e k_e}{1 + |E|}, \qquad u_e = \max_{c'} \cos(k_e, k_{c'});$$

as in the code, the weights do not sum to one. The first two layers and the last stay whole.

Deviations: it fires once, at the end of the prompt (there: at the first new token, then at every one, with a moving
average of the threshold); each head has its own threshold (there: a mean over heads of tokens that differ between
heads); the other layers share what is left of the budget evenly. The official code divides it by the variance of the
attention in each layer, which is known only after all layers have run, whereas a layer here is compressed while it is
at hand and no prompt's full cache is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates, with_whole_layers
from kvbench.methods.options import Count, WholeLayers
from kvbench.methods.scored import EvictAndMerge
from kvbench.ops.merging import nearest_kept, sum_by_slot, tokens_at


@dataclass(frozen=True, kw_only=True)
class D2O(EvictAndMerge):
    """Heavy hitters with recall of similar tokens; the options of `EvictAndMerge`, and these.

    Attributes:
        whole_first_layers: first layers left uncompressed; their slots count towards the budget. 2 in the official
            code, as `start_tokens` is 4 there and `recent_share` a half (0.1 of the prompt each).
        whole_last_layers: last layers left uncompressed, likewise; 1 in the official code.
        whole_layers: "inside" counts them; "on_top", as in the official code, does not, so that more is kept.
    """

    whole_first_layers: Count = 2
    whole_last_layers: Count = 1
    whole_layers: WholeLayers = "inside"

    name: ClassVar[str] = "d2o"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """Give whole layers all T slots and spread the rest evenly."""
        numbers = self.whole_first_layers, self.whole_last_layers
        return with_whole_layers(self, n_tokens, n_layers, *numbers, self.whole_layers)

    @property
    def exact_budget(self) -> bool:
        """True unless whole layers come on top."""
        return self.whole_layers == "inside"

    def scores(self, layer: LayerStates) -> Tensor:
        """Accumulated attention of each token."""
        return layer.group_scores(layer.observed("column_sums"), self.group_reduce)

    def merged(self, layer: LayerStates, kept: CompressedLayer, positions: Tensor, evicted: Tensor) -> CompressedLayer:
        """Average the recalled tokens into their nearest kept ones."""
        cosines, slots = nearest_kept(layer.keys, positions, evicted)
        recalled = cosines >= cosines.mean(1, keepdim=True)
        weights = (cosines * recalled).unsqueeze(-1)
        n_slots = kept.keys.shape[1]
        members = 1.0 + sum_by_slot(recalled.float().unsqueeze(-1), slots, n_slots)

        def averaged(states: Tensor, own: Tensor) -> Tensor:
            joined = sum_by_slot(tokens_at(states, evicted) * weights, slots, n_slots)
            return ((own.float() + joined) / members).to(own.dtype)

        return CompressedLayer(averaged(layer.keys, kept.keys), averaged(layer.values, kept.values), positions)
