"""PyramidKV's line of budgets in exact fractions: the yardstick for `kvbench.methods.pyramidkv`.

Symbols of the paper: k^l, slots of layer l of m; alpha, the window ("instruction tokens"), which every layer keeps;
beta, the steepness.
"""

from __future__ import annotations

from fractions import Fraction


def budget_line(n_tokens: int, m: int, k_average: int, alpha: int, beta: int) -> list[Fraction]:
    """Slots per layer before rounding; their mean is `k_average`.

    Args:
        n_tokens: prompt length.
        m: layers.
        k_average: slots per layer on average, window included.
        alpha: window tokens.
        beta: steepness.
    """
    b = k_average - alpha
    if n_tokens < 2 * b:
        return [Fraction(k_average)] * m
    k_last = b // beta
    k_first = 2 * b - k_last
    if k_first >= n_tokens - alpha:
        k_first = n_tokens - alpha
        k_last = 2 * b - k_first
    return [alpha + k_first - Fraction(k_first - k_last, max(m - 1, 1)) * layer for layer in range(m)]
