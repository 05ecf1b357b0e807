"""Attention over the whole prompt that also yields what policies score keys by.

For a layer with queries q, keys k and logits `s_ij = scaling * q_i . k_j` (j <= i, causal) the prefill needs

    P_ij = exp(s_ij - L_i),   L_i = log sum_{j <= i} exp(s_ij),   output_i = sum_j P_ij v_j,

and on request the column sums `sum_i P_ij` (the accumulated attention of H2O, Zhang et al. 2023, arXiv:2306.14048,
section 4) and the last W rows of P. P itself, T x T, is never held: memory is linear in T.

Two versions compute the column sums. "torch" (`observe_torch.py`) takes the softmax of one block of queries after the
other. "triton" keeps the library's flash forward
with its L and adds one kernel (`column_sums_triton.py`). Without a request it is plain SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from kvbench.errors import ConfigError, ModelError
from kvbench.methods.base import LayerStates
from kvbench.ops.dispatch import choose_backend
from kvbench.ops.fused_forward import forward_with_log_sum_exp
from kvbench.ops.observe_torch import observe_torch, window_rows
from kvbench.ops.rotary import rotary_frequencies

OBSERVABLE = frozenset({"column_sums", "window_attention", "queries", "rotary_frequencies"})


@dataclass
class Observation:
    """What one layer's attention over the prompt gave.

    Attributes:
        output: `(H, T, D)`, the queries' dtype.
        column_sums: `(H, T)` fp32, attention mass each key received from all queries, or None if not asked for.
        window_attention: `(H, min(W, T), T)` fp32, the softmax rows of the last queries, or None if not asked for.
        backend: what computed it: "sdpa", "torch" or "triton".
    """

    output: Tensor
    column_sums: Tensor | None
    window_attention: Tensor | None
    backend: str


@torch.no_grad()
def observe(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    *,
    column_sums: bool,
    window_tokens: int,
    backend: str = "auto",
    softcap: float | None = None,
) -> Observation:
    """Exact causal attention of a prompt on itself, with column sums and last rows on request.

    Args:
        query: `(H, T, D)` after RoPE.
        keys: `(H_k, T, D)` after RoPE; query head h uses KV head `h // (H / H_k)`.
        values: `(H_k, T, D)`.
        scaling: factor on the logits.
        column_sums: whether to sum each key's attention over all queries.
        window_tokens: how many last rows of the attention to return; 0 for none.
        backend: "auto", "torch" or "triton" (see `choose_backend`); concerns the column sums only.
        softcap: bound that logits are soft-capped to (Gemma 2), which only the torch version knows; None for none.

    Returns:
        The `Observation`. Accumulation is fp32 for every dtype.

    Raises:
        ConfigError: if `backend` cannot run here, or is "triton" with soft-capped logits.
    """
    if softcap is not None:
        return _observe_softcapped(query, keys, values, scaling, column_sums, window_tokens, backend, softcap)
    if not column_sums:
        output = _sdpa(query, keys, values, scaling)
        rows = window_rows(query, keys, scaling, window_tokens) if window_tokens else None
        return Observation(output, None, rows, "sdpa")
    chosen = choose_backend(backend, query.device)
    if chosen == "torch":
        output, sums, rows = observe_torch(query, keys, values, scaling, window_tokens)
        return Observation(output, sums, rows, chosen)
    from kvbench.ops.column_sums_triton import column_sums_triton

    output, log_sum_exp = forward_with_log_sum_exp(query, keys, values, scaling)
    sums = column_sums_triton(query, keys, log_sum_exp, scaling)
    rows = window_rows(query, keys, scaling, window_tokens) if window_tokens else None
    return Observation(output, sums, rows, chosen)


class Observer:
    """The attention context of a prefill: attends layer by layer and hands each layer's states to a function.

    Attributes:
        backends: names of the implementations used so far, for the record.
        layers_seen: indices of the layers observed so far; after a forward pass, as many as the model has.
    """

    def __init__(
        self,
        needs: frozenset[str],
        window_tokens: int,
        n_layers: int,
        n_query_heads: int,
        seed: int,
        on_layer: Callable[[LayerStates], None],
        backend: str = "auto",
        config: PreTrainedConfig | None = None,
    ) -> None:
        """Take the union of what the policies need.

        Args:
            needs: of "column_sums", "window_attention", "queries" and "rotary_frequencies" (see `LayerStates`).
            window_tokens: the largest window any policy needs; required with "window_attention".
            n_layers: number of layers of the model.
            n_query_heads: H.
            seed: passed on in `LayerStates.seed`.
            on_layer: called once per layer with its states, whose keys and values are views that live as long as they
                are referenced.
            backend: "auto", "torch" or "triton"; policies are told the choice in `LayerStates.kernels`.
            config: the model's text configuration; required with "rotary_frequencies".

        Raises:
            ConfigError: if a need is unknown, "window_attention" comes without a window, or "rotary_frequencies"
                without a configuration.
        """
        unknown = needs - OBSERVABLE
        if unknown:
            raise ConfigError(
                f"needs={sorted(unknown)} cannot be observed: use {', '.join(sorted(OBSERVABLE))}, or compute the "
                "scores from keys and values in compress()"
            )
        if "rotary_frequencies" in needs and config is None:
            raise ConfigError("config=None with need 'rotary_frequencies': give the model's configuration to Observer")
        if "window_attention" in needs and window_tokens < 1:
            raise ConfigError(f"window_tokens={window_tokens} is below 1: policies that need 'window_attention' set it")
        self.needs = needs
        self.config = config
        self.window_tokens = window_tokens if "window_attention" in needs else 0
        self.n_layers = n_layers
        self.n_query_heads = n_query_heads
        self.seed = seed
        self.on_layer = on_layer
        self.backend = backend
        self.backends: set[str] = set()
        self.layers_seen: set[int] = set()

    def attend(
        self,
        layer_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attend over the whole prompt in one layer and report its states.

        Args:
            layer_index: index of the layer, from 0.
            query: `(1, H, T, D)` after RoPE.
            key: `(1, H_k, T, D)` after RoPE.
            value: `(1, H_k, T, D)`.
            scaling: factor on the logits.
            softcap: bound that logits are soft-capped to, or None.

        Returns:
            `(1, T, H, D)`.

        Raises:
            ModelError: for a batch, or for a prompt that does not start at token 0.
        """
        n_tokens = query.shape[2]
        if query.shape[0] != 1:
            raise ModelError(f"a prefill of {query.shape[0]} prompts at once is not supported: give one prompt a call")
        if key.shape[2] != n_tokens:
            raise ModelError(
                f"{n_tokens} queries over {key.shape[2]} keys: a prefill takes the whole prompt in one call, "
                "with use_cache=False"
            )
        observation = observe(
            query[0],
            key[0],
            value[0],
            scaling,
            column_sums="column_sums" in self.needs,
            window_tokens=self.window_tokens,
            backend=self.backend,
            softcap=softcap,
        )
        self.backends.add(observation.backend)
        self.layers_seen.add(layer_index)
        self.on_layer(
            LayerStates(
                keys=key[0],
                values=value[0],
                layer_index=layer_index,
                n_layers=self.n_layers,
                n_query_heads=self.n_query_heads,
                seed=self.seed,
                column_sums=observation.column_sums,
                window_attention=observation.window_attention,
                kernels=choose_backend(self.backend, query.device),
                extras=self._extras(query[0], scaling),
            )
        )
        return observation.output.transpose(0, 1)[None]

    def _extras(self, query: Tensor, scaling: float) -> dict[str, Tensor]:
        """What `LayerStates.extras` names, as far as it is needed."""
        extras = {}
        if "queries" in self.needs:
            extras = {"queries": query, "scaling": torch.tensor(scaling)}
        if "rotary_frequencies" in self.needs and self.config is not None:
            extras["rotary_frequencies"] = rotary_frequencies(self.config, query.shape[1]).to(query.device)
        return extras


def _observe_softcapped(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    column_sums: bool,
    window_tokens: int,
    backend: str,
    softcap: float,
) -> Observation:
    if backend == "triton":
        raise ConfigError(f"kernels=triton do not know logits capped at {softcap}: use kernels=auto or torch")
    output, sums, rows = observe_torch(query, keys, values, scaling, window_tokens, softcap)
    return Observation(output, sums if column_sums else None, rows, "torch")


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    return scaled_dot_product_attention(
        query[None], keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=keys.shape[0] != query.shape[0]
    )[0]
