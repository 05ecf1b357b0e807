"""Checksums of the data: they follow prompts and answers, and nothing else."""

from kvbench.results.checksums import data_checksums


def record(sample, answers=("yes",), dataset="qasper", **more):
    return {"dataset": dataset, "sample": sample, "answers": list(answers), **more}


def test_order_arms_and_scores_do_not_matter():
    prompts = {("qasper", "a"): "A?", ("qasper", "b"): "B?"}
    records = [record("a", arm="full"), record("b", arm="full"), record("a", arm="h2o@0.5", score=0.0)]
    assert data_checksums(records, prompts) == data_checksums(reversed(records), dict(reversed(prompts.items())))


def test_every_prompt_answer_sample_and_data_set_matters():
    prompts = {("qasper", "a"): "A?"}
    seen = [
        data_checksums([record("a")], prompts),
        data_checksums([record("a")], {("qasper", "a"): "A? "}),
        data_checksums([record("a")], {}),
        data_checksums([record("a", ("yes", "no"))], prompts),
        data_checksums([record("a"), record("b")], prompts),
    ]
    assert len({checksums["qasper"] for checksums in seen}) == len(seen)
    assert list(data_checksums([record("a"), record("a", dataset="trec")], prompts)) == ["qasper", "trec"]
