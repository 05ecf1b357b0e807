"""CaM, cache merging: a token that leaves the recent window may leave its value with the tokens that follow it.

Source: Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference" (ICML 2024), eq. 14 and algorithm 1:
`M_i ~ Bernoulli(clamp(A_i / mean(A_j .. A_(j+m-1)), 0, 1))` and `v_t <- v_t + M_i v_i / m` for each of the m targets,
where A is the attention accumulated over all queries so far. Of the four different operators in the official
repository (zyxxmu/cam) `generate_task/streaming_llm/kv_cache_cam.py` is the nearest to that formula, and the one
followed here.

The base is StreamingLLM, as there: first and most recent tokens, equal shares (official start_ratio = recent_ratio =
0.1 of the prompt each). The part of the prompt that does not fit is evicted and never merged in bulk: in the official
code, too, merging starts with decoding. Deviations: accumulation in fp32 instead of fp16; the sum is divided by the
number of targets there really are; every token merges once, when it leaves; the gate's randomness is seeded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvbench.methods.base import CONSTANT, CompressedLayer, DecodeSlots, LayerStates, Policy, floor_share, reduce_groups
from kvbench.methods.options import Positive, WithinExcept
from kvbench.ops.counter_rng import absorb_word, counter_hash, hash_to_uniform
from kvbench.ops.steps import RowsStepper


@dataclass
class CaMState:
    """Attention mass over all queries so far, `(H_k, m)` fp32 (mean over a group), and `head_hashes`, `(H_k, 1)`."""

    scores: Tensor
    head_hashes: Tensor = field(metadata=CONSTANT)


@dataclass(frozen=True, kw_only=True)
class CaM(Policy):
    """Start and recent tokens, of constant size while decoding, with gated merging of leaving values.

    Slots are ordered [start, recent], prompt positions ascending. While decoding, the recent slots are a ring: the
    token that leaves the window before new token `step_index` is in ring slot `step_index mod recent`.

    Attributes:
        start_share: share of the kept slots that holds the first tokens; the rest is the recent window.
        merge_tokens: how many of the following kept tokens share the leaving value (m of the paper), fewer if the
            window is shorter; 32 is hard-coded in the official generation code.
        merge: false drops leaving tokens without merging, which is StreamingLLM, the base to compare with.
    """

    start_share: Annotated[float, WithinExcept(0, 1, left_out=1)] = 0.5
    merge_tokens: Positive = 32
    merge: bool = True

    name: ClassVar[str] = "cam"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})
    steps: ClassVar[bool] = True
    minimum_tokens: ClassVar[int] = 4  # two start and two recent slots at the default shares

    def split(self, n_slots: int) -> tuple[int, int]:
        """Divide a layer's slots into (start, recent); start is the floor of its share and leaves at least 1 recent."""
        start = min(n_slots - 1, floor_share(self.start_share, n_slots))
        return start, n_slots - start

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the first and the most recent tokens; nothing is merged here."""
        start, recent = self.split(budget_tokens)
        device = layer.keys.device
        scores = layer.group_scores(layer.observed("column_sums"))
        hashes = head_hashes(layer.seed, layer.n_layers, layer.n_kv_heads, device)
        return CompressedLayer(
            first_and_recent(layer.keys, start, recent),
            first_and_recent(layer.values, start, recent),
            kept_positions(layer.n_tokens, start, recent, device).expand(layer.n_kv_heads, -1),
            state=CaMState(first_and_recent(scores, start, recent), hashes[layer.layer_index]),
        )

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        """Count the new token's attention, put it in the place of the leaving token, and merge the latter's value.

        The targets are the next `merge_tokens` kept tokens in sequence order, the new token included if the window is
        that short. The gate compares `u * mean(A of the targets)` with the leaving token's A, u being uniform by (seed,
        layer, KV head, step), which is the Bernoulli draw without a division by zero. Device operations only.
        """
        start, recent = self.split(slots.n_slots)
        scores = slots.state.scores
        scores += reduce_groups(attention, slots.keys.shape[0], "mean")
        leaving = (start + slots.step_index.remainder(recent)).reshape(1)
        leaving_values = slots.values.index_select(1, leaving).float()
        leaving_scores = scores.index_select(1, leaving)
        slots.move_new_token(leaving)
        if not self.merge:
            return
        n_targets = min(self.merge_tokens, recent)
        ahead = torch.arange(1, n_targets + 1, device=slots.keys.device)
        targets = start + (slots.step_index + ahead).remainder(recent)  # `recent` ahead is the new token's slot
        uniform = hash_to_uniform(torch.as_tensor(absorb_word(slots.state.head_hashes, slots.step_index)))
        gate = uniform * scores.index_select(1, targets).mean(1, keepdim=True) < leaving_scores
        share = (leaving_values / n_targets) * gate.unsqueeze(-1)
        merged = slots.values.index_select(1, targets).float() + share
        slots.values.index_copy_(1, targets, merged.to(slots.values.dtype))

    @classmethod
    def rows_stepper(cls) -> type[RowsStepper]:
        """One launch for all rows, options differing from row to row included."""
        from kvbench.ops.steps_triton import CaMRowsStepper  # imports triton, which a CPU may lack

        return CaMRowsStepper


def first_and_recent(tensor: Tensor, start: int, recent: int) -> Tensor:
    """The first `start` and the last `recent` tokens of `(H, T, ...)`, copied as two stretches instead of by index."""
    return torch.cat([tensor[:, :start], tensor[:, tensor.shape[1] - recent :]], dim=1)


@functools.lru_cache(maxsize=32)  # the same for all layers of a prompt: one copy to the device instead of one a layer
def kept_positions(n_tokens: int, start: int, recent: int, device: torch.device) -> Tensor:
    """Positions of the first `start` and the last `recent` of `n_tokens` tokens, `(start + recent,)` int64."""
    return torch.cat([torch.arange(start), torch.arange(n_tokens - recent, n_tokens)]).to(device)


@functools.lru_cache(maxsize=32)
def head_hashes(seed: int, n_layers: int, n_kv_heads: int, device: torch.device) -> Tensor:
    """Hashes of (seed, layer, KV head), to which a step adds its number, `(n_layers, H_k, 1)` int64."""
    layers = torch.as_tensor(counter_hash(seed, torch.arange(n_layers).view(-1, 1, 1)))
    return torch.as_tensor(counter_hash(layers, torch.arange(n_kv_heads).view(1, -1, 1))).to(device)
