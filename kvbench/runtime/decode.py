"""The decode loop: one token for every sequence of a batch at a time, without asking the host anything inside a step.

A `Sequence` is the token-by-token plan of one row, and what came of it. It feeds some tokens that are known beforehand
(the question under `before_question`, the gold answer if it is forced along that) and then, if it generates, whatever
the model chooses. What the device needs of it is two integer tables, made before the first step:

    feed[row, step]     token to feed at this step, or -1: feed what was chosen last
    targets[row, step]  token whose likelihood under this step's logits is wanted, or -1

All that a step reads or writes lives in tensors that are allocated once (`_Tables`), so that it can be captured in a
CUDA graph and replayed. The host looks at the chosen tokens only every `check_every` steps, and lets finished rows go
when that makes the batch much smaller.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvbench.models.load import LoadedModel
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.cache import RaggedCache
from kvbench.runtime.patches import CompiledLayers, can_compile, padded_head
from kvbench.runtime.requests import Arm, Request

EAGER_STEPS = 2  # steps before a shape is captured: they compile kernels and fill library workspaces
MAX_CAPTURES = 8


@dataclass
class Sequence:
    """One row of a decode batch: an arm that generates its answer or is forced along the gold one.

    Attributes:
        forced: whether it follows the gold answer (else it generates).
        feed: tokens fed at the first steps; after them a generating sequence feeds its own choices. After a prefill of
            the whole prompt, that is the token which the prefill chose, the answer's first.
        targets: per step, the token whose likelihood is wanted, or -1.
        n_steps: decode steps needed at most.
        answer_step: step whose choice is the first answer token that decoding itself produces.
        row: its number in the cache.
        chosen: token chosen at each step so far.
        nll: negative log-likelihood of each step's target, nats (0 where there is none).
        kl: KL(reference || arm) at each step that has a target, nats.
        finite: whether all logits were finite.
    """

    request: Request
    arm: Arm
    forced: bool
    feed: list[int]
    targets: list[int]
    n_steps: int
    answer_step: int = 0
    row: int = -1
    chosen: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    finite: bool = True

    @classmethod
    def generating(cls, request: Request, arm: Arm, first_token: int = -1) -> Sequence:
        """A sequence that generates; `first_token` is the prefill's choice if the whole prompt was prefilled."""
        question = list(request.question_ids)
        feed = question or [first_token]
        n_steps = len(question) + request.max_new_tokens - 1
        return cls(request, arm, False, feed, [], n_steps, max(0, len(question) - 1))

    @classmethod
    def along_gold(cls, request: Request, arm: Arm) -> Sequence:
        """A sequence that follows the gold answer; needs at least one gold token."""
        question, gold = list(request.question_ids), list(request.gold_ids)
        # Without a question to read, the prefill's logits have already judged gold[0].
        targets = [-1] * (len(question) - 1) + gold if question else gold[1:]
        return cls(request, arm, True, question + gold[:-1], targets, len(question) + len(gold) - 1)

    @property
    def first_tokens(self) -> list[int]:
        """Tokens of the answer that were there before the first step."""
        return [] if self.forced or self.request.question_ids else self.feed

    @property
    def ending(self) -> tuple[list[int], str] | None:
        """The answer, its stop token left out, and "stop" or "length"; None as long as the sequence has to go on."""
        tokens, stops = self.first_tokens + self.chosen[self.answer_step :], set(self.request.stop_ids)
        limit = self.request.max_new_tokens
        for position, token in enumerate(tokens[:limit]):
            if token in stops and position >= self.request.min_new_tokens:
                return tokens[:position], "stop"
        return (tokens[:limit], "length") if len(tokens) >= limit else None

    @property
    def finished(self) -> bool:
        """Whether no further step is needed."""
        return len(self.chosen) >= self.n_steps or (not self.forced and self.ending is not None)


