"""The work of `bench_speed.py` as NVIDIA/kvpress does it, in a process and an environment of its own.

Called by `bench_speed.py --peer --peer-site DIR`, never needed by kvbench itself: kvpress 0.5.5 needs transformers
below 5.3, kvbench needs 5.4 or later. The only argument is a JSON document (see `Work`); the last line of the output is
another. What a run does is what kvpress's own text generation pipeline does (kvpress/pipeline.py of 0.5.5): prefill the
context with the press active, read the question with the compressed cache, then greedy decoding, batch 1, a forward
pass per token and a look at each token. The question is the prompt's last token, so that a run reads as many tokens and
generates as many as ours. Here kvpress is used to its advantage: the model is loaded once, the tokenizer is left out.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """What to time.

    Attributes:
        device: "cpu" or "cuda".
        dtype: name of the weights' dtype.
        folder: checkpoint folder, or None for random weights of `shape`.
        shape: keyword arguments of a `LlamaConfig`, used without a folder.
        arms: by arm: [press class or None, budget]; "Base(Inner)" wraps a press.
        sample_tokens: prompt length of the whole runs.
        new_tokens: tokens generated per run.
        prefill_lengths: prompt lengths at which prefills alone are timed.
        prefill_presses: press classes for them, at a budget of 0.5; null for no press.
        repeats: counted times per work.
        threads: CPU threads, or 0 for the default.
    """

    device: str
    dtype: str
    folder: str | None
    shape: dict[str, Any]
    arms: dict[str, tuple[str | None, float]]
    sample_tokens: int
    new_tokens: int
    prefill_lengths: list[int]
    prefill_presses: list[str | None]
    repeats: int
    threads: int


def build_model(work: Work) -> Any:
    """The model of the work; its end-of-sequence token is taken away, so that no run stops early."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = getattr(torch, work.dtype)
    if work.folder is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(work.folder, dtype=dtype, local_files_only=True)
        model.to(work.device)
    else:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with torch.device(work.device):
            model = LlamaForCausalLM(LlamaConfig(**work.shape))
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def build_press(name: str | None, budget: float) -> Any:
    """A press by class name, removing what the budget does not keep; "Outer(Inner)" wraps the scorer Inner."""
    if name is None:
        return None
    kvpress = importlib.import_module("kvpress")
    outer, _, inner = name.rstrip(")").partition("(")
    if inner:
        return getattr(kvpress, outer)(getattr(kvpress, inner)(compression_ratio=1.0 - budget))
    return getattr(kvpress, outer)(compression_ratio=1.0 - budget)


def prefill(model: Any, press: Any, ids: torch.Tensor) -> Any:
    """Prefill a context with the press active, as the pipeline does: without the output matrix."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with press(model) if press is not None else contextlib.nullcontext():
        model.model(input_ids=ids, past_key_values=cache)
    return cache


def generate(model: Any, press: Any, ids: torch.Tensor, new_tokens: int) -> int:
    """One whole run; returns the slots that the prompt's context takes in the first layer."""
    context_tokens = ids.shape[1] - 1
    cache = prefill(model, press, ids[:, :-1])
    kept = int(cache.layers[0].keys.shape[2])
    position = torch.tensor([[context_tokens]], device=ids.device)
    output = model(input_ids=ids[:, -1:], past_key_values=cache, position_ids=position, logits_to_keep=1)
    tokens = [output.logits[0, -1].argmax()]
    for step in range(1, new_tokens):
        output = model(input_ids=tokens[-1][None, None], past_key_values=cache, position_ids=position + step)
        tokens.append(output.logits[0, -1].argmax())
        tokens[-1].item()  # the pipeline compares every token with the stop tokens
    return kept


def timed(work: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each repetition; the device is idle at both ends."""
    seconds = []
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def time_generation(model: Any, name: str | None, budget: float, ids: torch.Tensor, work: Work) -> dict[str, Any]:
    """Times of whole runs with one press, after a short one, so that no library start-up is counted."""
    press = build_press(name, budget)
    generate(model, press, ids, 2)
    kept: list[int] = []
    seconds = timed(lambda: kept.append(generate(model, press, ids, work.new_tokens)), work.device, work.repeats)
    return {"seconds": seconds, "kept_slots": kept[-1]}


def time_prefill(model: Any, press: Any, ids: torch.Tensor, work: Work) -> list[float] | str:
    """Times of prefills alone, after one that is not counted, or "out of memory"."""
    try:
        prefill(model, press, ids)
        return timed(lambda: prefill(model, press, ids), work.device, work.repeats)
    except (torch.OutOfMemoryError, MemoryError):
        return "out of memory"


def use_attention(model: Any, press: str | None) -> None:
    """Eager attention for the press that needs attention weights, SDPA for all others."""
    model.set_attn_implementation("eager" if press == "ObservedAttentionPress" else "sdpa")


def run(work: Work) -> dict[str, Any]:
    """Time everything asked for."""
    if work.threads:
        torch.set_num_threads(work.threads)
    importlib.import_module("kvpress")  # patches attention functions: before a model is made
    model = build_model(work)
    vocabulary = model.config.vocab_size
    samples: dict[str, Any] = {}
    prefills: dict[str, Any] = {}

    def prompt(n_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, vocabulary, (1, n_tokens), generator=generator).to(work.device)

    for arm, (name, budget) in work.arms.items():
        use_attention(model, name)
        samples[arm] = {"press": name, **time_generation(model, name, budget, prompt(work.sample_tokens), work)}
        print(f"peer: {arm} {min(samples[arm]['seconds']):.2f} s", file=sys.stderr)
    for name in work.prefill_presses if work.prefill_lengths else []:
        use_attention(model, name)
        prefills[name or "none"] = {
            str(n_tokens): time_prefill(model, build_press(name, 0.5), prompt(n_tokens), work)
            for n_tokens in work.prefill_lengths
        }
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    return {"versions": versions, "samples": samples, "prefills": prefills}


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps(run(Work(**json.loads(sys.argv[1])))))
