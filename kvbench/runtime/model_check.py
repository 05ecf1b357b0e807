"""The one check of a model, for both engines and `compress()`, before anything is measured with it.

What a configuration tells is refused by name: encoders, other parts than text, layers that keep something else than
keys and values. What it does not tell (attention of the model's own, position ids that are not heeded, layers that run
twice) shows in a probe: a few random tokens through our attention, one prefill and some steps, must give the logits of
the model's own forward pass. What depends on length, sliding windows and LongRoPE, is checked with the samples: see
`check_lengths`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvbench.errors import KvbenchError, ModelError, failure_reason
from kvbench.models.checkpoint import quiet
from kvbench.models.load import input_device
from kvbench.ops.observe import softmax_attention
from kvbench.runtime.attention import EXAMPLES, attention_implementation

PROMPT_TOKENS, STEPS = 12, 4
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
"""Distance of the logits from the model's own, over their norm. The largest of SmolLM2, Qwen2.5-0.5B and random weights
in the shapes of Llama-2-7B and 13B is 3e-6 in float32, 0.03 in bfloat16 and 0.004 in float16; attention of another kind
comes to 0.4 and more."""


@dataclass(frozen=True)
class ModelFacts:
    """What the check found and the engines need to know."""

    shape: dict[str, int]
    """`n_layers`, `n_query_heads`, `n_kv_heads`, `head_dim`, all counts, the same in every layer."""
    window_tokens: int | None
    """The shortest sliding window of any layer, the querying token included; None for none."""
    soft_capped: bool


_checked: WeakKeyDictionary[PreTrainedModel, tuple[str, ModelFacts]] = WeakKeyDictionary()


def check_model(model: PreTrainedModel) -> ModelFacts:
    """Refuse a model that would be computed wrongly; the answer for an unchanged one is remembered."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{name} is no PreTrainedModel: give the transformers model itself, e.g. peft_model.get_base_model()"
        )
    if not _is_text_decoder(model.config):
        raise ModelError(f"{name} is not a decoder of text alone: use the text model, e.g. Gemma3ForCausalLM")
    if model.training:
        raise ModelError(f"{name} is in training mode, only inference is supported: call model.eval()")
    state = f"{model.dtype} {model.config._attn_implementation} {model.config.to_dict()}"
    remembered = _checked.get(model)
    if remembered is None or remembered[0] != state:
        windows = [window for window in layer_windows(model.config) if window is not None]
        _checked[model] = remembered = (state, _probe(model, min(windows, default=None)))
    return remembered[1]


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer in tokens, the querying token included; None for a layer without.

    Refuses layers that are neither full nor sliding-window attention.
    """
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:
        raise ModelError(
            f"model type {config.model_type!r} does not tell transformers what its layers keep "
            f"({failure_reason(error)}): use a decoder such as {EXAMPLES}"
        ) from error
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"layer {index} of model type {config.model_type!r} keeps its past in a {type(layer).__name__}: only "
                f"full and sliding-window attention can be used, e.g. {EXAMPLES}"
            )
    return [getattr(layer, "sliding_window", None) for layer in layers]


def output_weights(model: PreTrainedModel) -> list[Tensor]:
    """The output projection of each layer's attention as a view `(H, D, hidden)`: head h adds `output @ weight[h]`.

    `ModelError` unless every layer has one, `o_proj`, as a plain matrix.
    """
    shape = check_model(model).shape
    n_heads, head_dim = shape["n_query_heads"], shape["head_dim"]
    found: dict[int, Tensor] = {}
    for module in model.modules():
        projection, index = getattr(module, "o_proj", None), getattr(module, "layer_idx", None)
        if projection is None or not isinstance(index, int):
            continue
        columns = n_heads * head_dim
        if type(projection) is not nn.Linear or projection.weight.is_meta or projection.in_features != columns:
            raise ModelError(
                f"o_proj of layer {index} of {type(model).__name__} is a {type(projection).__name__} and no plain "
                f"matrix of {columns} columns, which need 'output_weight' asks for: load the model unquantised and "
                "merge adapters, or leave out methods that weigh values by it"
            )
        found[index] = projection.weight.detach().unflatten(1, (n_heads, head_dim)).permute(1, 2, 0)
    if sorted(found) != list(range(shape["n_layers"])):
        raise ModelError(
            f"{len(found)} of {shape['n_layers']} layers of {type(model).__name__} have the output projection o_proj "
            "that need 'output_weight' asks for: use a model such as Llama, or leave out methods that ask for it"
        )
    return [found[index] for index in range(shape["n_layers"])]


def check_lengths(model: PreTrainedModel, lengths: Sequence[tuple[int, int]]) -> None:
    """Refuse samples that do not fit into the model's shortest sliding window, or between two sets of frequencies.

    `lengths` are for each sample, all of which may come to lie in one batch, the tokens that are prefilled and those
    that its last query attends to, itself included.
    """
    window = check_model(model).window_tokens
    first, last = zip(*lengths, strict=True) if lengths else ((0,), (0,))
    if window is not None and max(last) > window:
        raise ModelError(
            f"{max(last)} tokens of prompt and answer exceed {type(model).__name__}'s sliding window of {window}: "
            "lower model.max_prompt_tokens until both fit, or use a model without sliding windows"
        )
    limit, kind = _frequency_limit(model.config)
    # A batch goes on to its longest answer, and its longest row decides for all.
    longest = max(first) + max(end - start for start, end in lengths) if lengths else 0
    if longest > limit and (kind == "dynamic" or min(first) <= limit):
        raise ModelError(
            f"prompts of {min(first)} to {max(first)} tokens with answers up to {longest} have both sets of "
            f"{type(model).__name__}'s rotary frequencies, which change at {limit} ({kind}): lower "
            f"model.max_prompt_tokens until all fit into {limit}, or give longer prompts only"
        )


def _frequency_limit(config: PreTrainedConfig) -> tuple[float, str]:
    """Tokens beyond which rotary frequencies are others, and the kind of rotary embedding that does so."""
    rotary = getattr(config, "rope_parameters", None) or {}
    for parameters in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        if (kind := parameters.get("rope_type")) in ("longrope", "dynamic"):
            fallback = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            return parameters.get("original_max_position_embeddings") or fallback, kind
    return math.inf, ""


def _is_text_decoder(config: PreTrainedConfig) -> bool:
    try:
        return config.get_text_config() is config and not config.is_encoder_decoder
    except ValueError:  # several text configurations
        return False


class _Probe(DynamicCache):
    """Attention context and cache of the probe: the whole prompt, then one token after the other.

    It attends over what it stores, as our caches do, not over what a model hands its attention: those may differ.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads_prompt = True
        self.shapes: set[tuple[int, ...]] = set()
        self.soft_capped = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Store keys and values, which must have the shape of those that attention got."""
        stored: Any = self.layers[layer_idx : layer_idx + 1]
        if stored and stored[0].keys.shape[1::2] != key_states.shape[1::2]:
            shapes = " and ".join(str(tuple(x.shape[1::2])) for x in (stored[0].keys, key_states))
            raise ModelError(f"its attention and its cache get heads and channels of the shapes {shapes}")
        return super().update(key_states, value_states, layer_idx)

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Attend over the prompt, which is stored, or in a step over all that is stored."""
        self.soft_capped |= softcap is not None
        if self.reads_prompt:
            if layer_index != len(self.layers):
                raise ModelError(f"layer {layer_index} attends where layer {len(self.layers)} is next")
            if query.shape[2:] != key.shape[2:] or key.shape != value.shape or query.shape[1] % key.shape[1]:
                shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
                raise ModelError(f"queries, keys and values have the shapes {shapes}")
            self.shapes.add((query.shape[1], *key.shape[1::2]))
            self.update(key, value, layer_index)
        stored: Any = self.layers[layer_index]
        return softmax_attention(query, stored.keys, stored.values, scaling, softcap)


