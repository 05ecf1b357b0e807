"""The report page: complete, self-contained, and deaf to what models and data sets wrote."""

import html
import itertools
import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from importlib import resources

import pytest
from report_records import ARMS, make_record, make_run

from kvbench.report import main
from kvbench.results.charts import axis_of
from kvbench.results.figures import BACKGROUNDS, INK, PALETTE, looks, spread
from kvbench.results.page import data_checksums, lost, render_report, shortened

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


def data_of(page):
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_nothing_written_by_models_or_data_becomes_markup(hostile):
    page = render_report([hostile])
    elements = Elements()
    elements.feed(page)
    assert elements.tags.count("script") == 2  # data and ours
    assert elements.outside == []
    assert page.count("&lt;script&gt;document.title") >= 3  # names in tables, and in what can be chosen
    assert "<script>document.title" not in page
    shown = data_of(page)
    texts = json.dumps(shown["samples"])
    assert texts.count("<script>document.title") > 30  # outputs, answers, names, prompt, reason
    assert shown["samples"][0][4].startswith("Read this: </pre><script>")


def test_the_page_holds_what_a_reader_needs(hostile, tmp_path):
    page = render_report([hostile, make_run(tmp_path, "b", [make_record(a, "x", 1.0) for a in ARMS])])
    for text in ("qasper<small>n = 6 qa_f1</small>", "cache MiB", "ROUGE-L to full", "SHA-256", "at abc",
                 "Prompts and answers of each data set", "No verdict: a single sample", "prefers-color-scheme: dark",
                 "the batches took 16 s"):  # fmt: skip
        assert text in page, text
    assert "seconds" not in page.split("<script")[0]
    assert page.index("Conclusion</h2>") < page.index("Arms: closeness and score</h2>") < page.index("Data sets</h2>")
    model, dataset, sample, answers, _, full, arms = data_of(page)["samples"][0]
    assert (model, dataset, sample, answers, full) == ("m", "qasper", "s0", [ATTACK], "100.0")
    assert "differs from token 3 on" in arms[1][2]
    assert [arm[3] for arm in arms] == [0, 1, 1, 1]  # where full is right and the arm wrong
    assert data_of(page)["samples"][1][4] is None


def steady(n=3, datasets=("qasper", "gov_report", "lcc")):
    kl = {"full": 0.0, "h2o@0.5": 0.004, "kvmerger@0.5": 2.5, "kvmerger@0.35": 5.0}
    return [
        make_record(arm, f"s{i}", 1 - min(0.9, kl[arm]) * (1 + j / 50), dataset, kl=kl[arm] * (1 + j / 9), meta={})
        for dataset in datasets for arm in ARMS for i in range(n) for j in [i % 3]
    ]  # fmt: skip


def test_the_conclusion_is_the_verdict_and_drawings_say_what_they_show(tmp_path):
    page = render_report([make_run(tmp_path, "a", steady())])
    assert "<li>KL to the full cache (n = 9 of 3 data sets): at 50 %, h2o is closest, separated from the" in page
    assert re.search(r'aria-label="h2o@0\.5: KL 0\.00444 \[0\.004\d, 0\.004\d\]"', page)
    assert (
        page.count(
            "KL to the full cache, nats a token: at 50 % of the slots, h2o is best (0.00444) and kvmerger worst (2.78)"
        )
        == 2
    )
    assert page.index(">single-document QA<") < page.index(">summarization<") < page.index(">code<")


def test_the_address_of_an_axis_is_logarithmic_and_clamped():
    axis = axis_of([0.0, 0.004, 3.0], log=True)
    assert (axis.low, axis.high, [text for _, text in axis.ticks]) == (0.001, 10.0, ["0.001", "0.01", "0.1", "1", "10"])
    assert [axis.place(value) for value in (0.0, 0.001, 0.1, 10, 99)] == [0, 0, 50, 100, 100]
    assert axis_of([1e-12, 1.0], log=True).low == 1e-5  # no more than six decades
    assert axis_of([], log=True).ticks == ()
    assert axis_of([0, 100], log=False).place(50) == 50


def test_labels_move_apart_in_their_order_and_stay_inside():
    places = [0.5, 0.5, 0.51, 0.99, 1.0]
    moved = spread(places, 0.1)
    assert sorted(moved) == moved
    assert min(b - a for a, b in itertools.pairwise(moved)) > 0.0999
    assert 0 <= moved[0] <= moved[-1] <= 1
    assert spread([0.1, 0.9], 0.1) == [0.1, 0.9]
    assert len({round(place, 6) for place in spread([0.5] * 50, 0.1)}) == 50


