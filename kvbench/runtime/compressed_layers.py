"""What transformers sees of a compressed cache, layer by layer: the storage protocol of `Cache.layers`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from kvbench.errors import ModelError
from kvbench.runtime.model_check import layer_windows


def slides(window: int | None, config: PreTrainedConfig) -> bool:
    """Whether a layer is left alone because its sliding window keeps its past short.

    A window as wide as the model's context (Phi-3, 128k) does not. Nor does any where all layers have one: they are
    compressed, and prompt and answer have to fit.

    Args:
        window: tokens that a query sees, itself included, or None for all.
        config: the model's text configuration.
    """
    context = getattr(config, "max_position_embeddings", math.inf)
    return window is not None and window < context and not all(w and w < context for w in layer_windows(config))


class CompressedCacheLayer(CacheLayerMixin):
    """What transformers sees of a compressed layer: how many tokens went through it, padding included.

    Keys and values are stored by the cache that the layer belongs to, after attention has seen them.

    Args:
        window: the layer's sliding window in tokens, None for none: more tokens are refused.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.seen_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: storage comes with the first prompt."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens; returns the arguments, which attention gets as they are.

        Raises:
            ModelError: if several tokens at once follow a compressed prompt, or more came than the window holds.
        """
        n_tokens = key_states.shape[2]
        if self.seen_tokens and n_tokens != 1:
            raise ModelError(
                f"{n_tokens} tokens at once on a compressed cache, at most 1 is supported: call model.generate(...) or "
                "cache.reset() for a new prompt, and leave out assisted decoding and chunked prefill"
            )
        self.seen_tokens += n_tokens
        if self.window is not None and self.seen_tokens > self.window:
            raise ModelError(
                f"{self.seen_tokens} tokens exceed the sliding window of {self.window}, which every layer of the model "
                "has: shorten prompt or answer"
            )
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, which is not the number of slots kept."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens seen."""
        return self.seen_tokens + int(query_length), 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.6


def cache_layers(config: PreTrainedConfig) -> list[Any]:
    """Transformers' own layers for a model; ours in place of those that attend to everything.

    Args:
        config: the model's text configuration.

    Returns:
        One layer of storage per layer of the model, all empty.

    Raises:
        ModelError: if a layer is neither full nor sliding-window attention.
    """
    layers: list[Any] = list(DynamicCache(config=config).layers)
    for index, window in enumerate(layer_windows(config)):
        if not slides(window, config):
            layers[index] = CompressedCacheLayer(window)
    return layers
