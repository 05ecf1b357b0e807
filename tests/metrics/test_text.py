import logging
import subprocess
import sys
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.metrics.text import (
    CHINESE_PUNCTUATION,
    chinese_words,
    equal_share,
    final_number,
    first_divergence,
    first_word,
    last_number,
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
    ("text", "number"),
    [
        ("2 bolts, then 1: 3 in all.", "3"),
        ("so $1,234.50.", "1234.5"),
        ("18.00", "18"),
        ("**-5**", "-5"),
        ("-$5", "-5"),
        (r"\boxed{-\$70,000}", "-70000"),
        ("\u2212$3", "-3"),
        ("16-3", "3"),
        ("f(x)-3", "3"),
        ("1, 2,3", "3"),
        ("12,3456", "3456"),
        ("x=.5", "0.5"),
        ("50% off", "50"),
        ("12,345,678.90", "12345678.9"),
        ("\u0663 \u00b2", None),
        ("no number.", None),
    ],
)
def test_the_last_number_of_an_answer(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@given(st.integers(-(10**24), 10**24), st.integers(0, 4), st.booleans(), st.sampled_from(["", "$", "\\$", "**", "= "]))
def test_however_a_number_is_written_it_is_the_same(units, places, grouped, opening):
    value = Decimal(units).scaleb(-places)
    written = f"{abs(value):,f}" if grouped else f"{abs(value):f}"
    sign = "-" if units < 0 else ""
    for text in (f"{opening}{sign}{written}", f"{sign}{opening}{written}" if "$" in opening else f"{sign}{written}"):
        for ending in (".", "", " dollars.", "**", "\n"):
            assert final_number(f"First 7 - 3, then {text}{ending}") == value
            assert last_number(f"I say {text}{ending}", f"2+2=4\n#### {value:,f}") == 1.0
            assert last_number(f"I say {text}{ending}", f"2+2=4\n#### {value + 1:,f}") == 0.0


@given(st.text())
def test_any_text_is_scored(text):
    assert last_number(text, "#### 3") in (0.0, 1.0)
    assert last_number("3", text) in (0.0, 1.0)


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
