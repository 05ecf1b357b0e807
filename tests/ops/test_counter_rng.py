"""The counter-based generator: known values, agreement of integer and tensor arithmetic, uniformity."""

import torch

from kvbench.ops.counter_rng import counter_hash, counter_uniform, mix_bits


def python_mix(word: int) -> int:
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ (word >> 16)


def test_mix_is_lowbias32():
    words = torch.tensor([0, 1, 2, 12345, 2**31, 2**32 - 1])
    assert mix_bits(words).tolist() == [python_mix(w) for w in words.tolist()]


def test_integers_and_tensors_agree():
    heads, steps = torch.arange(5).unsqueeze(1), torch.arange(7)
    seed = -(2**40) + 17
    hashed = counter_hash(torch.tensor(seed), heads, steps)
    assert hashed.shape == (5, 7)
    assert hashed.tolist() == [[counter_hash(seed, h, s) for s in range(7)] for h in range(5)]
    assert torch.equal(counter_uniform(seed, heads, steps), (hashed >> 8).float() / 2**24)


def test_every_argument_matters():
    assert len({counter_hash(*words) for words in [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, 0, 0), (1, 1)]}) == 6


def test_uniform_moments_and_independence():
    draws = counter_uniform(7, torch.arange(64).unsqueeze(1), torch.arange(4096)).double()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 5 * (1 / 12 / draws.numel()) ** 0.5
    assert abs(float(draws.var()) - 1 / 12) < 1e-3
    centred = draws - 0.5
    assert abs(float((centred[:, 1:] * centred[:, :-1]).mean())) < 5 / 12 / draws.numel() ** 0.5
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 5 / 12 / draws.numel() ** 0.5
    counts = torch.histc(draws.flatten(), bins=256, min=0, max=1)
    chi_square = float(((counts - 1024) ** 2 / 1024).sum())
    assert chi_square < 255 + 5 * (2 * 255) ** 0.5
