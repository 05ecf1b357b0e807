"""Work that a decode step leaves to run beside what follows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A CUDA stream of its own for launches whose results the rest of a layer does not need; without CUDA, no stream.

    The policies' one-launch steps are such work: small kernels that would leave the device idle, while only the next
    token's attention needs what they do. Inside a captured step the stream becomes a branch of the graph.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._busy = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Let launches of the block start after all before it, and run beside all after it until `join`.

        Yields:
            Nothing.
        """
        if self._stream is None:
            yield
            return
        self._busy = True
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what is launched from here on start after the work of all `beside` blocks so far."""
        if self._busy and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._busy = False
