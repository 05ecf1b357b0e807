"""Find a model on the Hugging Face hub: download its safetensors snapshot, or say how to get access to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from kvbench.errors import ModelError
from kvbench.models.config import ModelConfig
from kvbench.models.local import Checkpoint

FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
SKIPPED_FILES = ("consolidated*", "original/*", "onnx/*")
"""Second copies of the weights in other layouts."""


def locate(config: ModelConfig, report: Callable[[str], None]) -> Checkpoint:
    """The snapshot of `config.hub_id` at `config.revision`, from the hub's cache or downloaded into it.

    `HF_HUB_OFFLINE`, `HF_HOME` and the token of `hf auth login` are honoured by the hub's own client.

    Args:
        config: `hub_id` and `revision` are read.
        report: told what takes time.

    Returns:
        The snapshot folder; its source is "hub_id@commit", the commit that the revision stands for.

    Raises:
        ModelError: if the model is gated, unknown or cannot be reached.
    """
    hub_id, revision = str(config.hub_id), config.revision
    report(f"looking for {hub_id} (revision {revision}) in the hub's cache and on the hub")
    local = "or use a local copy with model.path=FOLDER"
    page = f"https://huggingface.co/{hub_id}"
    try:
        snapshot = snapshot_download(
            hub_id, revision=revision, allow_patterns=list(FILES), ignore_patterns=list(SKIPPED_FILES)
        )
    except GatedRepoError as error:
        raise ModelError(
            f"model {hub_id} is gated: accept its licence on {page}, then run `hf auth login`, {local}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model {hub_id} has no revision {revision}: choose one listed on {page}, {local}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model {hub_id} is not on the hub, or this account may not see it: check the id, accept its licence on "
            f"{page} and run `hf auth login`, {local}"
        ) from error
    except OSError as error:  # no network, HF_HUB_OFFLINE, disk full, server errors
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0").upper() in _TRUE else ""
        raise ModelError(
            f"model {hub_id} (revision {revision}) is neither in the hub's cache nor reachable{offline}: "
            f"{type(error).__name__}; go online, accept the licence on {page} if there is one and run "
            f"`hf auth login`, {local}"
        ) from error
    return Checkpoint(Path(snapshot), f"{hub_id}@{Path(snapshot).name}")


_TRUE = ("1", "ON", "YES", "TRUE")
