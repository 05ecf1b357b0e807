import logging
import subprocess
import sys

import pytest

from kvbench.metrics.text import (
    CHINESE_PUNCTUATION,
    chinese_words,
    equal_share,
    first_divergence,
    first_word,
    needle,
    normalize_answer,
    rouge_l_to_full,
)


@pytest.mark.parametrize(
    ("score", "prediction", "answer", "expected"),
    [
        (needle, " 4711. It is", "4711", 1.0),
        (needle, "\nthe number 4711", "4711", 1.0),
        (needle, "47112", "4711", 0.0),
        (needle, "14711", "4711", 0.0),
        (needle, "I forgot.\n4711", "4711", 0.0),
        (needle, "", "4711", 0.0),
        (needle, "In PORT Ellery, of course", "Port Ellery", 1.0),
        (needle, "axb", "a.b", 0.0),
        (first_word, ' "birds"\nWord: oak', "birds", 1.0),
        (first_word, "\n\nBirds, of course", "birds", 1.0),
        (first_word, "the birds", "birds", 0.0),
        (first_word, "birdsong", "birds", 0.0),
        (first_word, "oak\nbirds", "birds", 0.0),
        (first_word, "", "birds", 0.0),
        (first_word, "...", "birds", 0.0),
    ],
)
def test_exact_matches_look_at_the_first_line(score, prediction, answer, expected):
    assert score(prediction, answer) == expected


@pytest.mark.parametrize(
    ("first", "second", "divergence", "share"),
    [
        ([], [], None, 1.0),
        ([1, 2, 3], [1, 2, 3], None, 1.0),
        ([1, 2, 3], [1, 9, 3], 1, 2 / 3),
        ([1, 2], [1, 2, 3, 4], 2, 0.5),
        ([], [1], 0, 0.0),
        ([2, 1], [1, 2], 0, 0.0),
    ],
)
def test_token_agreement(first, second, divergence, share):
    for a, b in ((first, second), (second, first)):
        assert first_divergence(a, b) == divergence
        assert equal_share(a, b) == pytest.approx(share)


def test_rouge_l_to_full():
    assert rouge_l_to_full("", "") == rouge_l_to_full("the boat", "the boat") == 1.0
    assert rouge_l_to_full("the boat", "a boat") == pytest.approx(0.5, abs=1e-8)
    assert rouge_l_to_full("", "a boat") == 0.0


def test_normalisation_is_upstream_s_with_its_gaps():
    assert normalize_answer(" The  cat's\tan hat, A.") == "cats hat"
    assert normalize_answer("theatre") == "theatre"
    assert [mark in CHINESE_PUNCTUATION for mark in "》《·"] == [True, False, False]


def test_chinese_words_concatenate_to_the_text():
    text = "会议讨论了 harbour 的费用，12.5元。"
    words = chinese_words(text)
    assert "".join(words) == text
    assert "会议" in words
    logging.getLogger("jieba").setLevel(logging.WARNING)
    chinese_words("讨论")
    assert logging.getLogger("jieba").level == logging.WARNING  # loading jieba leaves it alone


def test_jieba_is_silent_and_lazy():
    program = (
        "import sys\n"
        "from kvbench.metrics import metric_names\n"
        "metric_names()\n"
        "assert not {'jieba', 'rouge_score', 'unidecode', 'torch', 'datasets'} & set(sys.modules)\n"
        "from kvbench.metrics.text import chinese_words\n"
        "chinese_words('会议')\n"
    )
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
