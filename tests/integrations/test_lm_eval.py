"""The harness's view of a compressed cache: against transformers, against the plain engine, inside the real harness."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from kvbench.errors import BudgetError, ConfigError, ModelError
from kvbench.integrations.lm_eval import CompressedAnswers, CompressedCacheLM, Continuation, Prompt
from kvbench.lm_eval import main, register
from kvbench.methods.registry import build_policy
from kvbench.runtime.plain import PlainEngine


def tokens(n_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (n_tokens,), generator=generator).tolist())


REQUESTS = [Continuation(tokens(n, seed=n), tokens(m, seed=100 + n)) for n, m in ((40, 1), (53, 4), (31, 7))]


def likelihoods(answers, requests):
    found = {index: (value, greedy) for index, value, greedy in answers.likelihoods(requests)}
    return [found[index] for index in range(len(requests))]


def texts(answers, prompts):
    found = dict(answers.texts(prompts))
    return [found[index] for index in range(len(prompts))]


def log_probabilities(loaded, context, continuation):
    """The continuation's, and the greedy choices at its places, from one forward pass of transformers."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].float()
    judged = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return float(judged.sum()), logits.argmax(-1).tolist()


@pytest.mark.parametrize("question_tokens", [0, 1, 5])
def test_the_full_cache_gives_transformers_own_likelihoods(tiny_gqa, question_tokens):
    answers = CompressedAnswers(tiny_gqa, build_policy("full"), question_tokens=question_tokens)
    for request, (value, greedy) in zip(REQUESTS, likelihoods(answers, REQUESTS), strict=True):
        expected, choices = log_probabilities(tiny_gqa, request.context_ids, request.continuation_ids)
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == (tuple(choices) == request.continuation_ids)
    assert answers.tally.budget_measured == 1.0


def test_a_greedy_continuation_is_recognised(tiny_gqa):
    answers = CompressedAnswers(tiny_gqa, build_policy("h2o", {"budget": 0.5}), question_tokens=3)
    context = tokens(60)
    job = answers._job(0, context, (), 5)
    ((_, result),) = answers._run([job])
    own, others = tuple(result.token_ids), (*result.token_ids[:4], (result.token_ids[4] + 1) % 250)
    found = likelihoods(answers, [Continuation(context, own), Continuation(context, others)])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


@pytest.mark.parametrize("method", ["h2o", "kvmerger_bias"])
def test_compressed_likelihoods_are_those_of_the_plain_engine(tiny_gqa, method):
    policy = build_policy(method, {"budget": 0.35})
    fused = likelihoods(CompressedAnswers(tiny_gqa, policy), REQUESTS)
    plain = likelihoods(CompressedAnswers(tiny_gqa, policy, engine=PlainEngine()), REQUESTS)
    full = likelihoods(CompressedAnswers(tiny_gqa, build_policy("full")), REQUESTS)
    for (value, greedy), (expected, choice), (uncompressed, _) in zip(fused, plain, full, strict=True):
        assert value == pytest.approx(expected, abs=2e-3)
        assert greedy == choice
        assert abs(value - uncompressed) > 1e-3  # a continuation of one token, too, sees the compressed cache


def test_without_question_tokens_the_first_token_is_the_prefill_s(tiny_gqa):
    compressed = CompressedAnswers(tiny_gqa, build_policy("h2o", {"budget": 0.35}), question_tokens=0)
    full = CompressedAnswers(tiny_gqa, build_policy("full"), question_tokens=0)
    one, several = REQUESTS[:2]
    got, expected = likelihoods(compressed, [one, several]), likelihoods(full, [one, several])
    assert got[0][0] == pytest.approx(expected[0][0], abs=1e-4)
    assert abs(got[1][0] - expected[1][0]) > 1e-3


def test_an_empty_continuation_is_certain(tiny_gqa):
    answers = CompressedAnswers(tiny_gqa, build_policy("full"))
    assert likelihoods(answers, [Continuation(tokens(9), ())]) == [(0.0, True)]


def test_a_request_s_result_depends_neither_on_its_place_nor_on_its_company(tiny_gqa):
    policy = build_policy("cam", {"budget": 0.5})  # its merging is random, by the sample's seed
    together = likelihoods(CompressedAnswers(tiny_gqa, policy), REQUESTS)
    for request, expected in zip(REQUESTS, together, strict=True):
        ((value, greedy),) = likelihoods(CompressedAnswers(tiny_gqa, policy), [request])
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


