r"""TOVA, token omission via attention: the last query alone decides, with one voice for all heads of a layer.

Source: Oren et al., "Transformers are Multi-State RNNs" (EMNLP 2024, arXiv 2401.06104), section 3.3; official code
schwartz-lab-NLP/TOVA. The attention of the newest query is averaged over all H query heads,

$$S_j = \frac{1}{H} \sum_{h=1}^{H} A^h_{Tj},$$

and the tokens it looks at least are dropped, at the end of the prompt down to the budget and then one after each new
token. Neither sinks nor recent tokens are protected; the newest token itself may go.

Deviation: the average is taken of fp32 probabilities (there: cast to the model's dtype first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.methods.base import CompressedLayer, DecodeSlots, LayerStates, Policy
from kvbench.methods.scored import take_slots, window_votes
from kvbench.ops.selection import heavy_and_recent


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """The tokens the last query attends to most, one set per layer, of constant size while decoding.

    After the prompt, slots are in the order of positions; a new token takes the slot of the token it displaces.

    Attributes:
        keep_newest: never drop the newest token, as NVIDIA/kvpress' TOVAPress does; the official code may.
    """

    keep_newest: bool = False

    name: ClassVar[str] = "tova"
    needs: ClassVar[frozenset[str]] = frozenset({"window_attention"})
    window_tokens: ClassVar[int] = 1  # the last query
    steps: ClassVar[bool] = True

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep what the last prompt query attends to most (ties: the more recent token), the same in every head."""
        scores = window_votes(layer, 1).mean(0, keepdim=True)
        newest = int(self.keep_newest)
        positions = heavy_and_recent(scores, budget_tokens - newest, newest)
        return take_slots(layer, positions.expand(layer.n_kv_heads, -1))

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        """Put the new token in the place of the one it attends to least, or drop it if that is itself.

        Of equals the first slot goes. Device operations only: nothing is read back to the host.
        """
        scores = attention.mean(0)
        slots.move_new_token(scores[: slots.n_slots + (not self.keep_newest)].argmin().reshape(1))
