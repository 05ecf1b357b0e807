"""The attention context of a prefill: attends layer by layer, observes what policies need, hands every layer over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvbench.errors import ConfigError, ModelError
from kvbench.methods.base import CompressedLayer, LayerStates, Policy
from kvbench.methods.full import in_effect
from kvbench.models.load import LoadedModel
from kvbench.ops.dispatch import choose_kernels
from kvbench.ops.observe import observe
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.model_check import output_weights
from kvbench.runtime.requests import RECONSTRUCTION, Arm, Request, model_shape

WINDOW_NEEDS = frozenset({"window_attention", "window_logsumexp"})
GIVEN = frozenset({"output_weight", RECONSTRUCTION})
OBSERVABLE = WINDOW_NEEDS | GIVEN | {"column_sums", "queries", "rotary_frequencies"}
FULL_ATTENTION = "full_attention"


@dataclass(eq=False)
class Observer:
    """Observes one prompt for all policies at once.

    Attributes:
        needs: of `OBSERVABLE` (see `LayerStates`), the union over the policies.
        window_tokens: the largest window any policy needs; required with "window_attention" or "window_logsumexp".
        n_layers: passed on in `LayerStates`, as `n_query_heads` and `seed`.
        on_layer: called once per layer with its states, whose keys and values are views.
        kernels: "auto", "torch" or "triton"; policies are told the choice in `LayerStates.kernels`.
        config: the model's text configuration; required with "rotary_frequencies".
        given: what is no part of a prefill, a tensor for each layer; required with "output_weight", "reconstruction".
        kernels_used: names of the implementations used so far, for the record.
    """

    needs: frozenset[str]
    window_tokens: int
    n_layers: int
    n_query_heads: int
    seed: int
    on_layer: Callable[[LayerStates], None]
    kernels: str = "auto"
    config: PreTrainedConfig | None = None
    given: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    kernels_used: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if unknown := self.needs - OBSERVABLE:
            raise ConfigError(
                f"needs={sorted(unknown)} cannot be observed: use {', '.join(sorted(OBSERVABLE))}, or compute the "
                "scores from keys and values in compress()"
            )
        if "rotary_frequencies" in self.needs and self.config is None:
            raise ConfigError("config=None with need 'rotary_frequencies': give the model's configuration to Observer")
        if (windows := self.needs & WINDOW_NEEDS) and self.window_tokens < 1:
            raise ConfigError(
                f"window_tokens={self.window_tokens} is below 1: policies that need {min(windows)!r} set it"
            )
        if missing := [name for name in sorted(self.needs & GIVEN) if not self.given.get(name)]:
            raise ConfigError(
                f"given lacks {', '.join(missing)}, which a policy needs: give Observer a tensor per layer"
            )

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Attend over the whole prompt in one layer and report its states; arguments as `AttentionContext.attend`."""
        n_tokens = query.shape[2]
        if query.shape[0] != 1:
            raise ModelError(f"a prefill of {query.shape[0]} prompts at once is not supported: give one prompt a call")
        if key.shape[2] != n_tokens:
            raise ModelError(
                f"{n_tokens} queries over {key.shape[2]} keys: a prefill takes the whole prompt in one call, "
                "with use_cache=False"
            )
        window_tokens = self.window_tokens if self.needs & WINDOW_NEEDS else 0
        observation = observe(
            query[0], key[0], value[0], scaling, column_sums="column_sums" in self.needs, window_tokens=window_tokens,
            window_logsumexp="window_logsumexp" in self.needs, kernels=self.kernels, softcap=softcap,
        )  # fmt: skip
        self.kernels_used.add(observation.kernels)
        extras = {"queries": query[0], "scaling": torch.tensor(scaling)} if "queries" in self.needs else {}
        extras |= {name: self.given[name][layer_index] for name in self.needs & GIVEN}
        if observation.window_logsumexp is not None:
            extras["window_logsumexp"] = observation.window_logsumexp
        if "rotary_frequencies" in self.needs and self.config is not None:
            extras["rotary_frequencies"] = rotary_frequencies(self.config, n_tokens).to(query.device)
        self.on_layer(
            LayerStates(
                keys=key[0], values=value[0], layer_index=layer_index, n_layers=self.n_layers,
                n_query_heads=self.n_query_heads, seed=self.seed, column_sums=observation.column_sums,
                window_attention=observation.window_attention, extras=extras,
                kernels=choose_kernels(self.kernels, query.device),
            )
        )  # fmt: skip
        return observation.output.transpose(0, 1)[None]


