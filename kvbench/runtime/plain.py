"""The plain engine: one arm, one sample, one token at a time. Slow on purpose; the oracle of the fused engine.

It runs torch operations only, on a GPU too. Its cache is one row, one list of tensors per KV head, with dense fp32
attention; it shares no code with `kvbench.runtime.cache` and the kernels of a decode step, so that agreement between
the engines means something.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvbench.errors import failure_reason
from kvbench.methods import base
from kvbench.methods.base import CompressedLayer, DecodeSlots, LayerStates, Policy
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.model_check import check_model
from kvbench.runtime.observe import Compressor, prefill
from kvbench.runtime.reconstruct import reconstruct
from kvbench.runtime.requests import Answer, Arm, Engine, Request, SampleFailure, ends_the_run, is_out_of_memory


@dataclass(frozen=True)
class PlainEngine(Engine):
    """Prefills anew for every sequence of every arm, and decodes it alone (see module docstring)."""

    def run(
        self, loaded: LoadedModel, requests: Sequence[Request], stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[Answer | SampleFailure]:
        """Run requests one after the other; see `Engine.run`."""
        self.check(loaded, requests)
        for request in requests:
            if stopping():
                return
            try:
                reference = _Row(loaded, request, request.reference).force()[1] if request.gold_ids else None
            except Exception as error:
                yield _failure(request, error, request.arms)
                continue
            for arm in request.arms:
                try:
                    outcome: Answer | SampleFailure = _answer(loaded, request, arm, reference)
                except Exception as error:
                    outcome = _failure(request, error, (arm,))
                yield outcome


def _answer(loaded: LoadedModel, request: Request, arm: Arm, reference: Tensor | None) -> Answer:
    """One arm's answer, and its likelihood and KL against the reference's log-probabilities `(n_gold, V)`."""
    start = time.perf_counter()
    row = _Row(loaded, request, arm)
    answer = Answer.blank(loaded, request, arm, row.cache.slots_per_layer, row.cache.n_bytes)
    answer.token_ids, answer.finish = row.generate()
    if reference is not None:
        answer.gold_nll, log_probs = _Row(loaded, request, arm).force()
        answer.kl = (reference.exp() * (reference - log_probs)).sum(-1).tolist()
    answer.seconds = time.perf_counter() - start
    answer.settings = {"engine": "plain", "kernels": "torch", **row.cost}
    return answer


def _failure(request: Request, error: Exception, arms: tuple[Arm, ...]) -> SampleFailure:
    """The failure that `error` means for `arms`; raises it again if no other sample could do better."""
    if ends_the_run(error):
        raise error
    if isinstance(error, FloatingPointError):
        return SampleFailure(request.index, str(error), arms)
    memory = "out of memory with a single arm: " if is_out_of_memory(error) else ""
    return SampleFailure(request.index, memory + failure_reason(error), arms)


class _Row:
    """One sequence: an arm's compressed cache, right after the prefill."""

    def __init__(self, loaded: LoadedModel, request: Request, arm: Arm):
        self.loaded, self.request = loaded, request
        policy = in_effect(arm.policy)
        compressor = Compressor(policy, request.compress_at, check_model(loaded.model).shape["n_layers"])
        self.cache = PlainCache(policy, position=request.compress_at)

        def on_layer(states: LayerStates) -> None:
            for _, compressed in compressor(states):
                self.cache.add(compressed)

        scores, self.cost = reconstruct(loaded, request, [arm])
        self.logits, _ = prefill(loaded, request, [arm], on_layer, kernels="torch", reconstruction=scores)
        for token in request.question_ids:
            self.logits = self._feed(token)

    def _feed(self, token: int) -> Tensor:
        with torch.inference_mode(), attention_implementation(self.loaded.model):
            ids, at = torch.tensor([[[token]], [[self.cache.position]]], device=self.loaded.device)
            caches = {"past_key_values": self.cache, "attention_context": self.cache}
            output = self.loaded.model(input_ids=ids, position_ids=at, use_cache=True, **caches)
        self.cache.advance()
        logits = output.logits[0, -1].float()
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"the model's logits are not finite after {self.cache.position} tokens")
        return logits

    def generate(self) -> tuple[list[int], str]:
        """Greedy answer: tokens without the stop token, and "stop" or "length"."""
        tokens: list[int] = []
        while True:
            logits = self.logits
            if len(tokens) < self.request.min_new_tokens:
                logits = logits.index_fill(0, torch.tensor(self.request.stop_ids, device=logits.device), -torch.inf)
            token = int(logits.argmax())
            if token in self.request.stop_ids:
                return tokens, "stop"
            tokens.append(token)
            if len(tokens) >= self.request.max_new_tokens:
                return tokens, "length"
            self.logits = self._feed(token)

    def force(self) -> tuple[list[float], Tensor]:
        """Negative log-likelihood of each gold token, and the log-probabilities `(n_gold, V)` that judged them."""
        judged = [self.logits, *(self._feed(token) for token in self.request.gold_ids[:-1])]
        log_probs = torch.stack([torch.log_softmax(logits, -1) for logits in judged])
        gold = torch.tensor(self.request.gold_ids, device=log_probs.device)
        return (-log_probs.gather(1, gold[:, None])[:, 0]).tolist(), log_probs


