"""Tables of the trials that `plus_trials.py` wrote: means, and each arm paired with `kvmerger_plus` at the same budget.

    python scripts/plus_report.py results/plus/held_back.csv

An interval is the 95 % paired bootstrap of the difference; p is the larger of the bootstrap's and the sign test's, both
corrected after Holm for all pairs of arms in the table; wins are samples on which `kvmerger_plus` is better. Only
samples that every arm has are used.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

from kvbench.results.statistics import Comparison, Scores, compare_arms

Line = Mapping[str, str]
PERCENT = 100.0  # comparisons are on the 0..100 scale


def measures(line: Line) -> dict[str, float]:
    """What a line is judged by, in nats; lower is better."""
    return {"KL to the full cache": float(line["kl"]), "NLL above the full cache's": excess_nll(line)}


def excess_nll(line: Line) -> float:
    """How much worse the forced tokens are predicted than with the full cache, nats a token."""
    return float(line["nll"]) - float(line["full_nll"])


def table(title: str, scores: Mapping[str, Mapping[str, float]], ours: str) -> list[str]:
    """One table: arm -> sample -> nats."""
    common = set.intersection(*(set(samples) for samples in scores.values()))
    column = {  # the comparison wants higher scores to be better
        arm: Scores("needle", {sample: {"score": -samples[sample]} for sample in common})
        for arm, samples in scores.items()
    }
    paired = {frozenset((c.first, c.second)): c for c in compare_arms({title: column}) if ours in (c.first, c.second)}
    lines = [f"| {title} (n = {len(common)}) | nats | {ours} less it | 95 % | wins | p |", "|---|---|---|---|---|---|"]
    for arm, samples in sorted(scores.items()):
        mean = sum(samples[sample] for sample in common) / len(common)
        comparison = paired.get(frozenset((arm, ours)))
        cells = difference_cells(comparison, ours) if comparison else "| | | |"
        lines.append(f"| {arm} | {mean:.4f} | {cells}")
    return lines


def difference_cells(comparison: Comparison, ours: str) -> str:
    """The paired difference in nats (negative: ours is better), its interval, wins and p."""
    sign = -1.0 if comparison.first == ours else 1.0
    wins = comparison.wins if comparison.first == ours else comparison.losses
    p_value = max(comparison.p_bootstrap_holm, comparison.p_sign_holm)
    interval = ""
    if comparison.interval is not None:
        low, high = sorted(sign * end / PERCENT for end in (comparison.interval.low, comparison.interval.high))
        interval = f"{low:+.4f} to {high:+.4f}"
    return f"{sign * comparison.difference / PERCENT:+.4f} | {interval} | {wins}/{comparison.n} | {p_value:.3f} |"


def main() -> None:
    """Print the tables of the CSV files named on the command line."""
    lines: list[Line] = []
    for path in map(Path, sys.argv[1:]):
        with path.open(newline="") as file:
            lines += csv.DictReader(file)
    for kind, budget in sorted({(line["kind"], line["budget"]) for line in lines}):
        cell = [line for line in lines if (line["kind"], line["budget"]) == (kind, budget)]
        for measure in measures(cell[0]):
            scores: dict[str, dict[str, float]] = {}
            for line in cell:
                scores.setdefault(line["arm"], {})[line["sample"]] = measures(line)[measure]
            title = f"{kind}, {float(budget):.0%}, {measure}"
            print("\n".join(table(title, scores, f"kvmerger_plus@{float(budget):g}")), end="\n\n")


if __name__ == "__main__":
    main()
