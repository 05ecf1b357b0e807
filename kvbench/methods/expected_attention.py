r"""ExpectedAttention: score each key by the attention that queries still to come are expected to pay to it.

Source: Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution" (arXiv 2510.00636); ExpectedAttentionPress of NVIDIA/kvpress. Before RoPE, the queries of a head are taken
for Gaussian with the mean mu and covariance C of the prompt's; R is the rotation averaged over the next positions. A
query then meets key k with the expected logit

$$z_j = s\, (R \mu) \cdot k_j + \frac{s^2}{2}\, k_j \cdot (R C R^\top) k_j, \qquad
S_j = (\operatorname{softmax}_j(z) + \epsilon)\, \lVert v_j \rVert,$$

s being the model's scale of logits; the softmax is averaged over the group. The first tokens are sinks: they are left
out of the statistics and always kept. It fires once.

Queries before RoPE are had by turning the rotated ones back by their own position. Where RoPE also scales (YaRN), mu
and C keep that scale, so that z is the logit the model would compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvbench.fields import Within
from kvbench.methods.base import LayerStates
from kvbench.methods.options import Count, Positive
from kvbench.methods.scored import ScoredPolicy


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(ScoredPolicy):
    """Expected attention of future queries; one selection at the end of the prompt.

    Attributes:
        future_tokens: positions after the prompt over which the rotation is averaged.
        start_tokens: first tokens that are always kept and whose queries do not count.
        use_covariance: whether the spread of the queries counts, and not their mean alone.
        use_value_norm: whether scores are multiplied by the norms of the values.
        epsilon: added to the expected attention before that, so that large values may win without it.
    """

    future_tokens: Positive = 512
    start_tokens: Count = 4
    use_covariance: bool = True
    use_value_norm: bool = True
    epsilon: Annotated[float, Within(0)] = 0.0

    name: ClassVar[str] = "expected_attention"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "rotary_frequencies"})

    @property
    def first_tokens(self) -> int:
        """The sinks."""
        return self.start_tokens

    def scores(self, layer: LayerStates) -> Tensor:
        """Expected attention of each key, times the norm of its value, `(H_k, T)` fp32; zeros for the sinks."""
        queries, scaling = layer.observed("queries"), layer.observed("scaling")
        frequencies = layer.observed("rotary_frequencies")
        start, device = self.start_tokens, layer.keys.device
        seen = torch.arange(start, layer.n_tokens, device=device)
        angles = seen.unsqueeze(-1) * frequencies
        queries = turn(queries[:, start:].float(), angles.cos(), -angles.sin()) * scaling
        coming = torch.arange(layer.n_tokens, layer.n_tokens + self.future_tokens, device=device)
        angles = coming.unsqueeze(-1) * frequencies
        basis = torch.eye(queries.shape[-1], device=device)
        rotation = turn(basis, angles.cos().mean(0), angles.sin().mean(0)).T  # column i is where channel i goes
        mean = queries.mean(1)
        keys = layer.keys[:, start:].float().repeat_interleave(layer.group_size, 0)
        logits = (keys @ (mean @ rotation.T).unsqueeze(-1)).squeeze(-1)
        if self.use_covariance:
            centred = (queries - mean.unsqueeze(1)) @ rotation.T
            covariance = centred.transpose(1, 2) @ centred / centred.shape[1]
            logits = logits + ((keys @ covariance) * keys).sum(-1) / 2
        expected = layer.group_scores(logits.softmax(-1), "mean") + self.epsilon
        if self.use_value_norm:
            expected = expected * layer.values[:, start:].float().norm(dim=-1)
        return torch.nn.functional.pad(expected, (start, 0))


def turn(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn channel pairs (i, i + R / 2) of `(..., D)` as RoPE does, by angles or averages of them; others stay."""
    n_pairs = cosines.shape[-1]
    first, second, rest = states.split([n_pairs, n_pairs, states.shape[-1] - 2 * n_pairs], -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], -1)
