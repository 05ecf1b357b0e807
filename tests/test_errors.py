"""Messages quote foreign text: they are one line, and nothing in them acts on a terminal."""

from hypothesis import given
from hypothesis import strategies as st

from kvbench.errors import DataError, printable


def test_what_acts_on_a_terminal_is_shown_as_an_escape():
    assert printable("a\x1b[2J\x07\r\n\x9b\u202e\u200b\ud800z") == "a\\x1b[2J\\x07\\r\\n\\x9b\\u202e\\u200b\\ud800z"
    assert printable("Größe 语言 🙂 «ok»") == "Größe 语言 🙂 «ok»"


@given(st.text())
def test_every_message_is_one_printable_line(text):
    message = str(DataError(text))
    message.encode("utf-8")
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in message)
    assert message.splitlines() in ([], [message])