class _Tables:
    """Static tensors of the loop, for at most `max_rows` rows and `n_steps` steps."""

    def __init__(self, max_rows: int, n_steps: int, max_stops: int, device: torch.device):
        def integers(*size: int, value: int = -1) -> Tensor:
            return torch.full(size, value, dtype=torch.int64, device=device)

        self.n_steps, self.max_stops = n_steps, max_stops
        self.step = integers(1, value=0)
        self.last, self.partners, self.stop_allowed_from = (integers(max_rows, value=0) for _ in range(3))
        self.feed, self.targets, self.chosen = (integers(max_rows, n_steps) for _ in range(3))
        self.stops = integers(max_rows, max_stops)
        self.nll, self.kl = torch.zeros(2, max_rows, n_steps, device=device)
        self.finite = torch.ones(max_rows, dtype=torch.bool, device=device)

    def fill(self, sequences: list[Sequence], first_step: int) -> None:
        """Describe the batch's rows to the device; called between steps only."""

        def put(target: Tensor, rows: list[Any]) -> None:
            width = target.shape[1] if target.ndim == 2 else 0
            padded = [row + [-1] * (width - len(row)) for row in rows] if width else rows
            target[: len(rows)] = torch.tensor(padded, dtype=torch.int64).to(target.device)

        own = [(row, s) for row, s in enumerate(sequences) if s.arm.key == s.request.reference.key]
        references = {(s.request.index, s.forced): row for row, s in own}
        put(self.feed, [s.feed for s in sequences])
        put(self.targets, [s.targets for s in sequences])
        put(self.stops, [list(s.request.stop_ids) for s in sequences])
        allowed = [s.answer_step + s.request.min_new_tokens - len(s.first_tokens) for s in sequences]
        put(self.stop_allowed_from, allowed)
        put(self.partners, [references.get((s.request.index, s.forced), row) for row, s in enumerate(sequences)])
        put(self.last, [s.chosen[-1] if s.chosen else 0 for s in sequences])
        self.finite[:] = True
        self.step.fill_(first_step)


