r"""Full cache: every prompt token kept, the baseline of every table.

Source: Vaswani et al., "Attention Is All You Need" (NeurIPS 2017), section 3.2. The output of one head for query i,

$$o_i = \sum_{j \le i} A_{ij} v_j, \qquad A_{ij} = \operatorname{softmax}_j(s\, q_i \cdot k_j),$$

is what every other method approximates with m slots in place of the T tokens of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvbench.errors import ConfigError
from kvbench.methods.base import CompressedLayer, LayerStates, Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keep all keys and values; while decoding the cache grows by one slot per new token. It has no options.

    Attributes:
        budget: 1; any other number is refused, since nothing would be left out and the number would mislead.
    """

    budget: float = 1.0

    name: ClassVar[str] = "full"

    def __post_init__(self) -> None:
        """Refuse any budget but 1."""
        super().__post_init__()
        if self.budget != 1.0:
            raise ConfigError(f"budget={self.budget:g} with method full, which keeps everything: set budget to 1.0")

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Return the layer as it is."""
        return layer.whole()


def in_effect(policy: Policy) -> Policy:
    """The policy that runs in place of one: at budget 1 every method keeps everything, while decoding, too.

    A policy whose budget decides nothing (`exact_budget` is false) runs at any budget.
    """
    return Full() if policy.budget == 1.0 and policy.exact_budget else policy
