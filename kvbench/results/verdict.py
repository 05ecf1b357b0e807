"""What a table allows to say: which methods are separated and which are not, in sentences that a newcomer can trust.

The pages, the Markdown files and the end of a run say the same sentences, made here from the tests of
`kvbench.results.statistics` alone. KL comes first: it separates methods with fewer samples than scores do. Arms compete
inside their budget. A data set of one sample says nothing about spread, so nothing is said of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvbench.results.cells import Cell, Column, Table, closest_arm
from kvbench.results.statistics import Comparison, against
from kvbench.results.summary import REFERENCE_METHOD, number

NAMED_ARMS = 4  # of more, their number is said


def verdict(table: Table) -> list[str]:
    """Two or three sentences about all data sets of a table; one that says why if nothing can be said."""
    gated = [column.name for column in table.columns if column.below_gate]
    column = table.overall
    if len(gated) == len(table.columns) > 0:
        return [f"No verdict: the full cache itself scores below {table.spec.gate:g}, so losing to it means little."]
    if column is None or not any(cell.n for cell in column.cells.values()):
        return ["No verdict: no two data sets have answers of the same arms."]
    names = table.averaged if column is table.average else (column.name,)
    if min(len(s.parts) for c in table.columns if c.name in names for s in c.scores.values()) < 2:
        return ["No verdict: a single sample of a data set says nothing about spread, two are the least."]
    size = _size(column.cells.values()) + (f" of {len(names)} data sets" if len(names) > 1 else "")
    contests = {budget: keys for budget, keys in sorted(column.contests.items(), reverse=True) if len(keys) > 1}
    said = [_below_full(table, column)]
    if contests:
        said.insert(0, _sentence("Scores", contests, lambda keys, short: _ahead(column, keys, short)))
        if closeness := {b: keys for b, keys in contests.items() if closest_arm(column, keys)}:
            text = _sentence(
                f"KL to the full cache ({size})", closeness, lambda keys, short: _closest(column, keys, short)
            )
            said.insert(0, text)
    if gated:
        said.append(
            f"Left out, as the full cache itself scores below {table.spec.gate:g}: {_named(gated, str, 'data sets')}."
        )
    return [sentence for sentence in said if sentence]


def _sentence(
    subject: str, contests: dict[float, list[str]], say: Callable[[list[str], Callable[[str], str]], str]
) -> str:
    """One clause a budget; budgets about which the same is to be said share theirs."""
    clauses: dict[str, list[str]] = {}
    for budget, keys in contests.items():

        def short(key: str, suffix: str = f"@{budget!r}") -> str:
            return key.replace(suffix, "", 1)

        clauses.setdefault(say(keys, short), []).append(f"{budget:.3g}" if budget > 1 else f"{100 * budget:.3g} %")
    return f"{subject}: " + "; ".join(f"at {_listed(budgets)}, {clause}" for clause, budgets in clauses.items()) + "."


def _closest(column: Column, keys: list[str], short: Callable[[str], str]) -> str:
    closest = closest_arm(column, keys)
    assert closest is not None
    far, near = _split(against(closest, column.kl_comparisons), keys)
    return f"{short(closest)} is closest, {_separation(far, near, short)}"


def _ahead(column: Column, keys: list[str], short: Callable[[str], str]) -> str:
    scores = {key: score for key in keys if (score := column.cells.get(key, Cell()).score) is not None}
    inside = [c for c in column.comparisons if c.first in scores and c.second in scores]
    if not any(c.separated for c in inside):
        return "no two methods are separated"
    best = max(sorted(scores), key=lambda key: scores[key])
    far, near = _split(against(best, inside), keys)
    return f"{short(best)} is highest, {_separation(far, near, short)}"


def _split(comparisons: Iterable[Comparison], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """The rivals of an arm that are separated from it and those that are not."""
    rivals = {c.second: c.separated for c in comparisons if c.second in keys}
    return [key for key in rivals if rivals[key]], [key for key in rivals if not rivals[key]]


def _separation(far: list[str], near: list[str], short: Callable[[str], str]) -> str:
    if not near:
        return f"separated from {'the only other' if len(far) == 1 else f'all {len(far)} others'}"
    if not far:
        return "but separated from no other"
    return f"separated from {_named(far, short)}, not from {_named(near, short)}"


def _below_full(table: Table, column: Column) -> str:
    """How many arms score below the full cache by more than chance."""
    full = next((arm.key for arm in table.spec.arms if arm.method == REFERENCE_METHOD), None)
    rivals = against(full, column.comparisons)
    if not rivals:
        return ""
    below = [c.second for c in rivals if c.separated and c.difference > 0]
    whole = number(column.cells.get(full or "", Cell()).score, ".1f")
    if not below:
        return f"No arm's score is separated from the full cache's ({whole}), which is no proof that they are equal."
    count = "The only arm" if len(rivals) == 1 else f"{len(below)} of {len(rivals)} arms"
    names = "" if len(rivals) == 1 or len(below) > NAMED_ARMS else f" ({_listed(below)})"
    return f"{count}{names} scored below the full cache ({whole}) by more than chance."


def _size(cells: Iterable[Cell]) -> str:
    sizes = sorted({cell.n for cell in cells if cell.n})
    return f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"


def _named(keys: Sequence[str], short: Callable[[str], str], others: str = "others") -> str:
    return _listed([short(key) for key in keys]) if len(keys) <= NAMED_ARMS else f"{len(keys)} {others}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
