"""The report page: complete, self-contained, and deaf to what models and data sets wrote."""

import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser

import pytest
from report_records import ARMS, make_record, make_run

from kvbench.report import main
from kvbench.results.page import data_checksums, lost, marked_parts, render_report, shortened

ATTACK = "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def hostile(tmp_path):
    records = [make_record(arm, f"s{i}", float(arm == "full" or i % 2)) for arm in ARMS for i in range(6)]
    for record in records:
        record.prediction = f"{record.arm} {ATTACK}"
        record.answers = [ATTACK]
    records += [make_record(arm, ATTACK, 0.5, dataset=f"trec{ATTACK}", meta={}) for arm in ARMS]
    records.append(make_record("h2o@0.5", "s9", 0.0, status="failed", reason=ATTACK, parts={}))
    run = make_run(tmp_path, "a", records)
    lines = [json.dumps({"dataset": "qasper", "sample": "s0", "prompt": f"Read this: {ATTACK}"}), "{broken"]
    (run / "prompts.jsonl").write_text("\n".join(lines))
    return run


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.outside = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href") and not str(v).startswith(("data:", "#"))]
        assert not [k for k, _ in attributes if k.startswith("on")], attributes


def test_nothing_written_by_models_or_data_becomes_markup(hostile):
    page = render_report([hostile])
    elements = Elements()
    elements.feed(page)
    assert elements.tags.count("script") == 1
    assert elements.outside == []
    assert page.count("&lt;script&gt;document.title") > 20  # outputs, answers, names, prompt, reason are all shown
    assert "Read this: &lt;/pre&gt;" in page


def test_the_page_holds_what_a_reader_needs(hostile, tmp_path):
    page = render_report([hostile, make_run(tmp_path, "b", [make_record(a, "x", 1.0) for a in ARMS])])
    for text in ("qasper, n = 6", "cache MiB", "ROUGE-L to full", "SHA-256", "at abc", "not kept in this run",
                 "Prompts and answers of each data set",
                 "differs from token 3 on", "data:image/svg+xml;base64,", "prefers-color-scheme: dark"):  # fmt: skip
        assert text in page, text
    assert re.search(r'data-lost="\[&#34;h2o@0\.5&#34;', page)


def test_same_runs_same_bytes_and_one_line_errors(hostile, tmp_path, capsys):
    assert main([str(hostile)]) == 0
    assert main([str(hostile), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (hostile / "report.html").read_bytes()
    assert main([str(tmp_path / "nothing")]) == 2
    assert main([str(hostile), "--output", str(tmp_path / "no" / "folder.html")]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2
    assert all(line.startswith("kvbench: ") for line in errors)


def dump_dom(page, folder):
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--no-first-run",
               f"--user-data-dir={tempfile.mkdtemp(dir=folder)}", "--virtual-time-budget=3000", "--dump-dom",
               path.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.integration("chromium")
def test_in_a_browser_our_script_runs_and_no_other(hostile, tmp_path):
    page = render_report([hostile])
    dom = dump_dom(page, tmp_path)
    assert "<title>kvbench: m</title>" in dom
    assert "8 of 8 samples</output>" in dom
    # The filter works: tick the box, as a reader would, with the same file.
    ticked = page.replace('id="f-lost"', 'id="f-lost" checked')
    assert "3 of 8 samples</output>" in dump_dom(ticked, tmp_path)
    # Escaping holds alone: without the security policy the attack still stays text ...
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert without != page
    assert "<title>kvbench: m</title>" in dump_dom(without, tmp_path)
    # ... and the policy alone: an injected script element does not run, while it would without the policy.
    injected = "<script>document.title='owned'</script></body>"
    assert "<title>kvbench: m</title>" in dump_dom(page.replace("</body>", injected), tmp_path)
    assert "<title>owned</title>" in dump_dom(without.replace("</body>", injected), tmp_path)


@pytest.mark.parametrize(
    ("text", "full", "shown"),
    [
        ("the red car", "the red car", "the red car"),
        ("the rod car", "the red car", "the <rod> car"),
        ("the red", "the red car", "the <red>"),
        ("the red car", "the red", "the red< car>"),
        ("", "the red", "<⌫>"),
        ("x", "", "<x>"),
    ],
)
def test_the_word_where_an_answer_first_differs_is_marked(text, full, shown):
    assert "".join(f"<{p['text']}>" if p["marked"] else p["text"] for p in marked_parts(text, full)) == shown


def test_lost_needs_a_right_full_cache_and_a_much_worse_arm():
    full = {"score": 0.8}
    assert lost(full, {"score": 0.4})
    right_enough = ((full, 0.5), ({"score": 0.0}, 0.0), (None, 0.0), (full, None))
    assert not any(lost(reference, {"score": score}) for reference, score in right_enough)
    assert not lost(full, full)


def test_long_prompts_show_both_ends():
    text = shortened("a" * 3000 + "b" * 3000)
    assert text.startswith("a" * 2000 + "\n")
    assert text.endswith("\n" + "b" * 2000)
    assert "2,000 characters left out" in text
    assert shortened("short") == "short"


def test_checksums_follow_every_prompt_answer_sample_and_data_set_and_nothing_else():
    def asked(sample, answers=("yes",), dataset="qasper", **more):
        return {"dataset": dataset, "sample": sample, "answers": list(answers), **more}

    prompts = {("qasper", "a"): "A?", ("qasper", "b"): "B?"}
    records = [asked("a", arm="full"), asked("b", arm="full"), asked("a", arm="h2o@0.5", score=0.0)]
    assert data_checksums(records, prompts) == data_checksums(reversed(records), dict(reversed(prompts.items())))
    seen = [
        data_checksums([asked("a")], prompts),
        data_checksums([asked("a")], {("qasper", "a"): "A? "}),
        data_checksums([asked("a")], {}),
        data_checksums([asked("a", ("yes", "no"))], prompts),
        data_checksums([asked("a"), asked("b")], prompts),
    ]
    assert len({checksums["qasper"] for checksums in seen}) == len(seen)
    assert list(data_checksums([asked("a"), asked("a", dataset="trec")], prompts)) == ["qasper", "trec"]
