"""Refitting against autograd, dense solves in the space of the slots and softmax written out, all in fp64."""

import math

import pytest
import torch
from policy_inputs import relative_rms

from kvbench.ops import refit
from kvbench.ops.refit import (
    add_within,
    attend,
    attend_to_all,
    conjugate_gradients,
    kept_mass,
    key_correction,
    refit_bias,
    ridge_correction,
)  # fmt: skip

HEADS, ROWS, SLOTS, TOKENS, CHANNELS = 3, 10, 14, 40, 6
RIDGES = [(0.05, True), (0.01, False)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(ragged: bool):
    """Queries, keys, values, wanted outputs, weights of rows, fixed slots, and padding hidden from all queries."""
    queries, keys = normal(HEADS, ROWS, CHANNELS), normal(HEADS, SLOTS, CHANNELS, seed=1)
    values, wanted = normal(HEADS, SLOTS, CHANNELS, seed=2), normal(HEADS, ROWS, CHANNELS, seed=3)
    lengths = torch.tensor([SLOTS, SLOTS - 5, SLOTS - 2] if ragged else [SLOTS] * HEADS).unsqueeze(1)
    padding = torch.arange(SLOTS) >= lengths
    fixed = padding | (torch.arange(SLOTS) % 4 == 0)
    return queries, keys, values, wanted, torch.linspace(0.1, 2, ROWS).expand(HEADS, -1), fixed, padding


def solved(design, residual, ridge, relative):
    """Ridge regression of one head in the space of the unknowns, fp64; lambda from the mean squared row if relative."""
    strength = ridge * float(design.square().sum(1).mean()) if relative else ridge
    return torch.linalg.solve(design.T @ design + strength * torch.eye(design.shape[1]).double(), design.T @ residual)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("own_place", [False, True])
def test_attention_is_softmax_written_out_also_in_blocks(monkeypatch, ragged, own_place):
    queries, keys, values, *_, padding = problem(ragged)
    hidden = padding.unsqueeze(1).repeat(1, ROWS, 1)
    if own_place:
        hidden = hidden | (torch.arange(SLOTS) > torch.arange(ROWS).unsqueeze(1) + 2)
        hidden[0, 4] = True  # a query that sees no slot
    bias = normal(HEADS, SLOTS, seed=5)
    got = attend(queries, keys, values, bias, hidden)
    for h in range(HEADS):
        for n in range(ROWS):
            seen = ~hidden[h, n]
            logits = (queries[h, n].double() @ keys[h].double().T + bias[h])[seen]
            share = logits.softmax(0)
            assert torch.allclose(got.weights[h, n, seen].double(), share, atol=1e-6)
            assert torch.allclose(got.output[h, n].double(), share @ values[h, seen].double(), atol=1e-5)
            assert got.weights[h, n, ~seen].abs().sum() == 0
            assert float(got.log_sum_exp[h, n]) == pytest.approx(float(logits.logsumexp(0)), rel=1e-5)
    whole = attend(queries, keys, values, hidden=hidden)
    monkeypatch.setattr(refit, "BLOCK_LOGITS", 3 * HEADS * SLOTS)
    for one, other in zip(attend_to_all(queries, keys, values, hidden), whole[1:], strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_mass_of_kept_keys_is_what_they_get_among_all():
    queries, keys = normal(HEADS, ROWS, CHANNELS), normal(HEADS, TOKENS, CHANNELS, seed=1)
    positions = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(h))[:9] for h in range(3)])
    kept = keys.gather(1, positions.unsqueeze(-1).expand(-1, -1, CHANNELS))
    everything = attend(queries, keys, keys)
    mass = attend(queries, kept, kept).mass(everything.log_sum_exp)
    assert torch.allclose(mass, kept_mass(everything.weights, positions), atol=1e-6)


@pytest.mark.parametrize(("ridge", "relative"), RIDGES)
@pytest.mark.parametrize("ragged", [False, True])
def test_values_are_the_weighted_ridge_regression_of_the_slots_that_may_move(ragged, ridge, relative):
    queries, keys, values, wanted, row_weights, fixed, padding = problem(ragged)
    weights, output, _ = attend(queries, keys, values, hidden=padding.unsqueeze(1))
    options = {"relative": relative, "row_weights": row_weights, "fixed": fixed}
    got = ridge_correction(weights, wanted - output, ridge, **options)
    for h in range(HEADS):
        roots = row_weights[h].double().sqrt().unsqueeze(1)
        free = ~fixed[h]
        expected = solved(weights[h, :, free].double() * roots, (wanted - output)[h].double() * roots, ridge, relative)
        assert relative_rms(got[h, free], expected) < 1e-5
        assert got[h, fixed[h]].abs().sum() == 0


