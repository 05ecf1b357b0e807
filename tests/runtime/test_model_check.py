"""The model check: what no configuration tells, when it runs, and what becomes of sliding windows in a run."""

import sys
from functools import partial

import pytest
import torch
from transformers import (
    AttentionInterface,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from kvbench.cli import main
from kvbench.errors import ModelError
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.models.load import LoadedModel
from kvbench.models.random_llama import MIN_VOCAB_SIZE, byte_tokenizer
from kvbench.runtime import model_check
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.model_check import check_model
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm, Request

SIZES = {
    "vocab_size": MIN_VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(config_class, model_class, **options):
    torch.manual_seed(0)
    return model_class(config_class(**{**SIZES, **options})).eval()


llama = partial(build, LlamaConfig, LlamaForCausalLM)
mistral = partial(build, MistralConfig, MistralForCausalLM)
roberta = partial(build, RobertaConfig, RobertaForCausalLM, is_decoder=True)


def loaded(model):
    return LoadedModel(
        name="small", model=model, tokenizer=byte_tokenizer(512), device=model.device, dtype=model.dtype,
        max_context_tokens=512, max_prompt_tokens=None, chat_format="none", source="random weights",
    )  # fmt: skip


def job(index, n_tokens, new_tokens=5, gold=0, compress_at=None):
    full = Arm("full", Full())
    arms = (full, Arm("h2o@0.5", H2O(budget=0.5)))
    ids = tuple(range(3, 3 + n_tokens))
    return Request(index, ids, compress_at or n_tokens, (5,) * gold, arms, full, (2,), new_tokens, new_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_position_ids_that_are_not_heeded_are_found_in_every_precision(dtype):
    assert check_model(llama().to(dtype)).shape == {
        "n_layers": 2, "n_query_heads": 4, "n_kv_heads": 2, "head_dim": 8,
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"RobertaForCausalLM .*its logits differ from those of plain softmax atten"):
        check_model(roberta().to(dtype))


def test_attention_of_the_model_s_own_is_found():
    def cooler(*arguments, scaling, **options):
        return AttentionInterface()["sdpa"](*arguments, scaling=scaling / 2, **options)

    AttentionInterface.register("cooler", cooler)
    model = llama()
    check_model(model)
    model.set_attn_implementation("cooler")
    with pytest.raises(ModelError, match="its logits differ from those of plain softmax attention"):
        check_model(model)


@pytest.mark.parametrize("factor", [torch.nan, 1.01])
def test_whatever_our_attention_gets_wrong_is_found(monkeypatch, factor):
    right = model_check.softmax_attention
    monkeypatch.setattr(model_check, "softmax_attention", lambda *states: right(*states) * factor)
    with pytest.raises(ModelError, match="LlamaForCausalLM is not supported"):
        check_model(llama())


def test_a_model_is_probed_once_and_again_when_its_configuration_changes(monkeypatch):
    model, calls = mistral(sliding_window=32), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert check_model(model).window_tokens == 32
    n_calls = len(calls)
    assert check_model(model).window_tokens == 32
    assert len(calls) == n_calls == 2 + model_check.STEPS
    model.config.sliding_window = None
    assert check_model(model).window_tokens is None
    assert model.config._attn_implementation == "sdpa"


def test_training_mode_and_infinite_weights():
    with pytest.raises(ModelError, match=r"is in training mode.*call model\.eval\(\)"):
        check_model(llama().train())
    broken = llama()
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    check_model(broken)  # the engines fail such samples one by one


@pytest.mark.parametrize("engine", [FusedEngine(), PlainEngine()], ids=["fused", "plain"])
@pytest.mark.parametrize(
    ("too_long", "n_tokens"),
    [(job(1, 30), 34), (job(1, 28, gold=6), 33), (job(1, 30, compress_at=10), 34)],
    ids=["answer", "gold", "question"],
)
def test_a_window_too_short_ends_a_run_before_its_first_sample(engine, too_long, n_tokens):
    model = mistral(sliding_window=32)
    fits = [job(0, 28, gold=5), job(2, 27, gold=6)]
    assert {result.index for result in engine.run(loaded(model), fits)} == {0, 2}
    message = f"{n_tokens} tokens of prompt and answer exceed MistralForCausalLM's sliding window of 32: lower model"
    with pytest.raises(ModelError, match=message):
        next(engine.run(loaded(model), [*fits, too_long]))


@pytest.mark.parametrize("engine", [FusedEngine(), PlainEngine()], ids=["fused", "plain"])
def test_two_sets_of_rotary_frequencies_are_never_mixed(engine):
    """As with Phi-3 of 128k tokens: the longest row of a batch decides for all of it."""
    rotary = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = build(
        Phi3Config, Phi3ForCausalLM, sliding_window=None, original_max_position_embeddings=32,
        rope_parameters={**rotary, "rope_theta": 1e4},
    )  # fmt: skip
    for jobs in ([job(0, 28), job(1, 10)], [job(0, 33), job(1, 40, gold=9)]):
        for result in engine.run(loaded(model), jobs):
            if result.arm.key != "full":
                continue
            ids = torch.tensor([jobs[result.index].input_ids])
            expected = model.generate(ids, do_sample=False, max_new_tokens=5, min_new_tokens=5, eos_token_id=2)
            assert result.token_ids == expected[0, ids.shape[1] :].tolist()
    for jobs in ([job(0, 20), job(1, 40)], [job(0, 29)], [job(0, 40, compress_at=20)], [job(0, 28), job(1, 9, 24)]):
        with pytest.raises(ModelError, match=r"both sets of Phi3ForCausalLM's rotary frequencies.* change at 32"):
            next(engine.run(loaded(model), jobs))


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_a_run_is_refused_in_one_line_with_exit_code_2(engine, tmp_path, monkeypatch, capfd):
    build(DiffLlamaConfig, DiffLlamaForCausalLM).save_pretrained(tmp_path / "model")
    byte_tokenizer(4096).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    arguments = [
        "model=local", "model.path=model", "model.chat_format=none", "model.device=cpu", "task=passkey",
        "task.limit=1", "task.lengths=[300]", "method=h2o", "budget=0.5", f"engine={engine}", "output.root=runs",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["kvbench", *arguments])
    assert main() == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    [line] = [line for line in error.splitlines() if line.startswith("kvbench: ")]
    assert "DiffLlamaForCausalLM is not supported (layer 0 attends where layer 1 is next): use a decoder" in line
    assert not [file for file in tmp_path.glob("runs/*/records*.jsonl") if file.read_text()]
