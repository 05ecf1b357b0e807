"""Tables of the trials that `plus_trials.py` wrote: means, and each arm paired with `kvmerger_plus` at the same budget.

    python scripts/plus_report.py results/plus/second_held_back_smollm2-135m.csv

Every row is over the n samples that its arm and `kvmerger_plus` both have. An interval is the 95 % paired bootstrap of
the difference; p is the larger of the bootstrap's and the sign test's, both corrected after Holm over the rows of the
table; wins are samples on which `kvmerger_plus` is better.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

from kvbench.results.statistics import Comparison, Scores, compare_arms, holm

Line = Mapping[str, str]
PERCENT = 100.0  # comparisons are on the 0..100 scale


def measures(line: Line) -> dict[str, float]:
    """What a line is judged by, in nats; lower is better."""
    return {"KL to the full cache": float(line["kl"]), "NLL above the full cache's": excess_nll(line)}


def excess_nll(line: Line) -> float:
    """How much worse the forced tokens are predicted than with the full cache, nats a token."""
    return float(line["nll"]) - float(line["full_nll"])


def table(title: str, scores: Mapping[str, Mapping[str, float]], ours: str) -> list[str]:
    """One table: arm -> sample -> nats, the lowest mean first."""
    found = [paired(samples, scores[ours]) for arm, samples in scores.items() if arm != ours]
    p_values = map(max, holm([c.p_bootstrap for c in found]), holm([c.p_sign for c in found]))
    lines = {}
    for (arm, samples), comparison, p_value in zip(
        ((arm, samples) for arm, samples in scores.items() if arm != ours), found, p_values, strict=True
    ):
        lines[arm] = f"{len(samples.keys() & scores[ours].keys())} | {mean(samples):.4f} | " + cells(
            comparison, p_value
        )
    lines[ours] = f"{len(scores[ours])} | {mean(scores[ours]):.4f} | | | | |"
    order = sorted(lines, key=lambda arm: mean(scores[arm]))
    head = [f"| {title} | n | nats | {ours} less it | 95 % | wins | p |", "|---|---|---|---|---|---|---|"]
    return head + [f"| {arm} | {lines[arm]}" for arm in order]


def mean(samples: Mapping[str, float]) -> float:
    """Mean over the samples an arm has."""
    return sum(samples.values()) / len(samples)


def paired(theirs: Mapping[str, float], ours: Mapping[str, float]) -> Comparison:
    """Ours against another arm on the samples that both have; higher scores are better there, hence the signs."""
    common = theirs.keys() & ours.keys()
    arms = {"ours": ours, "theirs": theirs}
    column = {
        arm: Scores("needle", {sample: {"score": -samples[sample]} for sample in common})
        for arm, samples in arms.items()
    }
    [comparison] = compare_arms({"": column})
    return comparison


def cells(comparison: Comparison, p_value: float) -> str:
    """The paired difference in nats (negative: ours is better), its interval, wins and p."""
    first = comparison.first == "ours"
    sign, wins = (-1.0, comparison.wins) if first else (1.0, comparison.losses)
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
