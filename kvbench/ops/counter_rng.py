"""Random numbers without a generator: a hash of (seed, counters).

A gate that is a function of (seed, layer, head, step) gives the same answer in a batch, alone, replayed from a CUDA
graph or resumed after a crash, which no stateful generator does. The arithmetic is 64-bit integer with 32-bit masks,
so that torch, Triton and plain Python agree bit for bit.

The hash absorbs one 32-bit word after another: `state = mix(state XOR word, plus the golden-ratio increment)`, where
`mix` is the xor-shift-multiply finaliser "lowbias32" (C. Wellons, hash-prospector: constants 0x7FEB352D and 0x846CA68B,
shifts 16, 15, 16; public domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

Word = int | Tensor
MASK = 0xFFFFFFFF
INCREMENT = 0x9E3779B9
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def mix_bits(state: Word) -> Word:
    """Scramble 32-bit words (an integer or an int64 tensor of them); a bijection on 0 .. 2^32 - 1."""
    state = state ^ (state >> 16)
    state = (state * MULTIPLIERS[0]) & MASK
    state = state ^ (state >> 15)
    state = (state * MULTIPLIERS[1]) & MASK
    return state ^ (state >> 16)


def absorb_word(state: Word, word: Word) -> Word:
    """Take one more 32-bit word into a hash: the low 32 bits of `word` count."""
    return mix_bits(((state ^ (word & MASK)) + INCREMENT) & MASK)


def counter_hash(seed: Word, *counters: Word) -> Word:
    """Hash a seed (64 bits) and counters (32 bits each), integers or int64 tensors that broadcast, to 32 bits."""
    state: Word = 0
    for word in (seed, seed >> 32, *counters):
        state = absorb_word(state, word)
    return state


def counter_uniform(seed: Word, *counters: Word) -> Tensor:
    """Uniform fp32 numbers in [0, 1), multiples of 2^-24, from `counter_hash` (arguments as there)."""
    return hash_to_uniform(torch.as_tensor(counter_hash(seed, *counters)))


def hash_to_uniform(hashes: Tensor) -> Tensor:
    """Uniform fp32 numbers in [0, 1), multiples of 2^-24, from 32-bit hashes (int64)."""
    return (hashes >> 8).to(torch.float32) * 2.0**-24
