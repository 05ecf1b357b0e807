"""Refit kept slots so that the attention of some queries comes out as with the whole cache.

Dropping keys from softmax attention makes two errors: the mass of the dropped keys is shared out among the kept ones,
and the kept values do not add up to the same output. Values enter the output linearly, so ridge regression towards the
old values mends them in closed form; keys and biases enter it through the softmax, and one Gauss-Newton step is the
same regression on the derivative. There are fewer queries than slots, so everything is solved in the space of the
queries, whose number does not grow with the cache.

This is the update of GRKV (arXiv 2605.31105; official code pjunjie/GRKV, grkv/solver.py and operators.py). "Attention
matching" (Zweiger et al., arXiv 2602.16284) fits biases and values too, by least squares without a ridge.

Shapes: N queries per KV head, those of a group's query heads one below the other, already rotated and multiplied by the
model's scaling; m slots. `fixed` `(H_k, m)` bool marks slots that are to stay, padding of ragged heads among them;
`row_weights` `(H_k or 1, N)` says how much each query counts, None: all alike. Everything is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST_FACTOR, HIGHEST_FACTOR = math.exp(-2.0), math.exp(3.0)  # of a slot's weight in the softmax
BLOCK_LOGITS = 2**25  # logits held at a time by `attend_to_all`: 128 MiB
SHORT_OF = 1.0 - 1e-5  # of a cap, so that the last bit does not decide whether it is kept
TINY = torch.finfo(torch.float32).tiny


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """Softmax rows `weights` `(H_k, N, m)`, their `output` `(H_k, N, D)` and `log_sum_exp` `(H_k, N)`, all fp32."""

    weights: Tensor
    output: Tensor
    log_sum_exp: Tensor

    def mass(self, log_sum_exp: Tensor) -> Tensor:
        """The rows in units of attention that has another log-sum-exp `(H_k, N)`: what kept keys get among all keys."""
        return self.weights * (self.log_sum_exp - log_sum_exp).exp().unsqueeze(-1)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None
) -> Attention:
    """Attention of queries `(H_k, N, D)` over the slots' keys and values `(H_k, m, D)`.

    `hidden`, bool and broadcast to `(H_k, N, m)`, marks what a query does not see, e.g. padding; one that sees nothing
    has weights and output 0 and log-sum-exp -inf. `bias` `(H_k, m)` is added to the logits.
    """
    logits = torch.bmm(queries.float(), keys.float().transpose(1, 2))
    if bias is not None:
        logits += bias.unsqueeze(1)
    if hidden is not None:
        logits.masked_fill_(hidden, -math.inf)
    log_sum_exp = logits.logsumexp(-1)
    weights = logits.softmax(-1)
    if hidden is not None:
        weights.masked_fill_(hidden, 0.0)
    return Attention(weights, torch.bmm(weights, values.float()), log_sum_exp)


def attend_to_all(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output `(H_k, N, D)` and log-sum-exp `(H_k, N)` of `attend` over all T tokens, a block of queries at a time."""
    keys, values = keys.float(), values.float()
    block = max(1, BLOCK_LOGITS // (keys.shape[0] * keys.shape[1]))
    parts = [
        attend(queries[:, rows], keys, values, hidden=None if hidden is None else hidden[:, rows])[1:]
        for rows in (slice(start, start + block) for start in range(0, queries.shape[1], block))
    ]
    output, log_sum_exp = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return output, log_sum_exp


def kept_mass(rows: Tensor, positions: Tensor) -> Tensor:
    """Attention of N observed queries on the keys kept at `(H_k, m)` positions, `(H_k, N, m)` fp32.

    `rows`, `(H_k, N, T)` fp32, are softmax rows over all keys: where a prefill observed them, no query is needed.
    """
    return rows.gather(2, positions.unsqueeze(1).expand(-1, rows.shape[1], -1))


# ---- corrections -----------------------------------------------------------------------------------------------------


def ridge_correction(
    design: Tensor, residual: Tensor, ridge: float, *,
    relative: bool = True, row_weights: Tensor | None = None, fixed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Solve `min sum_n w_n |residual_n - design_n x|^2 + lambda |x|^2`, `(H_k, m, C)` fp32.

    Of N equations in m unknowns, design `(H_k, N, m)` and residual `(H_k, N, C)` fp32. Lambda is `ridge`, times the
    mean squared row of the weighted design if `relative`. With attention as the design and what its output lacks as the
    residual, x is the correction of the values.
    """
    if fixed is not None:
        design = design.masked_fill(fixed.unsqueeze(1), 0.0)
    if row_weights is not None:
        roots = row_weights.sqrt().unsqueeze(-1)
        design, residual = design * roots, residual * roots
    gram = torch.bmm(design, design.transpose(1, 2))
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ridge * (diagonal.mean(1, keepdim=True).clamp_min(TINY) if relative else 1.0)
    factor = torch.linalg.cholesky_ex(gram).L  # positive definite by the ridge; the check would wait for the device
    return torch.bmm(design.transpose(1, 2), torch.cholesky_solve(residual, factor))


def key_correction(
    queries: Tensor, attention: Attention, values: Tensor, residual: Tensor, ridge: float, *,
    relative: bool = True, row_weights: Tensor | None = None, fixed: Tensor | None = None,
    iterations: int = 16, tolerance: float = 1e-6, one_system: bool = False,
) -> Tensor:  # fmt: skip
    """One Gauss-Newton step of the keys, `(H_k, m, D)` fp32, for an output that lacks `residual` `(H_k, N, D)`.

    A change d of the keys changes the output of query q, to first order, by `sum_s A_s (q . d_s)(v_s - o)`. Its ridge
    regression, lambda as in `ridge_correction`, is solved in the space of the outputs by conjugate gradients, each head
    by itself or all as one system (the same solution, another path). They stop after `iterations` or where the
    remainder is `tolerance` times the start. With queries `(H_k, N, 1)` of ones it is the step of a bias.
    """
    queries, values, (weights, output, _) = queries.float(), values.float(), attention
    if fixed is not None:
        weights = weights.masked_fill(fixed.unsqueeze(1), 0.0)
    if row_weights is not None:
        roots = row_weights.sqrt().unsqueeze(-1)
        weights, residual = weights * roots, residual * roots

    def changed_output(change: Tensor) -> Tensor:
        moved = weights * torch.bmm(queries, change.transpose(1, 2))
        return torch.bmm(moved, values) - moved.sum(-1, keepdim=True) * output

    def gradient(dual: Tensor) -> Tensor:
        pull = torch.bmm(dual, values.transpose(1, 2)) - (dual * output).sum(-1, keepdim=True)
        return torch.bmm((weights * pull).transpose(1, 2), queries)

    strength: Tensor | float = ridge
    if relative:
        spread = values.square().sum(-1).unsqueeze(1) + output.square().sum(-1, keepdim=True)
        spread = (spread - 2.0 * torch.bmm(output, values.transpose(1, 2))).clamp_min(0.0)
        squares = (weights.square() * spread).sum(-1) * queries.square().sum(-1)  # summed over an output's channels
        strength = ridge * (squares.mean(1) / output.shape[-1]).clamp_min(TINY).reshape(-1, 1, 1)
    dual = conjugate_gradients(
        lambda dual: changed_output(gradient(dual)) + strength * dual, residual, iterations, tolerance,
        dims=(-3, -2, -1) if one_system else (-2, -1),
    )  # fmt: skip
    return gradient(dual)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], wanted: Tensor, iterations: int, tolerance: float, dims: tuple[int, ...]
) -> Tensor:
    """Solve `operator(x) = wanted` for a symmetric positive definite operator; `dims`, from the last, are one system's.

    Remainders are made orthogonal again in every step, which rounding undoes long before a system is solved: otherwise
    the last bits of the operator decide where it is after a few steps. The number of launches is fixed and a system
    that has converged stands still, so that no device is waited for.
    """
    solution, remainder, direction = torch.zeros_like(wanted), wanted, wanted
    square = wanted.square().sum(dims, keepdim=True)
    enough = tolerance**2 * square
    earlier: list[Tensor] = []
    for _ in range(iterations):
        going = square > enough
        image = operator(direction)
        step = torch.where(going, square / (direction * image).sum(dims, keepdim=True).clamp_min(TINY), 0.0)
        solution = solution + step * direction
        earlier.append(remainder * square.clamp_min(TINY).rsqrt())
        basis, moved = torch.stack(earlier), remainder - step * image
        moved = moved - (basis * (basis * moved).sum(dims, keepdim=True)).sum(0)
        remainder = torch.where(going, moved, remainder)
        left = remainder.square().sum(dims, keepdim=True)
        direction = remainder + torch.where(going, left / square.clamp_min(TINY), 0.0) * direction
        square = left
    return solution


def refit_bias(
    mass: Tensor, ridge: float, *,
    relative: bool = True, row_weights: Tensor | None = None, fixed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Bias `(H_k, m)` fp32 with which the kept keys attract all the mass that the queries have to give.

    `mass` `(H_k, N, m)` is that of `kept_mass` or `Attention.mass`. The bias is between log `LOWEST_FACTOR` and log
    `HIGHEST_FACTOR`; the larger the ridge, as in `ridge_correction`, the closer to none.
    """
    lost = 1.0 - mass.sum(-1, keepdim=True)
    factors = ridge_correction(mass, lost, ridge, relative=relative, row_weights=row_weights, fixed=fixed).squeeze(-1)
    return (1.0 + factors).clamp(LOWEST_FACTOR, HIGHEST_FACTOR).log()


def refit_values(
    rows: Tensor, mass: Tensor, all_values: Tensor, kept_values: Tensor, bias: Tensor | None, ridge: float
) -> Tensor:
    """Values `(H_k, m, D)` with which the observed queries get the output they had over all `(H_k, T, D)` values.

    `rows` and `mass` are those of `kept_mass`; the larger `ridge`, the closer to the kept values themselves.
    """
    weights = mass if bias is None else mass * bias.exp().unsqueeze(1)
    attention = weights / weights.sum(-1, keepdim=True).clamp_min(TINY)
    residual = torch.bmm(rows, all_values.float()) - torch.bmm(attention, kept_values.float())
    return (kept_values.float() + ridge_correction(attention, residual, ridge)).to(kept_values.dtype)


def add_within(states: Tensor, correction: Tensor, cap_ratio: float, fixed: Tensor) -> Tensor:
    """Add a correction to states `(H_k, m, D)`, at most `cap_ratio` times the norm of each head's slots that may move.

    The bound holds after rounding to the states' dtype: a head beyond it is scaled by 0.9, up to four times, and else
    left as it was (GRKV's `round_bounded`).
    """
    start, slots = states.float(), fixed.unsqueeze(-1)
    limit = cap_ratio * _head_norms(start.masked_fill(slots, 0.0))
    scale = (SHORT_OF * limit / _head_norms(correction).clamp_min(TINY)).clamp_max(1.0)
    for _ in range(5):
        rounded = torch.where(slots, states, (start + scale * correction).to(states.dtype))
        beyond = _head_norms(rounded.float() - start) > limit
        scale = scale * torch.where(beyond, 0.9, 1.0)
    return torch.where(beyond, states, rounded)


def _head_norms(states: Tensor) -> Tensor:
    return torch.linalg.vector_norm(states, dim=(1, 2), keepdim=True)
