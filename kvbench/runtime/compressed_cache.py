"""`CompressedCache`: what `model.generate` takes for its cache while a policy keeps only part of it.

Layers with full attention are compressed: their keys and values are observed during the prefill, compressed at once and
dropped, so not even the prefill holds more than one layer's full cache; what is left are rows of a `RaggedCache`.
Layers with a sliding window keep transformers' own storage. The first forward pass is the prompt; every later one
brings a token per row. Prompts of a batch are padded on the left; every row is observed and compressed on its own,
without its padding, exactly as it would be alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from kvbench.errors import KvbenchError, ModelError
from kvbench.methods.base import LayerStates, Policy
from kvbench.methods.full import in_effect
from kvbench.ops.observe import softmax_attention
from kvbench.runtime.attention import IMPLEMENTATION, leave_note
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.model_check import layer_windows
from kvbench.runtime.observe import Compressor, Observer


@dataclass(frozen=True)
class LayerReport:
    """One layer at the end of the prompt, summed over all rows and KV heads.

    `full_slots` are what the uncompressed cache would hold, one per prompt token, padding not counted; in a layer left
    alone because it has a sliding window, those of the window. `n_bytes` counts bias and state of the policy, too.
    """

    index: int
    compressed: bool
    slots: int
    full_slots: int
    n_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """Requested and measured budget of the last `generate`, in numbers, so it outlives the cache; `str()` is a table.

    `prompt_tokens` has one length per row, padding not counted; `new_tokens` came to each row since; `allocated_bytes`
    is storage in use, room for new tokens included: 0 after the block.
    """

    method: str
    requested_budget: float
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    layers: tuple[LayerReport, ...]
    allocated_bytes: int

    @property
    def measured_budget(self) -> float:
        """Slots kept over slots of the full cache, in the layers that are compressed."""
        compressed = [layer for layer in self.layers if layer.compressed]
        return sum(layer.slots for layer in compressed) / sum(layer.full_slots for layer in compressed)

    @property
    def measured_bytes_ratio(self) -> float:
        """Bytes kept over bytes of the full cache, in all layers, those left alone included."""
        return self.n_bytes / self.full_bytes

    @property
    def layers_left_alone(self) -> tuple[int, ...]:
        """Indices of the layers that are not compressed."""
        return tuple(layer.index for layer in self.layers if not layer.compressed)

    @property
    def n_bytes(self) -> int:
        """Bytes kept of the prompts, in all layers."""
        return sum(layer.n_bytes for layer in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes of the full cache of the prompts, in all layers."""
        return sum(layer.full_bytes for layer in self.layers)

    def __str__(self) -> str:
        n_compressed = sum(layer.compressed for layer in self.layers)
        lines = [
            f"{self.method}, budget {self.requested_budget:g} requested, {self.measured_budget:.4f} measured in "
            f"{n_compressed} of {len(self.layers)} layers; bytes of all layers {self.measured_bytes_ratio:.4f} of the "
            f"full cache; prompt {'+'.join(map(str, self.prompt_tokens))} tokens, {self.new_tokens} new",
            "  layers      slots of     full    bytes of     full",
        ]
        for _, alike in itertools.groupby(self.layers, key=lambda layer: replace(layer, index=0)):
            first, *others = alike
            name = f"{first.index}-{others[-1].index}" if others else f"{first.index}"
            counts = f"{first.slots:10,d} {first.full_slots:11,d} {first.n_bytes:11,d} {first.full_bytes:11,d}"
            note = "" if first.compressed else "  left alone (sliding window)"
            lines.append(f"{name:>8} {counts}{f'  each of {len(others) + 1} alike' if others else ''}{note}")
        lines.append(
            "slots: key-value pairs held for the prompt, over all rows and KV heads (the full cache: one per token and "
            "head); bytes: theirs, with the method's biases, scores and scratch slots"
        )
        return "\n".join(lines)


