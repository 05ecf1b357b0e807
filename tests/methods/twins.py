"""What the loop twins of `kvbench.reference` say `compress` should give, by the method's name, and how to compare."""

import importlib

import torch
from policy_inputs import relative_rms

from kvbench.methods.base import reduce_groups
from kvbench.methods.expected_attention import ExpectedAttention
from kvbench.reference import criticalkv, defensivekv
from kvbench.reference.expected_attention import reference_scores
from kvbench.reference.kvmerger import reference_kvmerger
from kvbench.reference.merged import keep_and_evict, reference_d2o, reference_keepkv, reference_weightedkv
from kvbench.reference.scored import keep_best, reference_adakv, reference_knorm, reference_snapkv
from kvbench.reference.stepped import ReferenceCaM, ReferenceH2O, ReferenceStreamingLLM, ReferenceTOVA

Head = tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor | None]  # positions, keys, values, bias


def chosen(layer, positions) -> list[Head]:
    return [(kept, layer.keys[h, kept], layer.values[h, kept], None) for h, kept in enumerate(positions)]


def grouped_sums(policy, layer):
    return reduce_groups(layer.column_sums, layer.n_kv_heads, policy.group_reduce)


def stepped_twin(policy, layer, m):
    states = (layer.keys, layer.values)
    if policy.name == "h2o":
        options = (policy.recent_share, policy.normalise_by_count, policy.group_reduce)
        return ReferenceH2O(*states, layer.column_sums, m, *options)
    if policy.name == "cam":
        options = (policy.start_share, policy.merge_tokens, policy.gate, policy.gate_mean, policy.merge)
        return ReferenceCaM(*states, layer.column_sums, m, *options)
    if policy.name == "tova":
        return ReferenceTOVA(*states, layer.window_attention[:, -1], m, policy.keep_newest)
    return ReferenceStreamingLLM(*states, m, policy.start_tokens)


def stepped(policy, layer, m) -> list[Head]:
    keys, values, positions = stepped_twin(policy, layer, m).stacked()
    positions = torch.as_tensor(positions).expand(layer.n_kv_heads, -1).tolist()
    return [(kept, keys[h], values[h], None) for h, kept in enumerate(positions)]


def snapkv(policy, layer, m) -> list[Head]:
    options = (policy.observation_tokens, policy.kernel_tokens, policy.pooling, policy.group_reduce)
    return chosen(layer, reference_snapkv(layer.window_attention, layer.n_kv_heads, m, *options))


def knorm(policy, layer, m) -> list[Head]:
    return chosen(layer, reference_knorm(layer.keys, m, policy.recent_tokens))


def expected_scores(policy, layer) -> list[list[float]]:
    extras = layer.extras
    scores = reference_scores(
        extras["queries"], layer.keys, layer.values, extras["rotary_frequencies"], float(extras["scaling"]),
        n_future=policy.future_tokens, n_sink=policy.start_tokens, use_covariance=policy.use_covariance,
        use_vnorm=policy.use_value_norm, epsilon=policy.epsilon,
    )  # fmt: skip
    assert relative_rms(policy.scores(layer)[:, policy.start_tokens :], scores) < 1e-5
    return [[0.0] * policy.start_tokens + head for head in scores.tolist()]


def expected_attention(policy, layer, m) -> list[Head]:
    return chosen(layer, keep_best(expected_scores(policy, layer), layer.n_tokens, m, policy.start_tokens, 0))


def adakv(policy, layer, m) -> list[Head]:
    base = policy.base
    scores = expected_scores(base, layer) if isinstance(base, ExpectedAttention) else base.scores(layer).tolist()
    return chosen(layer, reference_adakv(scores, m, base.first_tokens, base.last_tokens, policy.floor_share))


def kvmerger(policy, layer, m) -> list[Head]:
    a, n_slots = grouped_sums(policy, layer), m if policy.budget_mode == "exact" else None
    pivot_scores = {"attention": a, "last": torch.zeros_like(a), "random": policy.pivot_scores(a, layer)}[policy.pivot]
    heads = reference_kvmerger(
        layer.keys, layer.values, a, *policy.protected_counts(layer.n_tokens, n_slots), n_slots=n_slots,
        epsilon=policy.threshold, linkage=policy.linkage, scope=policy.scope, pivot_scores=pivot_scores,
        sigma=policy.sigma if policy.sigma_mode == "fixed" else None, value_scale=policy.value_scale,
        merge=policy.merge,
    )  # fmt: skip
    expected: list[Head] = []
    for slots in heads:
        sizes = torch.tensor([len(slot.S) for slot in slots]).float()
        bias = sizes.log() if policy.value_scale == "log_bias" and policy.merge else None
        keys, values = (torch.stack([getattr(slot, name) for slot in slots]) for name in ("key", "value"))
        expected.append(([slot.p for slot in slots], keys, values, bias))
    return expected


