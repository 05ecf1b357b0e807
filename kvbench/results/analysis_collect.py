"""Prefill samples and measure every layer on the way; one pass per sample serves all three analyses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvbench.methods.base import LayerStates
from kvbench.models.load import LoadedModel
from kvbench.models.prompt import encode_sample
from kvbench.results.analysis_measures import adjacent_cosines, attention_uniformity, kept_shares, unrotated
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.observe import Observer
from kvbench.runtime.requests import model_shape
from kvbench.tasks.base import Sample

THRESHOLDS = (0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95)
WINDOW_QUERIES = 64
DIGITS = 5


def measure_samples(loaded: LoadedModel, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """Measure samples one by one.

    Args:
        loaded: a Llama-like model with `model.rotary_emb`.
        samples: any task's samples.

    Yields:
        Per sample plain JSON types: ids, `n_tokens`, and per layer the mean adjacent cosine of each KV head
        (`keys_after`, `keys_before`, `values`), the share of slots left at each of `THRESHOLDS` (`kept`), and the
        normalised entropy and the first token's attention, means over heads (`entropy`, `sink`).
    """
    for sample in samples:
        ids = encode_sample(sample, loaded).input_ids
        layers = measure_prompt(loaded, ids)
        fields = {name: [layer[name] for layer in layers] for name in layers[0]}
        yield {"dataset": sample.dataset, "sample": sample.id, "n_tokens": len(ids), **fields}


def measure_prompt(loaded: LoadedModel, input_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One prefill; the measures of every layer, in order."""
    ids = torch.tensor([list(input_ids)], device=loaded.device)
    positions = torch.arange(ids.shape[1], device=loaded.device).unsqueeze(0)
    probe = torch.zeros(1, device=loaded.device)
    cosines, sines = (table[0] for table in loaded.model.model.rotary_emb(probe, positions))
    layers: list[dict[str, Any]] = []

    def on_layer(layer: LayerStates) -> None:
        after = adjacent_cosines(layer.keys)
        before = adjacent_cosines(unrotated(layer.keys, cosines.to(layer.keys.device), sines.to(layer.keys.device)))
        assert layer.window_attention is not None
        entropy, sink = attention_uniformity(layer.window_attention[:, -WINDOW_QUERIES:])
        layers.append({
            "keys_after": _rounded(after.mean(1)), "keys_before": _rounded(before.mean(1)),
            "values": _rounded(adjacent_cosines(layer.values).mean(1)),
            "kept": _rounded(kept_shares(after, THRESHOLDS).mean(0)),
            "entropy": round(entropy.mean().item(), DIGITS), "sink": round(sink.mean().item(), DIGITS),
        })  # fmt: skip

    shape = model_shape(loaded)
    observer = Observer(
        needs=frozenset({"window_attention"}),
        window_tokens=WINDOW_QUERIES,
        n_layers=shape["n_layers"],
        n_query_heads=shape["n_query_heads"],
        seed=0,
        on_layer=on_layer,
    )
    with torch.inference_mode(), attention_implementation(loaded.model):
        loaded.model(input_ids=ids, attention_context=observer, use_cache=False, logits_to_keep=1)
    return layers


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
