"""The fused engine: one prefill per sample for all arms, all arms of one or more samples decoded as one batch.

On a GPU the arms compress side by side, each on a stream of its own: choosing slots keeps a few multiprocessors busy
for long and leaves the others idle. Side streams wait for everything the main stream has been given before, and the
main stream waits for all of them before it goes on, so a freed tensor is never reused while another still reads it.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import abc, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import psutil
import torch

from kvbench.errors import ConfigError, failure_reason
from kvbench.fields import Within, check_fields
from kvbench.methods.base import CompressedLayer, LayerStates, Policy
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.decode import DecodeLoop, Sequence
from kvbench.runtime.model_check import check_model
from kvbench.runtime.observe import Compressor, prefill
from kvbench.runtime.reconstruct import reconstruct
from kvbench.runtime.requests import (
    RECONSTRUCTION,
    Answer,
    Arm,
    Engine,
    Request,
    SampleFailure,
    ends_the_run,
    is_out_of_memory,
)

CONCURRENT_TOKENS = 16_384
"""Longest prompt whose arms compress at the same time: beyond, the work fills the GPU and memory is worth more."""


@dataclass(frozen=True)
class FusedEngine(Engine):
    """Prefill once, fork into arms, decode all arms as rows of one batch (see module docstring).

    Attributes:
        kernels: "auto", "torch" or "triton".
        cuda_graphs: capture decode steps in CUDA graphs.
        compile: run the decoder layers as compiled code in decode steps (GPU only).
        max_rows: rows of a decode batch at most; None: 24 on a CPU, 64 on a GPU.
        memory_ratio: share of the free device memory that the caches of one batch may take.
        check_every: decode steps between looks at which rows have finished (GPU only).
    """

    kernels: Literal["auto", "torch", "triton"] = "auto"
    cuda_graphs: bool = True
    compile: bool = True
    max_rows: Annotated[int, Within(1, 65_536)] | None = None
    memory_ratio: Annotated[float, Within(0, 1)] = 0.8
    check_every: Annotated[int, Within(1)] = 8

    def __post_init__(self) -> None:
        """Validate the options."""
        check_fields(self, "engine")
        if self.memory_ratio == 0.0:
            raise ConfigError("engine.memory_ratio=0 leaves no memory: give a share above 0, e.g. memory_ratio=0.8")

    def run(
        self, loaded: LoadedModel, requests: abc.Sequence[Request], stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[Answer | SampleFailure]:
        """Run requests, several per batch where rows and memory allow; see `Engine.run`."""
        self.check(loaded, requests)
        session = _Session(self, loaded)
        waiting = deque(requests)
        while waiting and not stopping():
            yield from session.run_batch(session.next_batch(waiting))


class _Session:
    """One run of the engine: the cache and the decode loop live as long as it does."""

    def __init__(self, engine: FusedEngine, loaded: LoadedModel):
        facts = check_model(loaded.model)
        self.engine, self.loaded, self.shape = engine, loaded, facts.shape
        # Only the torch kernels know soft-capped logits; kernels=triton is refused by name.
        self.kernels = "torch" if facts.soft_capped and engine.kernels == "auto" else engine.kernels
        self.on_gpu = loaded.device.type == "cuda"
        self.max_rows = engine.max_rows or (64 if self.on_gpu else 24)
        self.cache: RaggedCache | None = None
        self.loop: DecodeLoop | None = None

    # --- which requests go together ---

    def next_batch(self, waiting: deque[Request]) -> list[Request]:
        """Take the first request and as many more as rows and memory allow."""
        batch, available = [waiting.popleft()], self._available_bytes()
        rows, n_bytes = len(_sequences(batch[0])), self._bytes(batch[0])
        while waiting:
            rows += len(_sequences(waiting[0]))
            n_bytes += self._bytes(waiting[0])
            if rows > self.max_rows or n_bytes > available:
                break
            batch.append(waiting.popleft())
        return batch

    def _slots_per_layer(self, request: Request) -> list[int]:
        """Slots that a request's rows take in each layer, summed over KV heads, room for new tokens included."""
        slots = [0] * self.shape["n_layers"]
        for sequence in _sequences(request):
            policy = in_effect(sequence.arm.policy)
            room = 1 if policy.steps else max(1, sequence.n_steps)
            for index, budget in enumerate(policy.layer_budgets(request.compress_at, len(slots))):
                slots[index] += self.shape["n_kv_heads"] * (budget + room)
        return slots

    def _bytes(self, request: Request) -> int:
        try:
            slots = sum(self._slots_per_layer(request))
        except Exception as error:
            if ends_the_run(error):
                raise
            return sys.maxsize  # the request runs alone, where the policy's error is raised again and contained
        return slots * 2 * self.shape["head_dim"] * self.loaded.dtype.itemsize

    def _available_bytes(self) -> int:
        device = self.loaded.device
        free = psutil.virtual_memory().available
        if self.on_gpu:
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + unused
        return int(self.engine.memory_ratio * free) + (self.cache.allocated_bytes if self.cache is not None else 0)

    # --- running a batch, and what to do when memory runs out ---

    def run_batch(self, requests: list[Request], notes: tuple[str, ...] = ()) -> Iterator[Answer | SampleFailure]:
        """Run requests as one batch; an error halves the batch, then a single request's arms, until one is alone."""
        try:
            outcomes = self._attempt(requests, notes)
        except Exception as error:
            self.cache = self.loop = None
            if self.on_gpu:
                torch.cuda.empty_cache()
            if ends_the_run(error):
                raise
            reason, memory = failure_reason(error), is_out_of_memory(error)
            outcomes = None
        if outcomes is not None:
            yield from outcomes
            return
        cause, first = "out of memory" if memory else reason, requests[0]
        if len(requests) > 1:
            half, note = len(requests) // 2, f"{cause} with {len(requests)} samples in a batch: halved"
            parts = [requests[:half], requests[half:]]
        elif len(first.arms) > 1:
            half, note = len(first.arms) // 2, f"{cause} with {len(first.arms)} arms of one sample in a batch: halved"
            parts = [[replace(first, arms=first.arms[:half])], [replace(first, arms=first.arms[half:])]]
        else:
            alone = "out of memory with a single arm: " if memory else ""
            yield SampleFailure(first.index, alone + reason, first.arms)
            return
        for part in parts:
            yield from self.run_batch(part, (*notes, note))

    # --- one batch ---

    def _attempt(self, requests: list[Request], notes: tuple[str, ...]) -> list[Answer | SampleFailure]:
        max_rows = max(self.max_rows, sum(len(_sequences(request)) for request in requests))
        if self.cache is None or self.loop is None or self.cache.max_rows < max_rows:
            self.cache = RaggedCache(**self.shape, dtype=self.loaded.dtype, kernels=self.kernels, max_rows=max_rows)
            options = self.engine.check_every, self.engine.cuda_graphs, self.engine.compile
            self.loop = DecodeLoop(self.loaded, self.cache, *options)
        cache, loop, observed = self.cache, self.loop, set[str]()
        cache.clear()
        cache.reserve([sum(layer) for layer in zip(*map(self._slots_per_layer, requests), strict=True)])
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.loaded.device)
        forked = [self._fork(request, cache, observed) for request in requests]
        sequences = sorted((s for of_one, _ in forked for s in of_one), key=lambda sequence: not sequence.forced)
        cache.keep_rows([sequence.row for sequence in sequences])
        start = time.perf_counter()
        loop.run(sequences)
        seconds = (time.perf_counter() - start) / max(1, len(sequences))
        settings: dict[str, Any] = {
            "engine": "fused", "kernels": sorted(cache.kernels_used), "observe": sorted(observed),
            "batch_samples": len(requests), "batch_rows": len(sequences), "cuda_graphs": loop.replayed_steps > 0,
            "compiled": loop.compiled,
            "peak_bytes": torch.cuda.max_memory_allocated(self.loaded.device) if self.on_gpu else None,
            "notes": list(notes),
        }  # fmt: skip
        return [outcome for of_one, blanks in forked for outcome in _outcomes(of_one, blanks, seconds, settings)]

    def _fork(self, request: Request, cache: RaggedCache, observed: set[str]) -> tuple[list[Sequence], list[Answer]]:
        """Prefill a request and compress it into a row per sequence; answers hold what the prefill alone decides."""
        start = time.perf_counter()
        sequences = _sequences(request)
        arms = list({sequence.arm.key: sequence.arm for sequence in sequences}.values())
        rows: dict[str, list[int]] = {arm.key: [] for arm in arms}
        for sequence in sequences:
            policy, room = in_effect(sequence.arm.policy), max(1, sequence.n_steps)
            sequence.row = cache.add_row(policy, position=request.compress_at, room_tokens=room)
            rows[sequence.arm.key].append(sequence.row)

        def write(arm: int, layer_index: int, compressed: CompressedLayer) -> None:
            for row in rows[arms[arm].key]:
                cache.write(layer_index, row, compressed)

        fork = LayerFork([in_effect(arm.policy) for arm in arms], request.compress_at, self.shape["n_layers"], write)
        scores, cost = reconstruct(self.loaded, request, arms)
        logits, kernels_used = prefill(self.loaded, request, arms, fork, self.kernels, scores)
        observed |= kernels_used
        finite, nll = bool(torch.isfinite(logits).all()), list[float]()
        if not request.question_ids:
            if request.gold_ids:
                nll = [-float(torch.log_softmax(logits, -1)[request.gold_ids[0]])]
            if request.min_new_tokens > 0:
                logits = logits.index_fill(0, torch.tensor(request.stop_ids, device=logits.device), -torch.inf)
            first_token = int(logits.argmax())
        for sequence in sequences:
            sequence.finite = finite
            if sequence.first_tokens:
                sequence.feed = [first_token]
        second_pass = cost.get("second_pass_seconds", 0.0)
        seconds = (time.perf_counter() - start - second_pass) / len(arms)
        askers = {arm.key for arm in arms if RECONSTRUCTION in in_effect(arm.policy).needs}
        blanks = []
        for arm in request.arms:
            row = rows[arm.key][0]
            answer = Answer.blank(self.loaded, request, arm, cache.row_slots(row), cache.row_bytes(row))
            answer.gold_nll, answer.kl = [*nll], [0.0] * len(nll)  # the same for every arm
            answer.seconds = seconds
            if arm.key in askers:
                answer.seconds += second_pass / len(askers)
                answer.settings = cost
            blanks.append(answer)
        return sequences, blanks


