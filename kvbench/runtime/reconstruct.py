"""The second pass: the model repeats the prompt it has read, and each key's highest attention meanwhile is its score.

Source: KVzip (Kim et al., NeurIPS 2025, arXiv 2505.23416), section 3 and algorithm 1; official code snu-mllab/KVzip,
`model/wrapper.py` (`self_task`, `scoring`) and `attention/score.py`. The prompt is cut into chunks. For each one the
model is fed the demand to repeat it, and then the chunk itself (teacher forcing), at the positions after the prompt and
with the whole prompt in view. A key's score is the largest softmax weight that any query of the repetition and of its
group gives it, where the softmax runs over the sinks, the chunk's keys and the repetition's own.

Here prompt and repetitions are one forward pass of their own, whose keys and values are dropped layer by layer: only
scores are held, arms that do not ask pay nothing, and the prompt is computed twice in all (there: once).

Deviations: softmax in fp32 (there: the model's dtype, which rounds many scores to 1); the sinks are the first 4 tokens
as in NVIDIA/kvpress (there: the whole system prompt, which is never evicted), and every other token is in a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.ops.observe import cap_logits, observe, softmax_attention
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.requests import RECONSTRUCTION, SINK_TOKENS, Arm, Request

BLOCK_QUERIES, BLOCK_LOGITS = 256, 2**25
"""Queries of a repetition that are taken at a time, and their logits at most: 128 MiB in fp32."""


def reconstruct(loaded: LoadedModel, request: Request, arms: Iterable[Arm]) -> tuple[list[Tensor], dict[str, Any]]:
    """Scores `(H_k, T)` fp32 of each layer, and what they cost: `second_pass_seconds` and `second_pass_tokens`.

    Both are empty if none of the arms needs them.
    """
    if not any(RECONSTRUCTION in in_effect(arm.policy).needs for arm in arms):
        return [], {}
    start, n_tokens = time.perf_counter(), request.compress_at
    ids, positions, spans = [*request.input_ids[:n_tokens]], [*range(n_tokens)], []
    for first, last, repeat in request.repetitions():
        spans.append((len(ids), len(ids) + len(repeat), first, last))
        ids += repeat
        positions += range(n_tokens, n_tokens + len(repeat))
    scorer = _Scorer(n_tokens, spans)
    inputs = torch.tensor([[ids], [positions], [[1] * len(ids)]], device=loaded.device)
    # A mask that hides nothing: without one, transformers takes positions that start anew for packed sequences.
    given = {"input_ids": inputs[0], "position_ids": inputs[1], "attention_mask": inputs[2]}
    with torch.inference_mode(), attention_implementation(loaded.model):
        loaded.model(**given, attention_context=scorer, use_cache=False, logits_to_keep=1)
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    cost = {"second_pass_seconds": round(time.perf_counter() - start, 4), "second_pass_tokens": len(ids)}
    return scorer.scores, cost


@dataclass(eq=False)
class _Scorer:
    """Attention context of the second pass: spans are a repetition's tokens and the chunk it repeats."""

    n_tokens: int
    spans: list[tuple[int, int, int, int]]
    scores: list[Tensor] = field(default_factory=list, init=False)

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """The prompt attends to itself, every repetition to the prompt and itself; see `AttentionContext.attend`."""
        n_tokens = self.n_tokens
        asked, keys, values = (x[0, :, :n_tokens] for x in (query, key, value))
        unobserved: dict[str, Any] = {"column_sums": False, "window_tokens": 0, "kernels": "torch"}
        seen = observe(asked, keys, values, scaling, softcap=softcap, **unobserved)
        outputs = [seen.output.transpose(0, 1)[None]]
        scores = torch.ones(key.shape[1], n_tokens, device=key.device)  # sinks keep the 1
        for begin, end, first, last in self.spans:
            keys, values = (torch.cat([x[:, :, :n_tokens], x[:, :, begin:end]], 2) for x in (key, value))
            for start, stop in _blocks(end - begin, query.shape[1] * keys.shape[2]):
                rows, n_seen = query[:, :, begin + start : begin + stop], n_tokens + stop
                past = torch.ones(stop - start, n_seen, dtype=torch.bool, device=key.device).tril(n_tokens + start)
                states = rows, keys[:, :, :n_seen], values[:, :, :n_seen]
                outputs.append(softmax_attention(*states, scaling, softcap, past[None, None]))
            chunk = slice(first, last)
            scores[:, chunk] = chunk_scores(query[0, :, begin:end], key[0], begin, chunk, scaling, softcap)
        self.scores.append(scores)
        return torch.cat(outputs, 1)


def chunk_scores(
    queries: Tensor, keys: Tensor, begin: int, chunk: slice, scaling: float, softcap: float | None = None
) -> Tensor:
    """Largest attention of each key of a chunk, `(H_k, C)` fp32, over a repetition's queries `(H, R, D)` and the group.

    The softmax sees the first keys of `(H_k, n, D)`, the chunk's, and the repetition's own, from `begin` on.
    """
    n_kv_heads, n_queries = keys.shape[0], queries.shape[1]
    sinks = min(SINK_TOKENS, chunk.start)
    seen = torch.cat([keys[:, :sinks], keys[:, chunk], keys[:, begin : begin + n_queries]], 1).float()
    before = seen.shape[1] - n_queries
    highest = keys.new_zeros(n_kv_heads, before - sinks, dtype=torch.float32)
    for start, stop in _blocks(n_queries, queries.shape[0] * seen.shape[1]):
        rows = (queries[:, start:stop].float() * scaling).reshape(n_kv_heads, -1, queries.shape[2])
        logits = cap_logits(rows @ seen[:, : before + stop].transpose(1, 2), softcap)
        future = torch.full((stop - start, stop - start), -torch.inf, device=keys.device).triu_(1)
        logits.unflatten(1, (-1, stop - start))[..., before + start :] += future
        highest = torch.maximum(highest, logits.softmax(-1)[..., sinks:before].amax(1))
    return highest


def _blocks(n_queries: int, logits_per_query: int) -> Iterator[tuple[int, int]]:
    """First and last query of each block; what comes after a block's last query is not computed."""
    block = max(16, min(BLOCK_QUERIES, BLOCK_LOGITS // logits_per_query))
    return ((start, min(start + block, n_queries)) for start in range(0, n_queries, block))
