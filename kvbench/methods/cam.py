r"""CaM, cache merging: a token that leaves the recent window may leave its value with the tokens that follow it.

Source: Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference" (ICML 2024), eq. 14 and algorithm 1:

$$M_i \sim \operatorname{Bernoulli}\left(\min\left(1, \frac{A_i}{\frac{1}{m} \sum_{t=j}^{j+m-1} A_t}\right)\right),
\qquad v_t \leftarrow v_t + \frac{M_i v_i}{m} \quad \text{for } t = j, \dots, j+m-1$$

for token i, which leaves, and the m targets that follow it. What the attention A is, the official repository
(zyxxmu/cam) answers in more than one way, so it is the option `gate`. The default is `current`, the one of the file
that generates text (`cam_hf/utils_hh/modify_llama_cam.py`).

The base is StreamingLLM, as there: first and most recent tokens, equal shares (official start_ratio = recent_ratio =
0.1 of the prompt each). The part of the prompt that does not fit is evicted and never merged in bulk: in the official
code, too, merging starts with decoding. Deviations: fp32 instead of fp16; the sum is divided by the number of targets
there really are; every token merges once, when it leaves (the generation file: one step before); the gate's randomness
is seeded, and the query heads of a KV head share one gate by their mean attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from kvbench.methods.base import CONSTANT, CompressedLayer, DecodeSlots, LayerStates, Policy, floor_share, reduce_groups
from kvbench.methods.options import Positive, WithinExcept
from kvbench.ops.counter_rng import absorb_word, counter_hash, hash_to_uniform
from kvbench.ops.steps import RowsStepper


@dataclass
class CaMState:
    """Attention summed so far, `(H_k, m)` fp32 (mean over a group), unless it is current, and `(H_k, 1)` hashes."""

    scores: Tensor | None
    head_hashes: Tensor = field(metadata=CONSTANT)


@dataclass(frozen=True, kw_only=True)
class CaM(Policy):
    """Start and recent tokens, of constant size while decoding, with gated merging of leaving values.

    Slots are ordered [start, recent], prompt positions ascending. While decoding, the recent slots are a ring: the
    token that leaves the window before new token `step_index` is in ring slot `step_index mod recent`.

    Attributes:
        start_share: share of the kept slots that holds the first tokens; the rest is the recent window.
        merge_tokens: how many of the following kept tokens share the leaving value (m of the paper), fewer if the
            window is shorter; None is what the file of the gate has hard-coded: 16 for "accumulated", else 32.
        gate: what A is: "current", the attention of the newest query alone; "accumulated", summed over all queries,
            the prompt's included (`generate_task/streaming_llm/kv_cache_cam.py`); "decoding", summed over new tokens
            only (CAMPress of NVIDIA/kvpress).
        gate_mean: the leaving token's A is compared with the mean over the "targets" or over the whole rest of the
            "window"; None is "window" for "current", as in its file, else "targets".
        merge: false drops leaving tokens without merging, which is StreamingLLM, the base to compare with.
    """

    start_share: Annotated[float, WithinExcept(0, 1, left_out=1)] = 0.5
    merge_tokens: Positive | None = None
    gate: Literal["current", "accumulated", "decoding"] = "current"
    gate_mean: Literal["targets", "window"] | None = None
    merge: bool = True

    name: ClassVar[str] = "cam"
    steps: ClassVar[bool] = True
    minimum_tokens: ClassVar[int] = 4  # two start and two recent slots at the default shares

    @property
    def needs(self) -> frozenset[str]:
        """Sums over the prompt, where they count."""
        return frozenset({"column_sums"} if self.gate == "accumulated" else ())

    def split(self, n_slots: int) -> tuple[int, int]:
        """Divide a layer's slots into (start, recent); start is the floor of its share and leaves at least 1 recent."""
        start = min(n_slots - 1, floor_share(self.start_share, n_slots))
        return start, n_slots - start

    def gated(self, recent: int) -> tuple[int, int]:
        """How many tokens after the leaving one are its targets, and over how many its gate takes the mean."""
        n_targets = min(self.merge_tokens or (16 if self.gate == "accumulated" else 32), recent)
        over_window = (self.gate_mean or ("window" if self.gate == "current" else "targets")) == "window"
        return n_targets, recent if over_window else n_targets

    def compress(self, layer: LayerStates, budget_tokens: int) -> CompressedLayer:
        """Keep the first and the most recent tokens; nothing is merged here."""
        start, recent = self.split(budget_tokens)
        device = layer.keys.device
        scores = None
        if self.gate == "accumulated":
            scores = first_and_recent(layer.group_scores(layer.observed("column_sums")), start, recent)
        elif self.gate == "decoding":
            scores = torch.zeros(layer.n_kv_heads, budget_tokens, device=device)
        hashes = head_hashes(layer.seed, layer.n_layers, layer.n_kv_heads, device)
        return CompressedLayer(
            first_and_recent(layer.keys, start, recent),
            first_and_recent(layer.values, start, recent),
            kept_positions(layer.n_tokens, start, recent, device).expand(layer.n_kv_heads, -1),
            state=CaMState(scores, hashes[layer.layer_index]),
        )

    def step(self, slots: DecodeSlots, attention: Tensor) -> None:
        """Count the new token's attention, put it in the place of the leaving token, and merge the latter's value.

        The targets are the next tokens in sequence order, the new token included if the window is that short. The gate
        compares `u * mean(A)` with the leaving token's A, u being uniform by (seed, layer, KV head, step), which is the
        Bernoulli draw without a division by zero. Device operations only.
        """
        start, recent = self.split(slots.n_slots)
        scores = reduce_groups(attention, slots.keys.shape[0], "mean")
        if slots.state.scores is not None:
            slots.state.scores += scores
            scores = slots.state.scores
        leaving = (start + slots.step_index.remainder(recent)).reshape(1)
        leaving_values = slots.values.index_select(1, leaving).float()
        leaving_scores = scores.index_select(1, leaving)
        slots.move_new_token(leaving)
        if not self.merge:
            return
        scores = scores.index_copy(1, leaving, scores[:, -1:])
        n_targets, n_mean = self.gated(recent)
        ahead = torch.arange(1, recent + 1, device=slots.keys.device)
        following = start + (slots.step_index + ahead).remainder(recent)  # `recent` ahead is the new token's slot
        targets = following[:n_targets]
        uniform = hash_to_uniform(torch.as_tensor(absorb_word(slots.state.head_hashes, slots.step_index)))
        gate = uniform * scores.index_select(1, following[:n_mean]).mean(1, keepdim=True) < leaving_scores
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
