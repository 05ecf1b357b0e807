r"""DefensiveKV and LayerDefensiveKV: score a token by the most it was ever attended to, not by the mean.

Source: Feng et al., "Taming the Fragility of KV Cache Eviction in LLM Inference" (ICLR 2026, arXiv 2510.13334);
official code FFY0/DefensiveKV, `kvpress/presses/efficient_defensivekv_press.py`. Each of the last W queries' rows of
each query head is pooled along the tokens and scaled back to its own mass; a token's risk is its highest such entry,
and at least the mean risk of its head (the paper's prior). Risks are weighed by the L1 norm of the projected values as
in CriticalKV, here as a share n of all KV heads' norms:

$$S_j = n_j \max(r_j, \operatorname{mean}_t r_t), \qquad r_j = \max_{T - W < i \le T} \hat A_{ij}.$$

Tokens that together carry most of the attention are taken first, and all heads of the layer compete for its slots,
without a floor. LayerDefensiveKV lets all layers compete, too.

Deviations: accumulation in fp32. The official threshold of the first stage is 0.9 less the attention on the W tokens
before the window; the text beside it means the window's own, which its code has cut off by then: `window_mass` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from kvbench.fields import Within
from kvbench.methods.base import CompressedLayer, LayerStates, Policy, floor_share
from kvbench.methods.criticalkv import projected_value_norms
from kvbench.methods.options import Positive, Width
from kvbench.methods.scored import allocate_by_scores, take_marked
from kvbench.ops.selection import largest_of_all


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(Policy):
    """Worst-case risks, all heads of a layer in one ranking; one selection at the end of the prompt.

    Attributes:
        observation_tokens: W, last prompt queries whose rows are read and whose tokens are always kept.
        kernel_tokens: width of the average pooling along the tokens, odd.
        first_stage_mass: attention that the tokens of the first stage carry together, the window's included.
        window_mass: what counts as the window's attention: that on the W tokens before it ("before", the official
            code), or on its own ("own").
    """

    observation_tokens: Positive = 32
    kernel_tokens: Width = 5
    first_stage_mass: Annotated[float, Within(0, 1)] = 0.9
    window_mass: Literal["before", "own"] = "before"

    name: ClassVar[str] = "defensivekv"
    needs: ClassVar[frozenset[str]] = frozenset({"window_attention", "output_weight"})

    @property
    def window_tokens(self) -> int:
        """The observation window."""
        return self.observation_tokens

    @property
    def minimum_tokens(self) -> int:
        """The observation window, and one token that its risk has chosen."""
        return self.observation_tokens + 1

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the best of all heads together; `lengths` sum to the layer's slots."""
        n_slots = budget_tokens if self.allocates else layer.n_kv_heads * budget_tokens
        return take_marked(layer, largest_of_all(self.ranks(layer), n_slots))

    def ranks(self, layer: LayerStates) -> Tensor:
        """Weighed risks `(H_k, T)` fp32; infinity for the window and the tokens of the first stage."""
        n_window, n_older = self.observation_tokens, layer.n_tokens - self.observation_tokens
        rows = layer.observed("window_attention")[:, -n_window:]
        older = rows[:, :, :n_older]
        pooled = avg_pool1d(older, self.kernel_tokens, stride=1, padding=self.kernel_tokens // 2)
        tiny = torch.finfo(torch.float32).tiny
        pooled = pooled * (older.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp_min(tiny))
        worst = layer.group_scores(pooled.amax(1), "max")
        risks = worst.maximum(worst.mean(1, keepdim=True))
        norms = projected_value_norms(layer)[:, :n_older]
        risks = risks * (norms / norms.sum(0).clamp_min(tiny))
        return pad(risks.masked_fill(self._first_stage(layer, older), torch.inf), (0, n_window), value=torch.inf)

    def _first_stage(self, layer: LayerStates, older: Tensor) -> Tensor:
        """Mark each head's highest mean attention `(H_k, n)`, as many as stay below the mass, and fit the budget."""
        n_window, n_older = self.observation_tokens, older.shape[2]
        before = older[:, :, -n_window:].sum(-1).mean()
        inside = before if self.window_mass == "before" else 1.0 - older.sum(-1).mean()
        mean = layer.group_scores(older.mean(1))
        mean = mean / mean.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        highest, order = mean.sort(dim=1, descending=True, stable=True)
        reached = highest.cumsum(1) >= self.first_stage_mass - inside
        count = reached.int().argmax(1, keepdim=True)  # of entries before the mass is reached; 0 if it never is
        count = count.clamp_max(max(0, floor_share(self.budget, n_older) - n_window))
        chosen = torch.arange(n_older, device=mean.device) < count
        return torch.zeros_like(chosen).scatter_(1, order, chosen)


@dataclass(frozen=True, kw_only=True)
class LayerDefensiveKV(DefensiveKV):
    """DefensiveKV with one ranking over all layers; options as there."""

    name: ClassVar[str] = "layer_defensivekv"
    allocates: ClassVar[bool] = True

    def preference(self, layer: LayerStates) -> Tensor:
        """The layer's ranks."""
        return self.ranks(layer)

    def allocate(self, preferences: Sequence[Tensor], n_tokens: int, n_kv_heads: int) -> list[int]:
        """How many of the best ranks of all layers lie in each."""
        return allocate_by_scores(preferences, len(preferences) * n_kv_heads * self.budget_tokens(n_tokens))
