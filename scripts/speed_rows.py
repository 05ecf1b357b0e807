"""The measurements behind `bench_speed.py`: every function here makes rows of the table of speed targets.

What each row means is said in `bench_speed.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from speed_timing import Row, copy_bandwidth, peak_bytes, reset_peak, take_turns

from kvbench.errors import ConfigError
from kvbench.methods.base import CompressedLayer
from kvbench.methods.registry import load_policies, method_config
from kvbench.models.load import LoadedModel
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.decode import DecodeLoop
from kvbench.runtime.decode import Sequence as DecodeSequence
from kvbench.runtime.fused import FusedEngine, LayerFork
from kvbench.runtime.observe import prefill
from kvbench.runtime.requests import Arm, Request, model_shape

LONG_TOKENS = 65_536  # from here on one repeat is enough: a run takes many seconds


@dataclass(frozen=True)
class Setting:
    """What the rows are measured with.

    Attributes:
        loaded: the model, its own attention set to SDPA.
        arms: the arms, the full cache among them.
        repeats: times taken of each work.
        lengths: prompt lengths of row 1, tokens.
        sample_tokens: prompt length of the other rows.
        new_tokens: tokens generated per arm.
    """

    loaded: LoadedModel
    arms: tuple[Arm, ...]
    repeats: int
    lengths: tuple[int, ...]
    sample_tokens: int
    new_tokens: int

    def job(self, arms: Sequence[Arm], n_tokens: int, new_tokens: int, index: int = 0) -> Request:
        """A sample of random tokens that never stops early."""
        vocabulary = self.loaded.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(3, int(vocabulary), (n_tokens,), generator=torch.Generator().manual_seed(index)).tolist()
        return Request(index, tuple(ids), n_tokens, (), tuple(arms), self.full, (), new_tokens)

    @property
    def full(self) -> Arm:
        """The full-cache arm."""
        return next(arm for arm in self.arms if arm.policy.name == "full")


def parse_arm(text: str) -> Arm:
    """The arm "method@budget+option=value", budget and options optional, options not given at their defaults.

    Raises:
        ConfigError: if there is no such method or the text cannot be read.
    """
    head, *options = text.split("+")
    name, _, budget = head.partition("@")
    if (policy := load_policies().get(name)) is None:
        raise ConfigError(f"method {name!r} is unknown: choose one of {', '.join(load_policies())}")
    try:
        changes = OmegaConf.merge(OmegaConf.from_dotlist(options), {"budget": float(budget or 1)})
    except ValueError as error:
        raise ConfigError(f"arm {text!r} is not method@budget, e.g. h2o@0.5") from error
    return Arm.of(instantiate(OmegaConf.merge(method_config(policy), changes)))


def parse_arms(text: str) -> tuple[Arm, ...]:
    """The arms of a list like "full,h2o@0.5".

    Raises:
        ConfigError: as `parse_arm`, or if the full cache is not among them.
    """
    arms = tuple(parse_arm(part) for part in text.split(","))
    if not any(arm.policy.name == "full" for arm in arms):
        raise ConfigError(f"arms {text!r} lack the full cache: add full")
    return arms


class Fork:
    """One prompt prefilled into a cache that has a row per arm."""

    def __init__(self, setting: Setting, new_tokens: int):
        self.setting, self.new_tokens = setting, new_tokens
        self.shape = model_shape(setting.loaded)
        self.job = setting.job(setting.arms, setting.sample_tokens, new_tokens)
        self.cache = RaggedCache(**self.shape, dtype=setting.loaded.dtype, max_rows=len(setting.arms))
        self.backends: set[str] = set()

    def prefill(self, fork: bool = True) -> int:
        """Prefill, observed as the arms need it; with `fork` every layer is compressed and written for all arms.

        Returns:
            The first new token.
        """
        policies = [arm.policy for arm in self.setting.arms]
        self.cache.clear()
        for policy in policies if fork else ():
            self.cache.add_row(policy, position=self.job.compress_at, room_tokens=self.new_tokens)

        def write(row: int, layer_index: int, compressed: CompressedLayer) -> None:
            self.cache.write(layer_index, row, compressed)

        on_layer = LayerFork(policies, self.job.compress_at, self.shape["n_layers"], write) if fork else lambda s: None
        logits, self.backends = prefill(self.setting.loaded, self.job, self.setting.arms, on_layer)
        return int(logits.argmax())

    def row_bytes(self) -> dict[str, int]:
        """Bytes each arm keeps of the prompt."""
        return {arm.key: self.cache.row_bytes(row) for row, arm in enumerate(self.setting.arms)}


def plain_prefill(setting: Setting, n_tokens: int) -> Callable[[], object]:
    """A plain SDPA prefill of a prompt, to be called any number of times."""
    ids = torch.tensor([setting.job((), n_tokens, 1).input_ids], device=setting.loaded.device)

    def work() -> None:
        with torch.inference_mode():
            setting.loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return work


def prefill_row(setting: Setting, n_tokens: int, target: float | None, must_run: bool = False, number: int = 1) -> Row:
    """Row 1 at one length: prefill with exact column sums over plain prefill."""
    device = setting.loaded.device
    reset_peak(device)
    arms = [arm for arm in setting.arms if "column_sums" in arm.policy.needs][:1] or [parse_arm("h2o@0.5")]
    job = setting.job(arms, n_tokens, 1)
    backends: set[str] = set()

    def observed() -> None:
        backends.update(prefill(setting.loaded, job, arms, lambda states: None)[1])

    row = Row(number, "prefill with exact column sums / plain", f"{n_tokens:,} tokens", {}, lambda t: math.nan, target)
    row.must_run = must_run
    try:
        works = {"plain": plain_prefill(setting, n_tokens), "observed": observed}
        _, row.seconds = take_turns(works, device, 1 if n_tokens >= LONG_TOKENS else setting.repeats)
        row.formula = lambda t: t["observed"] / t["plain"]
    except torch.OutOfMemoryError:
        row.note = "out of memory"
        torch.cuda.empty_cache()
    row.peak_bytes, row.details = peak_bytes(device), {"observe": sorted(backends)}
    return row


def fork_row(setting: Setting, target: float) -> Row:
    """Row 2: what compressing and writing all arms adds to an observed prefill, over plain prefill."""
    reset_peak(setting.loaded.device)
    fork = Fork(setting, setting.new_tokens)
    works = {
        "plain": plain_prefill(setting, setting.sample_tokens),
        "observed": lambda: fork.prefill(fork=False),
        "forked": fork.prefill,
    }
    first, seconds = take_turns(works, setting.loaded.device, setting.repeats)
    return Row(
        2,
        f"forking one prefill into {len(setting.arms)} arms / plain prefill",
        f"{setting.sample_tokens:,} tokens",
        seconds,
        lambda t: (t["forked"] - t["observed"]) / t["plain"],
        target,
        peak_bytes=peak_bytes(setting.loaded.device),
        details={"first_seconds": first, "observe": sorted(fork.backends)},
    )


def step_row(setting: Setting, target: float) -> Row:
    """Row 3: a decode step of all arms over the time its bytes need at the bandwidth of a copy.

    The engine's own loop decodes the forked rows twice, some steps and three times as many; the difference is free of
    what a batch costs once.
    """
    loaded = setting.loaded
    reset_peak(loaded.device)
    n_short = max(4, setting.new_tokens // 4)
    n_long = 3 * n_short
    fork = Fork(setting, n_long + 1)
    engine = FusedEngine()
    loop = DecodeLoop(loaded, fork.cache, engine.check_every, cuda_graphs=True, compile_layers=engine.compile)

    def decode(n_steps: int) -> float:
        token = fork.prefill()
        job = setting.job(setting.arms, setting.sample_tokens, n_steps + 1)
        rows = [DecodeSequence.generating(job, arm, token) for arm in setting.arms]
        return take_turns({"run": lambda: loop.run(rows)}, loaded.device, repeats=0)[0]["run"]

    decode(n_long)  # compiles kernels and captures the graph
    seconds: dict[str, list[float]] = {"long": [], "short": []}
    for _ in range(setting.repeats):
        seconds["long"].append(decode(n_long))
        seconds["short"].append(decode(n_short))
    peak = peak_bytes(loaded.device)
    fork.prefill()
    cache_bytes = fork.row_bytes()
    bandwidth, copies = copy_bandwidth(loaded.device)
    floor = (weight_bytes(loaded) + sum(cache_bytes.values())) / bandwidth
    n_steps = n_long - n_short
    per_step = statistics.median(seconds["long"]) - statistics.median(seconds["short"])
    return Row(
        3,
        f"decode step of {len(setting.arms)} arms / bandwidth floor",
        f"{setting.sample_tokens:,} tokens",
        seconds,
        lambda t: (t["long"] - t["short"]) / n_steps / floor,
        target,
        peak_bytes=peak,
        details={
            "step_seconds": per_step / n_steps,
            "floor_seconds": floor,
            "weight_bytes": weight_bytes(loaded),
            "cache_bytes": cache_bytes,
            "copy_bytes_per_second": bandwidth,
            "copy_seconds": copies,
            "steps": [n_short, n_long],
            "replayed_steps": loop.replayed_steps,
            "kernels": sorted(fork.cache.kernels_used),
        },
        note="" if loop.replayed_steps else "no CUDA graph: steps ran eagerly",
    )


def weight_bytes(loaded: LoadedModel) -> int:
    """Bytes of weights that a decode step reads: all but the embedding table, unless it is the output matrix too."""
    model = loaded.model
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    skipped = 0 if embedding is output else embedding.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - skipped


def bytes_row(setting: Setting, target: float) -> Row:
    """Row 5: bytes an arm's cache takes over its budget's share of the full cache's bytes; the worst arm counts."""
    reset_peak(setting.loaded.device)
    fork = Fork(setting, setting.new_tokens)
    fork.prefill()
    shape, n_bytes = fork.shape, fork.row_bytes()
    slots = setting.sample_tokens * shape["n_layers"] * shape["n_kv_heads"]
    full_bytes = 2 * slots * shape["head_dim"] * setting.loaded.dtype.itemsize
    ratios = {arm.key: n_bytes[arm.key] / (arm.policy.budget * full_bytes) for arm in setting.arms}
    worst = max(ratios, key=lambda key: ratios[key])
    return Row(
        5,
        "allocated cache bytes of an arm / budget x full bytes",
        f"{setting.sample_tokens:,} tokens",
        {},
        lambda t: ratios[worst],
        target,
        peak_bytes=peak_bytes(setting.loaded.device),
        details={"ratios": ratios, "bytes": n_bytes, "full_bytes": full_bytes},
        note=f"worst: {worst}",
    )