def test_answers_are_transformers_greedy_ones_up_to_the_stop_text(tiny_gqa):
    answers, context = CompressedAnswers(tiny_gqa, build_policy("full")), tokens(45)
    output = tiny_gqa.model.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    whole = tiny_gqa.tokenizer.decode(output[0, 45:], skip_special_tokens=True)
    stop, first = whole[4:6], whole[3]  # two tokens of the byte tokenizer, and one
    found = texts(answers, [Prompt(context, (), 12), Prompt(context, (stop,), 12), Prompt(context, ("", first), 12)])
    assert found == [whole, whole.partition(stop)[0], whole.partition(first)[0]]


def test_generation_ends_at_a_token_that_opens_with_a_stop_text(tiny_gqa):
    answers = CompressedAnswers(tiny_gqa, build_policy("full"))
    (text,) = texts(answers, [Prompt(tokens(45), (), 12)])
    opening = answers._opening((text[2],))
    assert [answers._texts[token] for token in opening] == [text[2]]
    job = answers._job(0, tokens(45), opening, 12)
    ((_, result),) = answers._run([job])
    assert result.finish == "stop"
    assert tiny_gqa.tokenizer.decode(result.token_ids) == text.partition(text[2])[0]


def test_long_contexts_lose_their_beginning_and_are_counted(tiny_model):
    loaded = tiny_model("tiny-random", max_context_tokens=64)
    answers = CompressedAnswers(loaded, build_policy("full"))
    context, continuation = tokens(100), tokens(4, seed=1)
    found = likelihoods(answers, [Continuation(context, continuation), Continuation(context[-60:], continuation)])
    assert found[0] == pytest.approx(found[1])
    assert answers.tally.truncated == 1
    with pytest.raises(ModelError, match=r"64 new tokens leave no room for a context in the 64 tokens"):
        likelihoods(answers, [Continuation(context, tokens(64))])


def test_short_contexts_are_refused_or_kept_whole_and_counted(tiny_gqa):
    policy = build_policy("h2o", {"budget": 0.5})
    requests = [Continuation(tokens(5), tokens(2)), REQUESTS[0]]
    with pytest.raises(BudgetError, match=r"h2o needs at least 4: .*short_context=full"):
        likelihoods(CompressedAnswers(tiny_gqa, policy), requests)
    answers = CompressedAnswers(tiny_gqa, policy, short_context="full")
    short, long = likelihoods(answers, requests)
    (whole,) = likelihoods(CompressedAnswers(tiny_gqa, build_policy("full")), requests[:1])
    assert likelihoods(CompressedAnswers(tiny_gqa, build_policy("h2o", {"budget": 1.0})), requests[:1]) == [whole]
    assert short == pytest.approx(whole, abs=1e-4)
    assert long == pytest.approx(likelihoods(CompressedAnswers(tiny_gqa, policy), requests[1:])[0], abs=1e-4)
    assert (answers.tally.requests, answers.tally.kept_whole) == (2, 1)
    assert 0.5 < answers.tally.budget_measured < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question_tokens": -1}, "question_tokens=-1 is no integer of at least 0"),
        ({"question_tokens": 1.5}, "question_tokens=1.5 is no integer"),
        ({"short_context": "skip"}, "short_context='skip' is not one of refuse, full"),
    ],
)
def test_bad_options_are_refused(tiny_gqa, options, message):
    with pytest.raises(ConfigError, match=message):
        CompressedAnswers(tiny_gqa, build_policy("full"), **options)


def test_a_failing_engine_is_one_line(tiny_model):
    broken = tiny_model("tiny-random")
    broken.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"request 0 cannot be answered: .*not finite"):
        likelihoods(CompressedAnswers(broken, build_policy("full")), REQUESTS[:1])


def test_what_the_harness_calls_gives_the_answers_in_order():
    """Without the harness: requests as it makes them, and its hook."""
    model, kept = CompressedCacheLM("tiny-random", method="h2o", budget=0.5, max_gen_toks=4), []
    model.cache_hook = SimpleNamespace(add_partial=lambda kind, key, value: kept.append((kind, key, value)))
    model.device = model._device
    asked = [(("text", str(n)), list(tokens(n, seed=n)), list(tokens(m, seed=100 + n))) for n, m in ((40, 1), (31, 7))]
    found = model._loglikelihood_tokens(asked, disable_tqdm=True)
    expected = likelihoods(model.answers, [Continuation(tuple(c), tuple(f)) for _, c, f in asked])
    assert found == [pytest.approx(value) for value in expected]
    texts_found = model.generate_until([SimpleNamespace(args=("a" * 50, {"until": "\n"}))] * 2, disable_tqdm=True)
    assert texts_found[0] == texts_found[1]
    assert sorted(kind for kind, _, _ in kept) == ["generate_until"] * 2 + ["loglikelihood"] * 2
    info = model.get_model_info()
    assert (info["method"], info["budget"], info["requests"]) == ("h2o", 0.5, 6)
    with pytest.raises(ConfigError, match="loglikelihood_rolling have no context"):
        model.loglikelihood_rolling([])


