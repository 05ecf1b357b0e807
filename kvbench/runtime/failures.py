"""What may go wrong with one sample or one arm without ending the run, and how it is told in one line."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from kvbench.errors import KvbenchError

OUT_OF_MEMORY_ON_CPU = "DefaultCPUAllocator"
"""PyTorch's CPU allocator reports missing memory as a plain RuntimeError that begins with its name."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU, in PyTorch's CPU allocator or in Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY_ON_CPU in str(error)


def ends_the_run(error: Exception) -> bool:
    """Whether no other sample can do better: an error to mend in the settings, or a device that is lost.

    A CUDA error other than missing memory leaves the context unusable: every later call of the process fails.
    """
    if isinstance(error, KvbenchError):
        return True
    lost = getattr(torch, "AcceleratorError", ())  # new in torch 2.8; before, such an error looks like any other
    return isinstance(error, lost) and not is_out_of_memory(error)


def failure_reason(error: BaseException) -> str:
    """One line for the record: the error's class, the first line of its message, and where it was raised."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text