def keepkv_window(policy, layer):
    """Rows as the official code has them, exp(q.k) itself in fp64, and its epsilon."""
    rows = layer.window_attention[:, -policy.observation_tokens :].double()
    if policy.row_scale == "softmax":
        return reduce_groups(rows, layer.n_kv_heads, policy.group_reduce), 0.0
    logsumexp = layer.extras["window_logsumexp"][:, -policy.observation_tokens :, None].double()
    if policy.row_scale == "raw":
        return reduce_groups(rows * logsumexp.exp(), layer.n_kv_heads, policy.group_reduce), 2.0**-14
    rows = rows * (logsumexp - logsumexp.amax(1, keepdim=True)).exp()
    return reduce_groups(rows, layer.n_kv_heads, policy.group_reduce), 0.0


def evicted_and_merged(policy, layer, m) -> list[Head]:
    protected, bias = (policy.start_tokens, policy.recent_share), None
    if not policy.merge:
        return chosen(layer, [keep_and_evict(head, m, *protected)[0] for head in policy.scores(layer).tolist()])
    if policy.name == "d2o":
        positions, keys, values = reference_d2o(layer.keys, layer.values, grouped_sums(policy, layer), m, *protected)
    elif policy.name == "weightedkv":
        positions, values = reference_weightedkv(layer.values, grouped_sums(policy, layer), m, *protected)
        keys = [layer.keys[h, kept] for h, kept in enumerate(positions)]  # keys are never mixed
    else:
        window, epsilon = keepkv_window(policy, layer)
        keys, values, positions, bias = reference_keepkv(
            layer.keys, layer.values, window, m, n_start=protected[0], recent_share=protected[1],
            T_sim=policy.threshold, distance_weight=policy.distance_weight, merge_keys=policy.merge_keys,
            epsilon=epsilon,
        )  # fmt: skip
        positions = positions.tolist()
    return [(kept, keys[h], values[h], bias[h] if bias is not None else None) for h, kept in enumerate(positions)]


EXACT = (0.0, 0.0, 0.0)
SHARED = {  # twins that need their arguments spelled out; limits of the relative RMS of keys, values, biases
    **dict.fromkeys(("h2o", "cam", "streaming_llm", "tova"), (stepped, *EXACT)),
    **dict.fromkeys(("snapkv", "pyramidkv"), (snapkv, *EXACT)),
    "knorm": (knorm, *EXACT),
    "expected_attention": (expected_attention, *EXACT),
    "adakv": (adakv, *EXACT),
    **dict.fromkeys(("kvmerger", "kvmerger_bias"), (kvmerger, 1e-5, 1e-5, 1e-6)),
    "critical_adakv": (criticalkv.twin, *EXACT),
    "layer_defensivekv": (defensivekv.twin, *EXACT),
    "d2o": (evicted_and_merged, 1e-6, 1e-6, 0.0),
    "weightedkv": (evicted_and_merged, 0.0, 1e-6, 0.0),
    "keepkv": (evicted_and_merged, 1e-6, 1e-6, 1e-6),
}


def twin_of(name):
    """A method's twin and the limits: from the table, else `twin` and `LIMITS` of `kvbench.reference.NAME`."""
    if name in SHARED:
        return SHARED[name]
    module = importlib.import_module(f"kvbench.reference.{name}")
    return module.twin, *getattr(module, "LIMITS", EXACT)


def assert_as_twin(policy, layer, m) -> list[Head]:
    """Same slots in every head, in order; keys, values and biases within the twin's limits."""
    twin, *limits = twin_of(policy.name)
    expected, got = twin(policy, layer, m), policy.compress(layer, m)
    lengths = [got.keys.shape[1]] * layer.n_kv_heads if got.lengths is None else got.lengths.tolist()
    assert lengths == [len(positions) for positions, *_ in expected]
    assert got.n_slots == sum(lengths)
    for h, (positions, *tensors) in enumerate(expected):
        if got.positions is not None:
            assert got.positions[h, : lengths[h]].tolist() == positions
        for ours, theirs, limit in zip((got.keys, got.values), tensors, limits, strict=False):
            assert relative_rms(ours[h, : lengths[h]], theirs) <= limit
    biases = [bias for *_, bias in expected]
    assert [bias is None for bias in biases] == [got.bias is None] * len(biases)
    if got.bias is not None:  # those of all heads together: one that keeps nearly all has biases near zero
        ours = torch.cat([got.bias[h, :length] for h, length in enumerate(lengths)])
        assert relative_rms(ours, torch.cat(biases)) <= limits[2]
    return expected
