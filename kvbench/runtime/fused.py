"""The fused engine: one prefill per sample for all arms, all arms of one or more samples decoded as one batch."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import psutil
import torch

from kvbench.errors import ConfigError
from kvbench.fields import Within, check_fields
from kvbench.methods.base import CompressedLayer
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.decode import Decoded, DecodeLoop
from kvbench.runtime.engine import Arm, ArmResult, Engine, Job, JobResult, SampleFailure, check_jobs, never
from kvbench.runtime.failures import ends_the_run, failure_reason, is_out_of_memory
from kvbench.runtime.fork import LayerFork
from kvbench.runtime.model_check import check_model
from kvbench.runtime.prefill import prefill
from kvbench.runtime.strands import Strand, forced_strand, generating_strand


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
        self, loaded: LoadedModel, jobs: Sequence[Job], stopping: Callable[[], bool] = never
    ) -> Iterator[JobResult | SampleFailure]:
        """Run jobs, several per batch where rows and memory allow; see `Engine.run`."""
        check_jobs(loaded, jobs)
        session = _Session(self, loaded)
        waiting = deque(jobs)
        while waiting and not stopping():
            batch = session.next_batch(waiting)
            yield from session.run_batch(batch)


@dataclass
class _Session:
    """One run of the engine: the cache and the decode loop live as long as it does."""

    engine: FusedEngine
    loaded: LoadedModel
    shape: dict[str, int] = field(init=False)
    kernels: str = field(init=False)
    max_rows: int = field(init=False)
    cache: RaggedCache | None = field(init=False, default=None)
    loop: DecodeLoop | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        facts = check_model(self.loaded.model)
        self.shape = facts.shape
        # Only the torch kernels know soft-capped logits; kernels=triton is refused by name.
        self.kernels = "torch" if facts.soft_capped and self.engine.kernels == "auto" else self.engine.kernels
        default = 64 if self.loaded.device.type == "cuda" else 24
        self.max_rows = self.engine.max_rows or default

    # --- which jobs go together ---

    def next_batch(self, waiting: deque[Job]) -> list[Job]:
        """Take the first job and as many more as rows and memory allow."""
        batch = [waiting.popleft()]
        rows, n_bytes = self._rows(batch[0]), self._bytes(batch[0])
        available = self._available_bytes()
        while waiting:
            rows += self._rows(waiting[0])
            n_bytes += self._bytes(waiting[0])
            if rows > self.max_rows or n_bytes > available:
                break
            batch.append(waiting.popleft())
        return batch

    def _rows(self, job: Job) -> int:
        return len(job.arms) + (len(_forced_arms(job)) if job.gold_ids else 0)

    def _slots_per_layer(self, job: Job) -> list[int]:
        """Slots that a job's rows take in each layer, summed over KV heads, room for new tokens included."""
        strands = [(arm, job.max_new_tokens) for arm in job.arms]
        if job.gold_ids:
            strands += [(arm, len(job.gold_ids)) for arm in _forced_arms(job)]
        totals = [0] * self.shape["n_layers"]
        for arm, new_tokens in strands:
            policy = in_effect(arm.policy)
            room = 1 if policy.steps else len(job.question_ids) + new_tokens
            budgets = policy.layer_budgets(job.compress_at, self.shape["n_layers"])
            totals = [
                total + self.shape["n_kv_heads"] * (budget + room)
                for total, budget in zip(totals, budgets, strict=True)
            ]
        return totals

    def _bytes(self, job: Job) -> int:
        try:
            slots = sum(self._slots_per_layer(job))
        except Exception as error:
            if ends_the_run(error):
                raise
            return sys.maxsize  # the job runs alone, where the policy's error is raised again and contained
        return slots * 2 * self.shape["head_dim"] * self.loaded.dtype.itemsize

    def _available_bytes(self) -> int:
        if self.loaded.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.loaded.device)[0]
            free += torch.cuda.memory_reserved(self.loaded.device) - torch.cuda.memory_allocated(self.loaded.device)
        else:
            free = psutil.virtual_memory().available
        return int(self.engine.memory_ratio * free) + (self.cache.allocated_bytes if self.cache is not None else 0)

    # --- running a batch, and what to do when memory runs out ---

    def run_batch(self, jobs: list[Job], notes: tuple[str, ...] = ()) -> Iterator[JobResult | SampleFailure]:
        """Run jobs as one batch; an error halves the batch, then the arms of a single job, until it stands alone."""
        try:
            results = self._attempt(jobs, notes)
        except Exception as error:
            self._release()
            if ends_the_run(error):
                raise
            reason, memory = failure_reason(error), is_out_of_memory(error)
            results = None
        if results is not None:
            yield from results
            return
        cause = "out of memory" if memory else reason
        if len(jobs) > 1:
            half = len(jobs) // 2
            note = f"{cause} with {len(jobs)} samples in a batch: halved"
            yield from self.run_batch(jobs[:half], (*notes, note))
            yield from self.run_batch(jobs[half:], (*notes, note))
        elif len(jobs[0].arms) > 1:
            note = f"{cause} with {len(jobs[0].arms)} arms of one sample in a batch: halved"
            yield from self._run_half_the_arms(jobs[0], (*notes, note))
        else:
            if memory:
                reason = f"out of memory with a single arm: {reason}"
            yield SampleFailure(jobs[0].index, reason, jobs[0].arms)

    def _run_half_the_arms(self, job: Job, notes: tuple[str, ...]) -> Iterator[JobResult | SampleFailure]:
        """Run a job's arms in two batches; those that were completed are one result again."""
        half = len(job.arms) // 2
        merged: JobResult | None = None
        for arms in (job.arms[:half], job.arms[half:]):
            for part in self.run_batch([replace(job, arms=arms)], notes):
                if isinstance(part, SampleFailure):
                    yield part
                elif merged is None:
                    merged = part
                else:
                    merged.arms += part.arms
        if merged is not None:
            yield merged

    def _release(self) -> None:
        self.cache = self.loop = None
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- one batch ---

    def _attempt(self, jobs: list[Job], notes: tuple[str, ...]) -> list[JobResult | SampleFailure]:
        cache, loop = self._storage(max(self.max_rows, sum(self._rows(job) for job in jobs)))
        cache.reserve([sum(layer) for layer in zip(*map(self._slots_per_layer, jobs), strict=True)])
        on_gpu = self.loaded.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.loaded.device)
        prefilled = [self._prefill(job, cache) for job in jobs]
        strands = [strand for p in prefilled for strand in p.strands if strand.forced]
        strands += [strand for p in prefilled for strand in p.strands if not strand.forced]
        cache.keep_rows([strand.row for strand in strands])
        start = time.perf_counter()
        decoded = dict(zip(map(id, strands), loop.run(strands), strict=True))
        decode_seconds = (time.perf_counter() - start) / max(1, len(strands))
        settings = {
            "engine": "fused",
            "kernels": sorted(cache.backends),
            "observe": sorted(set().union(*(p.backends for p in prefilled))),
            "batch_samples": len(jobs),
            "batch_rows": len(strands),
            "cuda_graphs": loop.replayed_steps > 0,
            "compiled": loop.compiled,
            "peak_bytes": torch.cuda.max_memory_allocated(self.loaded.device) if on_gpu else None,
            "notes": list(notes),
        }
        return [result for p in prefilled for result in self._results(p, decoded, decode_seconds, settings)]

    def _storage(self, max_rows: int) -> tuple[RaggedCache, DecodeLoop]:
        if self.cache is None or self.loop is None or self.cache.max_rows < max_rows:
            self.cache = RaggedCache(**self.shape, dtype=self.loaded.dtype, backend=self.kernels, max_rows=max_rows)
            self.loop = DecodeLoop(
                self.loaded, self.cache, self.engine.check_every, self.engine.cuda_graphs, self.engine.compile
            )
        self.cache.clear()
        return self.cache, self.loop

    def _prefill(self, job: Job, cache: RaggedCache) -> _Prefilled:
        start = time.perf_counter()
        strands = [generating_strand(job, arm, None if job.question_ids else -1) for arm in job.arms]
        if job.gold_ids:
            strands += [forced_strand(job, arm) for arm in _forced_arms(job)]
        arms = list({strand.arm.key: strand.arm for strand in strands}.values())
        for strand in strands:
            policy = in_effect(strand.arm.policy)
            strand.row = cache.add_row(policy, position=job.compress_at, room_tokens=max(1, strand.n_steps))

        rows = [[strand.row for strand in strands if strand.arm.key == arm.key] for arm in arms]

        def write(arm: int, layer_index: int, compressed: CompressedLayer) -> None:
            for row in rows[arm]:
                cache.write(layer_index, row, compressed)

        fork = LayerFork([in_effect(arm.policy) for arm in arms], job.compress_at, self.shape["n_layers"], write)
        logits, backends = prefill(self.loaded, job, arms, fork, self.kernels)
        finite = bool(torch.isfinite(logits).all())
        first_nll = 0.0
        if not job.question_ids:
            if job.gold_ids:
                first_nll = -float(torch.log_softmax(logits, -1)[job.gold_ids[0]])
            if job.min_new_tokens > 0:
                logits = logits.index_fill(0, torch.tensor(job.stop_ids, device=logits.device), -torch.inf)
            first_token = int(logits.argmax())
            for strand in strands:
                if not strand.forced:
                    strand.feed = strand.first_choice = [first_token]
        accounts = {
            s.arm.key: (cache.row_slots(s.row), cache.row_bytes(s.row)) for s in strands
        }  # before decoding touches the rows
        seconds = (time.perf_counter() - start) / len(arms)
        return _Prefilled(job, strands, first_nll, accounts, seconds, backends, finite)

    def _results(
        self, prefilled: _Prefilled, decoded: dict[int, Decoded], decode_seconds: float, settings: dict[str, Any]
    ) -> Iterator[JobResult | SampleFailure]:
        job = prefilled.job
        by_arm = {(strand.arm.key, strand.forced): strand for strand in prefilled.strands}
        broken = tuple(arm for arm in job.arms if not _finite(prefilled, decoded, arm))
        if broken:
            yield SampleFailure(job.index, "the model's logits are not finite (NaN or infinity)", broken)
        results = []
        for arm in (arm for arm in job.arms if arm not in broken):
            generated = by_arm[arm.key, False]
            answer = generated.answer(decoded[id(generated)].chosen)
            assert answer is not None
            gold_nll: list[float] = []
            kl: list[float] = []
            rows = 1
            if job.gold_ids:
                forced = by_arm[arm.key, True]
                judged = [i for i, target in enumerate(forced.targets) if target >= 0]
                gold_nll = [decoded[id(forced)].nll[i] for i in judged]
                kl = [max(0.0, decoded[id(forced)].kl[i]) for i in judged]
                if not job.question_ids:  # judged by the prefill, which is the same for every arm
                    gold_nll, kl = [prefilled.first_nll, *gold_nll], [0.0, *kl]
                rows = 2
            slots, n_bytes = prefilled.accounts[arm.key]
            seconds = prefilled.seconds + rows * decode_seconds
            results.append(ArmResult(arm, answer[0], answer[1], gold_nll, kl, slots, n_bytes, seconds))
        full_slots = job.compress_at * self.shape["n_layers"] * self.shape["n_kv_heads"]
        full_bytes = full_slots * 2 * self.shape["head_dim"] * self.loaded.dtype.itemsize
        if results:
            yield JobResult(job.index, results, job.compress_at, full_slots, full_bytes, settings)


@dataclass
class _Prefilled:
    """A prefilled job: its strands, and what the prefill alone has already decided."""

    job: Job
    strands: list[Strand]
    first_nll: float
    accounts: dict[str, tuple[list[int], int]]
    seconds: float
    backends: set[str]
    finite: bool


def _forced_arms(job: Job) -> list[Any]:
    """The job's arms, and the reference arm if it is not among them: KL needs it."""
    keys = [arm.key for arm in job.arms]
    return [*job.arms, *([] if job.reference.key in keys else [job.reference])]


def _finite(prefilled: _Prefilled, decoded: dict[int, Decoded], arm: Arm) -> bool:
    """Whether all logits behind an arm's numbers were finite: its own rows' and, for KL, the reference's."""
    job = prefilled.job
    behind = [s for s in prefilled.strands if s.arm.key == arm.key or (s.forced and s.arm.key == job.reference.key)]
    return prefilled.finite and all(decoded[id(strand)].finite for strand in behind)
