import pytest

from kvbench.tasks.mini import Mini, rows

FIELDS = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}


def test_rows_are_valid_longbench_rows():
    found = list(rows())
    assert len({row["_id"] for row in found}) == len(found) == 60
    for row in found:
        assert set(row) == FIELDS
        assert len(row["_id"]) == 48
        assert int(row["_id"], 16) >= 0
        assert row["language"] == "en"
        assert row["all_classes"] is None
        assert row["answers"]
        assert all(isinstance(answer, str) and answer.strip() for answer in row["answers"])
        assert row["length"] == len(f"{row['input']} {row['context']} {row['answers'][0]}".split())


def test_each_document_has_questions_and_one_summary():
    by_document: dict[str, list[str]] = {}
    for row in rows():
        by_document.setdefault(row["context"], []).append(row["dataset"])
    assert len(by_document) >= 12
    assert all(sorted(kinds) == ["mini_qa"] * 4 + ["mini_summary"] for kinds in by_document.values())


def test_summaries_ask_nothing_and_are_shorter_than_their_texts():
    for row in rows():
        if row["dataset"] == "mini_summary":
            assert row["input"] == ""
            assert 30 <= len(row["answers"][0].split()) < len(row["context"].split()) / 3


def test_kinds_select_rows_and_metrics():
    assert {s.metric for s in Mini(kind="qa").samples()} == {"qa_f1"}
    assert {s.metric for s in Mini(kind="summary").samples()} == {"rouge_l"}
    assert len(Mini(kind="qa").samples()) + len(Mini(kind="summary").samples()) == len(Mini().samples())


@pytest.mark.parametrize("kind", ["qa", "summary"])
def test_prompts_hold_the_text_before_the_question(kind):
    for sample, row in zip(
        Mini(kind=kind).samples(), [r for r in rows() if r["dataset"] == f"mini_{kind}"], strict=True
    ):
        assert row["context"] in sample.prompt[: sample.question_start]
        assert row["input"] in sample.prompt[sample.question_start :]


def test_a_question_is_preceded_by_the_documents_other_questions_with_their_answers():
    by_id = {row["_id"]: row for row in rows()}
    for sample in Mini(kind="qa").samples():
        row = by_id[sample.id]
        shown = sample.prompt[: sample.question_start]
        others = [r for r in by_id.values() if r["context"] == row["context"] and r["input"] not in ("", row["input"])]
        assert len(others) == 3
        assert all(f"Question: {r['input']}\nAnswer: {r['answers'][0]}\n" in shown for r in others)
        assert row["input"] not in shown
