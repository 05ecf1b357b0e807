"""Our methods beside NVIDIA/kvpress and official code, on the same tensors: kept slots that agree, errors of numbers.

    python scripts/compare_official.py MODEL_FOLDER [METHOD ...] [--repo zsmerge=CLONE] [--repo cam=CLONE] ...

needs the environment of requirements-kvpress.txt, and for some methods a clone of the official repository, whose
functions are taken out of the file at HEAD and executed; nothing of theirs is part of this one. The text is our
licence's. A method is one function here, from a layer's tensors to an `Outcome`. Without its clone it is left out,
by name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kvbench.methods import cam as our_cam
from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.methods.cake import CAKE
from kvbench.methods.cam import CaM
from kvbench.methods.chunkkv import ChunkKV
from kvbench.methods.compactor import Compactor, gaussian_sketch
from kvbench.methods.criticalkv import CriticalAdaKV, CriticalKV, projected_value_norms
from kvbench.methods.defensivekv import DefensiveKV, LayerDefensiveKV
from kvbench.methods.grkv import GRKV, layer_slots
from kvbench.methods.keepkv import KeepKV
from kvbench.methods.keydiff import KeyDiff
from kvbench.methods.kvzip import KVzip
from kvbench.methods.lagkv import LagKV
from kvbench.methods.scored import ScoredPolicy
from kvbench.methods.snapkv import SnapKV
from kvbench.methods.zsmerge import ZSMerge
from kvbench.models.prompt import DEMANDS
from kvbench.runtime.reconstruct import chunk_scores
from kvbench.runtime.requests import SINK_TOKENS
from kvbench.testing import decode_slots

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (0.5, 0.35, 0.2)


class Outcome(NamedTuple):
    """Share of our kept slots that the other code keeps, and the relative RMS error of what `compared` names."""

    agreement: float
    error: float
    compared: str


@dataclass
class Layer:
    """One attention layer at the end of a prompt, as its module saw it."""

    module: Any
    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    states: LayerStates
    sources: dict[str, Path] = field(default_factory=dict)
    peers: list[Layer] = field(default_factory=list)
    """All layers that are compared: the whole model of a method that divides slots among layers."""

    def press_scores(self, press: Any) -> Tensor:
        """What a scoring press of kvpress says of this layer, `(H_k, T)`."""
        keys, values = self.states.keys[None], self.states.values[None]
        embeddings = {"position_embeddings": self.position_embeddings}
        return press.score(self.module, self.hidden_states, keys, values, None, embeddings)[0]

    def official(self, method: str, path: str, names: set[str], within: str = "", **namespace: Any) -> dict[str, Any]:
        """Functions (also a class's, or those `within` one) of a file of a clone at HEAD, run among `namespace`."""
        text = subprocess.check_output(["git", "-C", str(self.sources[method]), "show", f"HEAD:{path}"], text=True)
        tree = next(n for n in ast.walk(ast.parse(text)) if not within or getattr(n, "name", "") == within)
        found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
        namespace = {"torch": torch, "math": math, "F": torch.nn.functional, **namespace}
        namespace |= {name: __import__("typing").__dict__[name] for name in ("Optional", "Tuple", "List", "Union")}
        exec(compile(ast.Module(found, []), path, "exec"), namespace)
        return namespace


def overlap(ours: Tensor, theirs: Tensor) -> float:
    """Share of `(H_k, m)` positions that are among others' `(H_k, n)`."""
    pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / ours.numel()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative RMS error."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def marked(kept: CompressedLayer, n_tokens: int) -> Tensor:
    """The tokens that a layer keeps, `(H_k, T)` bool; its heads may be ragged."""
    assert kept.positions is not None
    marks = torch.zeros(kept.keys.shape[0], n_tokens, dtype=torch.bool)
    lengths = [kept.keys.shape[1]] * len(marks) if kept.lengths is None else kept.lengths.tolist()
    for head, length in enumerate(lengths):
        marks[head, kept.positions[head, :length]] = True
    return marks


def best_of_all(scores: Tensor, n_slots: int) -> Tensor:
    """Mark the `n_slots` highest of all scores, as topk breaks ties."""
    marks = torch.zeros(scores.numel(), dtype=torch.bool)
    return marks.index_fill_(0, scores.flatten().topk(n_slots).indices, True).view(scores.shape)


def against(ours: Tensor, theirs: Tensor, error: float, compared: str) -> Outcome:
    """The outcome of two `(H_k, T)` bool markings."""
    return Outcome(float((ours & theirs).sum() / ours.sum()), error, compared)


def scored(policy: ScoredPolicy, layer: Layer, press: Any) -> Outcome:
    """A method that keeps the best-scored tokens against a press of the same kind."""
    m, states = policy.budget_tokens(layer.states.n_tokens), layer.states
    theirs = layer.press_scores(press)
    kept = policy.compress(states, m).positions
    assert kept is not None
    competing = slice(policy.first_tokens, states.n_tokens - policy.last_tokens)
    error = relative_error(policy.scores(states)[:, competing], theirs[:, competing])
    return Outcome(overlap(kept, theirs.topk(m, -1).indices), error, "scores")


def keydiff(layer: Layer, budget: float) -> Outcome:
    """KeyDiffPress."""
    from kvpress import KeyDiffPress

    return scored(KeyDiff(budget=budget), layer, KeyDiffPress(1 - budget))


def lagkv(layer: Layer, budget: float) -> Outcome:
    """LagKVPress; equal ranks of several partitions are ties that the two break in their own ways."""
    from kvpress import LagKVPress

    return scored(LagKV(budget=budget), layer, LagKVPress(1 - budget))


def chunkkv(layer: Layer, budget: float) -> Outcome:
    """ChunkKVPress over KeyDiffPress, which protects nothing; whole chunks: of its slots, how many are ours."""
    from kvpress import ChunkKVPress, KeyDiffPress

    policy, states = ChunkKV(budget=budget, base=KeyDiff()), layer.states
    index = torch.arange(states.n_tokens).view(1, 1, -1, 1).expand(1, *states.keys.shape[:2], states.keys.shape[2])
    with mock.patch.object(KeyDiffPress, "score", return_value=policy.base.scores(states)[None]):
        press = ChunkKVPress(KeyDiffPress(1 - budget))
        theirs, _ = press.compress(layer.module, layer.hidden_states, index, index, None, {})
    kept = policy.compress(states, policy.budget_tokens(states.n_tokens)).positions
    assert kept is not None
    share = overlap(theirs[0, :, :, 0], kept)  # theirs are fewer
    return Outcome(share, 0.0, "(scores are the base's)")


def compactor(layer: Layer, budget: float) -> Outcome:
    """CompactorPress with our sketch in place of its random numbers."""
    from kvpress import CompactorPress

    policy = Compactor(budget=budget)
    sketch = gaussian_sketch(layer.states, policy.sketch_dimensions) * math.sqrt(policy.sketch_dimensions)
    with mock.patch("torch.randn", lambda *shape, **_: sketch[None].expand(shape)):
        return scored(policy, layer, CompactorPress(1 - budget))


def zsmerge(layer: Layer, budget: float) -> Outcome:
    """`cache_init` of mergekv/mergekv.py; the score of a group is the sum over its heads, as there."""
    states = layer.states
    policy = ZSMerge(budget=budget, observation_tokens=states.n_tokens, group_reduce="mean")
    m = policy.budget_tokens(states.n_tokens)
    dense, _, tail = policy.split(m)
    functions = layer.official(
        "zsmerge", "mergekv/mergekv.py", {"topk_split", "cache_init", SCORE}, **{"Tensor": Tensor}
    )
    queries = states.extras["queries"].unflatten(0, (states.n_kv_heads, -1)).transpose(0, 1)  # a group member a row
    keys = states.keys.expand_as(queries)
    _, scores = functions[SCORE](queries, keys, keys, scale_factor=1.0, shrink_factor=policy.decay)
    options = {"cache_budget": m, "cache_tail": tail, "cache_dense": dense, "score_update": "sum"}
    options["scores"] = scores.sum(0, keepdim=True)
    index = torch.arange(states.n_tokens).view(1, 1, -1, 1).expand(1, *states.keys.shape)
    places = functions["cache_init"](states.keys[None], index.float(), **options)[1][0, :, dense:, 0].long()
    theirs = functions["cache_init"](states.keys[None], states.values[None], **options)
    kept = policy.compress(states, m)
    assert kept.positions is not None
    assert kept.bias is not None
    merged = kept.bias > 0
    verbatim = kept.positions[~merged].view(states.n_kv_heads, -1)
    ours = torch.cat([kept.keys[merged], kept.values[merged], kept.bias[merged][:, None]], -1)
    theirs = torch.cat([theirs[0][0, :, 0], theirs[1][0, :, 0], theirs[2][0, :, :1].log()], -1)
    return Outcome(overlap(verbatim, places), relative_error(ours, theirs), "the dense slots' keys, values, biases")


SCORE = "score_scaled_dot_product_attention_"


def cam(layer: Layer, budget: float) -> Outcome:
    """`local_cam_mask` of the generation file: our gate opens just below its probability and is shut just above it.

    Its window is two tokens longer, since there the token leaves one step later.
    """
    states, policy = layer.states, CaM(budget=budget)
    m, H_k = policy.budget_tokens(states.n_tokens), states.n_kv_heads
    start, recent = policy.split(m)
    slots = decode_slots(policy.compress(states, m))
    slots.keys[:, -1], slots.values[:, -1] = states.keys[:, -1], states.values[:, -1]  # a new token
    row = states.group_scores((states.extras["queries"][:, -1:] @ slots.keys.repeat_interleave(
        states.group_size, 0).transpose(1, 2) * states.extras["scaling"]).softmax(-1)[:, 0])  # fmt: skip
    seen: list[Tensor] = []

    def opened(probability: Tensor) -> Tensor:
        seen.append(probability)
        return torch.ones_like(probability)

    shim = SimpleNamespace(mean=torch.mean, isnan=torch.isnan, isinf=torch.isinf, bernoulli=opened)
    names = {"local_cam_mask"}
    function = layer.official("cam", "cam_hf/utils_hh/modify_llama_cam.py", names, torch=shim)["local_cam_mask"]
    merged = function(slots.values[None].clone(), row[None, :, None], start, recent + 2)[0]
    attention = row.repeat_interleave(states.group_size, 0)
    agreeing, errors = 0, []
    for factor in (1 - 1e-5, 1 + 1e-5):
        ours = decode_slots(policy.compress(states, m))
        ours.keys[:, -1], ours.values[:, -1] = slots.keys[:, -1], slots.values[:, -1]
        uniform = (seen[0] * factor).clamp_max(1 - 2**-24).unsqueeze(1)
        with mock.patch.object(our_cam, "hash_to_uniform", lambda _, uniform=uniform: uniform):
            policy.step(ours, attention)
        ring = torch.cat([ours.values[:, start + 1 : m], ours.values[:, start : start + 1]], 1)
        open_now = (ring != slots.values[:, start + 1 :]).any(-1).any(-1)
        agreeing += int((open_now == (uniform[:, 0] < seen[0])).sum())
        if factor < 1:
            errors.append(relative_error(ring, merged[:, start + 1 :]))
    return Outcome(agreeing / (2 * H_k), errors[0], "merged values (slots: gates that agree)")


def keepkv(layer: Layer, budget: float, row_scale: str = "raw") -> Outcome:
    """`KV_update` of the attention class over the query heads themselves, with its window of the recent budget."""
    states, H = layer.states, layer.states.n_query_heads
    keys, values = (x.repeat_interleave(states.group_size, 0) for x in (states.keys, states.values))
    alone = LayerStates(keys, values, 0, 1, H, window_attention=states.window_attention, extras=states.extras)
    m = KeepKV(budget=budget).budget_tokens(states.n_tokens)
    recent, options = KeepKV().recent_tokens(m), {"budget": budget, "row_scale": row_scale}
    policy = KeepKV(observation_tokens=recent, **options)  # type: ignore[arg-type]  # the policy checks
    places: list[Tensor] = []

    class Recording:
        """torch, which remembers what it was asked for the largest of."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def topk(self, scores: Tensor, n: int, **how: Any) -> Any:
            found = torch.topk(scores, n, **how)
            places.append(found.indices + policy.start_tokens)
            return found

    path, shim = "utils_hh/modify_llama_oursk.py", Recording()
    function = layer.official("keepkv", path, {"KV_update"}, torch=shim)["KV_update"]
    official = SimpleNamespace(
        previous_recent_scores=None, cluster_cnt=None, recent_budget=recent, heavy_budget=m - recent, cache_budget=m,
        distance_weight=policy.distance_weight, sink_len=policy.start_tokens, num_heads=H,
        similarity_threshold=policy.threshold, epsilon=torch.finfo(torch.float16).tiny,
    )  # fmt: skip
    logits = states.extras["queries"] @ keys.transpose(1, 2) * states.extras["scaling"]
    future = torch.ones_like(logits, dtype=torch.bool).triu(1)
    with mock.patch.object(Tensor, "half", Tensor.float):  # there cosines and results are rounded to fp16
        theirs = function(official, (keys[None], values[None]), logits.masked_fill(future, -torch.inf).exp()[None])
    kept = policy.compress(alone, m)
    assert kept.positions is not None
    assert kept.bias is not None
    share = overlap(kept.positions[:, policy.start_tokens : m - recent], places[0])
    ours = torch.cat([kept.keys, kept.values, kept.bias.exp()[..., None]], -1)
    merged = torch.cat([theirs[0][0].float(), theirs[1][0].float(), official.cluster_cnt[..., None]], -1)
    same = (kept.positions[:, policy.start_tokens : m - recent] == places[0].sort().values).all(1)
    error = relative_error(ours[same], merged[same]) if same.any() else math.nan
    return Outcome(share, error, "keys, values, votes of the heads with the same slots")


def grkv(layer: Layer, budget: float, solver_dtype: torch.dtype = torch.float32) -> Outcome:
    """Value and key updates of grkv/solver.py on our slots, queries and targets, in bf16 as released."""
    given = layer.states
    states = dataclasses.replace(given, keys=given.keys.bfloat16(), values=given.values.bfloat16())
    policy = GRKV(budget=budget)
    m = policy.budget_tokens(states.n_tokens)
    base, ours = policy.base.compress(states, m), policy.compress(states, m)
    positions, padding = layer_slots(base)
    mutable = ~(padding | policy.guarded(states, positions, padding))
    rows, _ = policy.fitting_queries(states)
    names = {"flatten_heads", "unflatten_heads", "state", "derivatives", "conjugate_gradient", "ridge_update"}
    shared = {"sqrt": math.sqrt, "Callable": Callable}
    attention = layer.official("grkv", "grkv/operators.py", names, **shared)
    solver = layer.official("grkv", "grkv/solver.py", {"value_dual", "round_bounded"})
    queries = (rows * states.keys.shape[-1] ** 0.5).unflatten(1, (states.group_size, -1)).to(solver_dtype)
    n_queries = queries.shape[2]
    nothing = torch.full(queries.shape[:3], -torch.inf, dtype=solver_dtype), torch.zeros_like(queries)
    observations = SimpleNamespace(queries=queries, suffix_lse=nothing[0], suffix_value=nothing[1])

    def operator(seen: Tensor) -> SimpleNamespace:
        operator = SimpleNamespace(
            obs=observations, mutable=mutable, visible=seen.unsqueeze(1).expand(-1, n_queries, -1)
        )
        operator.state = partial(attention["state"], operator)
        return operator

    every, kept = operator(torch.ones(states.keys.shape[:2], dtype=torch.bool)), operator(~padding)
    target = every.state(states.keys.to(solver_dtype), states.values.to(solver_dtype))[0]
    keys, values = (x.to(solver_dtype) for x in (base.keys, base.values))
    weights = torch.full((n_queries,), policy.query_weight / n_queries, dtype=solver_dtype)
    change, _ = solver["value_dual"](kept, keys, values, target, weights, policy.ridge)
    values = solver["round_bounded"](values, change, mutable, policy.value_cap_ratio, torch.bfloat16)
    weigh = SimpleNamespace(
        forward=lambda x: x * weights.sqrt()[:, None], adjoint=lambda x: x * weights.sqrt()[:, None]
    )
    maps, lacking = attention["derivatives"](kept, keys, values, "key"), target - kept.state(keys, values)[0]
    change, _ = attention["ridge_update"](*maps, weigh, lacking, policy.ridge, policy.iterations, policy.tolerance)
    keys = solver["round_bounded"](keys, change, mutable, policy.key_cap_ratio, torch.bfloat16)
    starts = torch.cat([base.keys, base.values], -1)
    pairs = [(torch.cat(pair, -1) - starts)[mutable] for pair in ((ours.keys, ours.values), (keys, values))]
    return Outcome(1.0, relative_error(*pairs), "corrections of keys and values (slots: ours)")


WINDOW = SnapKV(kernel_tokens=5, pooling="avg")  # kvpress' SnapKV
PROJECTED = "norms of projected values"


def critical(layer: Layer, budget: float, adaptive: bool = False) -> Outcome:
    """CriticalKVPress and CriticalAdaKVPress over SnapKVPress, given the same attention."""
    from kvpress import CriticalAdaKVPress, CriticalKVPress, SnapKVPress

    states, module = layer.states, layer.module
    keys, values, rows = states.keys[None], states.values[None], states.window_attention[None]  # type: ignore[index]
    sizes = {name: getattr(module.config, name) for name in ("num_attention_heads", "hidden_size")}
    config = SimpleNamespace(**sizes, head_dim=module.head_dim, _attn_implementation="sdpa")
    shim = SimpleNamespace(config=config, o_proj=module.o_proj, num_key_value_groups=states.group_size)
    base = SnapKVPress(1 - budget, WINDOW.observation_tokens, WINDOW.kernel_tokens)
    arguments = (shim, layer.hidden_states, keys, values, rows, {})
    policy = (CriticalAdaKV if adaptive else CriticalKV)(budget=budget, base=WINDOW)
    m = policy.budget_tokens(states.n_tokens)
    if adaptive:
        CriticalAdaKVPress(base).compress(*arguments)
        theirs = torch.ones(states.keys.shape[:2], dtype=torch.bool)
        theirs[shim.masked_key_indices[1:]] = False  # type: ignore[attr-defined]  # set by the press
    else:
        scores = CriticalKVPress(base).score(*arguments)[0]
        theirs = torch.stack([best_of_all(head, m) for head in scores])
    error = relative_error(projected_value_norms(states), CriticalKVPress.vwl1norm(values, shim)[0])
    return against(marked(policy.compress(states, m), states.n_tokens), theirs, error, PROJECTED)


def defensive_scores(layer: Layer, policy: DefensiveKV) -> Tensor:
    """What the authors' press says of a layer, `(H_k, T)`, by the version without Triton."""
    from torch import nn
    from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

    names = {"vwl1norm", "compute_window_attention", "score"}
    others: dict[str, Any] = {"Qwen3MoeAttention": (), "Qwen3Attention": (), "nn": nn}
    path = "kvpress/presses/efficient_defensivekv_press.py"
    functions = layer.official("defensivekv", path, names, repeat_kv=repeat_kv, rotate_half=rotate_half, **others)
    states = layer.states
    press = SimpleNamespace(
        window_size=policy.observation_tokens, kernel_size=policy.kernel_tokens, compression_ratio=1 - policy.budget,
        compute_window_attention=functions["compute_window_attention"],
    )  # fmt: skip
    press.vwl1norm_triton = partial(functions["vwl1norm"], press)
    n_heads, n_tokens = states.keys.shape[:2]
    metadata = SimpleNamespace(bsz=1, num_key_value_heads=n_heads, head_lens=[n_tokens] * n_heads)
    given = {"metadata": metadata, "position_embeddings": layer.position_embeddings}
    tensors = (layer.hidden_states, states.keys[None], states.values[None], None, given)
    return functions["score"](press, layer.module, *tensors).view(n_heads, n_tokens)


def defensive(layer: Layer, budget: float, across_layers: bool = False) -> Outcome:
    """EfficientDefensiveKVPress, and its ranking over all layers, of our number of slots."""
    policy = (LayerDefensiveKV if across_layers else DefensiveKV)(budget=budget)
    competitors = layer.peers if across_layers else [layer]
    n_tokens, n_heads = layer.states.n_tokens, layer.states.n_kv_heads
    theirs = torch.stack([defensive_scores(one, policy) for one in competitors])
    kept = best_of_all(theirs, len(competitors) * n_heads * policy.budget_tokens(n_tokens))
    m, place = policy.budget_tokens(n_tokens), competitors.index(layer)
    if across_layers:
        m = policy.allocate([policy.ranks(one.states) for one in competitors], n_tokens, n_heads)[place]
    ranks = policy.ranks(layer.states)
    both = ranks.isfinite() & (theirs[place] < theirs[place].max())
    error = relative_error(ranks[both], theirs[place][both])
    ours = marked(policy.compress(layer.states, m), n_tokens)
    return against(ours, kept[place], error, "weighed risks outside the first stage")


def kvzip(layer: Layer, budget: float, selection: str = "global") -> Outcome:
    """`_get_score` over a repetition in the official wording, and `_threshold` or `_threshold_uniform`."""
    from torch import nn

    names = {"_get_score", "_update_score", "_mask_causal", "_make_mask", "_threshold", "_threshold_uniform"}
    functions = layer.official("kvzip", "attention/score.py", names, "KVScore", nn=nn)
    policy = KVzip(budget=budget, selection=selection)  # type: ignore[arg-type]  # the policy checks
    competitors = layer.peers if selection == "global" else [layer]
    n_tokens, n_heads = layer.states.n_tokens, layer.states.n_kv_heads

    def official_scores(one: Layer) -> Tensor:
        shim = SimpleNamespace(sink=SINK_TOKENS, start_idx=SINK_TOKENS, end_idx=n_tokens, causal_mask_score=None)
        shim.score = [torch.zeros(1, n_heads, 0)]
        for name in names:
            setattr(shim, name, partial(functions[name], shim))
        extras = one.states.extras
        shim._get_score(extras["repeat_queries"][None], torch.cat([one.states.keys, extras["repeat_keys"]], 1)[None], 0)
        return shim.score[0][0]

    theirs, m = torch.stack([official_scores(one) for one in competitors]), policy.budget_tokens(n_tokens)
    ratio = (m - SINK_TOKENS) / (n_tokens - SINK_TOKENS)  # of what may be evicted, that is all but the sinks
    chosen, _ = functions["_threshold_uniform" if selection == "uniform" else "_threshold"](None, theirs, ratio + 1e-9)
    place = competitors.index(layer)
    error = relative_error(policy.scores(layer.states)[:, SINK_TOKENS:], theirs[place])
    if selection == "global":
        m = policy.allocate([policy.preference(one.states) for one in competitors], n_tokens, n_heads)[place]
    ours = marked(policy.compress(layer.states, m), n_tokens)[:, SINK_TOKENS:]
    return against(ours, chosen[place], error, "scores")


class _Seen(Exception):
    """The official forward has scored the layer; what follows is attention itself."""


def cake(layer: Layer, budget: float) -> Outcome:
    """The scores of `llama_attn_forward_cake`, its budgets by `adjust_budgets`; tau1 = tau2 = 1."""
    import numpy as np
    from torch import nn
    from transformers.models.llama.modeling_llama import repeat_kv

    policy, (H_k, n_tokens) = CAKE(budget=budget), layer.states.keys.shape[:2]
    utils = layer.official("cake", "cake/utils.py", {"calculate_entropy", "adjust_budgets"}, np=np)
    types = {name: type(name, (), {}) for name in ("Cache", "StaticCache", "DynamicCache", "CakeCache")}
    path, name, window = "cake/model/modify_llama.py", "llama_attn_forward_cake", policy.observation_tokens
    forward = layer.official(
        "cake", path, {name}, nn=nn, repeat_kv=repeat_kv, calculate_entropy=utils["calculate_entropy"],
        apply_rotary_pos_emb=lambda queries, keys, *_: (queries, keys), logger=mock.MagicMock(), **types,
    )[name]  # fmt: skip

    def official_scores(one: Layer) -> tuple[float, Tensor]:
        states, seen = one.states, []

        def evict(*_: Any) -> None:
            raise _Seen

        evict.num_layers = -1  # type: ignore[attr-defined]  # a bare object stands in for theirs
        past = SimpleNamespace(update=lambda k, v, *_: (k, v), layer_budget=[], update_score=lambda *s: seen.extend(s))
        options = {"window_size": [window], "prefill": [True], "decoding_evict": [None], "key_size": [0]}
        config = SimpleNamespace(**options, tau1=1.0, tau2=1.0, gamma=policy.gamma, prefill_cake_evict=[evict])
        flat = [x.transpose(0, 1).flatten(1)[None] for x in (states.extras["queries"], states.keys, states.values)]
        module = SimpleNamespace(
            config=config, layer_idx=0, num_heads=states.n_query_heads, num_key_value_heads=H_k, training=False,
            num_key_value_groups=states.group_size, head_dim=states.keys.shape[2], attention_dropout=0.0,
            q_proj=lambda _: flat[0], k_proj=lambda _: flat[1], v_proj=lambda _: flat[2],
        )  # fmt: skip
        with suppress(_Seen):
            forward(module, one.hidden_states, past_key_value=past, position_embeddings=one.position_embeddings)
        return float(seen[0]), seen[1][0]

    found = [official_scores(one) for one in layer.peers]
    place, n_layers, m = layer.peers.index(layer), len(layer.peers), policy.budget_tokens(n_tokens)
    total, preferences = (m - window) * n_layers, [preference for preference, _ in found]
    shares = [preference / sum(preferences) * total for preference in preferences]
    share = utils["adjust_budgets"](shares, total, n_tokens - window, n_layers)[place]
    theirs = torch.ones(H_k, n_tokens, dtype=torch.bool)
    theirs[:, : n_tokens - window] = torch.stack([best_of_all(head, share) for head in found[place][1]])
    slots = policy.allocate([policy.preference(one.states) for one in layer.peers], n_tokens, H_k)[place]
    error = relative_error(policy.scores(layer.states)[:, : n_tokens - window], found[place][1])
    return against(marked(policy.compress(layer.states, slots), n_tokens), theirs, error, "scores")


METHODS: dict[str, tuple[Callable[[Layer, float], Outcome], str]] = {
    "keydiff": (keydiff, "kvpress KeyDiffPress"),
    "lagkv": (lagkv, "kvpress LagKVPress"),
    "chunkkv": (chunkkv, "kvpress ChunkKVPress over KeyDiffPress"),
    "compactor": (compactor, "kvpress CompactorPress"),
    "zsmerge": (zsmerge, "SusCom-Lab/ZSMerge `cache_init`"),
    "cam": (cam, "zyxxmu/cam `local_cam_mask`"),
    "grkv": (grkv, "pjunjie/GRKV `value_dual`, `ridge_update`, `round_bounded`"),
    "grkv fp64": (partial(grkv, solver_dtype=torch.float64), "the same, in fp64"),
    "keepkv": (keepkv, "kkvcache/KeepKV `KV_update`"),
    "criticalkv": (critical, "kvpress CriticalKVPress"),
    "critical_adakv": (partial(critical, adaptive=True), "kvpress CriticalAdaKVPress"),
    "defensivekv": (defensive, "FFY0/DefensiveKV `EfficientDefensiveKVPress`"),
    "defensivekv layers": (partial(defensive, across_layers=True), "the same, over all layers (`layer_defensivekv`)"),
    "kvzip": (kvzip, "snu-mllab/KVzip `_get_score`, `_threshold`"),
    "kvzip layerwise": (partial(kvzip, selection="layerwise"), "the same, within a layer"),
    "kvzip uniform": (partial(kvzip, selection="uniform"), "the same, `_threshold_uniform`"),
    "cake": (cake, "antgroup/cakekv `llama_attn_forward_cake`, `adjust_budgets`"),
    "keepkv softmax": (partial(keepkv, row_scale="softmax"), "the same, with `row_scale=softmax`"),
}
CLONES = ("zsmerge", "cam", "keepkv", "grkv", "defensivekv", "kvzip", "cake")


def row_logsumexp(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Log-sum-exp of every row of causal logits, `(H, T)`."""
    logits = queries @ keys.repeat_interleave(queries.shape[0] // keys.shape[0], 0).transpose(1, 2) * scaling
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)


def observed(model: Any, input_ids: Tensor, demand: Tensor, indices: list[int]) -> list[Layer]:
    """Layers of a Llama-like model with eager attention over `(1, T)` tokens, repeated after a demand `(1, N)`."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    n_tokens = input_ids.shape[1]
    config, seen = model.config, {}
    for index, block in enumerate(model.model.layers):
        if index in indices:
            hook = lambda module, _, kwargs, index=index: seen.update({index: (module, kwargs)})  # noqa: E731  one each
            block.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        output = model(input_ids=torch.cat([input_ids, demand, input_ids[:, SINK_TOKENS:]], 1), use_cache=True)
        repeated = [(seen[index], output.past_key_values.layers[index].keys[0, :, n_tokens:]) for index in indices]
        output = model(input_ids=input_ids, use_cache=True, output_attentions=True)

    def queries_of(module: Any, kwargs: dict[str, Any]) -> Tensor:
        queries = module.q_proj(kwargs["hidden_states"]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2).detach()
        return apply_rotary_pos_emb(queries, queries, *kwargs["position_embeddings"])[0][0]

    layers: list[Layer] = []
    for index, (again, repeat_keys) in zip(indices, repeated, strict=True):
        (module, kwargs), cached = seen[index], output.past_key_values.layers[index]
        hidden, embeddings, queries = kwargs["hidden_states"], kwargs["position_embeddings"], queries_of(*seen[index])
        keys, repeat_queries = cached.keys[0], queries_of(*again)[:, n_tokens:]
        both, chunk = torch.cat([keys, repeat_keys], 1), slice(SINK_TOKENS, n_tokens)
        weight = module.o_proj.weight.detach().unflatten(1, (-1, module.head_dim)).permute(1, 2, 0)
        reconstruction = torch.ones(keys.shape[:2])
        reconstruction[:, chunk] = chunk_scores(repeat_queries, both, n_tokens, chunk, module.scaling)
        attention = output.attentions[index][0].detach()
        exponents = torch.arange(0, module.head_dim, 2) / module.head_dim
        extras = {
            "queries": queries, "scaling": torch.tensor(module.scaling),
            "rotary_frequencies": 1.0 / config.rope_parameters["rope_theta"] ** exponents,
            "window_logsumexp": row_logsumexp(queries, keys, module.scaling), "output_weight": weight,
            "reconstruction": reconstruction, "repeat_queries": repeat_queries, "repeat_keys": repeat_keys,
        }  # fmt: skip
        states = LayerStates(
            keys, cached.values[0], index, config.num_hidden_layers, config.num_attention_heads,
            column_sums=attention.sum(1), window_attention=attention, extras=extras,
        )  # fmt: skip
        layers.append(Layer(module, hidden.detach(), embeddings, states))
    return layers


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder of a Llama-like model")
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; all if none is given")
    parser.add_argument("--repo", action="append", default=[], metavar="METHOD=CLONE")
    parser.add_argument("--tokens", type=int, default=780, help="prompt length; the default fills Compactor's tiles")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 20, 29])
    arguments = parser.parse_args()
    sources = {name: Path(path) for name, path in (one.split("=", 1) for one in arguments.repo)}
    wanted = arguments.methods or list(METHODS)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")  # the same for everyone
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    demand = tokenizer(DEMANDS[0], return_tensors="pt", add_special_tokens=False).input_ids
    layers = observed(model.eval(), input_ids, demand, arguments.layers)
    print(
        f"{arguments.tokens} tokens, layers {arguments.layers}, budgets {BUDGETS}: "
        "the least agreement, the largest error, and in brackets the means\n"
    )
    print("| method | against | kept slots agree | relative error | of |\n|---|---|---:|---:|---|")
    for name in wanted:
        function, against = METHODS[name]
        repository = name.split()[0]
        if repository in CLONES and repository not in sources:
            print(f"| `{name}` | {against} | not compared: give --repo {repository}=CLONE | | |")
            continue
        for layer in layers:
            layer.sources, layer.peers = sources, layers
        with torch.no_grad():
            found = [function(layer, budget) for layer in layers for budget in BUDGETS]
        agreements = [one.agreement for one in found]
        errors = [one.error for one in found if not math.isnan(one.error)] or [math.nan]
        agreement = f"{100 * min(agreements):.1f} % ({100 * sum(agreements) / len(found):.1f} %)"
        error = f"{max(errors):.1e} ({sum(errors) / len(errors):.1e})"
        print(f"| `{name}` | {against} | {agreement} | {error} | {found[0].compared} |")


if __name__ == "__main__":
    main()