@torch.no_grad()
def _probe(model: PreTrainedModel, window: int | None) -> ModelFacts:
    limits = [window, getattr(model.config, "max_position_embeddings", None)]
    n_tokens = min([PROMPT_TOKENS + STEPS, *(limit for limit in limits if limit is not None and limit > STEPS)])
    probe, generator = _Probe(), torch.Generator().manual_seed(0)
    try:
        n_layers, vocab_size = int(model.config.num_hidden_layers), int(model.config.vocab_size)
        ids = torch.randint(3, vocab_size, (1, n_tokens), generator=generator).to(input_device(model))
        own = model(input_ids=ids, use_cache=False).logits[0, -STEPS - 1 :].float()
        with quiet(), attention_implementation(model):  # a class that keeps its own is told in one line, here
            prompt = {"input_ids": ids[:, :-STEPS], "use_cache": False, "logits_to_keep": 1}
            ours = [model(**prompt, attention_context=probe).logits[0, -1]]
            if (n_found := len(probe.layers)) != n_layers:
                raise ModelError(f"{n_found} of {n_layers} layers go through transformers' AttentionInterface")
            if len(probe.shapes) > 1:
                raise ModelError(f"layers have heads of {len(probe.shapes)} shapes, 1 is possible")
            probe.reads_prompt = False
            for position in range(n_tokens - STEPS, n_tokens):
                at = torch.tensor([[position]], device=ids.device)
                step: dict[str, Any] = {"input_ids": ids[:, position : position + 1], "position_ids": at}
                output = model(**step, past_key_values=probe, attention_context=probe, use_cache=True)
                ours.append(output.logits[0, -1])
    except KvbenchError as error:
        _refuse(model, str(error).split(": ")[0], error)
    except Exception as error:
        _refuse(model, failure_reason(error), error)
    # What is added to all logits of a position counts for none; where `own` is not finite neither: the engines report
    # such samples themselves.
    got, own = (x - x.mean(-1, keepdim=True) for x in (torch.stack(ours).float(), own))
    ratios = (got - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=torch.finfo(own.dtype).tiny)
    distances = torch.where(own.isfinite().all(-1), ratios, 0.0)
    # With 16 bits one token of a mixture of experts may go to another expert: so the median counts.
    distance = float(distances.max() if model.dtype.itemsize > 2 else distances.median())
    if not distance <= TOLERANCE.get(model.dtype, 0.15):  # nor if it is NaN
        _refuse(model, f"its logits differ from those of plain softmax attention by {distance:.1%} of their norm")
    n_query_heads, n_kv_heads, head_dim = probe.shapes.pop()
    shape = {"n_layers": n_layers, "n_query_heads": n_query_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    return ModelFacts(shape, window, probe.soft_capped)


def _refuse(model: PreTrainedModel, reason: str, cause: Exception | None = None) -> NoReturn:
    raise ModelError(f"{type(model).__name__} is not supported ({reason}): use a decoder such as {EXAMPLES}") from cause