def luminance(colour):
    """WCAG 2.1, relative luminance of "#rrggbb"."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def channels(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes():
    css = (resources.files("kvbench.results") / "templates" / "report.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): ([^;]+);", block)) for block in re.findall(r":root \{([^}]+)\}", css))
    return [light, {**light, **dark}], [float(share) for share in re.findall(r"var\(--heat\) / ([.\d]+)", css)]


def test_contrasts():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    shades = themes()[1]
    assert len(shades) == 5
    for theme, paper in zip(themes()[0], BACKGROUNDS, strict=True):
        assert theme["paper"].lower() == paper.lower()
        for colour in PALETTE:
            assert contrast(colour, paper) >= 3, colour
        for text, ground in (("ink", "paper"), ("ink", "soft"), ("accent", "paper"), ("accent", "soft"),
                             ("dim", "paper"),
                             ("lost", "paper"), ("lost", "soft"), ("mark-ink", "mark")):  # fmt: skip
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        heat = [int(part) / 255 for part in theme["heat"].split()]
        for share in shades:
            mixed = [share * h + (1 - share) * p for h, p in zip(heat, channels(paper), strict=True)]
            assert contrast(theme["ink"], "#" + "".join(f"{round(255 * c):02x}" for c in mixed)) >= 4.5
    assert contrast(INK, BACKGROUNDS[0]) >= 3


def test_every_method_looks_different_and_the_full_cache_like_none():
    found = looks(["full", *(f"m{i:02}" for i in range(40))])
    assert len(set(found.values())) == 41
    assert found["full"][0] not in PALETTE


def test_elements_do_not_grow_with_samples(tmp_path):
    counts = []
    for n in (30, 60):
        elements = Elements()
        elements.feed(render_report([make_run(tmp_path, f"n{n}", steady(n))]))
        counts.append(len(elements.tags))
    assert counts[0] == counts[1] < 700


def test_same_runs_same_bytes_and_one_line_errors(hostile, tmp_path, capsys):
    assert main([str(hostile)]) == 0
    assert main([str(hostile), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (hostile / "report.html").read_bytes()
    assert main([str(tmp_path / "nothing")]) == 2
    assert main([str(hostile), "--output", str(tmp_path / "no" / "folder.html")]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2
    assert all(line.startswith("kvbench: ") for line in errors)


def dump_dom(page, folder, address="", size="1440,900"):
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--no-first-run", f"--window-size={size}",
               f"--user-data-dir={tempfile.mkdtemp(dir=folder)}", "--virtual-time-budget=3000", "--dump-dom",
               path.as_uri() + address]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def without_policy(page):
    changed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert changed != page
    return changed


def answer(page, folder, script, address="", size="1440,900"):
    """What a script at the end of the page returns: a reader's clicks and looks."""
    asking = f"<script>document.title = 'said ' + JSON.stringify((() => {{ {script} }})())</script></body>"
    dom = dump_dom(without_policy(page).replace("</body>", asking), folder, address, size)
    return json.loads(html.unescape(re.search(r"<title>said (.*?)</title>", dom)[1]))


@pytest.mark.integration("chromium")
def test_in_a_browser_our_script_runs_and_no_other(hostile, tmp_path):
    page = render_report([hostile])
    assert "<title>kvbench: m</title>" in (dom := dump_dom(page, tmp_path))
    assert "8 of 8 samples</output>" in dom
    assert "3 of 8 samples</output>" in dump_dom(page, tmp_path, "#lost=1")
    opened = dump_dom(page, tmp_path, "#sample=m/qasper/s0")
    assert "<title>kvbench: m</title>" in opened
    assert "Read this: &lt;/pre&gt;&lt;script&gt;" in opened
    # Escaping holds alone: without the security policy the attack still stays text ...
    assert "<title>kvbench: m</title>" in dump_dom(without_policy(page), tmp_path, "#sample=m/qasper/s0")
    # ... and the policy alone: an injected script element does not run, while it would without the policy.
    injected = "<script>document.title='owned'</script></body>"
    assert "<title>kvbench: m</title>" in dump_dom(page.replace("</body>", injected), tmp_path)
    assert "<title>owned</title>" in dump_dom(without_policy(page).replace("</body>", injected), tmp_path)


ROWS = "Array.from(document.querySelectorAll('.panel tbody tr')).filter((row) => !row.hidden).map((row) => row.cells[0].textContent)"  # noqa: E501
CHANGE = "const set = (id, value) => { const c = document.getElementById(id); c.value = value; c.dispatchEvent(new Event('change')); };"  # noqa: E501


