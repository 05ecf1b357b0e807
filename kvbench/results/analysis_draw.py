"""Tables and figures of the analyses, from `results/analysis/<model>.json` alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kvbench.errors import DataError
from kvbench.results.analysis_variance import VarianceShares, variance_shares
from kvbench.results.figures import MARKERS, PALETTE, SEQUENTIAL, save, style

STATES = (("keys_after", "keys after RoPE"), ("keys_before", "keys before RoPE"), ("values", "values"))
PAPER_THRESHOLD = 0.75


def read_measurements(folder: Path) -> dict[str, dict[str, Any]]:
    """Model -> its measurements.

    Raises:
        DataError: if there are none.
    """
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise DataError(f"no measurements in {folder}: run `python -m kvbench.analysis measure` first")
    return found


def write_all(folder: Path) -> list[Path]:
    """Write `keys.csv`, `compression.csv`, `uniformity.csv`, `variance.csv` and the figures; returns the files."""
    measured = read_measurements(folder)
    texts = {"keys": keys_csv(measured), "compression": compression_csv(measured),
             "uniformity": uniformity_csv(measured), "variance": variance_csv(measured)}  # fmt: skip
    paths = []
    for name, text in texts.items():
        paths.append(folder / f"{name}.csv")
        paths[-1].write_text(text, encoding="utf-8", newline="\n")
    with style():
        for model, data in measured.items():
            for name, draw in (("keys", keys_figure), ("compression", compression_figure), ("uniformity", uniformity)):
                paths += save(draw(data), folder / f"{name}-{model}")
    return paths


def layer_means(data: dict[str, Any], name: str) -> np.ndarray:
    """Mean over samples of a per-layer measure: `(layers, ...)`."""
    return np.mean([np.array(sample[name]) for sample in data["samples"]], axis=0)


def keys_csv(measured: dict[str, dict[str, Any]]) -> str:
    """Mean adjacent cosine per model, layer and KV head."""
    rows = []
    for model, data in measured.items():
        means = {name: layer_means(data, name) for name, _ in STATES}
        for layer, head in np.ndindex(*means["values"].shape):
            rows.append([model, layer, head, *(f"{means[name][layer, head]:.4f}" for name, _ in STATES)])
    return _csv(["model", "layer", "kv_head", *(name for name, _ in STATES)], rows)


def compression_csv(measured: dict[str, dict[str, Any]]) -> str:
    """Share of slots left per model, data set, layer and threshold: mean and standard deviation over samples."""
    rows = []
    for model, data in measured.items():
        for dataset in _datasets(data):
            kept = np.array([s["kept"] for s in data["samples"] if s["dataset"] == dataset])
            for layer, place in np.ndindex(*kept.shape[1:]):
                values = kept[:, layer, place]
                deviation = f"{values.std(ddof=1):.4f}" if len(values) > 1 else ""
                rows.append([model, dataset, layer, data["thresholds"][place], len(values), f"{values.mean():.4f}",
                             deviation])  # fmt: skip
    return _csv(["model", "dataset", "layer", "threshold", "n", "kept_mean", "kept_deviation"], rows)


def uniformity_csv(measured: dict[str, dict[str, Any]]) -> str:
    """Normalised entropy and attention on the first token per model and layer."""
    rows = []
    for model, data in measured.items():
        entropy, sink = layer_means(data, "entropy"), layer_means(data, "sink")
        rows += [[model, layer, f"{e:.4f}", f"{s:.4f}"] for layer, (e, s) in enumerate(zip(entropy, sink, strict=True))]
    return _csv(["model", "layer", "normalised_entropy", "first_token_attention"], rows)


def model_variances(measured: dict[str, dict[str, Any]]) -> dict[float, VarianceShares]:
    """The test of "independent of the data set, persistent per model" at every threshold, over all models."""
    thresholds = next(iter(measured.values()))["thresholds"]
    found = {}
    for place, threshold in enumerate(thresholds):
        ratios = {
            model: (np.array([[layer[place] for layer in s["kept"]] for s in data["samples"]]),
                    [s["dataset"] for s in data["samples"]])
            for model, data in measured.items()
        }  # fmt: skip
        found[threshold] = variance_shares(ratios)
    return found


def variance_csv(measured: dict[str, dict[str, Any]]) -> str:
    """The variance shares at every threshold."""
    names = ("models", "layers", "datasets", "samples", "p_datasets", "max_range")
    rows = [
        [threshold, *(f"{getattr(shares, name):.4f}" for name in names)]
        for threshold, shares in model_variances(measured).items()
    ]
    return _csv(["threshold", *names], rows)


def keys_figure(data: dict[str, Any]) -> Figure:
    """Cosine maps, layers x KV heads, for keys after and before RoPE and for values."""
    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    axes = figure.subplots(1, len(STATES), sharey=True)
    image: Any = None
    for axis, (name, label) in zip(axes, STATES, strict=True):
        grid = layer_means(data, name)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap=SEQUENTIAL, aspect="auto")
        axis.set_title(f"{label}: mean {grid.mean():.2f}", fontsize=9)
        axis.set_xlabel("KV head")
        axis.set_xticks(range(grid.shape[1]) if grid.shape[1] <= 8 else range(0, grid.shape[1], 8))
        axis.grid(False)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="mean cosine of adjacent tokens")
    return figure


def compression_figure(data: dict[str, Any]) -> Figure:
    """Share of slots left per layer at the paper's threshold, one line per data set with the spread of its samples."""
    place = data["thresholds"].index(PAPER_THRESHOLD)
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axis = figure.subplots()
    for index, dataset in enumerate(_datasets(data)):
        kept = np.array([[layer[place] for layer in s["kept"]] for s in data["samples"] if s["dataset"] == dataset])
        colour, layers = PALETTE[index % len(PALETTE)], np.arange(kept.shape[1])
        axis.plot(layers, 100 * kept.mean(0), color=colour, marker=MARKERS[index % 8], markersize=3, label=dataset)
        axis.fill_between(layers, 100 * kept.min(0), 100 * kept.max(0), color=colour, alpha=0.12, linewidth=0)
    axis.set_xlabel("layer")
    axis.set_ylabel(f"slots left at cosine {PAPER_THRESHOLD}, %")
    axis.set_ylim(0, 100)
    axis.legend(fontsize=7, ncols=2)
    return figure


def uniformity(data: dict[str, Any]) -> Figure:
    """Normalised entropy of attention and attention on the first token, per layer."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    axis = figure.subplots()
    for index, (name, label) in enumerate(
        (("entropy", "normalised entropy"), ("sink", "attention on the first token"))
    ):
        values = layer_means(data, name)
        axis.plot(
            range(len(values)), values, color=PALETTE[index + 1], marker=MARKERS[index], markersize=4, label=label
        )
    axis.set_xlabel("layer")
    axis.set_ylim(0, 1)
    axis.legend(fontsize=8)
    return figure


def _datasets(data: dict[str, Any]) -> list[str]:
    return sorted({sample["dataset"] for sample in data["samples"]})


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
