"""What the harness asks, answered over a compressed context: against transformers, and against the plain engine."""

import pytest
import torch

from kvbench.errors import BudgetError, ConfigError, ModelError
from kvbench.integrations.lm_eval import CompressedAnswers, Continuation, Prompt
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
    answers = CompressedAnswers(tiny_gqa, build_policy("full"))
    context = tokens(45)
    output = tiny_gqa.model.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    whole = tiny_gqa.tokenizer.decode(output[0, 45:], skip_special_tokens=True)
    stop = whole[4:6]  # two tokens of the byte tokenizer
    first = whole[3]
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
