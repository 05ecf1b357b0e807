"""The KVMerger paper's observations (arXiv 2407.08454), tested and drawn from `<model>.json` alone.

`kvbench.analysis` measures them. The claim that a fixed threshold's ratio is "independent of the data set, persistent
per model" is a test: ratios of all samples and layers are split into sums of squares between models, between a model's
layers, between data sets (the part of a layer's ratio that moves with the data set) and between samples of one data
set. If the claim holds, the data sets' share is no larger than relabelling the samples at random makes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvbench.errors import DataError
from kvbench.results.figures import MARKERS, PALETTE, SEQUENTIAL, save_both, style, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_THRESHOLD = 0.75
N_PERMUTATIONS = 2000
SEED = 20_241
STATES = {"keys_after": "keys after RoPE", "keys_before": "keys before RoPE", "values": "values"}
Measured = dict[str, dict[str, Any]]
"""Model -> what was measured of it."""


class VarianceShares(NamedTuple):
    """Shares of the total sum of squares; the first four sum to 1."""

    models: float  # between models
    layers: float  # between the layers of a model
    datasets: float  # between data sets, within layers
    samples: float  # between samples of a data set, within layers
    p_datasets: float  # share of random relabellings of a model's samples whose data sets differ at least as much
    max_range: float  # largest range of a layer's data set means, in ratio units


def variance_shares(ratios: dict[str, tuple[NDArray[np.float64], list[str]]]) -> VarianceShares:
    """Split the variance of ratios: model -> (`(samples, layers)`, data set of each sample).

    `p_datasets` is 1 if no model has two data sets.
    """
    every = np.concatenate([values.ravel() for values, _ in ratios.values()])
    total = float(((every - every.mean()) ** 2).sum())
    models = float(sum(values.size * (values.mean() - every.mean()) ** 2 for values, _ in ratios.values()))
    layers = sum(len(values) * float(((values.mean(0) - values.mean()) ** 2).sum()) for values, _ in ratios.values())
    generator = np.random.default_rng(SEED)
    observed, shuffled, ranges = 0.0, np.zeros(N_PERMUTATIONS), []
    for values, labels in ratios.values():
        codes = np.unique(labels, return_inverse=True)[1].astype(np.int64)
        observed += float(_between(values, codes[None])[0])
        shuffled += _between(values, generator.permuted(np.tile(codes, (N_PERMUTATIONS, 1)), axis=1))
        means = np.stack([values[codes == code].mean(0) for code in np.unique(codes)])
        ranges.append(float(np.ptp(means, axis=0).max()))
    p_datasets = (int((shuffled >= observed - 1e-12).sum()) + 1) / (N_PERMUTATIONS + 1)
    parts = np.array([models, layers, observed, total - models - layers - observed]) / (total or 1.0)
    models, layers, datasets, samples = parts.tolist()
    return VarianceShares(models, layers, datasets, samples, p_datasets, max(ranges))


def _between(values: NDArray[np.float64], codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Squares between data sets' means, summed over layers, for `(labellings, samples)` codes of equal sizes."""
    centred = values - values.mean(0)
    total = np.zeros(len(codes))
    for code in np.unique(codes[0]):
        members = (codes == code).astype(np.float64)
        total += ((members @ centred) ** 2).sum(1) / members[0].sum()
    return total


def write_all(folder: Path) -> list[Path]:
    """Write `keys.csv`, `compression.csv`, `uniformity.csv`, `variance.csv` and the figures; returns the files."""
    measured = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not measured:
        raise DataError(f"no measurements in {folder}: run `python -m kvbench.analysis measure` first")
    paths = []
    for table in (keys_table, compression_table, uniformity_table, variance_table):
        paths.append(folder / f"{table.__name__.removesuffix('_table')}.csv")
        table(measured).to_csv(paths[-1], index=False, lineterminator="\n")
    with style():
        for model, data in measured.items():
            for draw in (keys_figure, compression_figure, uniformity_figure):
                paths += save_both(draw(data), folder / f"{draw.__name__.removesuffix('_figure')}-{model}")
    return paths


def layer_means(data: dict[str, Any], name: str) -> NDArray[np.float64]:
    """Mean over samples of a per-layer measure: `(layers, ...)`."""
    return np.mean([np.array(sample[name]) for sample in data["samples"]], axis=0)