class CompressedCache(Cache):
    """A cache that a policy compresses at the end of the prompt.

    Made by `kvbench.compress`, with the model's configuration and the options of that function; also the context of
    the model's attention layers inside the block.
    """

    layers: list[Any]  # transformers' own union of layer kinds lacks what all kinds used here have

    def __init__(
        self, config: PreTrainedConfig, policy: Policy, seed: int = 0, kernels: str = "auto",
        output_weights: Sequence[Tensor] = (),
    ):  # fmt: skip
        super().__init__(layers=_cache_layers(config))
        self.policy, self.seed, self.kernels = policy, seed, kernels
        self._config, self._closed = config, False
        full = [index for index, layer in enumerate(self.layers) if isinstance(layer, _CompressedLayer)]
        self._ranks = {index: rank for rank, index in enumerate(full)}  # of the compressed layers, among themselves
        self._given = {"output_weight": [output_weights[index] for index in full] if output_weights else []}
        self.reset()

    # ---- for people ------------------------------------------------------------------------------------------------

    def report(self) -> CacheReport:
        """Slots and bytes per layer, requested and measured budget of the last prompt; also after the block."""
        if len(self._reports) < len(self.layers):
            raise KvbenchError("0 prompts were read, a report needs 1: call model.generate(...) inside the block first")
        layers = tuple(self._reports[index] for index in sorted(self._reports))
        method, requested, prompts = self.policy.name, self.policy.budget, tuple(self._prompt_tokens)
        return CacheReport(method, requested, prompts, self._new_tokens, layers, self.allocated_bytes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all storage in use now."""
        rows = self._rows.allocated_bytes if self._rows is not None else 0
        return rows + sum(x.nbytes for layer in self.layers for x in (layer.keys, layer.values) if x is not None)

    def reset(self) -> None:
        """Forget the prompt and free its memory, so that the next call starts a new one."""
        self._free()
        self._prompt_tokens: list[int] = []
        self._new_tokens = 0
        self._reports: dict[int, LayerReport] = {}

    def close(self) -> None:
        """Free all memory for good; only `report` works afterwards."""
        self._free()
        self._closed = True

    def _free(self) -> None:
        self.layers = _cache_layers(self._config)
        self._rows: RaggedCache | None = None
        self._compressors: list[Compressor] = []

    # ---- for the model ---------------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values `(B, H_k, Q, D)` after RoPE (called by the model's attention module).

        Returns what attention gets: in a compressed layer the arguments, else the window's keys and values.
        """
        if self._closed:
            raise ModelError("this cache's compress() block has ended: generate inside the block")
        if (implementation := self._config._attn_implementation) != IMPLEMENTATION:
            raise ModelError(
                f"attention implementation {implementation!r} was set inside the compress() block, which needs its own:"
                " set it before the block"
            )
        keys, values = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        leave_note(self, layer_idx, keys)
        return keys, values

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
        softcap: float | None = None, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend over the whole prompt, which is then compressed, over what is left of it, or over a sliding window.

        Arguments and result as `AttentionContext.attend`; the output of padding is 0.
        """
        rank = self._ranks.get(layer_index)
        if rank is None:
            if mask is not None and mask.shape[-1] < key.shape[2]:
                raise ModelError(f"{_named(mask)} does not fit {key.shape[2]} tokens: give one 0 or 1 per token")
            if layer_index not in self._reports:
                kept = self.layers[layer_index].keys
                slots, n_bytes = math.prod(kept.shape[:3]), 2 * kept.nbytes
                self._reports[layer_index] = LayerReport(layer_index, False, slots, slots, n_bytes, n_bytes)
            return softmax_attention(query, key, value, scaling, softcap, mask)
        if layer_index not in self._reports:
            return self._read_prompt(layer_index, (query, key, value), mask, scaling, softcap)
        assert self._rows is not None
        if rank == 0:
            padded_tokens = self.layers[layer_index].seen_tokens - self._new_tokens - 1
            _check_padding(mask, [padded_tokens - n_tokens for n_tokens in self._prompt_tokens])
            self._rows.make_room()
        output = self._rows.attend(rank, query, key, value, scaling, softcap)
        if rank == len(self._ranks) - 1:
            self._rows.advance()
            self._new_tokens += 1
        return output

    def _read_prompt(
        self, layer_index: int, states: tuple[Tensor, ...], mask: Tensor | None, scaling: float, softcap: float | None
    ) -> Tensor:
        """Attend over every row's prompt and compress it, one row after the other; states: query, keys, values."""
        query, key, _ = states
        policy, n_layers, rank = in_effect(self.policy), len(self._ranks), self._ranks[layer_index]
        batch_size, n_heads, padded_tokens, head_dim = query.shape
        n_kv_heads = key.shape[1]
        # Only the torch kernels know soft-capped logits; `observe` refuses kernels="triton" by name.
        kernels = "torch" if softcap is not None and self.kernels == "auto" else self.kernels
        if self._rows is None:
            self._prompt_tokens = _prompt_lengths(query, mask)
            self._compressors = [Compressor(policy, n_tokens, n_layers) for n_tokens in self._prompt_tokens]
            self._rows = RaggedCache(n_layers, n_heads, n_kv_heads, head_dim, key.dtype, kernels, batch_size)
            for n_tokens in self._prompt_tokens:
                self._rows.add_row(policy, position=n_tokens)
            self._rows.reserve_rows([compressor.budgets for compressor in self._compressors])
        caught: list[LayerStates] = []
        written: set[int] = set()
        observer = Observer(
            policy.needs, policy.window_tokens, n_layers, n_heads, self.seed, caught.append, kernels, self._config,
            self._given,
        )  # fmt: skip
        output = query.new_zeros(batch_size, padded_tokens, n_heads, head_dim)
        for row, n_tokens in enumerate(self._prompt_tokens):
            tokens = slice(padded_tokens - n_tokens, None)
            q, k, v = (x[row : row + 1, :, tokens] for x in states)
            output[row, tokens] = observer.attend(rank, q, k, v, scaling, softcap)[0]
            for ready, compressed in self._compressors[row](caught.pop()):
                self._rows.write(ready, row, compressed)
                written.add(ready)
        full_slots = sum(self._prompt_tokens) * n_kv_heads
        full_bytes = full_slots * 2 * head_dim * key.element_size()
        for index in (index for index, its_rank in self._ranks.items() if its_rank in written):
            slots, n_bytes = self._rows.layer_use(self._ranks[index])
            self._reports[index] = LayerReport(index, True, slots, full_slots, n_bytes, full_bytes)
        return output

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep copies of some rows, in the order given (beam search): `(B',)` int64 with B' at most B."""
        if self._rows is None:
            return
        rows = indices.tolist()
        self._rows.choose(rows)
        self._prompt_tokens = [self._prompt_tokens[row] for row in rows]
        for index, layer in enumerate(self.layers):
            if index not in self._ranks:
                layer.batch_select_indices(indices.to(layer.keys.device))

    reorder_cache = batch_select_indices  # type: ignore[assignment]  # its name in beam search

    def __bool__(self) -> bool:
        """Whether tokens were seen: an empty cache is false (Phi-3 drops a true one before a long prompt)."""
        return self.get_seq_length() > 0

    def __repr__(self) -> str:
        return f"CompressedCache({self.policy!r}, {len(self._ranks)} of {len(self.layers)} layers compressed)"

    def _unsupported(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(
            "a compressed cache cannot be rolled back by a single token: generate without assistant_model, "
            "prompt_lookup_num_tokens and other speculative decoding"
        )

    crop = activate_past_recording = batch_repeat_interleave = _unsupported


class _CompressedLayer(DynamicLayer):
    """What transformers sees of a compressed layer: how many tokens went through it, padding included.

    More tokens than the layer's sliding window holds, if it has one, are refused.
    """

    is_croppable = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window, self.seen_tokens = window, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens; returns the arguments, which attention gets as they are."""
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


def _cache_layers(config: PreTrainedConfig) -> list[Any]:
    """Empty storage for every layer: transformers' own where a sliding window keeps the past short, else ours.

    A window as wide as the model's context (Phi-3, 128k) does not. Nor does any where all layers have one: they are
    compressed, and prompt and answer have to fit.
    """
    context = getattr(config, "max_position_embeddings", math.inf)
    windows = layer_windows(config)
    short = [window is not None and window < context for window in windows]
    layers: list[Any] = list(DynamicCache(config=config).layers)
    for index, window in enumerate(windows):
        if not short[index] or all(short):
            layers[index] = _CompressedLayer(window)
    return layers


def _prompt_lengths(query: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each row's prompt, padding not counted; refuses masks that hide anything but padding before it."""
    batch_size, padded_tokens = query.shape[0], query.shape[2]
    if mask is None:
        return [padded_tokens] * batch_size
    if tuple(mask.shape) != (batch_size, padded_tokens):
        raise ModelError(
            f"{_named(mask)} does not fit {batch_size} prompts of {padded_tokens} tokens: give one 0 or 1 per token"
        )
    if hidden := int((~mask[:, -1].bool()).sum()):
        raise ModelError(
            f"{hidden} rows of attention_mask hide their last token, at most 0 may: pad on the left "
            "(tokenizer.padding_side='left')"
        )
    if holes := int((mask[:, 1:] < mask[:, :-1]).sum()):
        raise ModelError(
            f"attention_mask hides tokens after a prompt has begun in {holes} places, 0 are supported: pad on the left"
        )
    lengths: list[int] = mask.sum(1).tolist()
    return lengths


def _named(mask: Tensor) -> str:
    return f"attention_mask of shape {tuple(mask.shape)}"


def _check_padding(mask: Tensor | None, expected: list[int]) -> None:
    """Refuse a mask `(B, T + new)` over later tokens that hides anything but the padding that the prompts came with."""
    hidden = [0] * len(expected) if mask is None else (~mask.bool()).sum(1).tolist()
    if hidden != expected:
        raise ModelError(
            f"attention_mask hides {hidden} tokens of the rows, their prompts began with {expected} of padding: give "
            "the prompts' mask with a 1 added per new token"
        )