def _sequences(request: Request) -> list[Sequence]:
    """All rows of a request: each arm generates; with a gold answer, each is forced, too, and so is the reference."""
    sequences = [Sequence.generating(request, arm) for arm in request.arms]
    if request.gold_ids:
        keys = [arm.key for arm in request.arms]
        forced = [*request.arms, *([] if request.reference.key in keys else [request.reference])]
        sequences += [Sequence.along_gold(request, arm) for arm in forced]
    return sequences


def _outcomes(
    sequences: list[Sequence], blanks: list[Answer], seconds: float, settings: dict[str, Any]
) -> Iterator[Answer | SampleFailure]:
    """Fill in one request's answers; `seconds` is a row's share of decoding."""
    request = sequences[0].request
    rows = {(sequence.arm.key, sequence.forced): sequence for sequence in sequences}
    reference = rows.get((request.reference.key, True))

    def is_finite(arm: Arm) -> bool:
        behind = (rows[arm.key, False], rows.get((arm.key, True)), reference)
        return all(sequence.finite for sequence in behind if sequence is not None)

    if broken := tuple(arm for arm in request.arms if not is_finite(arm)):
        yield SampleFailure(request.index, "the model's logits are not finite (NaN or infinity)", broken)
    for answer in (answer for answer in blanks if answer.arm not in broken):
        ending, forced = rows[answer.arm.key, False].ending, rows.get((answer.arm.key, True))
        assert ending is not None
        answer.token_ids, answer.finish = ending
        if forced is not None:
            judged = [step for step, target in enumerate(forced.targets) if target >= 0]
            answer.gold_nll += [forced.nll[step] for step in judged]
            answer.kl += [max(0.0, forced.kl[step]) for step in judged]
        answer.seconds += seconds * (1 if forced is None else 2)
        answer.settings = settings | answer.settings
        yield answer


