r"""CAKE: give more slots to layers whose attention is spread over many tokens and shifts between queries.

Source: Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences" (ICLR 2025, arXiv
2503.12491), equations for layer preference and eviction indicator; official code antgroup/cakekv,
`cake/model/modify_llama.py`, `cake/utils.py`, `cake/cake_cache.py`. Of the last W queries' rows over the tokens before
the window, a layer's preference P and a token's score S, pooled along the tokens, are

$$P = \left(-\sum_{i,j} A_{ij} \log A_{ij}\right)^{1/\tau_1} \left(\sum_j \operatorname{var}_i A_{ij}\right)^{1/\tau_2},
\qquad
S_j = \operatorname{mean}_i A_{ij} + \gamma \operatorname{var}_i A_{ij},$$

the sums of P running over heads, too. Layers share the slots beside the window in proportion to P.

The paper chose tau1 and tau2 for each model and budget (`model2tau.json` there: for Llama-3.1-8B 1.6 and 0.4 with 1,024
slots, 1.6 and 0.6 with 128); 1 where it names none.

Deviations: all layers are held until their budgets are known, where the paper lets them shrink as later ones come in
(the same slots, less memory); slots that a layer has no tokens for go to the others until none is left (there: in one
round, and what is left then is lost); prompts little longer than the budget are compressed, too. It fires once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from kvbench.fields import Within
from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.methods.options import AboveZero, Width
from kvbench.methods.scored import ScoredPolicy


@dataclass(frozen=True, kw_only=True)
class CAKE(ScoredPolicy):
    """Layer budgets by preference, then mean and variance of the window's rows; one selection.

    Attributes:
        observation_tokens: W, last prompt queries whose rows are read and whose tokens are always kept.
        tau1: temperature of the entropy in a layer's preference.
        tau2: temperature of the variance there.
        gamma: weight of the variance in a token's score.
        kernel_tokens: width of the average pooling along the tokens, odd; zeros beyond the edges count.
    """

    observation_tokens: Annotated[int, Within(2)] = 32
    tau1: AboveZero = 1.0
    tau2: AboveZero = 1.0
    gamma: Annotated[float, Within(0)] = 200.0
    kernel_tokens: Width = 5

    name: ClassVar[str] = "cake"
    needs: ClassVar[frozenset[str]] = frozenset({"window_attention"})
    allocates: ClassVar[bool] = True

    @property
    def window_tokens(self) -> int:
        """The observation window."""
        return self.observation_tokens

    @property
    def last_tokens(self) -> int:
        """The observation window's own tokens."""
        return self.observation_tokens

    def _older(self, layer: LayerStates) -> Tensor:
        """The window's rows over the tokens before it, `(H, W, T - W)`."""
        rows = layer.observed("window_attention")[:, -self.observation_tokens :]
        return rows[:, :, : layer.n_tokens - self.observation_tokens]

    def scores(self, layer: LayerStates) -> Tensor:
        """Mean and weighed variance of each token's attention, pooled, `(H_k, T)` fp32; zeros for the window."""
        rows = self._older(layer)
        indicator = rows.mean(1) + self.gamma * rows.var(1)
        pooled = avg_pool1d(indicator, self.kernel_tokens, stride=1, padding=self.kernel_tokens // 2)
        return pad(layer.group_scores(pooled), (0, self.observation_tokens))

    def preference(self, layer: LayerStates) -> Tensor:
        """The layer's preference, `(1,)` fp64."""
        rows = self._older(layer)
        entropy, variance = torch.special.entr(rows).sum().double(), rows.var(1).sum().double()
        return (entropy ** (1 / self.tau1) * variance ** (1 / self.tau2)).reshape(1)

    def allocate(self, preferences: Sequence[Tensor], n_tokens: int, n_kv_heads: int) -> list[int]:
        """The window for every layer, and a share of the other slots in proportion to its preference."""
        weights, n_older = torch.cat(list(preferences)).tolist(), n_tokens - self.observation_tokens
        total = len(weights) * (self.budget_tokens(n_tokens) - self.observation_tokens)
        if not 0.0 < sum(weights) < float("inf"):
            weights = [1.0] * len(weights)  # all queries attend alike everywhere
        shares = [min(int(weight / sum(weights) * total), n_older) for weight in weights]
        while left := total - sum(shares):
            open_layers = [index for index, share in enumerate(shares) if share < n_older]
            each, more = divmod(left, len(open_layers))
            for rank, index in enumerate(open_layers):
                shares[index] = min(shares[index] + each + (rank < more), n_older)
        return [n_kv_heads * (share + self.observation_tokens) for share in shares]

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the best-scored tokens and the window, equally many in each head."""
        return super().compress(layer, budget_tokens // layer.n_kv_heads)
