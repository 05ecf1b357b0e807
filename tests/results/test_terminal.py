"""The printed table is text: what records say neither moves the cursor nor becomes markup."""

import io

from report_records import make_record
from rich.console import Console

from kvbench.results.terminal import print_tables

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e[bold red][link=http://x]name[/link]"


def test_names_in_records_are_shown_not_obeyed():
    record = make_record("full", "s1", 1.0, dataset=HOSTILE)
    record.arm = HOSTILE
    output = io.StringIO()
    print_tables([record.to_dict()], "model", Console(file=output, width=400, force_terminal=False))
    text = output.getvalue()
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert text.count("\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\u202e[bold red][link=http://x]name[/link]") == 2
