"""How a transformers model reaches this package: one attention implementation, named "kvbench", set for a `with` block.

Inside the block the model is called with one more keyword, `attention_context=`, which transformers hands down to the
attention function of every layer. The context does the work:

    with attention_implementation(model):
        model(input_ids=prompt, attention_context=observer, use_cache=False, logits_to_keep=1)

`AttentionInterface` and `AttentionMaskInterface` are the public plug-in points; registering a name there is all that
outlasts the block, and nothing refers to that name afterwards. A context must not be a mapping, a sequence or an object
with a method `to`: accelerate moves those between devices when a model is spread over several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvbench.errors import KvbenchError, ModelError
from kvbench.ops.dispatch import current_device

IMPLEMENTATION = "kvbench"

EXAMPLES = "Llama, Mistral, Qwen2, Qwen3, Phi3 or Gemma"

# Arguments that change what attention computes; a model that sets one of them needs more than `attend` offers.
_UNSUPPORTED_ARGUMENTS = ("s_aux", "position_bias", "head_mask")


class AttentionContext(Protocol):
    """What `attention_context=` has to be: the prompt's `Observer` or the decode batch's `RaggedCache`."""

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend in one layer; a model that caps its logits also passes `softcap=`, the bound.

        Args:
            layer_index: index of the layer, from 0.
            query: `(B, H, Q, D)` after RoPE.
            key: `(B, H_k, Q, D)` after RoPE, or whatever the cache's `update` returned.
            value: as `key`.
            scaling: factor on the logits.

        Returns:
            `(B, Q, H, D)`.
        """
        ...


@contextmanager
def registered_attention(
    model: PreTrainedModel, name: str, attention: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """Let a model's attention layers call a function of ours, until the block ends.

    The former implementation comes back however the block ends; blocks may be nested.

    Args:
        model: a causal language model whose layers use transformers' attention interface.
        name: what the implementation is called in transformers' registers, where it stays.
        attention: the attention function.
        mask: the function that makes its mask.

    Yields:
        Nothing.

    Raises:
        ModelError: if the model's class does not let its attention implementation be set.
    """
    previous = model.config._attn_implementation
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ModelError(
                f"{type(model).__name__} keeps its attention implementation {previous!r}: use a model whose layers go "
                f"through transformers' AttentionInterface, e.g. {EXAMPLES}"
            )
        yield
    finally:
        if model.config._attn_implementation != previous:
            model.set_attn_implementation(previous)


def attention_implementation(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model's attention layers call the `attention_context` it is given, until the block ends.

    Args:
        model: a causal language model whose layers use transformers' attention interface.

    Returns:
        The block (see `registered_attention`).
    """
    return registered_attention(model, IMPLEMENTATION, _attention, _mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    attention_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: check that the context computes all this layer asks for, then call it."""
    if attention_context is None:
        raise KvbenchError(
            f"attention_context=None reached {type(module).__name__}: inside attention_implementation(model) call "
            "model(input_ids, attention_context=...) with an Observer or a RaggedCache"
        )
    if attention_mask is not None:
        raise KvbenchError(
            f"attention_mask of shape {tuple(attention_mask.shape)} is not supported: give whole prompts, one a call, "
            "without padding and without a mask"
        )
    if dropout:
        raise KvbenchError(f"attention dropout {dropout} is not supported: call model.eval() first")
    refuse_arguments(module, kwargs)
    optional = {} if softcap is None else {"softcap": softcap}
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer_index = cast(int, module.layer_idx)
    with current_device(query.device):
        output = attention_context.attend(layer_index, query, key, value, scaling, **optional)
    return output, None


def refuse_arguments(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse an attention layer that asks for more than softmax attention, soft-capped or not.

    Args:
        module: the layer.
        arguments: the keywords that it gave its attention function.

    Raises:
        ModelError: with the argument that cannot be heeded.
    """
    for name in _UNSUPPORTED_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} needs the attention argument {name!r}, which kvbench lacks: "
                f"use a model with plain softmax attention, e.g. {EXAMPLES}"
            )


def _mask(
    *args: Any, attention_mask: Tensor | None = None, q_length: Any = None, local_size: int | None = None, **kwargs: Any
) -> None:
    """The registered mask function: no mask is needed, and one that hides a token is refused instead of ignored.

    Positional and further keyword arguments differ between versions of transformers and are not needed.
    """
    if attention_mask is not None and not bool(torch.as_tensor(attention_mask).all()):
        hidden = int((~attention_mask.bool()).sum())
        raise KvbenchError(
            f"attention_mask hides {hidden} tokens, at most 0 are supported: give whole prompts, one a call, without "
            "padding"
        )
    if local_size is not None and isinstance(q_length, int) and 1 < q_length > local_size:
        raise ModelError(
            f"{q_length} tokens exceed the model's sliding window of {local_size}: lower model.max_prompt_tokens until "
            "prompt and answer fit into the window"
        )
    if not kwargs.get("allow_is_causal_skip", True) and isinstance(q_length, int) and q_length > 1:
        raise KvbenchError(
            f"{q_length} position_ids that describe several packed sequences, or a model's own mask, are not "
            "supported: give one whole prompt a call"
        )
