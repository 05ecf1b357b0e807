r"""SnapKV: keep what the last queries of the prompt look at, neighbours included, and the tokens of those queries.

Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation" (NeurIPS 2024, arXiv 2404.14469);
official code FasterDecoding/SnapKV, `snapkv/monkeypatch/snapkv_utils.py`. The votes of the last W queries are
pooled along the tokens so that a chosen token brings its neighbours,

$$S_j = \max_{|t - j| \le r} \frac{1}{W} \sum_{i=T-W+1}^{T} A_{it}, \qquad r = (\mathtt{kernel\_tokens} - 1) / 2,$$

and the best are kept with the W tokens themselves. It fires once; while decoding the cache grows.

Deviations: accumulation in fp32 (there: fp16 probabilities), and grouped-query attention keeps one set per KV head
from the group's reduced votes (there: keys are repeated and every query head keeps its own set, at G times the memory).
As in AdaKV's code, votes are reduced before pooling; NVIDIA/kvpress reduces after it, which differs for max pooling
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from kvbench.methods.base import LayerStates
from kvbench.methods.options import GroupReduction, Positive, Width
from kvbench.methods.scored import ScoredPolicy, window_votes


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoredPolicy):
    """Window votes, pooled; one selection at the end of the prompt.

    Attributes:
        observation_tokens: W, last prompt queries that vote and whose tokens are always kept; 32 in the official
            LongBench runs.
        kernel_tokens: width of the pooling along the tokens, odd; 1 does not pool. Official: 7 on LongBench, 5 in the
            class.
        pooling: "max" (official LongBench runs) or "avg" (official class; zeros beyond the edges count, as there).
        group_reduce: how the query heads of a KV head share one score: "mean", "max" or "first".
    """

    observation_tokens: Positive = 32
    kernel_tokens: Width = 7
    pooling: Literal["max", "avg"] = "max"
    group_reduce: GroupReduction = "mean"

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[frozenset[str]] = frozenset({"window_attention"})

    @property
    def window_tokens(self) -> int:
        """The observation window."""
        return self.observation_tokens

    @property
    def last_tokens(self) -> int:
        """The observation window's own tokens."""
        return self.observation_tokens

    def scores(self, layer: LayerStates) -> Tensor:
        """Pooled votes of the window's queries, `(H_k, T)` fp32; zeros for the window's own tokens, kept anyway."""
        votes = layer.group_scores(window_votes(layer, self.observation_tokens), self.group_reduce)
        older = votes[:, : layer.n_tokens - self.observation_tokens].unsqueeze(0)
        pool = max_pool1d if self.pooling == "max" else avg_pool1d
        pooled = pool(older, self.kernel_tokens, stride=1, padding=self.kernel_tokens // 2)
        return pad(pooled[0], (0, self.observation_tokens))