@pytest.mark.integration("chromium")
def test_in_a_browser_rows_are_sorted_and_filtered_and_the_address_tells(tmp_path):
    page = render_report([make_run(tmp_path, "a", steady())])
    assert answer(page, tmp_path, f"return {ROWS}") == list(ARMS)
    by_kl = f"{CHANGE} set('f-sort', 'kl'); return [{ROWS}, location.hash]"
    assert answer(page, tmp_path, by_kl) == [["full", "h2o@0.5", "kvmerger@0.5", "kvmerger@0.35"], "#sort=kl+up"]
    twice = f"const b = document.querySelector('.panel [data-key=score] button'); b.click(); b.click(); return {ROWS}"
    assert answer(page, tmp_path, twice) == ["kvmerger@0.5", "kvmerger@0.35", "h2o@0.5", "full"]
    half = f"{CHANGE} set('f-budget', '0.5'); set('f-method', 'kvmerger'); return [{ROWS}, location.hash]"
    assert answer(page, tmp_path, half) == [["full", "kvmerger@0.5"], "#budget=0.5&method=kvmerger"]
    assert answer(page, tmp_path, f"return {ROWS}", "#budget=0.5&method=kvmerger") == ["full", "kvmerger@0.5"]
    heads = (
        "return Array.from(document.querySelectorAll('.heated th')).filter((h) => !h.hidden).map((h) => h.textContent)"
    )
    shown = answer(page, tmp_path, heads, "#category=summarization")
    assert [text for text in shown if "qasper" in text or "lcc" in text] == []
    assert any(text.startswith("gov_report") for text in shown)


@pytest.mark.integration("chromium")
def test_in_a_browser_two_answers_stand_side_by_side_with_their_words_compared(tmp_path):
    texts = {"full": "the red car is fast", "h2o@0.5": "the blue car was very fast", "kvmerger@0.5": ""}
    records = [make_record(arm, "s1", float(arm == "full"), prediction=text, meta={}) for arm, text in texts.items()]
    page = render_report([make_run(tmp_path, "a", records)])
    look = "return Array.from(document.querySelectorAll('.pair pre')).map((side) => side.innerHTML)"
    link = "#sample=m/qasper/s1&a=full&b="
    assert answer(page, tmp_path, look, f"{link}h2o@0.5") == [
        "the <mark>red</mark> car <mark>is</mark> fast",
        "the <mark>blue</mark> car <mark>was very</mark> fast",
    ]
    assert answer(page, tmp_path, look, f"{link}kvmerger@0.5")[1] == "<mark>⌫</mark>"
    assert answer(page, tmp_path, look, f"{link}full") == ["the red car is fast"] * 2
    gold = "return document.querySelector('.gold').textContent"
    assert answer(page, tmp_path, gold, f"{link}h2o@0.5") == "Gold answer: gold"
    chosen = f"""{CHANGE} document.querySelector('.pair').querySelectorAll('select')[1].id = 'right';
        set('right', 'kvmerger@0.5'); return location.hash"""
    assert answer(page, tmp_path, chosen, f"{link}h2o@0.5").endswith("b=kvmerger%400.5")


@pytest.mark.integration("chromium")
def test_in_a_browser_it_fits_a_desktop_and_a_telephone(tmp_path):
    names = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum",
             "multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc")  # fmt: skip
    page = render_report([make_run(tmp_path, "a", steady(2, names))])
    right = """const right = (selector) => Math.max(0, ...Array.from(document.querySelectorAll(selector), (e) =>
        e.getBoundingClientRect().right)); return [document.documentElement.scrollWidth, right('.panel td'),
        right('.heated td:nth-child(2)')]"""
    assert max(answer(page, tmp_path, right, size="1440,900")) <= 1440
    # A window is never as narrow as a telephone, a frame is.
    frame = f"<body><iframe width=390 height=800 srcdoc='{html.escape(without_policy(page))}'></iframe></body>"
    ask = """<script>addEventListener('load', () => { const d = document.querySelector('iframe').contentDocument;
        const row = d.querySelector('.panel tbody tr'); document.title = 'said ' + JSON.stringify([
        d.documentElement.scrollWidth - d.documentElement.clientWidth,
         getComputedStyle(row).display]) })</script></body>"""
    dom = dump_dom(frame.replace("</body>", ask), tmp_path)
    assert json.loads(html.unescape(re.search(r"<title>said (.*?)</title>", dom)[1])) == [0, "grid"]


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
