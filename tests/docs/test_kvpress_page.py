"""docs/kvpress.md: the press on the page, inside kvpress. Needs kvpress, hence a transformers older than ours."""

import re
from pathlib import Path

import pytest
import torch

from kvbench.methods.base import LayerStates
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm, Request

pytestmark = pytest.mark.integration("kvpress")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kvpress.md"
N_CONTEXT, N_QUESTION, N_NEW = 60, 5, 10


@pytest.fixture(scope="module")
def press_class():
    (code,) = re.findall(r"```python\n# kvmerger_press\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module: dict = {}
    exec(code, module)
    return module["KVMergerPress"]


@pytest.fixture
def eager():
    loaded = load_model(named_config("tiny-random", device="cpu"))
    loaded.model.set_attn_implementation("eager")
    return loaded


def token_ids(n_tokens, seed=0):
    return torch.randint(3, 250, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


def prefilled(model, ids, press=None):
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        if press is None:
            output = model.model(ids, past_key_values=cache, output_attentions=True)
            return cache, output.attentions
        with press(model):
            model.model(ids, past_key_values=cache)
    return cache, None


@pytest.mark.parametrize("options", [{}, {"sigma": 3.0, "pivot": "last"}])
def test_every_layer_is_what_the_policy_makes_of_the_uncompressed_cache(eager, press_class, options):
    press = press_class(compression_ratio=0.5, options=options)
    ids = token_ids(N_CONTEXT)
    whole, attentions = prefilled(eager.model, ids)
    cache, _ = prefilled(eager.model, ids, press)
    for index, (layer, attention) in enumerate(zip(whole.layers, attentions, strict=True)):
        states = LayerStates(
            layer.keys[0], layer.values[0], index, len(attentions), attention.shape[1], column_sums=attention[0].sum(1)
        )
        kept = press.policy.compress(states, N_CONTEXT // 2)
        assert torch.equal(cache.layers[index].keys[0], kept.keys)
        assert torch.equal(cache.layers[index].values[0], kept.values)
        assert cache.layers[index].keys.shape[2] == N_CONTEXT // 2


def test_the_answer_is_that_of_the_plain_engine(eager, press_class):
    from kvpress import KVPressTextGenerationPipeline

    press = press_class(compression_ratio=0.5)
    ids = token_ids(N_CONTEXT + N_QUESTION)
    pipe = KVPressTextGenerationPipeline(model=eager.model, tokenizer=eager.tokenizer)
    inputs = {"context_ids": ids[:, :N_CONTEXT], "questions_ids": [ids[:, N_CONTEXT:]]}
    (text,) = pipe._forward(inputs, max_new_tokens=N_NEW, press=press)
    assert eager.model.model.layers[0].self_attn._forward_hooks == {}
    arm = Arm.of(press.policy)
    job = Request(
        index=0, input_ids=tuple(ids[0].tolist()), compress_at=N_CONTEXT, gold_ids=(), arms=(arm,), reference=arm,
        stop_ids=(2,), max_new_tokens=N_NEW,
    )  # fmt: skip
    (expected,) = PlainEngine().run(eager, [job])
    assert text == eager.tokenizer.decode(expected.token_ids, skip_special_tokens=True)
    (full,) = pipe._forward(inputs, max_new_tokens=N_NEW, press=None)
    assert text != full  # compression changes this answer, so the agreement is not trivial


def test_the_pipeline_runs_with_text(eager, press_class):
    from kvpress import KVPressTextGenerationPipeline

    pipe = KVPressTextGenerationPipeline(model=eager.model, tokenizer=eager.tokenizer)
    found = pipe(
        "A bridge, a tower. " * 8, question="Which?", press=press_class(compression_ratio=0.65), max_new_tokens=4
    )
    assert isinstance(found["answer"], str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whole_first_layers": 2}, "masks all layers alike"),
        ({"value_scale": "log_bias"}, "neither biases nor ragged heads"),
        ({"budget_mode": "threshold", "threshold": 0.2}, "neither biases nor ragged heads"),
    ],
)
def test_what_kvpress_cannot_hold_is_refused(eager, press_class, options, message):
    with pytest.raises(ValueError, match=message):
        prefilled(eager.model, token_ids(N_CONTEXT), press_class(compression_ratio=0.4, options=options))


def test_another_attention_is_refused(eager, press_class):
    eager.model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation"):
        prefilled(eager.model, token_ids(N_CONTEXT), press_class(compression_ratio=0.5))