class _Layer:
    """One layer: keys, values and bias per KV head, each `(n, D)` or `(n,)`, lengths may differ."""

    def __init__(self, compressed: CompressedLayer):
        n_kv_heads, n_slots = compressed.keys.shape[:2]
        lengths = [n_slots] * n_kv_heads if compressed.lengths is None else compressed.lengths.tolist()
        bias = compressed.bias if compressed.bias is not None else compressed.keys.new_zeros(n_kv_heads, n_slots)
        self.keys = [compressed.keys[h, :n].clone() for h, n in enumerate(lengths)]
        self.values = [compressed.values[h, :n].clone() for h, n in enumerate(lengths)]
        self.bias = [bias[h, :n].float().clone() for h, n in enumerate(lengths)]
        self.state_class = None if compressed.state is None else type(compressed.state)
        self.state = {name: tensor.clone() for name, tensor in base.slot_state(compressed.state).items()}
        self.constants = {name: tensor.clone() for name, tensor in base.constant_state(compressed.state).items()}

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append one token: key and value `(H_k, D)`."""
        for h in range(len(self.keys)):
            self.keys[h] = torch.cat([self.keys[h], key[h : h + 1]])
            self.values[h] = torch.cat([self.values[h], value[h : h + 1]])
            self.bias[h] = torch.cat([self.bias[h], self.bias[h].new_zeros(1)])

    def attend(self, query: Tensor, scaling: float, softcap: float | None) -> tuple[Tensor, list[Tensor]]:
        """Dense attention of one query `(H, D)`: output `(H, D)` fp32 and the softmax row of each query head."""
        group_size = query.shape[0] // len(self.keys)
        outputs, rows = [], []
        for head in range(query.shape[0]):
            h = head // group_size
            logits = self.keys[h].float() @ query[head].float() * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            row = torch.softmax(logits + self.bias[h], 0)
            outputs.append(row @ self.values[h].float())
            rows.append(row)
        return torch.stack(outputs), rows

    def step(self, policy: Policy, rows: list[Tensor], step_index: Tensor) -> None:
        """Let the policy put the new token (the last slot) in place of another."""
        keys, values = torch.stack(self.keys), torch.stack(self.values)
        state = {
            name: torch.cat([tensor, tensor.new_zeros(tensor.shape[0], 1, *tensor.shape[2:])], 1)
            for name, tensor in self.state.items()
        }
        slots = DecodeSlots(keys, values, base.make_state(self.state_class, state | self.constants), step_index)
        policy.step(slots, torch.stack(rows))
        self.keys, self.values = list(keys[:, :-1]), list(values[:, :-1])
        self.bias = [bias[:-1] for bias in self.bias]
        self.state = {name: tensor[:, :-1] for name, tensor in state.items()}


class PlainCache(Cache):
    """One arm's cache of one sample, whose first new token has position id `position`; also the attention context."""

    def __init__(self, policy: Policy, position: int):
        super().__init__(layers=[])
        self.policy, self.position, self._steps, self.n_bytes = policy, position, 0, 0
        self.slots_per_layer: list[int] = []
        self._stored: list[_Layer] = []

    def add(self, compressed: CompressedLayer) -> None:
        """Add the next layer."""
        layer = _Layer(compressed)
        self._stored.append(layer)
        self.slots_per_layer.append(compressed.n_slots)
        stored = [*layer.keys, *layer.values, *layer.state.values()]
        if compressed.bias is not None:
            stored += layer.bias
        self.n_bytes += sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new token's key and value `(1, H_k, 1, D)`; returns them unchanged."""
        self._stored[layer_idx].append(key_states[0, :, 0], value_states[0, :, 0])
        return key_states, value_states

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Attention of the new token `(1, H, 1, D)` over the stored slots as `(1, 1, H, D)`, then the policy's step."""
        layer = self._stored[layer_index]
        output, rows = layer.attend(query[0, :, 0], scaling, softcap)
        if self.policy.steps:
            layer.step(self.policy, rows, torch.tensor(self._steps, device=query.device))
        return output[None, None].to(query.dtype)

    def advance(self) -> None:
        """One token has passed through all layers."""
        self.position += 1
        self._steps += 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, which is not the number of slots kept."""
        return self.position

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Key length and offset for a mask; unused, since our mask function makes none."""
        return self.position + 1, 0