@pytest.mark.parametrize(("ridge", "relative"), RIDGES)
@pytest.mark.parametrize("kind", ["keys", "bias"])
@pytest.mark.parametrize("one_system", [False, True])
def test_the_step_of_keys_is_gauss_newton_on_the_derivative_of_attention(kind, ridge, relative, one_system):
    queries, keys, values, wanted, row_weights, fixed, padding = problem(ragged=True)
    attention = attend(queries, keys, values, hidden=padding.unsqueeze(1))
    seen = queries if kind == "keys" else torch.ones(HEADS, ROWS, 1)
    got = key_correction(
        seen, attention, values, wanted - attention.output, ridge, relative=relative, row_weights=row_weights,
        fixed=fixed, iterations=400, tolerance=1e-7, one_system=one_system,
    )  # fmt: skip
    for h in range(HEADS):
        roots, free = row_weights[h].double().sqrt().unsqueeze(1), ~fixed[h]

        def outputs(change, h=h, free=free, roots=roots):
            moved = torch.zeros(SLOTS, change.shape[1]).double().index_put((free.nonzero()[:, 0],), change)
            logits = queries[h].double() @ keys[h].double().T + seen[h].double() @ moved.T
            return roots * (logits.masked_fill(padding[h], -math.inf).softmax(-1) @ values[h].double())

        start = torch.zeros(int(free.sum()), seen.shape[-1]).double()
        design = torch.autograd.functional.jacobian(outputs, start).reshape(ROWS * CHANNELS, -1)
        residual = (roots * wanted[h].double() - outputs(start)).flatten()
        expected = solved(design, residual.unsqueeze(1), ridge, relative)
        assert relative_rms(got[h, free].flatten(), expected.flatten()) < 1e-3
        assert got[h, fixed[h]].abs().sum() == 0


def test_conjugate_gradients_stand_still_where_a_system_is_solved():
    matrices = normal(2, 5, 5, seed=1)
    matrices = matrices @ matrices.transpose(1, 2) + 0.1 * torch.eye(5)
    wanted = torch.stack([normal(5, 2), torch.zeros(5, 2)])
    many = conjugate_gradients(lambda x: matrices @ x, wanted, 200, 1e-4, (-2, -1))
    assert torch.equal(many, conjugate_gradients(lambda x: matrices @ x, wanted, 400, 1e-4, (-2, -1)))
    assert relative_rms(matrices @ many, wanted) <= 2e-4
    assert many[1].abs().sum() == 0


@pytest.mark.parametrize(("ridge", "relative"), RIDGES)
def test_bias_is_the_regression_of_the_lost_mass_and_none_where_slots_are_fixed(ridge, relative):
    _, _, _, _, row_weights, fixed, padding = problem(ragged=True)
    mass = (0.5 * normal(HEADS, ROWS, SLOTS, seed=4).softmax(-1)).masked_fill(padding.unsqueeze(1), 0.0)
    got = refit_bias(mass, ridge, relative=relative, row_weights=row_weights, fixed=fixed)
    for h in range(HEADS):
        roots, free = row_weights[h].double().sqrt().unsqueeze(1), ~fixed[h]
        lost = roots * (1 - mass[h].double().sum(1, keepdim=True))
        factors = 1 + solved(mass[h, :, free].double() * roots, lost, ridge, relative)[:, 0]
        assert torch.allclose(got[h, free].double(), factors.clamp(math.e**-2, math.e**3).log(), atol=1e-4)
        assert got[h, fixed[h]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_what_is_added_stays_within_the_cap_after_rounding(dtype, size):
    states = normal(HEADS, SLOTS, CHANNELS, dtype=dtype) * torch.tensor([1.0, 1e-3, 30.0], dtype=dtype).reshape(3, 1, 1)
    fixed = torch.arange(SLOTS).expand(HEADS, -1) % 3 == 0
    correction = (size * normal(HEADS, SLOTS, CHANNELS, seed=7)).masked_fill(fixed.unsqueeze(-1), 0.0)
    got = add_within(states, correction, 0.1, fixed)
    assert got.dtype == dtype
    assert torch.equal(got[fixed], states[fixed])
    for h in range(HEADS):
        moved, limit = (got[h] - states[h]).float().norm(), 0.1 * states[h, ~fixed[h]].float().norm()
        assert moved <= limit
        if dtype == torch.float32:  # rounding shifts nothing: the whole correction or all that the cap allows
            assert float(moved) == pytest.approx(min(float(correction[h].norm()), float(limit)), rel=0.11)


def test_a_head_that_rounding_keeps_beyond_its_cap_stays_as_it_was():
    states = torch.ones(1, 4, 8, dtype=torch.bfloat16)  # the next number is 2 ** -7 = 0.0078 above
    free = torch.zeros(1, 4, dtype=torch.bool)
    assert (add_within(states, torch.ones(1, 4, 8), 0.0080, free) - states).unique().tolist() == [2**-7]
    assert add_within(states, torch.ones(1, 4, 8), 0.0076, free).equal(states)
