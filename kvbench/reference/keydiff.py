"""KeyDiff in plain loops and fp64: CosSim(mu(K), k) of every key k, the lowest are kept."""

from __future__ import annotations

from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.methods.keydiff import KeyDiff
from kvbench.reference.scored import keep_best


def twin(policy: KeyDiff, layer: LayerStates, n_slots: int) -> list[tuple[list[int], Tensor, Tensor, None]]:
    """For each head positions, keys, values and no bias."""
    scores = []
    for keys in layer.keys.double():
        units = [k / k.norm() for k in keys]
        mu = sum(units[1:], units[0]) / len(units)
        scores.append([-float(k @ mu / mu.norm()) for k in units])
    kept = keep_best(scores, layer.n_tokens, n_slots, 0, 0)
    return [(head, layer.keys[h, head], layer.values[h, head], None) for h, head in enumerate(kept)]
