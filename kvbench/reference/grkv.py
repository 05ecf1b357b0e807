"""GRKV in plain loops and fp64: the yardstick for `kvbench.methods.grkv`.

Symbols of the paper: K, V the cache, o* the outputs over all of it, A the attention over the kept slots; J maps a
change of the keys to that of the outputs. Values are solved in the space of the slots (the other end of the identity
`(X'X + l)^-1 X' = X' (XX' + l)^-1`), keys in the Krylov space that conjugate gradients search, with J written out.
Slots are those of the base, which has a twin of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.methods.base import LayerStates
from kvbench.reference.expected_attention import rope

LIMITS = (5e-6, 5e-6, 0.0)  # of keys and values, corrections being about a tenth of them
Head = tuple[list[int], Tensor, Tensor, None]


def twin(policy: Any, layer: LayerStates, n_slots: int) -> list[Head]:
    """Positions, keys, values and no bias of every KV head."""
    base = policy.base.compress(layer, n_slots)
    heads = range(layer.n_kv_heads)
    kept = [base.positions[h, : n_slots if base.lengths is None else base.lengths[h]].tolist() for h in heads]
    K0 = [layer.keys[h, kept[h]].double() for h in heads]
    V0 = [layer.values[h, kept[h]].double() for h in heads]
    if policy.refit == "none" or n_slots >= layer.n_tokens:
        return _heads(layer, kept, K0, V0)
    T, Q = layer.n_tokens, min(policy.fit_queries, layer.n_tokens)
    t = [(i * T // Q + (i + 1) * T // Q - 1) // 2 for i in range(Q)]
    if policy.sample == "window":
        t = list(range(T - Q, T))
    w, penalty = policy.query_weight / Q, policy.ridge
    scores = policy.scorer.scores(layer)
    queries, mutable, targets = [], [], []
    for h in heads:
        rows = []
        for g in range(layer.group_size):
            for i in t:
                q = layer.extras["queries"][h * layer.group_size + g, i].double()
                turn = T - 1 - i if policy.place == "last" else 0
                rows.append((rope(q, turn, layer.extras["rotary_frequencies"].double()), i))
        queries.append(
            [(q * layer.extras["scaling"].double(), T - 1 if policy.place == "last" else i) for q, i in rows]
        )
        prefix = [s for s, j in enumerate(kept[h]) if j < T - policy.scorer.last_tokens]
        first = policy.scorer.first_tokens
        ranks = sorted((kept[h][s] < first, float(scores[h, kept[h][s]]), s) for s in prefix)
        mutable.append(sorted(s for *_, s in ranks[: len(prefix) - int(policy.guard_share * len(prefix) + 1e-9)]))
        targets.append(attention(queries[h], layer.keys[h].double(), layer.values[h].double(), list(range(T)))[1])

    def outputs(K: list[Tensor], V: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [attention(queries[h], K[h], V[h], kept[h]) for h in heads]

    def objective(K: list[Tensor], V: list[Tensor]) -> float:
        total = 0.0
        for h, (_, o) in enumerate(outputs(K, V)):
            total += w * float((o - targets[h]).square().sum())
            total += penalty * float((K[h] - K0[h]).square().sum() + (V[h] - V0[h]).square().sum())
        return total

    V1 = []
    for h, (A, o) in enumerate(outputs(K0, V0)):
        X = w**0.5 * A[:, mutable[h]]
        eye = torch.eye(len(mutable[h]), dtype=torch.float64)
        dV = torch.linalg.solve(X.T @ X + penalty * eye, X.T @ (w**0.5 * (targets[h] - o)))
        V1.append(bounded(V0[h], dV, mutable[h], policy.value_cap_ratio, layer.values.dtype))
    Js, residuals = [], []
    for h, (A, o) in enumerate(outputs(K0, V1)):
        Q_h = torch.stack([q for q, _ in queries[h]])
        Js.append(jacobian(Q_h, A, V1[h], o, mutable[h]) * w**0.5)
        residuals.append((w**0.5 * (targets[h] - o)).flatten())
    dual = krylov_solution(Js, residuals, penalty, policy.iterations, policy.tolerance)
    K1 = []
    for h in heads:
        dK = (Js[h].T @ dual[h]).reshape(len(mutable[h]), -1)
        K1.append(bounded(K0[h], dK, mutable[h], policy.key_cap_ratio, layer.keys.dtype))
    candidates = [(K0, V0), (K0, V1), (K1, V1)][: 3 if policy.refit == "both" else 2]
    return _heads(layer, kept, *min(candidates, key=lambda states: objective(*states)))


def _heads(layer: LayerStates, kept: list[list[int]], K: list[Tensor], V: list[Tensor]) -> list[Head]:
    return [(kept[h], K[h].to(layer.keys.dtype), V[h].to(layer.values.dtype), None) for h in range(len(kept))]


def attention(queries: list[tuple[Tensor, int]], K: Tensor, V: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
    """Softmax rows and outputs of queries, each with the last position it sees; zeros where that is no slot."""
    rows = torch.zeros(len(queries), len(positions), dtype=torch.float64)
    for n, (q, last) in enumerate(queries):
        seen = [s for s, j in enumerate(positions) if j <= last]
        if seen:
            rows[n, seen] = torch.softmax(K[seen] @ q, 0)
    return rows, rows @ V


def jacobian(Q: Tensor, A: Tensor, V: Tensor, o: Tensor, mutable: list[int]) -> Tensor:
    """J, `(N * D, slots * D)`: slot s moves output n by `A_ns (q_n . dk_s) (v_s - o_n)`."""
    J = torch.zeros(*o.shape, len(mutable), Q.shape[1], dtype=torch.float64)
    for n in range(len(Q)):
        for i, s in enumerate(mutable):
            J[n, :, i] = A[n, s] * torch.outer(V[s] - o[n], Q[n])
    return J.reshape(o.numel(), -1)


def krylov_solution(Js: list[Tensor], b: list[Tensor], penalty: float, steps: int, tolerance: float) -> list[Tensor]:
    """Where exact conjugate gradients on `(J J' + penalty) x = b` of all heads stand after some steps from x = 0.

    That is the solution within the span of b, M b, M M b and so on, here from an orthonormal basis of it.
    """
    r = torch.cat(b)
    J = torch.block_diag(*Js)
    M = J @ J.T + penalty * torch.eye(len(r), dtype=torch.float64)
    basis, x, new = r[:, None][:, :0], torch.zeros_like(r), r
    for _ in range(steps):
        if float((r - M @ x).norm()) <= tolerance * float(r.norm()):
            break
        for _ in range(2):
            new = new - basis @ (basis.T @ new)
        basis = torch.cat([basis, (new / new.norm())[:, None]], dim=1)
        x = basis @ torch.linalg.solve(basis.T @ M @ basis, basis.T @ r)
        new = M @ basis[:, -1]
    return list(x.split([len(part) for part in b]))


def bounded(start: Tensor, change: Tensor, mutable: list[int], cap: float, dtype: torch.dtype) -> Tensor:
    """`start` with its mutable slots changed within the cap and rounded; as it was where rounding does not allow it."""
    limit = cap * float(start[mutable].norm())
    scale = min(1.0, (1 - 1e-5) * limit / max(float(change.norm()), 1e-300))
    for _ in range(5):
        out = start.clone()
        out[mutable] = (start[mutable] + scale * change).to(dtype).double()
        if float((out - start).norm()) <= limit:
            return out
        scale *= 0.9
    return start
