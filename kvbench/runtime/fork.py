"""Forking a prefill into arms: every layer is compressed for all of them while its states are at hand.

On a GPU the arms compress side by side, each on a stream of its own: choosing slots keeps a few multiprocessors busy
for long and leaves the others idle. The order of the streams is what makes memory safe without further bookkeeping:
side streams wait for everything the main stream has been given before, and the main stream waits for all of them
before it goes on, so a freed tensor is never reused while another stream still reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from kvbench.methods.base import CompressedLayer, LayerStates, Policy

CONCURRENT_TOKENS = 16_384
"""Longest prompt whose arms compress at the same time: beyond, the work fills the GPU and memory is worth more."""


class LayerFork:
    """Compresses one layer after the other for all arms; give it to `prefill` as `on_layer`.

    Args:
        policies: one per arm.
        n_tokens: prompt tokens that are compressed.
        n_layers: layers of the model.
        write: called with (arm, layer, compressed layer) for every arm in order; copies what it keeps.

    Raises:
        BudgetError: if an arm's budget is impossible for the prompt.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        n_tokens: int,
        n_layers: int,
        write: Callable[[int, int, CompressedLayer], None],
    ):
        self.policies, self.write = policies, write
        self.budgets = [policy.layer_budgets(n_tokens, n_layers) for policy in policies]

    def __call__(self, states: LayerStates) -> None:
        """Compress and write one layer for all arms."""
        device = states.keys.device
        if device.type == "cuda" and states.n_tokens <= CONCURRENT_TOKENS and len(self.policies) > 1:
            self._side_by_side(states, device)
            return
        for arm in range(len(self.policies)):
            self.write(arm, states.layer_index, self._compress(arm, states))

    def _compress(self, arm: int, states: LayerStates) -> CompressedLayer:
        return self.policies[arm].compress(states, self.budgets[arm][states.layer_index])

    def _side_by_side(self, states: LayerStates, device: torch.device) -> None:
        main = torch.cuda.current_stream(device)
        ready = main.record_event()
        streams = [_stream(device, arm) for arm in range(len(self.policies))]
        compressed = []
        for arm, stream in enumerate(streams):
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                compressed.append(self._compress(arm, states))
        for arm, stream in enumerate(streams):
            main.wait_stream(stream)
            self.write(arm, states.layer_index, compressed[arm])


@functools.cache
def _stream(device: torch.device, arm: int) -> torch.cuda.Stream:
    """One stream per place in the order of arms, the same for every sample: freed memory belongs to its stream."""
    return torch.cuda.Stream(device)