def keys_table(measured: Measured) -> pd.DataFrame:
    """Mean adjacent cosine per model, layer and KV head."""
    rows = []
    for model, data in measured.items():
        means = [layer_means(data, name) for name in STATES]
        places = np.ndindex(*means[0].shape)
        rows += [[model, *place, *(f"{mean[place]:.4f}" for mean in means)] for place in places]
    return pd.DataFrame(rows, columns=["model", "layer", "kv_head", *STATES])


def compression_table(measured: Measured) -> pd.DataFrame:
    """Share of slots left per model, data set, layer and threshold: mean and standard deviation over samples."""
    rows = [
        (model, sample["dataset"], layer, threshold, kept)
        for model, data in measured.items() for sample in data["samples"]
        for layer, shares in enumerate(sample["kept"])
        for threshold, kept in zip(data["thresholds"], shares, strict=True)
    ]  # fmt: skip
    keys = ["model", "dataset", "layer", "threshold"]
    kept = pd.DataFrame(rows, columns=[*keys, "kept"]).groupby(keys)["kept"]
    table = kept.agg(n="size", kept_mean=lambda own: own.to_numpy().mean(), kept_deviation="std").reset_index()
    return table.assign(**{name: table[name].map("{:.4f}".format, na_action="ignore") for name in table.columns[-2:]})


def uniformity_table(measured: Measured) -> pd.DataFrame:
    """Normalised entropy and attention on the first token per model and layer."""
    rows = [
        [model, layer, f"{entropy:.4f}", f"{sink:.4f}"]
        for model, data in measured.items()
        for layer, (entropy, sink) in enumerate(zip(*(layer_means(data, n) for n in ("entropy", "sink")), strict=True))
    ]
    return pd.DataFrame(rows, columns=["model", "layer", "normalised_entropy", "first_token_attention"])


def variance_table(measured: Measured) -> pd.DataFrame:
    """The test of "independent of the data set, persistent per model" at every threshold, over all models."""
    rows = []
    for place, threshold in enumerate(next(iter(measured.values()))["thresholds"]):
        ratios = {
            model: (np.array([np.array(s["kept"])[:, place] for s in data["samples"]]),
                    [s["dataset"] for s in data["samples"]])
            for model, data in measured.items()
        }  # fmt: skip
        rows.append([threshold, *(f"{share:.4f}" for share in variance_shares(ratios))])
    return pd.DataFrame(rows, columns=["threshold", *VarianceShares._fields])


def keys_figure(data: dict[str, Any]) -> Figure:
    """Cosine maps, layers x KV heads, for keys after and before RoPE and for values."""
    figure, (axes,) = subplots(1, len(STATES), (8.0, 5.2), sharey=True)
    image: Any = None
    for axis, (name, label) in zip(axes, STATES.items(), strict=True):
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
    figure, ((axis,),) = subplots(1, 1, (8.0, 3.6))
    for index, dataset in enumerate(sorted({sample["dataset"] for sample in data["samples"]})):
        kept = np.array([s["kept"] for s in data["samples"] if s["dataset"] == dataset])
        percent, colour = 100 * kept[:, :, place], PALETTE[index % len(PALETTE)]
        layers = np.arange(percent.shape[1])
        axis.plot(layers, percent.mean(0), color=colour, marker=MARKERS[index % 8], markersize=3, label=dataset)
        axis.fill_between(layers, percent.min(0), percent.max(0), color=colour, alpha=0.12, linewidth=0)
    axis.set(xlabel="layer", ylabel=f"slots left at cosine {PAPER_THRESHOLD}, %", ylim=(0, 100))
    axis.legend(fontsize=7, ncols=2)
    return figure


def uniformity_figure(data: dict[str, Any]) -> Figure:
    """Normalised entropy of attention and attention on the first token, per layer."""
    figure, ((axis,),) = subplots(1, 1, (8.0, 3.2))
    labels = {"entropy": "normalised entropy", "sink": "attention on the first token"}
    for (name, label), colour, marker in zip(labels.items(), PALETTE[1:3], MARKERS[:2], strict=True):
        values = layer_means(data, name)
        axis.plot(range(len(values)), values, markersize=4, label=label, color=colour, marker=marker)
    axis.set(xlabel="layer", ylim=(0, 1))
    axis.legend(fontsize=8)
    return figure
