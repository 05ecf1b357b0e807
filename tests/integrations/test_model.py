"""The model inside the real harness: a local task over a small local data set, two arms. Needs the package lm_eval."""

import importlib.util
import json
import sys

import pytest

from kvbench.errors import ConfigError
from kvbench.integrations.lm_eval import CompressedCacheLM
from kvbench.lm_eval import main, register

INSTALLED = importlib.util.find_spec("lm_eval") is not None and importlib.util.find_spec("lm_eval.api") is not None
needs_harness = pytest.mark.integration("lm_eval")

DOCUMENTS = [
    {
        "passage": f"The {place} of the town is {colour}. " * 6,
        "question": f"What colour is the {place}?",
        "label": label,
    }
    for label, (place, colour) in enumerate([("bridge", "red"), ("tower", "green"), ("harbour", "blue")])
]
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_choice: ["red", "green", "blue"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
ANSWER_TASK = """
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{passage}}}}\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{['red', 'green', 'blue'][label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING_TASK = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{passage}}}}"
"""


@pytest.fixture
def local_tasks(tmp_path, monkeypatch):
    """Folder with the tasks; the harness is told to stay offline and to keep its caches there."""
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    for name, text in (("choice", CHOICE_TASK), ("answer", ANSWER_TASK), ("rolling", ROLLING_TASK)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def evaluate(tasks_folder, tasks, arguments):
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    return lm_eval.simple_evaluate(
        model="kvbench",
        model_args=arguments,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(tasks_folder), include_defaults=False),
        bootstrap_iters=0,
    )


@needs_harness
def test_two_arms_run_choice_and_answer_tasks(local_tasks):
    tasks = ["local_choice", "local_answer"]
    outputs = {}
    for arguments in ("pretrained=tiny-random", "pretrained=tiny-random,method=h2o,budget=0.35,recent_share=0.25"):
        found = evaluate(local_tasks, tasks, arguments)
        assert set(found["results"]) == set(tasks)
        assert 0.0 <= found["results"]["local_choice"]["acc,none"] <= 1.0
        outputs[found["config"]["method"]] = [
            [sample["filtered_resps"] for sample in found["samples"][task]] for task in tasks
        ]
        config = found["config"]
    assert config["method_options"] == {"recent_share": "0.25"}
    assert config["budget_measured"] == pytest.approx(0.35, abs=0.01)
    assert config["requests"] == 3 * 3 + 3
    assert outputs["full"] != outputs["h2o"]


@needs_harness
def test_the_full_cache_agrees_with_the_harness_s_own_model(local_tasks, tiny_gqa):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = evaluate(local_tasks, ["local_choice"], "pretrained=tiny-random")
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=tiny_gqa.model, tokenizer=tiny_gqa.tokenizer, batch_size=1),
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(local_tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    for mine, other in zip(ours["samples"]["local_choice"], theirs["samples"]["local_choice"], strict=True):
        for (value, greedy), (expected, choice) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(value) == pytest.approx(float(expected), abs=2e-3)
            assert greedy == choice


@needs_harness
@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("local_rolling", "pretrained=tiny-random", "loglikelihood_rolling have no context"),
        ("local_choice", "pretrained=tiny-random,method=h2o,sinks=4", "unknown option sinks for method h2o"),
        ("local_choice", "pretrained=tiny-random,method=h20", "unknown method 'h20'"),
    ],
)
def test_what_cannot_be_done_is_refused(local_tasks, task, arguments, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(local_tasks, [task], arguments)


@needs_harness
def test_the_command_line_is_the_harness_s_with_one_model_more(local_tasks, monkeypatch, capsys):
    words = ["lm_eval", "--model", "kvbench", "--model_args", "pretrained=tiny-random,method=h2o,budget=0.5"]
    words += ["--include_path", str(local_tasks), "--tasks"]
    monkeypatch.setattr(sys, "argv", [*words, "local_choice"])
    assert main() == 0
    assert "|local_choice|" in capsys.readouterr().out.replace(" ", "")
    monkeypatch.setattr(sys, "argv", [*words, "local_rolling"])
    assert main() == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("kvbench: ")
    assert "have no context that could be compressed" in last


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ({"until": "\n", "max_gen_toks": 3}, (("\n",), 3)),
        ({"until": ["a", "b"], "do_sample": False, "temperature": 0.0, "top_p": 0.9}, (("a", "b"), 256)),
        ({"max_new_tokens": 5, "temperature": 0}, ((), 5)),
        ({"do_sample": True}, None),
        ({"temperature": 0.7}, None),
        ({"num_beams": 4}, None),
        ({"penalty": 1.1}, None),
    ],
)
def test_only_greedy_generation_is_taken(arguments, accepted):
    model = CompressedCacheLM("tiny-random")
    if accepted is None:
        with pytest.raises(ConfigError, match="only greedy decoding is"):
            model._generation(arguments)
    else:
        assert model._generation(arguments) == accepted


def test_a_chat_template_s_own_bos_is_not_doubled():
    model = CompressedCacheLM("tiny-random")
    text = model.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text.startswith(model.tokenizer.bos_token)
    assert model.tok_encode(text).count(model.prefix_token_id) == 1
    assert model.tok_encode("Hello").count(model.prefix_token_id) == 1
    assert model.tok_encode("Hello", add_special_tokens=False).count(model.prefix_token_id) == 0


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed, so its absence cannot be shown")
def test_without_the_harness_the_command_says_how_to_get_it(capsys):
    assert main() == 2
    assert 'pip install "kvbench[lm_eval]"' in capsys.readouterr().err
