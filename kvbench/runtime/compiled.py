"""Decoder layers run as compiled code for a `with` block, the model's own code left as it is.

A decode step of a few rows spends much of its time in the model's small elementwise operations (RMSNorm, rotary
embedding, activation, residuals), each a kernel of its own. Compiling the decoder layers fuses them:

    layers = CompiledLayers(model)
    with attention_implementation(model), layers.active():
        model(input_ids, position_ids=..., past_key_values=cache, attention_context=cache, use_cache=True)

Queries, keys and values are computed by one product, see `packed.py`.

All layers share one compiled code, made at the first step. The registered attention function and `RaggedCache.update`
are called as they are, between the compiled parts; under CUDA graphs such a seam costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from kvbench.errors import ModelError
from kvbench.models.load import LoadedModel
from kvbench.runtime import attention as interface
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.packed import PackedProjections

MAX_CODES = 64  # versions of one function's compiled code: dtypes, one row or several, models of one process


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers names as the model's repeated blocks (`_no_split_modules`)."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def can_compile(loaded: LoadedModel) -> bool:
    """Whether compiling the layers is possible and of use: a GPU that holds the whole model, and known layers."""
    devices = {parameter.device for parameter in loaded.model.parameters()}
    return loaded.device.type == "cuda" and len(devices) == 1 and bool(decoder_layers(loaded.model))


class CompiledLayers:
    """A model's decoder layers and their compiled calls, which take effect in `active` blocks only.

    The number of rows is symbolic: one code serves all batches, but a batch of one row has its own. A second object for
    the same kind of model finds the code of the first one.

    Args:
        model: the model; outside of `active` nothing of it is changed but where its weights lie.
        backend: a backend of torch.compile, by name or as a function.
    """

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor"):
        self.model = model
        self._packed = PackedProjections(model)
        # Intermediate roundings to bfloat16 are kept, so that compiled and plain layers compute the same function.
        options: dict[str, Any] | None = {"emulate_precision_casts": True} if backend == "inductor" else None
        self._calls = [
            (layer, torch.compile(layer._call_impl, backend=backend, dynamic=True, options=options))
            for layer in decoder_layers(model)
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the layers as compiled code until the block ends; for decode steps, so one token a row.

        To be entered inside `attention_implementation(model)`.

        Yields:
            Nothing.

        Raises:
            ModelError: if torch.compile fails, e.g. for want of a C compiler.
        """
        from torch._dynamo import config as dynamo_config  # imported late: slow, and most processes do not need it
        from torch._dynamo.exc import TorchDynamoException

        with ExitStack() as undo:
            undo.enter_context(
                # Without the first, every layer would get a code of its own: its index would be taken for a constant.
                dynamo_config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=MAX_CODES)
            )
            AttentionInterface.register(interface.IMPLEMENTATION, _opaque(interface._attention))
            undo.callback(AttentionInterface.register, interface.IMPLEMENTATION, interface._attention)
            undo.enter_context(self._packed.active())
            undo.enter_context(_replaced(RaggedCache, "update", _opaque(RaggedCache.update)))
            for layer, compiled in self._calls:
                undo.enter_context(_replaced(layer, "_compiled_call_impl", compiled))
            try:
                yield
            except TorchDynamoException as error:
                cause = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
                raise ModelError(
                    f"torch.compile failed on the layers of {type(self.model).__name__} ({cause}): "
                    "set engine.compile=false"
                ) from error


@functools.cache
def _opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, not looked into by torch.compile; the same wrapper every time, since compiled code checks it."""
    return torch.compiler.disable(function)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute until the block ends; one that the owner only inherited is removed again."""
    former = vars(owner).get(name)
    had_own = name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, former)
        else:
            delattr(owner, name)
