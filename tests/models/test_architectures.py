"""Every decoder of the installed transformers: what `docs/models.md` says of it holds, and `generate` agrees."""

import importlib.util
from pathlib import Path

import pytest
import torch
from small_decoders import ask, prompt
from transformers.utils import logging

import kvbench
from kvbench.errors import ModelError
from kvbench.methods.full import Full
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.model_check import layer_windows
from kvbench.runtime.plain import PlainEngine

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "model_table.py"
SPEC = importlib.util.spec_from_file_location("model_table", SCRIPT)
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)

LISTED = {line.split("`")[1]: line for line in table.PAGE.read_text().splitlines() if line.startswith("| `")}
NEW_TOKENS = 5
ENGINES = {"fused": FusedEngine(), "plain": PlainEngine()}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def generate(model, ids):
    """Greedy tokens of transformers' own cache, and the negative log-likelihood of each."""
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        eos_token_id=2, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = output.sequences[0, ids.shape[1] :]
    log_probs = torch.log_softmax(torch.cat(output.logits).float(), -1)
    return tokens.tolist(), -log_probs.gather(1, tokens[:, None])[:, 0]


def answer(engine, model, ids, gold=()):
    """What an engine answers with the full cache; likewise."""
    found = ask(engine, model, ids, Full(), NEW_TOKENS, gold)
    return found.token_ids, torch.tensor(found.gold_nll)


def compressed(model, ids):
    with kvbench.compress(model, Full()):
        return generate(model, ids)


def assert_same(got, expected):
    assert got[0] == expected[0]
    torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=1e-4)


def test_every_architecture_is_listed():
    page = table.PAGE.read_text()
    assert len(LISTED) >= 100
    assert set(table.architectures()) == set(LISTED) | set(page.partition("Not built: ")[2].split("`")[1::2])


@pytest.mark.parametrize("name", LISTED)
def test_supported_means_generate_s_tokens_and_refused_means_one_line(name):
    model = table.build(name)
    assert table.row(name, model) == LISTED[name]
    ids = prompt(9)
    if "| refused |" in LISTED[name]:
        for use in (*(lambda engine=engine: answer(engine, model, ids) for engine in ENGINES.values()),
                    lambda: compressed(model, ids)):  # fmt: skip
            with pytest.raises(ModelError) as caught:
                use()
            assert "\n" not in str(caught.value)
        return
    windows = layer_windows(model.config)
    if not any(windows):
        ids = prompt(24)
    expected = generate(model, ids)
    assert_same(compressed(model, ids), expected)
    for engine in ENGINES.values():
        assert_same(answer(engine, model, ids, expected[0]), expected)
    if any(windows):  # 24 tokens are more than the window of 16
        for engine in ENGINES.values():
            with pytest.raises(ModelError, match=r"28 tokens of prompt and answer exceed \w+'s sliding window of 16"):
                answer(engine, model, prompt(24))
        if all(windows):
            with pytest.raises(ModelError, match="24 tokens exceed the sliding window of 16"):
                compressed(model, prompt(24))
        else:
            assert_same(compressed(model, prompt(24)), generate(model, prompt(24)))
