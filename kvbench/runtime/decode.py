"""The decode loop: one token for every row of a batch at a time, without asking the host anything inside a step.

All that a step reads or writes lives in tensors that are allocated once (`_Tables`), so that a step can be captured in
a CUDA graph and replayed. The host looks at the chosen tokens only every `check_every` steps, lets finished rows go
when that makes the batch much smaller, and stops when no row is left.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.models.load import LoadedModel
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.compiled import CompiledLayers, can_compile
from kvbench.runtime.head import padded_head
from kvbench.runtime.strands import Strand, reference_rows

EAGER_STEPS = 2  # steps before a shape is captured: they compile kernels and fill library workspaces
MAX_CAPTURES = 8


@dataclass
class Decoded:
    """What decoding gave one strand.

    Attributes:
        chosen: token chosen at each step.
        nll: negative log-likelihood of each step's target, nats (0 where there is none).
        kl: KL(reference || arm) at each step that has a target, nats.
        finite: whether all logits were finite.
    """

    chosen: list[int]
    nll: list[float]
    kl: list[float]
    finite: bool = True


class _Tables:
    """Static tensors of the loop, for at most `max_rows` rows and `n_steps` steps."""

    def __init__(self, max_rows: int, n_steps: int, max_stops: int, device: torch.device):
        def integers(*size: int) -> Tensor:
            return torch.full(size, -1, dtype=torch.int64, device=device)

        self.n_steps, self.max_stops = n_steps, max_stops
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.last = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.feed = integers(max_rows, n_steps)
        self.targets = integers(max_rows, n_steps)
        self.chosen = integers(max_rows, n_steps)
        self.partners = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.stops = integers(max_rows, max_stops)
        self.stop_allowed_from = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.nll = torch.zeros(max_rows, n_steps, device=device)
        self.kl = torch.zeros(max_rows, n_steps, device=device)
        self.finite = torch.ones(max_rows, dtype=torch.bool, device=device)

    def fill(self, strands: list[Strand], first_step: int, chosen: list[list[int]]) -> None:
        """Describe the batch's rows to the device; called between steps only."""
        device = self.step.device
        n_rows = len(strands)
        feed = torch.full((n_rows, self.n_steps), -1, dtype=torch.int64)
        targets = feed.clone()
        stops = torch.full((n_rows, self.max_stops), -1, dtype=torch.int64)
        allowed = torch.zeros(n_rows, dtype=torch.int64)
        for row, strand in enumerate(strands):
            feed[row, : len(strand.feed)] = torch.tensor(strand.feed, dtype=torch.int64)
            targets[row, : len(strand.targets)] = torch.tensor(strand.targets, dtype=torch.int64)
            stop_ids = torch.tensor(strand.job.stop_ids, dtype=torch.int64)
            stops[row, : len(stop_ids)] = stop_ids
            allowed[row] = strand.answer_step + strand.job.min_new_tokens - len(strand.first_choice)
        self.feed[:n_rows] = feed.to(device)
        self.targets[:n_rows] = targets.to(device)
        self.stops[:n_rows] = stops.to(device)
        self.stop_allowed_from[:n_rows] = allowed.to(device)
        self.partners[:n_rows] = torch.tensor(reference_rows(strands), device=device)
        self.last[:n_rows] = torch.tensor([tokens[-1] if tokens else 0 for tokens in chosen], device=device)
        self.finite[:] = True
        self.step.fill_(first_step)