@dataclass
class _Captured:
    """A step of one batch shape: run eagerly a few times, then captured."""

    eager_steps: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class DecodeLoop:
    """Decodes batches of sequences whose prompts are in a `RaggedCache`.

    Args:
        loaded: the model.
        cache: holds the sequences' rows.
        check_every: steps between looks at which rows have finished.
        cuda_graphs: capture steps in CUDA graphs (ignored on a CPU or if the model spans several devices).
        compile_layers: run the decoder layers as compiled code (ignored likewise), `compiled` says whether.
        pack: with projections of one input as one product (see `patches`).
    """

    def __init__(
        self, loaded: LoadedModel, cache: RaggedCache, check_every: int, cuda_graphs: bool,
        compile_layers: bool = False, pack: bool = True,
    ):  # fmt: skip
        self.loaded, self.cache = loaded, cache
        devices = {parameter.device for parameter in loaded.model.parameters()}
        self.cuda_graphs = cuda_graphs and loaded.device.type == "cuda" and len(devices) == 1
        self.check_every = check_every if loaded.device.type == "cuda" else 1  # a look costs nothing on a CPU
        self._tables: _Tables | None = None
        self._captured: dict[tuple[Hashable, int], _Captured] = {}
        self._pool: Any = None
        self.replayed_steps = 0  # so far
        self._layers = CompiledLayers(loaded.model, pack=pack) if compile_layers and can_compile(loaded) else None
        self.compiled = self._layers is not None

    def run(self, sequences: list[Sequence]) -> None:
        """Decode sequences to their ends; row i of the cache is sequence i, forced ones come first."""
        active = [*sequences]
        n_steps = max((sequence.n_steps for sequence in sequences), default=0)
        if n_steps == 0:
            return
        tables, max_stops = self._tables, max(len(sequence.request.stop_ids) for sequence in sequences)
        if tables is None or tables.n_steps < n_steps or tables.max_stops < max_stops:
            capacity = 1 << (n_steps - 1).bit_length()
            tables = self._tables = _Tables(self.cache.max_rows, capacity, max(max_stops, 4), self.loaded.device)
            self._captured.clear()
        step, refill, model = 0, True, self.loaded.model
        layers = self._layers.active() if self._layers is not None else nullcontext()
        head = padded_head(model) if self.loaded.device.type == "cpu" else nullcontext()
        with torch.inference_mode(), attention_implementation(model), layers, head:
            while going := [sequence for sequence in active if not sequence.finished]:
                if self._worth_shrinking(active, going):
                    kept = set(map(id, going))
                    self.cache.keep_rows([row for row, sequence in enumerate(active) if id(sequence) in kept])
                    active, refill = going, True
                if refill:
                    tables.fill(active, step)
                    refill = False
                n_forced = sum(sequence.forced for sequence in active)
                until = min(step + self.check_every, max(sequence.n_steps for sequence in going))
                for _ in range(step, until):
                    self._step(tables, len(active), n_forced)
                self._collect(tables, active, step, until)
                step = until

    def _worth_shrinking(self, active: list[Sequence], going: list[Sequence]) -> bool:
        """With graphs every new shape costs a capture, so only a much smaller batch is worth one."""
        if not self.cuda_graphs:
            return len(going) < len(active)
        forced_done = any(s.forced for s in active) and not any(s.forced for s in going)
        return forced_done or len(going) <= len(active) // 2

    def _step(self, tables: _Tables, n_rows: int, n_forced: int) -> None:
        captured = _Captured()
        if self.cuda_graphs and self.cache.capturable:
            captured = self._captured.setdefault((self.cache.graph_key, n_forced), captured)
        if captured.eager_steps < EAGER_STEPS:
            captured.eager_steps += 1
            self._forward(tables, n_rows, n_forced)
        else:
            if captured.graph is None:
                captured.graph = torch.cuda.CUDAGraph()
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                torch.cuda.synchronize()
                with torch.cuda.graph(captured.graph, pool=self._pool):
                    self._forward(tables, n_rows, n_forced)
                while len(self._captured) > MAX_CAPTURES:  # the most recent only: each holds memory
                    del self._captured[next(iter(self._captured))]
            captured.graph.replay()
            self.replayed_steps += 1
        self.cache.count_step()

    def _forward(self, tables: _Tables, n_rows: int, n_forced: int) -> None:
        """One step for all rows; everything on the device."""
        step = tables.step
        fed = tables.feed[:n_rows].index_select(1, step)[:, 0]
        token = torch.where(fed >= 0, fed, tables.last[:n_rows])
        tokens = {"input_ids": token[:, None], "position_ids": self.cache.position_ids}
        output = self.loaded.model(**tokens, past_key_values=self.cache, attention_context=self.cache, use_cache=True)
        self.cache.advance_device()
        logits = output.logits[:, -1].float()
        tables.finite[:n_rows] &= torch.isfinite(logits).all(-1)
        if n_forced:
            self._judge(tables, logits[:n_forced], n_forced)
        early, stops = (step < tables.stop_allowed_from[:n_rows])[:, None], tables.stops[:n_rows]
        penalty = torch.where(early & (stops >= 0), -torch.inf, 0.0)  # stop tokens of rows that may not stop yet
        choice = logits.scatter_add(1, stops.clamp(min=0), penalty).argmax(-1)
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

    def _collect(self, tables: _Tables, active: list[Sequence], start: int, stop: int) -> None:
        """Fetch what steps `start` to `stop` gave; the only place that waits for the device."""
        n_rows = len(active)
        found = [table[:n_rows, start:stop].tolist() for table in (tables.chosen, tables.nll, tables.kl)]
        for sequence, chosen, nll, kl, finite in zip(active, *found, tables.finite[:n_rows].tolist(), strict=True):
            sequence.chosen += chosen
            sequence.nll += nll
            sequence.kl += kl
            sequence.finite &= finite
