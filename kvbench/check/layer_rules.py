"""Rules about what `compress` returns."""

from __future__ import annotations

import torch

from kvbench.check.inputs import HEAD_DIM, Case
from kvbench.check.rule import Broken, NotRun, describe
from kvbench.check.subject import Subject
from kvbench.methods.base import CompressedLayer, constant_state, slot_state


def compresses(subject: Subject) -> str:
    """`compress` returns a `CompressedLayer` for MHA, GQA and MQA, for short and long prompts, at every budget."""
    for case in subject.cases:
        try:
            kept = subject.compress(case)
        except Exception as error:  # foreign code: whatever it raises is a finding
            needs = ", ".join(sorted(subject.policy.needs)) or "nothing"
            raise Broken(
                f"{case}: {describe(error)}",
                f"mend it; needs declares {needs}, so only that is there. A budget too small is refused in "
                "layer_budgets, not in compress",
            ) from error
        if not isinstance(kept, CompressedLayer):
            raise Broken(f"{case}: a {type(kept).__name__} came back", "return a CompressedLayer")
        subject.kept[case] = kept
    if not subject.kept:
        raise Broken("no case could be tried", "take at least one of the budgets 0.1 to 1")
    lengths = sorted({case.n_tokens for case in subject.kept})
    budgets = sorted({case.budget for case in subject.kept})
    return f"{len(subject.kept)} cases: {lengths} tokens, budgets {budgets}"


def shapes(subject: Subject) -> str:
    """Keys and values are `(H_k, m, D)`, positions `(H_k, m)`, state `(H_k, m, ...)`."""
    for case, kept in subject.kept.items():
        m = kept.keys.shape[1] if kept.keys.ndim == 3 else -1
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(("keys", "values"), (case.n_kv_heads, m, HEAD_DIM))
        if kept.positions is not None:
            wanted["positions"] = (case.n_kv_heads, m)
        for name, shape in wanted.items():
            if tuple(getattr(kept, name).shape) != shape:
                raise Broken(
                    f"{case}: {name} {tuple(getattr(kept, name).shape)}, expected {shape}",
                    "keep states per KV head: reduce the query heads of a group before you choose tokens",
                )
        for name, state in slot_state(kept.state).items():
            if tuple(state.shape[:2]) != (case.n_kv_heads, m):
                raise Broken(
                    f"{case}: state {name!r} {tuple(state.shape)}, expected {(case.n_kv_heads, m)} and more",
                    "declare what is not per slot with field(metadata=CONSTANT)",
                )
    names = sorted(
        {name for kept in subject.kept.values() for name in {**slot_state(kept.state), **constant_state(kept.state)}}
    )
    return f"as they should be; state and constants: {', '.join(names) or 'none'}"


def dtypes(subject: Subject) -> str:
    """Keys and values keep the model's dtype, positions are int64, all on the layer's device."""
    for case, kept in subject.kept.items():
        wanted = {"keys": case.dtype, "values": case.dtype}
        if kept.positions is not None:
            wanted["positions"] = torch.int64
        for name, dtype in wanted.items():
            tensor = getattr(kept, name)
            if tensor.dtype != dtype:
                raise Broken(f"{case}: {name} are {tensor.dtype}", f"return {name} as {dtype}: .to(layer.keys.dtype)")
            if tensor.device != subject.states(case).keys.device:
                raise Broken(f"{case}: {name} lie on {tensor.device}", "create tensors with device=layer.keys.device")
    return ", ".join(sorted({str(case.dtype).removeprefix("torch.") for case in subject.kept}))


def lengths(subject: Subject) -> str:
    """Ragged heads say how many slots they keep: `lengths (H_k,)` int64, 1 to m; a policy that steps has none."""
    ragged = {case: kept for case, kept in subject.kept.items() if kept.lengths is not None}
    for case, kept in ragged.items():
        assert kept.lengths is not None
        if subject.policy.steps:
            raise Broken(f"{case}: lengths beside steps", "keep equal heads in a policy that steps, or drop the step")
        if kept.lengths.dtype != torch.int64 or tuple(kept.lengths.shape) != (case.n_kv_heads,):
            raise Broken(
                f"{case}: lengths {kept.lengths.dtype} {tuple(kept.lengths.shape)}", "return (H_k,) of torch.int64"
            )
        low, high = int(kept.lengths.min()), int(kept.lengths.max())
        if low < 1 or high > kept.keys.shape[1]:
            raise Broken(
                f"{case}: lengths from {low} to {high} with m = {kept.keys.shape[1]}",
                "keep at least one slot per head, and pad to the longest head",
            )
    return f"ragged in {len(ragged)} of {len(subject.kept)} cases" if ragged else "all heads keep equally many slots"


