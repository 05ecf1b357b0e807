"""`with kvbench.compress(model, policy) as cache:` - inside the block, `model.generate` keeps a compressed cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from kvbench.errors import ConfigError, ModelError
from kvbench.methods.base import Policy
from kvbench.methods.full import in_effect
from kvbench.methods.registry import build_policy
from kvbench.runtime.attention import IMPLEMENTATION, attention_implementation
from kvbench.runtime.compressed_cache import CompressedCache
from kvbench.runtime.model_check import check_model, output_weights
from kvbench.runtime.requests import RECONSTRUCTION

# Options of `generate` that read a prompt in pieces, take tokens back, bring a cache of their own or ask for attention
# weights that no kernel here keeps, with the value that switches each off.
_UNSUPPORTED_OPTIONS: dict[str, Any] = {
    "assistant_model": None, "prompt_lookup_num_tokens": None, "prefill_chunk_size": None, "cache_implementation": None,
    "use_cache": True, "output_attentions": False,
}  # fmt: skip


@contextmanager
def compress(
    model: PreTrainedModel, policy: Policy | str, *, seed: int = 0, kernels: str = "auto", **options: Any
) -> Iterator[CompressedCache]:
    """Compress the key-value cache of everything that `model` generates inside a `with` block.

        with kvbench.compress(model, KVMerger(budget=0.35)) as cache:
            output = model.generate(**inputs, max_new_tokens=64)
        print(cache.report())

    Each call of `generate` is a new prompt: one, or a batch padded on the left, each row with its own budget
    `floor(budget * T_row)`. Greedy, sampling, beams and streaming work as ever. The block ends without a trace, also
    after an exception: the model's attention implementation and `generate` are what they were, all storage is freed.

    Args:
        model: a decoder of transformers that uses its attention interface.
        policy: the method with its options, e.g. `KVMerger(budget=0.35)`, or its name ("kvmerger", "module:Class").
        seed: what policies derive their randomness from.
        kernels: "auto", "torch" or "triton".
        **options: of the method where `policy` is a name, `budget` among them.

    Yields:
        The cache: `report()` says slots and bytes per layer. `model.generate` uses it by itself; other callers pass
        it as `past_key_values`.

    Raises:
        ConfigError: if `policy` is none, needs "reconstruction" or has wrong options, or `kernels` cannot run here.
        ModelError: if the model is not supported (see `check_model`), or is inside such a block already.
    """
    if isinstance(policy, str):
        policy = build_policy(policy, options)
    elif options:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(f"{given}: options go with a method's name: compress(model, 'h2o', budget=0.35)")
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy={policy!r} is no Policy: give KVMerger(budget=0.35) or 'kvmerger', budget=0.35")
    if isinstance(model, PreTrainedModel) and model.config._attn_implementation == IMPLEMENTATION:
        raise ModelError(
            f"this {type(model).__name__} is inside a compress() block already, at most 1 is possible: leave it before "
            "you enter another"
        )
    check_model(model)
    needs = in_effect(policy).needs
    if RECONSTRUCTION in needs:
        raise ConfigError(
            f"policy={policy.name} has the model repeat the prompt, which here holds the question, too: run it by the "
            "harness with protocol.compress=before_question, or use a method without need 'reconstruction'"
        )
    weights = output_weights(model) if "output_weight" in needs else ()
    with attention_implementation(model):
        cache = CompressedCache(model.config, policy, seed, kernels, weights)
        try:
            with _generate_with(model, cache):
                yield cache
        finally:
            cache.close()


@contextmanager
def _generate_with(model: Any, cache: CompressedCache) -> Iterator[None]:
    """Let `model.generate` pass `cache` as `past_key_values` until the block ends.

    `generate` has no default cache that could be set, and a cache made by `generate` itself would not tell us about
    beams. So this one object gets an attribute `generate`, as transformers itself gives to a model whose repository
    brings its own (`GenerationMixin.adjust_generation_fn`). No class and no module is touched.
    """
    generate, own = model.generate, vars(model).get("generate")

    @functools.wraps(generate)
    def generate_compressed(*args: Any, **kwargs: Any) -> Any:
        _check_options(model, args, kwargs)
        given = kwargs.get("past_key_values")
        if given is cache and cache:
            raise ModelError(
                f"past_key_values holds {cache.get_seq_length()} tokens of an earlier turn, 0 are supported: give the "
                "whole conversation as one prompt without past_key_values, or call cache.reset() before it"
            )
        if given is not None and given is not cache:
            raise ModelError(
                f"past_key_values is a {type(given).__name__}, only the block's own cache is supported: leave it out "
                "or pass the cache that compress() yields"
            )
        cache.reset()
        try:
            return generate(*args, **{**kwargs, "past_key_values": cache})
        except BaseException:
            cache.reset()
            raise

    vars(model)["generate"] = generate_compressed
    try:
        yield
    finally:
        del vars(model)["generate"]
        if own is not None:
            vars(model)["generate"] = own


def _check_options(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    for name, off in _UNSUPPORTED_OPTIONS.items():
        values = [kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None)]
        value = next((value for value in values if value is not None), off)
        if value != off and value != "hybrid":  # what older Gemma checkpoints ask for and transformers ignores
            shown = value if isinstance(value, str | int | bool) else type(value).__name__
            raise ConfigError(f"generate({name}={shown}) is not supported with a compressed cache: use {name}={off}")
