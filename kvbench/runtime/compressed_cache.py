"""`CompressedCache`: what `model.generate` takes for its cache while a policy keeps only part of it.

Per layer there are two kinds of storage. Layers with full attention are compressed: their keys and values are observed
during the prefill, compressed at once and dropped, so not even the prefill holds more than one layer's full cache.
Layers with a sliding window keep transformers' own storage. The first forward pass is the prompt; every later one
brings a token per row.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache, PreTrainedConfig

from kvbench.errors import KvbenchError, ModelError
from kvbench.methods.base import Policy
from kvbench.methods.full import in_effect
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.cache_report import CacheReport, LayerReport
from kvbench.runtime.compressed_layers import CompressedCacheLayer, cache_layers
from kvbench.runtime.compressed_prompt import check_padding, observers_of, prompt_lengths, rows_for
from kvbench.runtime.generate_attention import IMPLEMENTATION, leave_note
from kvbench.runtime.observe import Observer


class CompressedCache(Cache):
    """A cache that a policy compresses at the end of the prompt.

    Made by `kvbench.compress`; also the context of the model's attention layers inside that block.

    Args:
        config: the model's text configuration.
        policy: the method, with its budget.
        seed: what policies derive their randomness from.
        kernels: "auto", "torch" or "triton".

    Raises:
        ModelError: if a layer is neither full nor sliding-window attention.
    """

    layers: list[Any]  # transformers' own union of layer kinds lacks what all kinds used here have
    _rows: RaggedCache | None
    _observers: list[Observer]
    _prompt_tokens: list[int]
    _reports: dict[int, LayerReport]

    def __init__(self, config: PreTrainedConfig, policy: Policy, seed: int = 0, kernels: str = "auto"):
        super().__init__(layers=cache_layers(config))
        self.policy = policy
        self.seed = seed
        self.kernels = kernels
        self._config = config
        self._closed = False
        self.reset()

    # ---- for people ------------------------------------------------------------------------------------------------

    def report(self) -> CacheReport:
        """Slots and bytes per layer, requested and measured budget of the last prompt; also after the block.

        Raises:
            KvbenchError: if no prompt has been read yet.
        """
        if len(self._reports) < len(self.layers):
            raise KvbenchError("0 prompts were read, a report needs 1: call model.generate(...) inside the block first")
        return CacheReport(
            method=self.policy.name,
            requested_budget=self.policy.budget,
            prompt_tokens=tuple(self._prompt_tokens),
            new_tokens=self._new_tokens,
            layers=tuple(self._reports[index] for index in sorted(self._reports)),
            allocated_bytes=self.allocated_bytes,
        )

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all storage in use now."""
        total = self._rows.allocated_bytes if self._rows is not None else 0
        kept = [tensor for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return total + sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def reset(self) -> None:
        """Forget the prompt and free its memory, so that the next call starts a new one."""
        self._release()
        self._prompt_tokens = []
        self._new_tokens = 0
        self._reports = {}

    def close(self) -> None:
        """Free all memory for good; only `report` works afterwards."""
        self._release()
        self._closed = True

    # ---- for the model ---------------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values (called by the model's attention module).

        Args:
            key_states: `(B, H_k, Q, D)` after RoPE.
            value_states: `(B, H_k, Q, D)`.
            layer_idx: the layer.
            *args: handed to transformers' own storage of layers left alone.
            **kwargs: likewise.

        Returns:
            What attention gets: in a compressed layer the arguments, else the window's keys and values.

        Raises:
            ModelError: if several tokens at once follow a compressed prompt, the block has ended, or the model's
                attention implementation was set inside it.
        """
        if self._closed:
            raise ModelError("this cache's compress() block has ended: generate inside the block")
        if (implementation := self._config._attn_implementation) != IMPLEMENTATION:
            raise ModelError(
                f"attention implementation {implementation!r} was set inside the compress() block, which needs its own:"
                " set it before the block"
            )
        layer = self.layers[layer_idx]
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if layer_idx not in self._ranks and layer_idx not in self._reports:
            slots = layer.keys.shape[0] * layer.keys.shape[1] * layer.keys.shape[2]
            n_bytes = 2 * layer.keys.numel() * layer.keys.element_size()
            self._reports[layer_idx] = LayerReport(layer_idx, False, slots, slots, n_bytes, n_bytes)
        leave_note(self, layer_idx, keys)
        return keys, values

    def compresses(self, layer_index: int) -> bool:
        """Whether a layer is compressed rather than left alone."""
        return layer_index in self._ranks

    def attend(
        self,
        layer_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attend in a compressed layer: over the whole prompt, which is then compressed, or over what is left of it.

        Args:
            layer_index: the layer, from 0.
            query: `(B, H, Q, D)` after RoPE.
            key: `(B, H_k, Q, D)` after RoPE.
            value: `(B, H_k, Q, D)`.
            mask: `(B, T)` bool, over all tokens seen, False for padding, or None for no padding.
            scaling: factor on the logits.
            softcap: bound that logits are soft-capped to (Gemma 2), or None.

        Returns:
            `(B, Q, H, D)`; zeros for padding.

        Raises:
            BudgetError: if the policy cannot run with so few slots.
            ModelError: if a prompt is padded elsewhere than on the left, or new tokens come with another mask.
        """
        rank = self._ranks[layer_index]
        if layer_index not in self._reports:
            if self._rows is None:
                self._begin(query, key, mask, softcap)
            return self._read_prompt(layer_index, query, key, value, scaling, softcap)
        assert self._rows is not None
        if rank == 0:
            check_padding(mask, self._prompt_tokens, self.layers[layer_index].seen_tokens - self._new_tokens - 1)
            self._rows.make_room()
        self._rows.update(key, value, rank)
        output = self._rows.attend(rank, query, key, value, scaling, softcap=softcap)
        if rank == len(self._ranks) - 1:
            self._rows.advance()
            self._new_tokens += 1
        return output

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row become a copy of another (beam search).

        Args:
            beam_idx: `(B,)` int64, the row that each row becomes.
        """
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in the order given.

        Args:
            indices: `(B',)` int64 with B' at most B.
        """
        if self._rows is None:
            return
        rows = indices.tolist()
        self._rows.choose(rows)
        self._prompt_tokens = [self._prompt_tokens[row] for row in rows]
        for index, layer in enumerate(self.layers):
            if index not in self._ranks:
                layer.batch_select_indices(indices.to(layer.keys.device))

    @property
    def is_compileable(self) -> bool:
        """False: a step's storage is none that transformers could compile."""
        return False

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

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        self.layers = cache_layers(self._config)
        full = [index for index, layer in enumerate(self.layers) if isinstance(layer, CompressedCacheLayer)]
        self._ranks = {index: rank for rank, index in enumerate(full)}
        self._rows = None
        self._observers = []

    def _begin(self, query: Tensor, key: Tensor, mask: Tensor | None, softcap: float | None) -> None:
        # Only the torch kernels know soft-capped logits; the prefill refuses kernels="triton" by name.
        kernels = "torch" if softcap is not None and self.kernels == "auto" else self.kernels
        policy = in_effect(self.policy)
        self._prompt_tokens = prompt_lengths(query, mask)
        self._rows = rows_for(policy, self._prompt_tokens, len(self._ranks), query, key, kernels)
        self._observers = observers_of(self._rows, policy, self._prompt_tokens, self.seed, self._config)

    def _read_prompt(
        self,
        layer_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attend over every row's prompt and compress it, one row after the other."""
        assert self._rows is not None
        rank, padded_tokens = self._ranks[layer_index], query.shape[2]
        output = query.new_zeros(query.shape[0], padded_tokens, query.shape[1], query.shape[3])
        for row, (observer, n_tokens) in enumerate(zip(self._observers, self._prompt_tokens, strict=True)):
            tokens = slice(padded_tokens - n_tokens, None)
            states = query[row : row + 1, :, tokens], key[row : row + 1, :, tokens], value[row : row + 1, :, tokens]
            output[row, tokens] = observer.attend(rank, *states, scaling=scaling, softcap=softcap)[0]
        slots, n_bytes = self._rows.layer_use(rank)
        full_slots = sum(self._prompt_tokens) * key.shape[1]
        full_bytes = full_slots * 2 * key.shape[3] * key.element_size()
        self._reports[layer_index] = LayerReport(layer_index, True, slots, full_slots, n_bytes, full_bytes)
        return output