def exact_budget(subject: Subject) -> str:
    """The kept slots are the budget exactly, at 10, 20, 35, 50 and 100 %, ties and padding included."""
    exact = subject.policy.exact_budget
    for case, kept in subject.kept.items():
        allowed = case.n_kv_heads * subject.budget_tokens(case)
        if kept.n_slots > allowed or (exact and kept.n_slots != allowed):
            raise Broken(
                f"{case}: {kept.n_slots} slots in all heads, {'expected' if exact else 'at most'} {allowed}",
                "keep budget_tokens slots per KV head on average"
                + (", or set exact_budget to False if a threshold decides" if exact else ""),
            )
    budgets = ", ".join(f"{100 * budget:g} %" for budget in sorted({case.budget for case in subject.kept}))
    return f"{budgets}: {'exact' if exact else 'within the limit'}"


def positions(subject: Subject) -> str:
    """Every slot stands for one prompt token of its own: positions in 0 .. T-1, no two alike in a head."""
    ascending = True
    verbatim = total = 0
    for case, kept, head, length in subject.heads():
        if kept.positions is None:
            continue
        places = kept.positions[head, :length]
        if int(places.min()) < 0 or int(places.max()) >= case.n_tokens:
            raise Broken(
                f"{case}: positions from {int(places.min())} to {int(places.max())}",
                "give the index in the prompt of the token each slot stands for",
            )
        if len(places.unique()) != length:
            raise Broken(
                f"{case}: head {head} has {length} slots at {len(places.unique())} positions",
                "keep each token once per head; a merged slot stands for its pivot",
            )
        ascending &= bool((places.diff() > 0).all())
        verbatim += int((kept.keys[head, :length] == subject.states(case).keys[head, places]).all(-1).sum())
        total += length
    order = "ascending" if ascending else "not always ascending"
    if not total:
        return "not given"
    return f"valid and unique, {order}; {100 * verbatim / total:.0f} % of the kept keys are a prompt token's own"


def bias(subject: Subject) -> str:
    """A bias is `(H_k, m)` fp32 and finite on every kept slot."""
    biased = {case: kept.bias for case, kept in subject.kept.items() if kept.bias is not None}
    for case, values in biased.items():
        shape = tuple(subject.kept[case].keys.shape[:2])
        if values.dtype != torch.float32 or tuple(values.shape) != shape:
            raise Broken(
                f"{case}: bias {values.dtype} {tuple(values.shape)}", f"return it as torch.float32 of shape {shape}"
            )
    for case, kept, head, length in subject.heads():
        if kept.bias is not None and not bool(kept.bias[head, :length].isfinite().all()):
            raise Broken(
                f"{case}: bias of head {head} is not finite", "leave a slot out instead of hiding it with -inf"
            )
    return f"in {len(biased)} of {len(subject.kept)} cases" if biased else "none"


def finite(subject: Subject) -> str:
    """Keys and values of kept slots are finite, also where all keys of a head are equal."""
    for case, kept, head, length in subject.heads():
        for name in ("keys", "values"):
            if not bool(getattr(kept, name)[head, :length].isfinite().all()):
                raise Broken(f"{case}: {name} of head {head} are not finite", "guard divisions and logarithms by zero")
    return "NaN and infinity in none"


def full_budget(subject: Subject) -> str:
    """A budget of 100 % keeps the full cache: every key and value, no bias, in any order."""
    if not subject.policy.exact_budget:
        raise NotRun("exact_budget is false: a threshold may compress at any budget")
    whole = [case for case in subject.kept if case.budget == 1.0]
    for case in whole:
        kept, layer = subject.kept[case], subject.states(case)
        order = torch.arange(case.n_tokens).expand(case.n_kv_heads, -1)
        if kept.positions is not None:
            order = kept.positions.argsort(1)
        for name in ("keys", "values"):
            rows = getattr(kept, name).gather(1, order[..., None].expand_as(kept.keys))
            if not torch.equal(rows, getattr(layer, name)):
                raise Broken(f"{case}: {name} are not those of the prompt", _whole(case))
        if kept.bias is not None and bool((kept.bias != 0).any()):
            raise Broken(f"{case}: bias up to {float(kept.bias.abs().max()):.3g}", _whole(case))
    return f"equal to the full cache in {len(whole)} cases"


def _whole(case: Case) -> str:
    return f"return the layer as it is if budget_tokens >= {case.n_tokens} (layer.whole())"
