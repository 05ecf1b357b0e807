"""Which implementation of an attention operation runs where: the torch version anywhere, the Triton version on CUDA.

Callers record the name they get back, so that a fallback is never silent.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kvbench.errors import ConfigError

KERNELS = ("auto", "torch", "triton")

logger = logging.getLogger(__name__)


def choose_kernels(requested: str, device: torch.device | str) -> str:
    """Decide between the torch and the Triton version of an operation.

    Args:
        requested: "auto" (Triton on a CUDA device if it can be imported, otherwise torch), "torch" or "triton".
        device: where the tensors live.

    Returns:
        "torch" or "triton". Triton runs on CUDA with the package installed, and on any device under its interpreter
        (environment variable TRITON_INTERPRET=1, meant for tests), but there only if it is asked for by name.

    Raises:
        ConfigError: if `requested` is none of the three, or "triton" is requested where it cannot run.
    """
    if requested not in KERNELS:
        raise ConfigError(f"kernels={requested!r} is not one of {', '.join(KERNELS)}: choose one of these")
    on_cuda = torch.device(device).type == "cuda"
    if requested == "torch" or (requested == "auto" and not on_cuda):
        return "torch"
    reason = ""
    if not _triton_installed():
        reason = "the package triton is not installed"
    elif not on_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        reason = "Triton kernels need a CUDA device"
    if reason and requested == "triton":
        raise ConfigError(f"kernels='triton' on device {str(device)!r}: {reason}; use kernels=torch or kernels=auto")
    if reason:
        _warn_once(f"kernels=auto takes the slower torch version on {device}: {reason}")
    return "torch" if reason else "triton"


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one until the block ends: Triton launches kernels there, wherever their tensors lie.

    A model that is spread over several GPUs calls its layers without doing so. Nothing happens for the CPU or the GPU
    that is current already.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
