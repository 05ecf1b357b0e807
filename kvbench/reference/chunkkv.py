"""ChunkKV chunk by chunk in plain lists: chunks C_1 .. C_n of size c, taken in the order of their mean scores."""

from __future__ import annotations

from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.methods.chunkkv import ChunkKV


def twin(policy: ChunkKV, layer: LayerStates, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """For each head positions, keys, values and no bias; scores are those of the base method."""
    base, c, n_tokens = policy.base, policy.chunk_tokens, layer.n_tokens
    end = n_tokens - base.last_tokens
    scores = [sum(column) for column in base.scores(layer).double().T.tolist()]
    C = [[t for t in range(start, min(start + c, end)) if t >= base.first_tokens] for start in range(0, end, c)]
    ranked = sorted(
        filter(None, C), key=lambda chunk: (sum(scores[t] for t in chunk) / len(chunk), chunk), reverse=True
    )
    kept = [*range(base.first_tokens), *range(end, n_tokens)]
    for chunk in ranked:
        kept += sorted(chunk, key=lambda t: (scores[t], t), reverse=True)[: n_slots - len(kept)]
    kept.sort()
    return [(kept, layer.keys[h, kept], layer.values[h, kept], None) for h in range(layer.n_kv_heads)]
