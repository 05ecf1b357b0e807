"""The table of merging against its own base: by hand on made-up records."""

import dataclasses

import pytest
from report_records import make_record, make_run, make_spec

from kvbench.results.cells import build_table
from kvbench.results.merging import merging_effects
from kvbench.results.tables import write_table

ARMS = ("full", "cam@0.5", "cam@0.5,merge=False")


def table_of(tmp_path, kl_on=0.1, kl_off=0.3):
    def records(dataset):
        for i in range(6):
            sample = f"{dataset}{i}"
            yield make_record("full", sample, 0.9, dataset)
            yield make_record("cam@0.5", sample, 0.5 + 0.05 * i, dataset, kl=kl_on, cache_bytes=2080)
            off = make_record("cam@0.5", sample, 0.5, dataset, kl=kl_off + 0.01 * i, cache_bytes=2000)
            yield dataclasses.replace(off, arm=ARMS[2])

    runs = [(name, make_run(tmp_path, name, list(records(name)))) for name in ("qasper", "hotpotqa")]
    spec = make_spec(*runs, arms=ARMS[:2])
    base = spec.arms[1]._replace(key=ARMS[2])
    merging = ((ARMS[1], ARMS[2]),)
    return build_table(dataclasses.replace(spec, arms=(*spec.arms, base), merging=merging))


def test_differences_are_paired_signed_and_counted(tmp_path):
    (effect,) = merging_effects(table_of(tmp_path))
    assert (effect.n, effect.wins, effect.losses, effect.n_kl) == (12, 10, 0, 12)
    assert effect.score == pytest.approx(100 * 0.05 * 2.5)
    assert effect.score_interval.low < effect.score < effect.score_interval.high
    assert effect.kl == pytest.approx(0.1 - 0.3 - 0.01 * 2.5)
    assert effect.kl_interval.low < effect.kl < effect.kl_interval.high < 0
    assert effect.p < 0.05
    assert effect.same_slots
    assert effect.bytes_ratio == pytest.approx(1.04)
    assert effect.differing_share == pytest.approx(10 / 12)


def test_a_table_with_bases_says_what_merging_does_and_another_does_not(tmp_path):
    table = table_of(tmp_path / "runs")
    paths = write_table(table, tmp_path / "tables")
    text = next(path for path in paths if path.suffix == ".md").read_text()
    assert "| `cam@0.5` | `cam@0.5,merge=False` | 12 | +12.50 [" in text
    (csv,) = [path for path in paths if path.name.endswith("-merging.csv")]
    assert csv.read_text().splitlines()[0].startswith("arm,base,n,score,wins,losses,p,")
    assert len(csv.read_text().splitlines()) == 2
    table.spec = dataclasses.replace(table.spec, merging=())
    paths = write_table(table, tmp_path / "plain")
    assert "Merging against" not in next(path for path in paths if path.suffix == ".md").read_text()
    assert len(paths) == 4
