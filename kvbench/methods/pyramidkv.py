r"""PyramidKV: SnapKV's selection with more slots in lower layers and fewer in higher ones.

Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling" (arXiv
2406.02069); official code Zefan-Cai/KVCache-Factory, `pyramidkv/pyramidkv_utils.py`. With m slots a layer on
average, window W and b = m - W, layer l of L keeps its window and

$$b_l = b_1 - \frac{l - 1}{L - 1} (b_1 - b_L), \qquad b_L = \frac{b}{\beta}, \qquad b_1 = 2 b - b_L$$

tokens before it; if b is more than half of the prompt, all layers get the same.

Deviation: the official step between layers is rounded down, so that the total depends on rounding; here each layer of
the lower half is rounded up and its counterpart in the upper half gets the rest, so that the total is the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvbench.methods.options import Positive
from kvbench.methods.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall from layer to layer; its options are SnapKV's, and one more.

    Attributes:
        observation_tokens: as SnapKV's; 8 in the official LongBench runs.
        beta: the last layer keeps 1 / beta of the average prefix slots; larger is steeper, 1 is uniform. 20 in the
            official code.
    """

    observation_tokens: Positive = 8
    beta: Positive = 20

    name: ClassVar[str] = "pyramidkv"

    def layer_budgets(self, n_tokens: int, n_layers: int) -> list[int]:
        """Slots, window included, that fall linearly from the first layer to the last."""
        uniform = super().layer_budgets(n_tokens, n_layers)
        average = uniform[0] - self.observation_tokens
        if n_tokens < 2 * average:
            return uniform
        least = average // self.beta
        most = min(2 * average - least, n_tokens - self.observation_tokens)
        fall = 2 * (most - average)  # from the first layer to the last
        lower = [most - fall * index // (n_layers - 1) for index in range(n_layers // 2)]
        middle = [average] * (n_layers % 2)
        upper = [2 * average - slots for slots in reversed(lower)]
        return [self.observation_tokens + slots for slots in (*lower, *middle, *upper)]
