"""What a compressed model's attention layers call: the cache that has just taken their keys and values.

transformers hands a cache the new keys and values (`update`) and calls the registered attention function right after,
in the same thread, without saying which cache it was. `update` therefore leaves a note in a context variable, which the
attention function takes away: it works in any thread (streaming generates in one of its own), for several models at a
time, and a forward pass that went past the cache is noticed instead of computed wrongly.

Masks: layers that are compressed want to know which tokens are padding, so their mask is the 2D one; layers with a
sliding window are left to transformers, with the mask of its SDPA.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from kvbench.errors import ModelError
from kvbench.ops.dispatch import current_device
from kvbench.ops.observe_torch import cap_logits
from kvbench.runtime.attention import refuse_arguments, registered_attention
from kvbench.runtime.compressed_layers import slides

if TYPE_CHECKING:  # the cache leaves the notes, so it imports this module
    from kvbench.runtime.compressed_cache import CompressedCache

IMPLEMENTATION = "kvbench_compressed"


@dataclass(frozen=True)
class _Note:
    cache: CompressedCache
    layer_index: int
    key: Tensor


_note: ContextVar[_Note | None] = ContextVar("kvbench_note", default=None)


def leave_note(cache: CompressedCache, layer_index: int, key: Tensor) -> None:
    """Tell the attention function that runs next which cache it attends over.

    Args:
        cache: the cache.
        layer_index: the layer, from 0.
        key: the keys that `update` is about to return; the note holds for the call that gets this very tensor.
    """
    _note.set(_Note(cache, layer_index, key))


def compressed_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model's attention layers call the cache that takes their keys, until the block ends.

    Args:
        model: a causal language model whose layers use transformers' attention interface.

    Returns:
        The block (see `registered_attention`).
    """
    return registered_attention(model, IMPLEMENTATION, _attention, _mask)


def refuse_nested(model: PreTrainedModel) -> None:
    """Refuse a model that is inside a block already.

    Raises:
        ModelError: in that case.
    """
    if isinstance(model, PreTrainedModel) and model.config._attn_implementation == IMPLEMENTATION:
        raise ModelError(
            f"this {type(model).__name__} is inside a compress() block already, at most 1 is possible: leave it before "
            "you enter another"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: find the cache, refuse what it cannot compute, let it attend."""
    note = _note.get()
    _note.set(None)
    if note is None or note.key is not key or note.layer_index != module.layer_idx:
        raise ModelError(
            f"layer {module.layer_idx} of {type(module).__name__} ran without the compressed cache: inside the block "
            "call model.generate(...), or pass past_key_values=cache on every call (Phi-3 itself drops it where prompt "
            "and answer cross original_max_position_embeddings: keep both on one side)"
        )
    if dropout:
        raise ModelError(f"attention dropout {dropout} is not supported, only 0 is: call model.eval() first")
    if torch.is_grad_enabled() and query.requires_grad:
        raise ModelError("gradients through a compressed cache are not supported: call the model under torch.no_grad()")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    refuse_arguments(module, kwargs)
    if note.cache.compresses(note.layer_index):
        with current_device(query.device):
            return note.cache.attend(note.layer_index, query, key, value, attention_mask, scaling, softcap), None
    if softcap is not None:
        return _capped_attention(query, key, value, attention_mask, scaling, softcap), None
    output, _ = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """A sliding-window layer with soft-capped logits, which SDPA cannot compute; shapes as `_attention`."""
    batch_size, n_heads, n_queries, head_dim = query.shape
    grouped = query.float().view(batch_size, key.shape[1], -1, n_queries, head_dim)
    logits = cap_logits(grouped @ key.float().unsqueeze(2).transpose(3, 4) * scaling, softcap)
    if mask is None:  # SDPA's mask function leaves out a mask that is plainly causal
        mask = torch.ones(n_queries, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - n_queries)
    else:
        mask = mask.unsqueeze(2)
    weights = logits.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
    output = (weights @ value.float().unsqueeze(2)).view(batch_size, n_heads, n_queries, head_dim)
    return output.transpose(1, 2).to(query.dtype)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The registered mask function: `(B, T)` bool or None for full layers, SDPA's own mask for sliding windows."""
    window: int | None = kwargs.get("local_size")
    if slides(window, kwargs["config"]):
        mask: Tensor | None = AttentionMaskInterface()["sdpa"](*args, **kwargs)
        return mask
    if kwargs.get("use_vmap") or (window is None and kwargs.get("mask_function") is not causal_mask_function):
        raise ModelError(
            "a mask other than causal with left padding is not supported (packed sequences, prefix or image blocks): "
            "give plain text prompts, one sequence a row"
        )
    padding: Tensor | None = kwargs.get("attention_mask")
    if padding is None or bool(padding.all()):
        return None
    hidden = int((~padding[:, -1].bool()).sum())
    if hidden:
        raise ModelError(
            f"{hidden} rows of attention_mask hide their last token, at most 0 may: pad on the left "
            "(tokenizer.padding_side='left')"
        )
    return padding
