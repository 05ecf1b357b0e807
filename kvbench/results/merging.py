"""Methods that merge against their own bases: paired differences over the samples that both arms answered.

The two keep the same slots, so what differs is what merging does. Scores are compared over the table's average (or its
only data set), KL over all samples of all data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.results.cells import Table
from kvbench.results.statistics import ALPHA, Comparison, Interval, holm, mean_interval
from kvbench.results.summary import grouped, number

HEADER = (
    "arm", "base", "n", "score, on - off", "wins / losses", "p", "n of KL", "KL, on - off", "answers that differ",
    "same slots", "bytes, on / off",
)  # fmt: skip
NOTE = (
    "Merging on minus merging off, in the same slots, with 95 % paired bootstrap intervals. p: the larger of paired "
    "bootstrap and sign test, after Holm's correction over the rows; bold where it is below 0.05. Score: 0 to 100. "
    "KL: nats a gold token, over all data sets; below 0 merging is closer to the full cache. Bytes: what a bias of the "
    "merged slots costs is counted."
)


@dataclass(frozen=True)
class MergingEffect:
    """What merging does to one arm, compared with its base."""

    arm: str
    base: str
    n: int  # samples of the scores
    score: float  # difference, 0..100
    score_interval: Interval | None
    wins: int
    losses: int
    p: float  # the larger of two tests, corrected for the number of effects
    n_kl: int
    kl: float | None
    kl_interval: Interval | None
    differing_share: float  # of the answers
    same_slots: bool
    bytes_ratio: float


def merging_effects(table: Table) -> list[MergingEffect]:
    """One effect for each pair that has records, in the order of the arms."""
    columns = table.all_columns[-1:]
    compared = {frozenset((c.first, c.second)): c for column in columns for c in column.comparisons}
    rows = {
        arm: {(row["dataset"], row["sample"]): row for row in own}
        for arm, own in grouped((row for row in table.records if row["status"] == "ok"), "arm").items()
    }
    pairs = [pair for pair in table.spec.merging if frozenset(pair) in compared]
    found = [_signed(compared[frozenset(pair)], pair[0]) for pair in pairs]
    tests = zip(holm([c.p_bootstrap for c in found]), holm([c.p_sign for c in found]), strict=True)
    effects = []
    for (arm, base), comparison, p_values in zip(pairs, found, tests, strict=True):
        both = [(rows[arm][key], rows[base][key]) for key in sorted(rows[arm].keys() & rows[base].keys())]
        kl = np.array([on["kl"] - off["kl"] for on, off in both if None not in (on["kl"], off["kl"])])
        effects.append(
            MergingEffect(
                arm, base, comparison.n, comparison.difference, comparison.interval, comparison.wins,
                comparison.losses, max(p_values), len(kl), float(kl.mean()) if len(kl) else None, mean_interval(kl),
                sum(on["token_ids"] != off["token_ids"] for on, off in both) / len(both),
                all(on["slots_per_layer"] == off["slots_per_layer"] for on, off in both),
                sum(on["cache_bytes"] for on, _ in both) / max(1, sum(off["cache_bytes"] for _, off in both)),
            )
        )  # fmt: skip
    return effects


def _signed(comparison: Comparison, first: str) -> Comparison:
    """The comparison with the given arm as its first."""
    if comparison.first == first:
        return comparison
    interval = comparison.interval and Interval(-comparison.interval.high, -comparison.interval.low)
    return Comparison(
        comparison.second, comparison.first, comparison.n, -comparison.difference, interval, comparison.losses,
        comparison.wins, comparison.p_bootstrap, comparison.p_sign,
    )  # fmt: skip


def merging_rows(effects: Sequence[MergingEffect]) -> list[list[str]]:
    """The effects as text, after `HEADER`."""
    rows = []
    for e in effects:
        p = f"{e.p:.3f}" if e.p >= ALPHA else f"**{e.p:.3f}**"
        rows.append([
            f"`{e.arm}`", f"`{e.base}`", str(e.n), f"{e.score:+.2f}{_ends(e.score_interval, '+.2f')}",
            f"{e.wins} / {e.losses}", p, str(e.n_kl), f"{number(e.kl, '+.4f')}{_ends(e.kl_interval, '+.4f')}",
            f"{e.differing_share:.0%}", "yes" if e.same_slots else "no", f"{e.bytes_ratio:.4f}",
        ])  # fmt: skip
    return rows


def _ends(interval: Interval | None, spec: str) -> str:
    return f" [{interval.low:{spec}}, {interval.high:{spec}}]" if interval else ""
