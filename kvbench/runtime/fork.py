"""One observed prefill of a prompt, forked into arms: every layer is compressed for all while its states are at hand.

On a GPU the arms compress side by side, each on a stream of its own: choosing slots keeps a few multiprocessors busy
for long and leaves the others idle. The order of the streams is what makes memory safe without further bookkeeping:
side streams wait for everything the main stream has been given before, and the main stream waits for all of them
before it goes on, so a freed tensor is never reused while another stream still reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from kvbench.methods.base import CompressedLayer, LayerStates, Policy
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.observe import Observer
from kvbench.runtime.requests import Arm, Request, model_shape

CONCURRENT_TOKENS = 16_384
"""Longest prompt whose arms compress at the same time: beyond, the work fills the GPU and memory is worth more."""


def prefill(
    loaded: LoadedModel,
    request: Request,
    arms: Iterable[Arm],
    on_layer: Callable[[LayerStates], None],
    kernels: str = "auto",
) -> tuple[Tensor, set[str]]:
    """Prefill a request's first `compress_at` tokens with full attention and observe what the arms' policies need.

    Args:
        loaded: the model.
        request: the request.
        arms: arms whose policies will compress the layers.
        on_layer: called once per layer, in order, with the layer's states; they are freed when it returns unless it
            keeps a reference.
        kernels: "auto", "torch" or "triton".

    Returns:
        Logits of the last prefilled token `(V,)` fp32, and the names of the observation backends that ran.
    """
    policies = [in_effect(arm.policy) for arm in arms]
    shape = model_shape(loaded)
    observer = Observer(
        needs=frozenset().union(*(policy.needs for policy in policies)),
        window_tokens=max(policy.window_tokens for policy in policies),
        n_layers=shape["n_layers"],
        n_query_heads=shape["n_query_heads"],
        seed=request.seed,
        on_layer=on_layer,
        backend=kernels,
        config=loaded.model.config.get_text_config(),
    )
    input_ids = torch.tensor([request.input_ids[: request.compress_at]], device=loaded.device)
    with torch.inference_mode(), attention_implementation(loaded.model):
        output = loaded.model(input_ids=input_ids, attention_context=observer, use_cache=False, logits_to_keep=1)
        return output.logits[0, -1].float(), observer.backends


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
        device, index, arms = states.keys.device, states.layer_index, range(len(self.policies))
        if device.type != "cuda" or states.n_tokens > CONCURRENT_TOKENS or len(arms) == 1:
            for arm in arms:
                self.write(arm, index, self._compress(arm, states))
            return
        main = torch.cuda.current_stream(device)
        ready = main.record_event()
        compressed = []
        for arm in arms:
            stream = _stream(device, arm)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                compressed.append(self._compress(arm, states))
        for arm in arms:
            main.wait_stream(_stream(device, arm))
            self.write(arm, index, compressed[arm])

    def _compress(self, arm: int, states: LayerStates) -> CompressedLayer:
        return self.policies[arm].compress(states, self.budgets[arm][states.layer_index])


@functools.cache
def _stream(device: torch.device, arm: int) -> torch.cuda.Stream:
    """One stream per place in the order of arms, the same for every sample: freed memory belongs to its stream."""
    return torch.cuda.Stream(device)
