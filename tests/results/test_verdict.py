"""The sentences at the end of a run: what is separated is said so, what is not is not, and never of one sample."""

import io
from pathlib import Path

import pytest
from report_records import make_record
from rich.console import Console

from kvbench.results.cells import table_of
from kvbench.results.tables import above_text, kl_text
from kvbench.results.terminal import limits_of, next_commands, print_tables, print_verdict
from kvbench.results.verdict import verdict

KL = {"full": 0.0, "h2o@0.5": 0.4, "kvmerger@0.5": 0.1, "cam@0.5": 0.2, "kvmerger@0.35": 0.3}
SCORES = {"full": 0.9, "h2o@0.5": 0.3, "kvmerger@0.5": 0.6, "cam@0.5": 0.59, "kvmerger@0.35": 0.2}


def records(n=14, datasets=("qasper",), kl=KL, scores=SCORES, noise=0.0):
    """With noise, samples disagree on the order of the arms."""
    found = []
    for dataset in datasets:
        for rank, arm in enumerate(kl):
            for i in range(n):
                wobble = 1 + noise * ((7 * i + 5 * rank) % 11 - 5) / 5
                more = {"kl": kl[arm] * wobble, "meta": {}}
                found.append(make_record(arm, f"s{i}", scores[arm] * wobble, dataset, **more).to_dict())
    return found


def test_steady_differences_are_called_separated():
    closeness, score, full = verdict(table_of(records(), "m"))
    assert closeness == (
        "KL to the full cache (n = 14): at 50 %, kvmerger is closest, separated from all 2 others."
    )  # 35 % has one arm: no contest
    assert score == "Scores: at 50 %, kvmerger is highest, separated from all 2 others."
    names = "cam@0.5, h2o@0.5, kvmerger@0.35 and kvmerger@0.5"
    assert full == f"4 of 4 arms ({names}) scored below the full cache (90.0) by more than chance."


def test_noise_is_not():
    table = table_of(records(noise=1.0, kl=dict.fromkeys(KL, 0.2), scores=dict.fromkeys(KL, 0.5)), "m")
    closeness, score, full = verdict(table)
    assert "separated from no other" in closeness
    assert score == "Scores: at 50 %, no two methods are separated."
    assert full.startswith("No arm's score is separated from the full cache's")


def test_what_is_separated_from_some_names_both_sides():
    (closeness, *_) = verdict(table_of(records(kl={**KL, "cam@0.5": 0.1}), "m"))
    assert closeness.endswith("at 50 %, cam is closest, separated from h2o, not from kvmerger.")


def test_all_data_sets_together_are_judged_by_their_average():
    (closeness, *_) = verdict(table_of(records(7, ("qasper", "trec")), "m"))
    assert closeness.startswith("KL to the full cache (n = 14 of 2 data sets): at 50 %, kvmerger is closest, separated")


@pytest.mark.parametrize("datasets", [("qasper",), tuple(f"d{i}" for i in range(20))])
def test_single_samples_carry_no_verdict_however_many_data_sets_are_averaged(datasets):
    table = table_of(records(1, datasets), "m")
    assert not any(c.separated for c in [*table.overall.comparisons, *table.overall.kl_comparisons])
    assert not any(cell.best for cell in table.overall.cells.values())
    assert verdict(table) == ["No verdict: a single sample of a data set says nothing about spread, two are the least."]


def test_what_the_full_cache_itself_fails_is_left_out_and_named():
    gated = [
        {**row, "metric": "string_match_all"} for row in records(datasets=("hard",), scores=dict.fromkeys(KL, 0.5))
    ]
    table = table_of([*records(datasets=("qasper", "trec")), *gated], "m")
    closeness, *_, last = verdict(table)
    assert closeness.startswith("KL to the full cache (n = 28 of 2 data sets)")
    assert last == "Left out, as the full cache itself scores below 60: hard."
    alone = table_of(gated, "m")
    assert verdict(alone) == ["No verdict: the full cache itself scores below 60, so losing to it means little."]
    assert not alone.columns[0].kl_comparisons
    assert verdict(table_of(gated, "m", gate=40))[0].startswith("KL to the full cache (n = 14)")


def test_arms_that_share_nothing_are_not_compared():
    apart = [*records(3, ("a",), {"full": 0.0}), *records(3, ("b",), {"h2o@0.5": 0.1})]
    assert verdict(table_of(apart, "m")) == ["No verdict: no two data sets have answers of the same arms."]


def test_failures_and_arms_that_miss_their_budget_take_no_part():
    rows = [{**row, "slots_per_layer": [40, 40]} if row["arm"] == "cam@0.5" else row for row in records()]
    (closeness, *_) = verdict(table_of(rows, "m"))
    assert closeness.endswith("at 50 %, kvmerger is closest, separated from the only other.")
    broken = [{**row, "status": "failed", "kl": None, "parts": {}} for row in records()]
    assert verdict(table_of(broken, "m"))[0].startswith("No verdict")


def test_intervals_are_paired_and_the_closest_is_marked():
    cells = table_of(records(noise=1.0), "m").columns[0].cells
    above = cells["h2o@0.5"].kl_above
    assert (above.first, above.second, above.n) == ("h2o@0.5", "kvmerger@0.5", 14)
    assert above.interval.low < above.difference < above.interval.high
    assert above.difference == pytest.approx(cells["h2o@0.5"].kl - cells["kvmerger@0.5"].kl)
    assert above_text(cells["kvmerger@0.5"]) == "closest"
    assert cells["full"].kl is None
    low, high = cells["h2o@0.5"].kl_interval
    assert kl_text(cells["h2o@0.5"]) == f"{cells['h2o@0.5'].kl:.3g} [{low:.2g}, {high:.2g}]"


def test_paired_differences_are_narrower_than_what_varies_alike_in_both():
    rows = []
    for i in range(14):
        rows += [
            make_record(arm, f"s{i}", 0.5, kl=i + step).to_dict() for arm, step in (("a@0.5", 0.0), ("b@0.5", 0.1))
        ]
    cells = table_of(rows, "m").columns[0].cells
    low, high = cells["b@0.5"].kl_interval
    assert high - low > 3
    assert tuple(cells["b@0.5"].kl_above.interval) == pytest.approx((0.1, 0.1))


def test_a_terminal_shows_what_fits_and_no_times():
    for width, there in ((120, True), (80, False)):
        output = io.StringIO()
        console = Console(file=output, width=width, force_terminal=False)
        table = print_tables(records(), "m", "after_question", console)
        print_verdict(table, {"Next": "x " * 99}, console)
        text = output.getvalue()
        assert "separated from all 2 others" in " ".join(text.split())
        assert "seconds" not in text
        assert ("+0.3 [" in text) == there
        assert max(len(line) for line in text.splitlines() if "Next" not in line) <= width


def test_the_next_command_repeats_the_words_given_with_higher_limits():
    limits = limits_of({"name": "demo", "limit": None, "tasks": {"passkey": {"limit": 8}, "fewshot": {"limit": 8}}})
    assert limits == {"task.tasks.passkey.limit": 8, "task.tasks.fewshot.limit": 8}
    page, more = next_commands(["model=a b", "task.tasks.passkey.limit=8"], Path("runs/x"), limits).values()
    assert page == "python -m kvbench.report runs/x"
    assert more == "python -m kvbench 'model=a b' task.tasks.passkey.limit=32 task.tasks.fewshot.limit=32"
    assert list(next_commands([], Path("x"), {}).values()) == ["python -m kvbench.report x"]