# Inside the harness: a local task over a small local data set.

INSTALLED = importlib.util.find_spec("lm_eval") is not None and importlib.util.find_spec("lm_eval.api") is not None
needs_harness = pytest.mark.integration("lm_eval")

DOCUMENTS = [
    {"passage": f"The {place} of the town is {colour}. " * 6, "question": f"What colour is the {place}?", "label": n}
    for n, (place, colour) in enumerate([("bridge", "red"), ("tower", "green"), ("harbour", "blue")])
]
TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: {text}
doc_to_target: {target}
"""
QUESTION = '"{{passage}}\\nQuestion: {{question}}\\nAnswer:"'
TASKS = {
    "choice": ("multiple_choice", QUESTION, "label", """
doc_to_choice: ["red", "green", "blue"]
metric_list: [{metric: acc}]
"""),
    "answer": ("generate_until", QUESTION, "\"{{['red', 'green', 'blue'][label]}}\"", """
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""),
    "rolling": ("loglikelihood_rolling", '""', '"{{passage}}"', ""),
}  # fmt: skip


@pytest.fixture
def local_tasks(tmp_path, monkeypatch):
    """Folder with the tasks; the harness is told to stay offline and to keep its caches there."""
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    for name, (output_type, text, target, more) in TASKS.items():
        task = TASK.format(name=name, data=data, output_type=output_type, text=text, target=target) + more
        (tmp_path / f"{name}.yaml").write_text(task, encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def evaluate(tasks_folder, tasks, model_args, model="kvbench"):
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    manager = TaskManager(include_path=str(tasks_folder), include_defaults=False)
    return lm_eval.simple_evaluate(model, model_args, tasks=tasks, task_manager=manager, bootstrap_iters=0)


@needs_harness
def test_two_arms_run_choice_and_answer_tasks(local_tasks):
    tasks = ["local_choice", "local_answer"]
    outputs = {}
    for arguments in ("pretrained=tiny-random", "pretrained=tiny-random,method=h2o,budget=0.35,recent_share=0.25"):
        found = evaluate(local_tasks, tasks, arguments)
        assert set(found["results"]) == set(tasks)
        assert 0.0 <= found["results"]["local_choice"]["acc,none"] <= 1.0
        config = found["config"]
        outputs[config["method"]] = [sample["filtered_resps"] for task in tasks for sample in found["samples"][task]]
    assert config["method_options"] == {"recent_share": "0.25"}
    assert config["budget_measured"] == pytest.approx(0.35, abs=0.01)
    assert config["requests"] == 3 * 3 + 3
    assert outputs["full"] != outputs["h2o"]


@needs_harness
def test_the_full_cache_agrees_with_the_harness_s_own_model(local_tasks, tiny_model):
    from lm_eval.models.huggingface import HFLM

    ours = evaluate(local_tasks, ["local_choice"], "pretrained=tiny-random")
    same = tiny_model("tiny-random", n_layers=10)  # as deep as the one that the name alone means
    own = HFLM(pretrained=same.model, tokenizer=same.tokenizer, batch_size=1)
    theirs = evaluate(local_tasks, ["local_choice"], None, own)
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


def test_only_greedy_generation_is_taken():
    model = CompressedCacheLM("tiny-random")
    for arguments, accepted in (
        ({"until": "\n", "max_gen_toks": 3}, (("\n",), 3)),
        ({"until": ["a", "b"], "do_sample": False, "temperature": 0.0, "top_p": 0.9}, (("a", "b"), 256)),
        ({"max_new_tokens": 5, "temperature": 0}, ((), 5)),
    ):
        assert model._generation(arguments) == accepted
    for arguments in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}, {"penalty": 1.1}):
        with pytest.raises(ConfigError, match="only greedy decoding is"):
            model._generation(arguments)


def test_a_chat_template_s_own_bos_is_not_doubled():
    model = CompressedCacheLM("tiny-random")
    text = model.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text.startswith(model.tokenizer.bos_token)
    encoded = model.tok_encode(text), model.tok_encode("Hello"), model.tok_encode("Hello", add_special_tokens=False)
    assert [ids.count(model.prefix_token_id) for ids in encoded] == [1, 1, 0]


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed, so its absence cannot be shown")
def test_without_the_harness_the_command_says_how_to_get_it(capsys):
    assert main() == 2
    assert 'pip install "kvbench[lm_eval]"' in capsys.readouterr().err
