r"""Compactor: keep keys that are outliers, or that the tokens around them, before and after, look at.

Source: Chari and Van Durme, "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage
Scores" (arXiv 2507.08143); the authors' CompactorPress in NVIDIA/kvpress, which is followed where it differs from the
paper. Two terms, each standardised over all heads and tokens of the layer, are added, the first times `blending`:

* leverage: keys before RoPE, centred, times a Gaussian sketch `(D, s)`, are the rows $x_j$ of X; score l below.
* attention without a causal mask inside tiles of the prompt, its logits not divided by sqrt(D); column sums, averaged
  over the group, times the norm of the value, and averaged with both neighbours: a.

$$S_j = \beta\, z(l)_j + z(a)_j, \qquad l_j = x_j^\top (X^\top X + 0.01\, I)^{-1} x_j, \qquad
\beta = \mathtt{blending},$$

z being that standardisation. Sinks and last tokens are always kept and take no part.

Deviations: the sketch comes from the sample's seed (there: the global generator); queries of the last, shorter tile
attend to that tile alone, whereas there its padding joins in with logits of about 0. Keys before RoPE are had by
turning the rotated ones back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from kvbench.fields import Within
from kvbench.methods.base import LayerStates
from kvbench.methods.expected_attention import turn
from kvbench.methods.options import Count, Positive
from kvbench.methods.scored import ScoredPolicy
from kvbench.ops.counter_rng import counter_uniform

JITTER = 0.01
LEAST_DEVIATION = 1e-6


@dataclass(frozen=True, kw_only=True)
class Compactor(ScoredPolicy):
    """Leverage scores and non-causal attention; one selection at the end of the prompt.

    Attributes:
        terms: "both", "leverage" alone (LeverageScorePress) or "attention" alone (NonCausalAttnPress).
        blending: weight of the leverage term; None is the share that is evicted, 1 - budget.
        start_tokens: first tokens that are always kept.
        end_tokens: last tokens that are always kept.
        tile_tokens: tokens of a tile of the attention.
        sketch_dimensions: s, columns of the sketch.
    """

    terms: Literal["both", "leverage", "attention"] = "both"
    blending: Annotated[float, Within(0)] | None = None
    start_tokens: Count = 8
    end_tokens: Count = 4
    tile_tokens: Positive = 256
    sketch_dimensions: Positive = 48

    name: ClassVar[str] = "compactor"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "rotary_frequencies"})

    @property
    def first_tokens(self) -> int:
        """The sinks."""
        return self.start_tokens

    @property
    def last_tokens(self) -> int:
        """The last tokens."""
        return self.end_tokens

    def scores(self, layer: LayerStates) -> Tensor:
        """The sum of the terms, `(H_k, T)` fp32; zeros for the tokens kept anyway."""
        competing = slice(self.start_tokens, layer.n_tokens - self.end_tokens)
        found = torch.zeros(
            layer.n_kv_heads, layer.n_tokens - self.start_tokens - self.end_tokens, device=layer.keys.device
        )
        if self.terms != "attention":
            weight = 1.0 if self.terms == "leverage" else 1 - self.budget if self.blending is None else self.blending
            found = found + weight * standardised(self.leverage(layer, competing))
        if self.terms != "leverage":
            found = found + standardised(self.attention(layer, competing))
        return pad(found, (self.start_tokens, self.end_tokens))

    def leverage(self, layer: LayerStates, competing: slice) -> Tensor:
        """Approximate leverage of the competing keys, `(H_k, n)` fp32."""
        positions = torch.arange(layer.n_tokens, device=layer.keys.device)[competing]
        angles = positions.unsqueeze(-1) * layer.observed("rotary_frequencies")
        keys = turn(layer.keys[:, competing].float(), angles.cos(), -angles.sin())
        sketch = gaussian_sketch(layer, self.sketch_dimensions)
        x = (keys - keys.mean(1, keepdim=True)) @ sketch
        gram = x.transpose(1, 2) @ x + JITTER * torch.eye(self.sketch_dimensions, device=x.device)
        return (x * torch.cholesky_solve(x.transpose(1, 2), torch.linalg.cholesky(gram)).transpose(1, 2)).sum(-1)

    def attention(self, layer: LayerStates, competing: slice) -> Tensor:
        """Attention that competing keys receive inside their tiles, times values' norms, pooled; `(H_k, n)` fp32."""
        keys = layer.keys[:, competing].float().repeat_interleave(layer.group_size, 0)
        queries = layer.observed("queries")[:, competing].float()
        tiles = zip(queries.split(self.tile_tokens, 1), keys.split(self.tile_tokens, 1), strict=True)
        sums = torch.cat([(query @ key.transpose(1, 2)).softmax(-1).sum(1) for query, key in tiles], 1)
        weighted = layer.group_scores(sums) * layer.values[:, competing].float().norm(dim=-1)
        return avg_pool1d(weighted, 3, stride=1, padding=1)


def standardised(scores: Tensor) -> Tensor:
    """Scores minus their mean over heads and tokens, in standard deviations; zeros where all are alike."""
    deviation = scores.std() if scores.numel() > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / deviation.clamp_min(LEAST_DEVIATION)


def gaussian_sketch(layer: LayerStates, n_columns: int) -> Tensor:
    """Normal numbers of variance 1 / n_columns by (seed, layer, head, channel, column), `(H_k, D, n_columns)` fp32."""
    shape = (layer.n_kv_heads, layer.keys.shape[-1], n_columns)
    cells = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    radius, angle = (counter_uniform(layer.seed, layer.layer_index, *cells, which) for which in (0, 1))
    normal = (-2.0 * (1.0 - radius).log()).sqrt() * (2.0 * math.pi * angle).cos()  # Box and Muller 1958
    return (normal / math.sqrt(n_columns)).to(layer.keys.device)