class LayerFork:
    """Compresses each layer for all policies, as `prefill`'s `on_layer`; an impossible budget is refused at once.

    `write` is called with (index of the policy, layer, compressed layer), in order, and copies what it keeps.
    """

    def __init__(
        self, policies: abc.Sequence[Policy], n_tokens: int, n_layers: int,
        write: Callable[[int, int, CompressedLayer], None],
    ):  # fmt: skip
        self.write = write
        self.compressors = [Compressor(policy, n_tokens, n_layers) for policy in policies]

    def __call__(self, states: LayerStates) -> None:
        """Compress and write one layer for all arms."""
        device, arms = states.keys.device, range(len(self.compressors))
        if device.type != "cuda" or states.n_tokens > CONCURRENT_TOKENS or len(arms) == 1:
            for arm in arms:
                for index, compressed in self.compressors[arm](states):
                    self.write(arm, index, compressed)
            return
        main = torch.cuda.current_stream(device)
        seen = main.record_event()
        ready_by_arm = []
        for arm in arms:
            stream = _stream(device, arm)
            stream.wait_event(seen)
            with torch.cuda.stream(stream):
                ready_by_arm.append(list(self.compressors[arm](states)))
        for arm in arms:
            main.wait_stream(_stream(device, arm))
            for index, compressed in ready_by_arm[arm]:
                self.write(arm, index, compressed)


@functools.cache
def _stream(device: torch.device, arm: int) -> torch.cuda.Stream:
    """One stream per place in the order of arms, the same for every sample: freed memory belongs to its stream."""
    return torch.cuda.Stream(device)
