import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge import Rouge

from kvbench.metrics.rouge_l import rouge_l, split_sentences


def package_rouge_l(prediction, reference):
    """What LongBench/metrics.py computes, any exception included."""
    try:
        return Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
    except ValueError:
        return 0.0


REPORT = (
    "The council met on Tuesday to discuss the harbour. Costs rose by 12.5 percent, it said. Nobody objected to the "
    "harbour plan. The council will meet again in May to discuss the costs of the plan."
)
SUMMARY = (
    "The council discussed the harbour plan. Costs rose by 12.5 percent. It will meet again in May to discuss costs."
)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (SUMMARY, REPORT, package_rouge_l(SUMMARY, REPORT)),
        ("one two", "one two", 0.999999995),  # 2 / (2 + 1e-8)
        ("One two", "one two", 0.4999999950000001),  # case counts: 1 of 2 words
        ("two two two", "two", 0.999999995),  # distinct words: repetition is free
        ("two, one", "two one", 0.4999999950000001),  # punctuation sticks to words
        ("", "one", 0.0),
        ("one", "", 0.0),
        ("...", "one", 0.0),
        (" ", " ", 0.999999995),  # a blank piece is one empty word
        ("12.5", "12.7", 0.4999999950000001),  # the dot in a number ends a sentence: 12 is shared
    ],
)
def test_hand_computed(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-15)
    assert rouge_l(prediction, reference) == package_rouge_l(prediction, reference)


@settings(max_examples=300, deadline=None)
@given(*[st.text("ab.  c", max_size=40)] * 2)
def test_bit_equal_to_the_package(prediction, reference):
    assert rouge_l(prediction, reference) == package_rouge_l(prediction, reference)


WORDS = ["to", "be", "or", "not", ".", "that", "is", "the", "question", "\u3000", "\t\n"]


@settings(max_examples=100, deadline=None)
@given(*[st.lists(st.sampled_from(WORDS), max_size=60)] * 2)
def test_bit_equal_on_sentences_of_words(prediction, reference):
    prediction, reference = " ".join(prediction), " ".join(reference)
    assert rouge_l(prediction, reference) == package_rouge_l(prediction, reference)


def test_long_sentences_do_not_recurse():
    text = " ".join(f"w{number}" for number in range(1200))
    with pytest.raises(RecursionError):
        Rouge().get_scores([text], [text], avg=True)
    assert rouge_l(text, text) == 0.999999995


def test_sentences():
    assert split_sentences("a  b. c..d") == [["a", "b"], ["c"], ["d"]]
    assert split_sentences(" . ") == [[""], [""]]
    assert split_sentences("..") == []
