"""How a transformers model reaches this package: one attention implementation, named "kvbench", set for a `with` block.

The attention function of every layer looks for its context, which does the work: either the keyword
`attention_context=`, which transformers hands down from the model's call,

    with attention_implementation(model):
        model(input_ids=prompt, attention_context=observer, use_cache=False, logits_to_keep=1)

or, inside `generate`, which refuses unknown keywords, the cache that has just taken the layer's keys: transformers
calls `Cache.update` and the attention function one after the other in the same thread, so `update` leaves a note in a
context variable. That works in any thread (streaming generates in one of its own), for several models at a time, and a
forward pass that went past the cache is noticed. Registering a name at the public plug-in points is all that outlasts
the block. A context must not be a mapping, a sequence or an object with a method `to`: accelerate moves those between
devices when a model is spread over several.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from kvbench.errors import KvbenchError, ModelError
from kvbench.ops.dispatch import current_device

IMPLEMENTATION = "kvbench"

EXAMPLES = "Llama, Mistral, Qwen2, Qwen3, Phi3 or Gemma"

# Arguments that change what attention computes; a model that sets one of them needs more than `attend` offers.
_UNSUPPORTED_ARGUMENTS = ("s_aux", "position_bias", "head_mask")


class AttentionContext(Protocol):
    """What does the work of a layer: the prompt's `Observer`, the decode batch's `RaggedCache`, `generate`'s cache."""

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend in one layer: from query `(B, H, Q, D)` after RoPE to `(B, Q, H, D)`.

        Key and value are `(B, H_k, Q, D)` after RoPE, or whatever the cache's `update` returned; `scaling` is the
        factor on the logits. Two more keywords are passed only where there is something to pass: `softcap=`, the bound
        of a model that caps its logits, and to a context that left a note `mask=`, what `_mask` returns.
        """
        ...


_note: ContextVar[tuple[AttentionContext, int, Tensor] | None] = ContextVar("kvbench_note", default=None)


def leave_note(context: AttentionContext, layer_index: int, key: Tensor) -> None:
    """Tell the attention function that runs next who attends, if it gets this very `key` in this very layer."""
    _note.set((context, layer_index, key))


@contextmanager
def attention_implementation(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's attention layers call their context, until the block ends, however it ends; blocks may be nested.

    Refuses a model whose class does not let its attention implementation be set.
    """
    previous = model.config._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation != IMPLEMENTATION:
            raise ModelError(
                f"{type(model).__name__} keeps its attention implementation {previous!r}: use a model whose layers go "
                f"through transformers' AttentionInterface, e.g. {EXAMPLES}"
            )
        yield
    finally:
        if model.config._attn_implementation != previous:
            model.set_attn_implementation(previous)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    attention_context: AttentionContext | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The registered attention function: find the context, check that it computes all this layer asks for, call it."""
    optional: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    layer_index = cast(int, module.layer_idx)
    if attention_context is None:
        note = _note.get()
        _note.set(None)
        if note is None or note[1] != layer_index or note[2] is not key:
            raise ModelError(
                f"layer {layer_index} of {type(module).__name__} ran without attention_context= and without the "
                "compressed cache: inside compress() call model.generate(...), or pass past_key_values=cache on every "
                "call (Phi-3 itself drops it where prompt and answer cross original_max_position_embeddings: keep both "
                "on one side); elsewhere pass an Observer or a RaggedCache"
            )
        attention_context, optional["mask"] = note[0], attention_mask
    elif attention_mask is not None:
        _refuse_mask(query.shape[2], attention_mask, kwargs.get("sliding_window"))
    if dropout:
        raise ModelError(f"attention dropout {dropout} is not supported, only 0 is: call model.eval() first")
    if torch.is_grad_enabled() and query.requires_grad:
        raise ModelError("gradients through our attention are not supported: call the model under torch.no_grad()")
    for name in _UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} needs the attention argument {name!r}, which kvbench lacks: "
                f"use a model with plain softmax attention, e.g. {EXAMPLES}"
            )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    with current_device(query.device):
        return attention_context.attend(layer_index, query, key, value, scaling, **optional), None


def _refuse_mask(n_queries: int, mask: Tensor, window: int | None) -> None:
    """Refuse what whole prompts and decode batches cannot heed: hidden tokens, or more tokens than a window holds."""
    if mask.dim() == 2:
        raise KvbenchError(
            f"attention_mask hides {int((~mask.bool()).sum())} tokens, at most 0 are supported: give whole prompts, "
            "one a call, without padding"
        )
    if window is not None and n_queries > window:
        raise ModelError(
            f"{n_queries} tokens exceed the model's sliding window of {window}: lower model.max_prompt_tokens until "
            "prompt and answer fit into the window"
        )
    raise KvbenchError(
        f"attention_mask of shape {tuple(mask.shape)} is not supported: give whole prompts, one a call, without "
        "padding, without a mask, and within the model's sliding window"
    )


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The registered mask function: what is hidden beside the future, which every context hides by itself.

    None for nothing; `(B, T)` bool over all tokens seen, False for padding; transformers' own `(B, 1, Q, K)` bool where
    more tokens were seen than a sliding window holds. Anything else is refused.
    """
    n_queries, window, padding = kwargs.get("q_length"), kwargs.get("local_size"), kwargs.get("attention_mask")
    several = isinstance(n_queries, int) and n_queries > 1
    causal = window is not None or kwargs.get("mask_function") is causal_mask_function
    if kwargs.get("use_vmap") or not causal or (several and not kwargs.get("allow_is_causal_skip", True)):
        raise ModelError(
            f"{n_queries} position_ids that describe several packed sequences, or a model's own mask, are not "
            "supported: give plain text prompts, one sequence a row"
        )
    if window is not None and (kwargs.get("kv_offset") or (several and cast(int, n_queries) > window)):
        mask: Tensor | None = AttentionMaskInterface()["sdpa"](*args, **kwargs)
        return mask
    return None if padding is None or bool(padding.all()) else padding
