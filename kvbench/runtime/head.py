"""The output matrix multiplied with a padded number of rows, for a `with` block: CPU libraries dislike some numbers.

With MKL on two AMD cores, SmolLM2's 49,152 x 576 output matrix takes 11 ms for one row, 17 ms for four, five or eight,
but 25, 37, 26 and 40 ms for two, three, six and seven (fp32, medians of twelve): its kernels take rows in fours and do
a remainder of two or three one at a time. Rows of zeros cost nothing beside that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

ROWS = 4


@contextmanager
def padded_head(model: PreTrainedModel, multiple: int = ROWS) -> Iterator[None]:
    """Let a model's output matrix see a multiple of some number of rows until the block ends.

    Logits keep their shape and meaning; single rows, the `(1, T, E)` of a prompt included, are left as they are.

    Args:
        model: a causal language model.
        multiple: rows (the first dimension of the hidden states) are filled up with zeros to a multiple of it.

    Yields:
        Nothing.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def fill_up(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        missing = -hidden.shape[0] % multiple
        if hidden.shape[0] == 1 or missing == 0:
            return arguments
        rows.append(hidden.shape[0])
        return pad(hidden, (0, 0) * (hidden.ndim - 1) + (0, missing)), *arguments[1:]

    def cut(module: nn.Module, arguments: tuple[Any, ...], logits: Tensor) -> Tensor:
        return logits[: rows.pop()] if rows else logits

    rows: list[int] = []
    hooks = [head.register_forward_pre_hook(fill_up), head.register_forward_hook(cut)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