@dataclass
class _Captured:
    """A step of one batch shape: run eagerly a few times, then captured."""

    eager_steps: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class DecodeLoop:
    """Decodes batches of strands whose prompts are in a `RaggedCache`.

    Args:
        loaded: the model.
        cache: the cache that holds the strands' rows.
        check_every: steps between looks at which rows have finished.
        cuda_graphs: capture steps in CUDA graphs (ignored on a CPU or if the model spans several devices).
        compile_layers: run the decoder layers as compiled code (ignored likewise).

    Attributes:
        replayed_steps: steps that were replays of a captured one, so far.
        compiled: whether the decoder layers run as compiled code.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: RaggedCache,
        check_every: int,
        cuda_graphs: bool,
        compile_layers: bool = False,
    ):
        self.loaded, self.cache = loaded, cache
        devices = {parameter.device for parameter in loaded.model.parameters()}
        self.cuda_graphs = cuda_graphs and loaded.device.type == "cuda" and len(devices) == 1
        self.check_every = check_every if loaded.device.type == "cuda" else 1  # a look costs nothing on a CPU
        self._tables: _Tables | None = None
        self._captured: dict[tuple[Hashable, int], _Captured] = {}
        self._pool: Any = None
        self.replayed_steps = 0
        self._layers = CompiledLayers(loaded.model) if compile_layers and can_compile(loaded) else None
        self.compiled = self._layers is not None

    def run(self, strands: list[Strand]) -> list[Decoded]:
        """Decode strands to their ends.

        Args:
            strands: row i of the cache is strand i; forced strands first.

        Returns:
            One `Decoded` per strand.
        """
        decoded = [Decoded([], [], []) for _ in strands]
        active = list(range(len(strands)))
        n_steps = max((strand.n_steps for strand in strands), default=0)
        if n_steps == 0:
            return decoded
        tables = self._prepare(strands, n_steps)
        step = 0
        refill = True
        model = self.loaded.model
        layers = self._layers.active() if self._layers is not None else nullcontext()
        head = padded_head(model) if self.loaded.device.type == "cpu" else nullcontext()
        with torch.inference_mode(), attention_implementation(model), layers, head:
            while True:
                going = [i for i in active if not _finished(strands[i], decoded[i])]
                if not going:
                    return decoded
                if self._worth_shrinking(strands, active, going):
                    self.cache.keep_rows([active.index(i) for i in going])
                    active, refill = going, True
                if refill:
                    tables.fill([strands[i] for i in active], step, [decoded[i].chosen for i in active])
                    refill = False
                n_forced = sum(strands[i].forced for i in active)
                until = min(step + self.check_every, max(strands[i].n_steps for i in going))
                for _ in range(step, until):
                    self._step(tables, len(active), n_forced)
                self._collect(tables, decoded, active, step, until)
                step = until

    def _worth_shrinking(self, strands: list[Strand], active: list[int], going: list[int]) -> bool:
        """With graphs every new shape costs a capture, so only a much smaller batch is worth one."""
        if not self.cuda_graphs:
            return len(going) < len(active)
        forced_done = any(strands[i].forced for i in active) and not any(strands[i].forced for i in going)
        return forced_done or len(going) <= len(active) // 2

    def _prepare(self, strands: list[Strand], n_steps: int) -> _Tables:
        max_stops = max(1, *(len(strand.job.stop_ids) for strand in strands))
        tables = self._tables
        if tables is None or tables.n_steps < n_steps or tables.max_stops < max_stops:
            capacity = 1 << (n_steps - 1).bit_length()
            tables = _Tables(self.cache.max_rows, capacity, max(max_stops, 4), self.loaded.device)
            self._tables = tables
            self._captured.clear()
        return tables

    def _step(self, tables: _Tables, n_rows: int, n_forced: int) -> None:
        if not (self.cuda_graphs and self.cache.capturable):
            self._forward(tables, n_rows, n_forced)
            self.cache.count_step()
            return
        shape = (self.cache.graph_key, n_forced)
        captured = self._captured.setdefault(shape, _Captured())
        if captured.eager_steps < EAGER_STEPS:
            captured.eager_steps += 1
            self._forward(tables, n_rows, n_forced)
        else:
            if captured.graph is None:
                captured.graph = self._capture(lambda: self._forward(tables, n_rows, n_forced))
                self._forget_oldest()
            captured.graph.replay()
            self.replayed_steps += 1
        self.cache.count_step()

    def _forget_oldest(self) -> None:
        """Keep the most recent captures only: each holds memory."""
        while len(self._captured) > MAX_CAPTURES:
            del self._captured[next(iter(self._captured))]

    def _capture(self, forward: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            forward()
        return graph

    def _forward(self, tables: _Tables, n_rows: int, n_forced: int) -> None:
        """One step for all rows; everything on the device."""
        step = tables.step
        fed = tables.feed[:n_rows].index_select(1, step)[:, 0]
        token = torch.where(fed >= 0, fed, tables.last[:n_rows])
        output = self.loaded.model(
            input_ids=token[:, None],
            position_ids=self.cache.position_ids,
            past_key_values=self.cache,
            attention_context=self.cache,
            use_cache=True,
        )
        self.cache.advance_device()
        logits = output.logits[:, -1].float()
        tables.finite[:n_rows] &= torch.isfinite(logits).all(-1)
        if n_forced:
            self._judge(tables, logits[:n_forced], n_forced)
        choice = _suppress_early_stops(logits, tables, n_rows).argmax(-1)
        tables.last[:n_rows] = choice
        tables.chosen[:n_rows].index_copy_(1, step, choice[:, None])
        step += 1

    def _judge(self, tables: _Tables, logits: Tensor, n_forced: int) -> None:
        """Likelihood of the targets and KL to the reference rows, for the forced rows (the first ones)."""
        log_probs = torch.log_softmax(logits, -1)
        target = tables.targets[:n_forced].index_select(1, tables.step)
        nll = -log_probs.gather(1, target.clamp(min=0))
        reference = log_probs.index_select(0, tables.partners[:n_forced])
        kl = (reference.exp() * (reference - log_probs)).sum(-1, keepdim=True)
        tables.nll[:n_forced].index_copy_(1, tables.step, nll)
        tables.kl[:n_forced].index_copy_(1, tables.step, kl)

    def _collect(self, tables: _Tables, decoded: list[Decoded], active: list[int], start: int, stop: int) -> None:
        """Fetch what steps `start` to `stop` gave; the only place that waits for the device."""
        n_rows = len(active)
        chosen = tables.chosen[:n_rows, start:stop].tolist()
        nll = tables.nll[:n_rows, start:stop].tolist()
        kl = tables.kl[:n_rows, start:stop].tolist()
        finite = tables.finite[:n_rows].tolist()
        for row, index in enumerate(active):
            decoded[index].chosen += chosen[row]
            decoded[index].nll += nll[row]
            decoded[index].kl += kl[row]
            decoded[index].finite &= finite[row]


def _suppress_early_stops(logits: Tensor, tables: _Tables, n_rows: int) -> Tensor:
    """Logits with stop tokens at minus infinity in rows that may not stop yet."""
    early = (tables.step < tables.stop_allowed_from[:n_rows])[:, None]
    stops = tables.stops[:n_rows]
    safe = stops.clamp(min=0)
    penalty = torch.where(early & (stops >= 0), -torch.inf, 0.0)
    return logits.scatter_add(1, safe, penalty.to(logits.dtype))


def _finished(strand: Strand, decoded: Decoded) -> bool:
    if len(decoded.chosen) >= strand.n_steps:
        return True
    return not strand.forced and strand.answer(decoded.chosen) is not None
