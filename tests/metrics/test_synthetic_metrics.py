import math

import pytest

from kvbench.metrics.base import BestAnswerMetric
from kvbench.metrics.synthetic import first_word_score, needle_score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        (" 4711. It is", "4711", 1.0),
        ("\n4711", "4711", 1.0),
        ("the number 4711", "4711", 1.0),
        ("47112", "4711", 0.0),
        ("4711x", "4711", 0.0),
        ("14711", "4711", 0.0),
        ("I forgot.\n4711", "4711", 0.0),
        ("", "4711", 0.0),
        ("In PORT Ellery, of course", "Port Ellery", 1.0),
        ("a.b", "a.b", 1.0),
        ("axb", "a.b", 0.0),
    ],
)
def test_needle_is_found_as_whole_words_in_the_first_line(prediction: str, answer: str, score: float) -> None:
    assert needle_score(prediction, answer) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        (' "birds"\nWord: oak', "birds", 1.0),
        ("Birds, of course", "birds", 1.0),
        ("the birds", "birds", 0.0),
        ("bird", "birds", 0.0),
        ("birdsong", "birds", 0.0),
        ("\n\nbirds", "birds", 1.0),
        ("oak\nbirds", "birds", 0.0),
        ("", "birds", 0.0),
        ("...", "birds", 0.0),
    ],
)
def test_first_word_decides(prediction: str, answer: str, score: float) -> None:
    assert first_word_score(prediction, answer) == score


def test_a_comparison_that_gives_no_number_is_not_taken_for_zero():
    broken = BestAnswerMetric("broken", "NaN for one answer", lambda p, a, c: math.nan if a == "bad" else 0.5)
    for answers in (("bad", "good"), ("good", "bad"), ("bad",)):
        assert math.isnan(broken.score("text", answers, (), "")["score"])
    assert broken.score("text", ("good",), (), "") == {"score": 0.5}
    assert broken.score("text", (), (), "") == {"score": 0.0}