def rotary_frequencies(config: PreTrainedConfig, n_tokens: int) -> Tensor:
    """Angles per position `(R / 2,)` by which a model's layers of full attention turn queries and keys, fp32, CPU.

    RoPE (Su et al., arXiv 2104.09864) turns channel pair i of a token at position t by the angle `t * frequency_i`. The
    pairs are taken to be (i, i + R / 2) of the first R channels, as in Llama, Mistral, Qwen, Phi-3 and Gemma; R is D
    unless only part of the channels turns. Some kinds of RoPE have other frequencies for long prompts.

    Raises:
        ModelError: if the configuration does not describe one rotary embedding for all these layers.
    """
    parameters: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    layer_type = {}
    if parameters and FULL_ATTENTION in parameters:
        parameters, layer_type = parameters[FULL_ATTENTION], {"layer_type": FULL_ATTENTION}
    if not parameters or "rope_type" not in parameters or 0 in (getattr(config, "no_rope_layers", None) or ()):
        raise ModelError(
            f"rope_parameters={parameters!r} of {type(config).__name__} describe no rotary embedding that all layers "
            "share: use a method that does not turn queries, or a model like Llama, Mistral, Qwen, Phi-3 or Gemma"
        )
    kind = parameters["rope_type"]
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"), seq_len=n_tokens, **layer_type)[0].float()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_turning = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, n_turning, 2, dtype=torch.float32) / n_turning)


def prefill(
    loaded: LoadedModel, request: Request, arms: Iterable[Arm], on_layer: Callable[[LayerStates], None],
    kernels: str = "auto", reconstruction: Sequence[Tensor] = (),
) -> tuple[Tensor, set[str]]:  # fmt: skip
    """Prefill a request's first `compress_at` tokens with full attention and observe what the arms' policies need.

    `on_layer` is called once per layer, in order; the layer's states are freed when it returns unless it keeps a
    reference. `reconstruction` are the scores of `kvbench.runtime.reconstruct`, where they are needed. Returns the last
    token's logits `(V,)` fp32, and the names of the kernels that observed.
    """
    policies, shape = [in_effect(arm.policy) for arm in arms], model_shape(loaded)
    needs: frozenset[str] = frozenset().union(*(policy.needs for policy in policies))
    window_tokens = max(policy.window_tokens for policy in policies)
    sizes, config = (shape["n_layers"], shape["n_query_heads"]), loaded.model.config.get_text_config()
    given: dict[str, Sequence[Tensor]] = {RECONSTRUCTION: reconstruction}
    if "output_weight" in needs:
        given["output_weight"] = output_weights(loaded.model)
    observer = Observer(needs, window_tokens, *sizes, request.seed, on_layer, kernels, config, given)
    input_ids = torch.tensor([request.input_ids[: request.compress_at]], device=loaded.device)
    with torch.inference_mode(), attention_implementation(loaded.model):
        output = loaded.model(input_ids=input_ids, attention_context=observer, use_cache=False, logits_to_keep=1)
        return output.logits[0, -1].float(), observer.kernels_used


class Compressor:
    """One policy over the layers of one prompt: each is compressed as it passes, or all once slots are allocated.

    An impossible budget is refused at once.
    """

    def __init__(self, policy: Policy, n_tokens: int, n_layers: int):
        self.policy, self.n_layers = policy, n_layers
        self.budgets = policy.layer_budgets(n_tokens, n_layers)
        self._held: list[LayerStates] = []
        self._preferences: list[Tensor] = []

    def __call__(self, states: LayerStates) -> Iterator[tuple[int, CompressedLayer]]:
        """The layers that are ready with this one, by index and in order; a layer is let go of before the next."""
        policy = self.policy
        if not policy.allocates:
            yield states.layer_index, policy.compress(states, self.budgets[states.layer_index])
            return
        preference = policy.preference(states)
        self._preferences.append(preference.to(self._preferences[0].device) if self._preferences else preference)
        self._held.append(_needed(states, policy.needs))
        if len(self._held) < self.n_layers:
            return
        n_tokens, n_kv_heads = states.n_tokens, states.n_kv_heads
        budgets = policy.allocate(self._preferences, n_tokens, n_kv_heads)
        total, most = self.n_layers * n_kv_heads * policy.budget_tokens(n_tokens), n_kv_heads * n_tokens
        possible = len(budgets) == self.n_layers and all(n_kv_heads <= slots <= most for slots in budgets)
        if not possible or (policy.exact_budget and sum(budgets) != total):
            raise ValueError(
                f"{policy.name} allocates {sum(budgets)} slots to {len(budgets)} layers, the budget is {total} for "
                f"{self.n_layers} with {n_kv_heads} to {most} each: mend allocate()"
            )
        for index, slots in enumerate(budgets):
            yield index, policy.compress(self._held.pop(0), slots)
        self._preferences.clear()


def _needed(states: LayerStates, needs: frozenset[str]) -> LayerStates:
    """A layer's states without what was observed for other policies."""
    names = needs | ({"scaling"} if "queries" in needs else frozenset())
    return replace(
        states,
        column_sums=states.column_sums if "column_sums" in needs else None,
        window_attention=states.window_attention if needs & WINDOW_NEEDS else None,
        extras={name: tensor for name, tensor in states.extras.items() if name in names},
    )
