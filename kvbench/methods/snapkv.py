"""SnapKV: keep what the last queries of the prompt look at, neighbours included, and the tokens of those queries.

Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation" (NeurIPS 2024, arXiv 2404.14469);
official code FasterDecoding/SnapKV, `snapkv/monkeypatch/snapkv_utils.py`. The votes of the last W queries (their
softmax rows, summed) are pooled along the tokens so that a chosen token brings its neighbours, and the best are kept
with the W tokens themselves. It fires once; while decoding the cache grows.

Deviations: accumulation in fp32 (there: fp16 probabilities), and grouped-query attention keeps one set per KV head
from the group's reduced votes (there: keys are repeated and every query head keeps its own set, at G times the memory).
As in AdaKV's code, votes are reduced before pooling; NVIDIA/kvpress reduces after it, which differs for max pooling
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from kvbench.errors import ConfigError
from kvbench.methods.base import LayerStates
from kvbench.methods.options import GROUP_REDUCTIONS, reduce_groups, require_choice, require_count
from kvbench.methods.scored import ScoredPolicy

POOLINGS = ("max", "avg")


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoredPolicy):
    """Window votes, pooled; one selection at the end of the prompt.

    Attributes:
        observation_tokens: W, last prompt queries that vote and whose tokens are always kept.
        kernel_tokens: width of the pooling along the tokens, odd; 1 does not pool.
        pooling: "max" or "avg" (zeros beyond the edges count, as there).
        group_reduce: how the query heads of a KV head share one score: "mean", "max" or "first".
    """

    observation_tokens: int = 32
    kernel_tokens: int = 7
    pooling: str = "max"
    group_reduce: str = "mean"

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[frozenset[str]] = frozenset({"window_attention"})

    def __post_init__(self) -> None:
        """Validate the options; raises `ConfigError`."""
        super().__post_init__()
        require_count("observation_tokens", self.observation_tokens, minimum=1)
        require_count("kernel_tokens", self.kernel_tokens, minimum=1)
        if self.kernel_tokens % 2 == 0:
            raise ConfigError(f"kernel_tokens={self.kernel_tokens} is even: give an odd width, so that it has a middle")
        require_choice("pooling", self.pooling, POOLINGS)
        require_choice("group_reduce", self.group_reduce, GROUP_REDUCTIONS)

    @property
    def window_tokens(self) -> int:
        """The observation window."""
        return self.observation_tokens

    @property
    def last_tokens(self) -> int:
        """The observation window's own tokens."""
        return self.observation_tokens

    def scores(self, layer: LayerStates) -> Tensor:
        """Pooled votes of the window's queries.

        Args:
            layer: needs `window_attention`.

        Returns:
            `(H_k, T)` fp32; zeros for the window's own tokens, which are kept anyway.
        """
        window = self.observation_tokens
        votes = reduce_groups(window_votes(layer, self.name, window), layer.n_kv_heads, self.group_reduce)
        older = votes[:, : layer.n_tokens - window].unsqueeze(0)
        pool = max_pool1d if self.pooling == "max" else avg_pool1d
        pooled = pool(older, self.kernel_tokens, stride=1, padding=self.kernel_tokens // 2)
        return pad(pooled[0], (0, window))


def window_votes(layer: LayerStates, name: str, window_tokens: int) -> Tensor:
    """Attention each key receives from the last `window_tokens` queries, `(H, T)` fp32 sums.

    The prefill may have observed more rows than this method asked for; only its own count.
    """
    if layer.window_attention is None:
        raise ValueError(f"{name} needs window_attention, which the prefill did not provide")
    return layer.window_attention[:, -window_tokens:].sum(1, dtype=torch.float32)
