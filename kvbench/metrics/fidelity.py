"""Closeness of a compressed arm to the full cache, where a handful of samples separates methods that F1 cannot.

Pure functions of tensors and token ids: the engine runs both arms, this says how far apart they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.metrics.rouge_l import rouge_l

_CHUNK_ELEMENTS = 1 << 22  # rows are converted to double precision in pieces of at most 32 MiB


def _normalized(log_probs: Tensor) -> Tensor:
    """Double precision, with what single precision left out of the normalisation put right."""
    return torch.log_softmax(log_probs.double(), dim=-1)


def kl_to_full(log_probs_full: Tensor, log_probs_arm: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(full || arm) of the next-token distributions.

    Args:
        log_probs_full: (tokens, vocabulary) log-probabilities with the full cache.
        log_probs_arm: (tokens, vocabulary) log-probabilities of the same positions with the compressed cache.

    Returns:
        (tokens,) divergence in nats, double precision, never negative; inf where the arm excludes a token that the full
        cache allows.

    Raises:
        ValueError: if the shapes differ or are not two-dimensional.
    """
    if log_probs_full.dim() != 2 or log_probs_full.shape != log_probs_arm.shape:
        raise ValueError(f"log-probabilities of shapes {tuple(log_probs_full.shape)} and {tuple(log_probs_arm.shape)}")
    rows = max(1, _CHUNK_ELEMENTS // max(1, log_probs_full.shape[1]))
    pieces = []
    for full, arm in zip(log_probs_full.split(rows), log_probs_arm.split(rows), strict=True):
        full, arm = _normalized(full), _normalized(arm)
        probabilities = full.exp()
        terms = torch.where(probabilities > 0, probabilities * (full - arm), 0.0)
        pieces.append(terms.sum(dim=-1).clamp_min(0.0))
    return torch.cat(pieces)


def gold_nll(log_probs: Tensor, gold_ids: Tensor) -> Tensor:
    """Negative log-likelihood of every gold token.

    Args:
        log_probs: (tokens, vocabulary) log-probabilities, row t predicting gold token t.
        gold_ids: (tokens,) ids of the gold answer.

    Returns:
        (tokens,) in nats, double precision.

    Raises:
        ValueError: if there is not one row per gold token.
    """
    if log_probs.dim() != 2 or gold_ids.shape != log_probs.shape[:1]:
        raise ValueError(f"{tuple(log_probs.shape)} log-probabilities for gold ids of shape {tuple(gold_ids.shape)}")
    return -log_probs.gather(1, gold_ids.to(log_probs.device)[:, None]).squeeze(1).double()


def first_divergence(ids_a: Sequence[int], ids_b: Sequence[int]) -> int | None:
    """Number of tokens two generations share before they differ.

    Args:
        ids_a: generated token ids.
        ids_b: generated token ids.

    Returns:
        Index of the first difference (the length of the shorter one if it is a prefix of the other); None if equal.
    """
    for position, (a, b) in enumerate(zip(ids_a, ids_b, strict=False)):
        if a != b:
            return position
    return None if len(ids_a) == len(ids_b) else min(len(ids_a), len(ids_b))


def equal_share(ids_a: Sequence[int], ids_b: Sequence[int]) -> float:
    """Share of positions at which two generations hold the same token.

    Args:
        ids_a: generated token ids.
        ids_b: generated token ids.

    Returns:
        Equal positions divided by the length of the longer one, in [0, 1]; 1.0 if both are empty.
    """
    longer = max(len(ids_a), len(ids_b))
    return sum(a == b for a, b in zip(ids_a, ids_b, strict=False)) / longer if longer else 1.0


def rouge_l_to_full(text: str, full_text: str) -> float:
    """ROUGE-L of an arm's text against the full cache's text.

    Args:
        text: generated with the compressed cache.
        full_text: generated with the full cache.

    Returns:
        F-measure in [0, 1]; exactly 1.0 for equal texts, also empty ones.
    """
    return 1.0 if text == full_text else rouge_l(text, full_text)
