"""Best effort at seeing, on a CPU, what would make a decode step wait for the device on a GPU.

Two of torch's public hooks: a function mode sees what Python asks of a tensor (`tolist`, `bool(tensor)`), a dispatch
mode sees what operators read on their own (a boolean mask as index needs to know how many entries are true).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # where torch's own notes on extending it place it

CALLS = {
    "tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__format__",
    "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "equal", "allclose", "is_nonzero",
}  # fmt: skip
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Functions(TorchFunctionMode):
    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in CALLS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATORS:
            self.seen.append(name)
        elif name in MASKED and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]):
            self.seen.append("a boolean mask as index")
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Collect what a block asks of tensors that needs their values on the host.

    Yields:
        A list that fills with names, in order; empty at the end if nothing was seen.
    """
    seen: list[str] = []
    with _Functions(seen), _Operators(seen):
        yield seen
