r"""Measure the paper's observations on a model, and draw what was measured.

python -m kvbench.analysis measure --model smollm2-135m --task passkey mini longbench/qasper --limit 4 \
        --override data.root=DIR data.official=DIR2 model.max_prompt_tokens=1500
python -m kvbench.analysis draw        # keys, compression, uniformity: CSV and figures from the measurements alone

KVMerger (arXiv 2407.08454): adjacent keys are similar, and RoPE is why; a fixed threshold gives each layer a ratio that
belongs to the model and not to the data; the first and last layers attend more uniformly than the others. One prefill
of a sample measures all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvbench.arguments import Parser
from kvbench.commands import command, strict_json
from kvbench.config import composed
from kvbench.methods.base import LayerStates
from kvbench.models.load import LoadedModel, load_model
from kvbench.models.prompt import encode_sample
from kvbench.paths import file_stem
from kvbench.plan import build_plan
from kvbench.records.environment import describe_environment
from kvbench.results.analysis import write_all
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.observe import Observer
from kvbench.runtime.requests import model_shape
from kvbench.tasks.base import Sample

THRESHOLDS = (0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95)
WINDOW_QUERIES = 64
DIGITS = 5


def adjacent_cosines(states: Tensor) -> Tensor:
    """Cosine of each token's state with the next token's: `(H_k, T, D)`, T at least 2, to `(H_k, T - 1)` fp32."""
    states = states.float()
    return cosine_similarity(states[:, :-1], states[:, 1:], dim=-1)


def unrotated(keys: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Keys `(H_k, T, D)` as they were before RoPE, fp32: each is rotated back by its own position.

    Halves are rotated against each other as in Llama, Mistral and Qwen (Su et al., "RoFormer", arXiv 2104.09864,
    equation 34, in transformers' layout); cosines and sines, `(T, D)`, are the model's, attention scaling included.
    """
    keys, cosines, sines = keys.float(), cosines.float(), sines.float()
    first, second = keys.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (keys * cosines - turned * sines) / (cosines.square() + sines.square())


def kept_shares(cosines: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Share of slots left if every run of neighbours above a threshold becomes one slot; nothing is protected.

    `(H_k, T - 1)` from `adjacent_cosines` to `(H_k, thresholds)` sets over tokens, in (0, 1].
    """
    limits = torch.tensor(thresholds, device=cosines.device)
    links = (cosines.unsqueeze(-1) > limits).sum(1)
    return 1 - links / (cosines.shape[1] + 1)


def attention_uniformity(rows: Tensor) -> tuple[Tensor, Tensor]:
    """How uniformly the last W queries of a prompt attend: `(H, W, T)`, where row w sees T - W + w + 1 keys.

    To `(H,)` mean normalised entropy, 1 for uniform attention over all visible keys and 0 for a single key, and `(H,)`
    mean attention on the first token (the attention sink).
    """
    n_window, n_tokens = rows.shape[1:]
    rows = rows.double()
    entropy = torch.special.entr(rows).sum(-1)
    visible = torch.arange(n_tokens - n_window + 1, n_tokens + 1, device=rows.device, dtype=torch.float64)
    return (entropy / visible.clamp_min(2).log()).mean(-1), rows[..., 0].mean(-1)


def measure_samples(loaded: LoadedModel, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """Measure samples one by one on a Llama-like model with `model.rotary_emb`; yields plain JSON types.

    Ids, `n_tokens`, and per layer the mean adjacent cosine of each KV head (`keys_after`, `keys_before`, `values`), the
    share of slots left at each of `THRESHOLDS` (`kept`), and the normalised entropy and the first token's attention,
    means over heads (`entropy`, `sink`).
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
    rotary = loaded.model.model.rotary_emb(torch.zeros(1, device=loaded.device), positions)
    cosines, sines = (table[0] for table in rotary)
    layers: list[dict[str, Any]] = []

    def on_layer(layer: LayerStates) -> None:
        after = adjacent_cosines(layer.keys)
        before = adjacent_cosines(unrotated(layer.keys, cosines.to(layer.keys.device), sines.to(layer.keys.device)))
        assert layer.window_attention is not None
        entropy, sink = attention_uniformity(layer.window_attention[:, -WINDOW_QUERIES:])
        measures = {"keys_after": after.mean(1), "keys_before": before.mean(1),
                    "values": adjacent_cosines(layer.values).mean(1), "kept": kept_shares(after, THRESHOLDS).mean(0),
                    "entropy": entropy.mean(), "sink": sink.mean()}  # fmt: skip
        layers.append({name: _rounded(values.tolist()) for name, values in measures.items()})

    shape, needs = model_shape(loaded), frozenset({"window_attention"})
    observer = Observer(
        needs=needs, window_tokens=WINDOW_QUERIES, n_layers=shape["n_layers"], n_query_heads=shape["n_query_heads"],
        seed=0, on_layer=on_layer,
    )  # fmt: skip
    with torch.inference_mode(), attention_implementation(loaded.model):
        loaded.model(input_ids=ids, attention_context=observer, use_cache=False, logits_to_keep=1)
    return layers


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else round(value, DIGITS)


def measure(model: str, tasks: Sequence[str], limit: int, overrides: Sequence[str], folder: Path) -> Path:
    """Measure a model on the first samples of some tasks and write `<model>.json`; returns the file."""
    more = [f"task.limit={limit}", *overrides]
    plans = [build_plan(composed([f"model={model}", f"task={task}", *more])) for task in tasks]
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before it is measured
    loaded = load_model(plans[0].model)
    measured: list[dict[str, Any]] = []
    for row in (row for plan in plans for row in measure_samples(loaded, plan.task.samples(lambda: loaded.tokenizer))):
        print(f"{row['dataset']} {row['sample']}: {row['n_tokens']} tokens", file=sys.stderr)
        measured.append(row)
    environment = describe_environment()
    document: dict[str, Any] = {"model": loaded.name, "dtype": str(loaded.dtype).removeprefix("torch.")}
    document["thresholds"] = list(THRESHOLDS)
    document |= {"window_queries": WINDOW_QUERIES, "kvbench": environment["kvbench"], "commit": environment["commit"]}
    document |= {name: environment["packages"][name] for name in ("torch", "transformers")} | {"samples": measured}
    path = folder / f"{file_stem(loaded.name)}.json"
    path.write_text(strict_json(document, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m kvbench.analysis", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("results/analysis"), help="measurements and figures")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure", help="prefill samples and measure every layer")
    command.add_argument("--model", default="smollm2-135m", help="an option of configs/model")
    command.add_argument("--task", nargs="+", default=["passkey", "fewshot", "niah", "mini"], help="of configs/task")
    command.add_argument("--limit", type=int, default=4, help="samples of each task")
    command.add_argument("--override", nargs="*", default=[], help="further settings, e.g. data.root=DIR")
    commands.add_parser("draw", help="CSV and figures from the measurements alone")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        print(measure(options.model, options.task, options.limit, options.override, options.folder))
    else:
        print(*write_all(options.folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
