"""One observed prefill of a prompt, handing every layer's states to a callback while they are at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.engine import Arm, Job, model_shape
from kvbench.runtime.observe import Observer


def prefill(
    loaded: LoadedModel, job: Job, arms: Iterable[Arm], on_layer: Callable[[LayerStates], None], kernels: str = "auto"
) -> tuple[Tensor, set[str]]:
    """Prefill a job's prompt with full attention and observe what the arms' policies need.

    Args:
        loaded: the model.
        job: the job; its first `compress_at` tokens are prefilled.
        arms: arms whose policies will compress the layers.
        on_layer: called once per layer, in order, with the layer's states; they are freed when it returns unless it
            keeps a reference.
        kernels: "auto", "torch" or "triton".

    Returns:
        Logits of the last prefilled token `(V,)` fp32, and the names of the observation backends that ran.
    """
    policies = [in_effect(arm.policy) for arm in arms]
    shape = model_shape(loaded)
    observer = Observer(
        needs=frozenset().union(*(policy.needs for policy in policies)),
        window_tokens=max(policy.window_tokens for policy in policies),
        n_layers=shape["n_layers"],
        n_query_heads=shape["n_query_heads"],
        seed=job.seed,
        on_layer=on_layer,
        backend=kernels,
        config=loaded.model.config.get_text_config(),
    )
    input_ids = torch.tensor([job.input_ids[: job.compress_at]], device=loaded.device)
    with torch.inference_mode(), attention_implementation(loaded.model):
        output = loaded.model(input_ids=input_ids, attention_context=observer, use_cache=False, logits_to_keep=1)
        return output.logits[0, -1].float(), observer.backends
