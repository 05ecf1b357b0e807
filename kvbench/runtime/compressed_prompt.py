"""The prompts of a batch, padded on the left: how long each is, rows for what a policy keeps, an observer for each.

Every row is observed and compressed on its own, without its padding, exactly as it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from transformers import PreTrainedConfig

from kvbench.errors import ModelError
from kvbench.methods.base import LayerStates, Policy
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.observe import Observer


def prompt_lengths(query: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each row's prompt, padding not counted.

    Args:
        query: `(B, H, T, D)`, the prompt's queries.
        mask: `(B, T)` bool, False for padding, or None for none.

    Returns:
        B lengths in tokens.

    Raises:
        ModelError: if the mask does not fit, or hides tokens elsewhere than before a prompt.
    """
    batch_size, padded_tokens = query.shape[0], query.shape[2]
    if mask is None:
        return [padded_tokens] * batch_size
    if tuple(mask.shape) != (batch_size, padded_tokens):
        raise ModelError(
            f"attention_mask of shape {tuple(mask.shape)} does not fit {batch_size} prompts of {padded_tokens} tokens: "
            "give one 0 or 1 per token"
        )
    holes = int((mask[:, 1:] < mask[:, :-1]).sum())
    if holes:
        raise ModelError(
            f"attention_mask hides tokens after a prompt has begun in {holes} places, 0 are supported: pad on the left"
        )
    lengths: list[int] = mask.sum(1).tolist()
    return lengths


def check_padding(mask: Tensor | None, prompt_tokens: Sequence[int], padded_tokens: int) -> None:
    """Refuse a mask over later tokens that hides anything but the padding that the prompts came with.

    Args:
        mask: `(B, T + new)` bool, or None if it hides nothing.
        prompt_tokens: length of each prompt in tokens, padding not counted.
        padded_tokens: T, padding counted.

    Raises:
        ModelError: if a row hides more or fewer tokens.
    """
    expected = [padded_tokens - n_tokens for n_tokens in prompt_tokens]
    hidden = [0] * len(expected) if mask is None else (~mask.bool()).sum(1).tolist()
    if hidden != expected:
        raise ModelError(
            f"attention_mask hides {hidden} tokens of the rows, their prompts began with {expected} of padding: give "
            "the prompts' mask with a 1 added per new token"
        )


def rows_for(
    policy: Policy, prompt_tokens: Sequence[int], n_layers: int, query: Tensor, key: Tensor, kernels: str
) -> RaggedCache:
    """Empty rows of the right shape, one per prompt.

    Args:
        policy: the method of all rows.
        prompt_tokens: length of each prompt in tokens.
        n_layers: layers that are compressed.
        query: `(B, H, T, D)`, queries of one layer.
        key: `(B, H_k, T, D)`, keys of one layer.
        kernels: "auto", "torch" or "triton".

    Returns:
        The rows, with storage reserved for their budgets.

    Raises:
        BudgetError: if the policy cannot run with so few slots.
    """
    budgets = [policy.layer_budgets(n_tokens, n_layers) for n_tokens in prompt_tokens]
    rows = RaggedCache(
        n_layers=n_layers,
        n_query_heads=query.shape[1],
        n_kv_heads=key.shape[1],
        head_dim=key.shape[3],
        dtype=key.dtype,
        backend=kernels,
        max_rows=len(prompt_tokens),
    )
    for n_tokens in prompt_tokens:
        rows.add_row(policy, position=n_tokens)
    rows.reserve_rows(budgets)
    return rows


def observers_of(
    rows: RaggedCache, policy: Policy, prompt_tokens: Sequence[int], seed: int, config: PreTrainedConfig
) -> list[Observer]:
    """One observer per row, which compresses each layer it sees and writes what is left into the row.

    Args:
        rows: from `rows_for`.
        policy: the method.
        prompt_tokens: length of each prompt in tokens.
        seed: handed to the policy.
        config: the model's text configuration.

    Returns:
        B observers.
    """
    budgets = [policy.layer_budgets(n_tokens, rows.n_layers) for n_tokens in prompt_tokens]

    def compress(row: int, states: LayerStates) -> None:
        rows.write(states.layer_index, row, policy.compress(states, budgets[row][states.layer_index]))

    return [
        Observer(
            needs=policy.needs,
            window_tokens=policy.window_tokens,
            n_layers=rows.n_layers,
            n_query_heads=rows.n_query_heads,
            seed=seed,
            on_layer=partial(compress, row),
            backend=rows.backend,
            config=config,
        )
        for row in range(len(prompt_tokens))
    ]
