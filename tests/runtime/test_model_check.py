"""The model check: what no configuration tells, when it runs, and what becomes of sliding windows in a run."""

import sys
from functools import partial

import pytest
import torch
from small_decoders import build, loaded
from transformers import AttentionInterface

from kvbench.cli import main
from kvbench.errors import ModelError
from kvbench.methods.full import Full
from kvbench.methods.h2o import H2O
from kvbench.models.load import MIN_VOCAB_SIZE, byte_tokenizer
from kvbench.runtime import model_check
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.model_check import check_model
from kvbench.runtime.plain import PlainEngine
from kvbench.runtime.requests import Arm, Request

BOTH_ENGINES = pytest.mark.parametrize("engine", [FusedEngine(), PlainEngine()], ids=["fused", "plain"])
SIZES = {"vocab_size": MIN_VOCAB_SIZE, "max_position_embeddings": 4096}
llama, mistral = partial(build, "llama"), partial(build, "mistral")


def request_of(index, n_tokens, new_tokens=5, gold=0, compress_at=None):
    full = Arm.of(Full())
    ids, arms = tuple(range(3, 3 + n_tokens)), (full, Arm.of(H2O(budget=0.5)))
    return Request(index, ids, compress_at or n_tokens, (5,) * gold, arms, full, (2,), new_tokens, new_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_position_ids_that_are_not_heeded_are_found_in_every_precision(dtype):
    shape = {"n_layers": 3, "n_query_heads": 4, "n_kv_heads": 2, "head_dim": 8}
    assert check_model(llama().to(dtype)).shape == shape
    with pytest.raises(ModelError, match=r"RobertaForCausalLM .*its logits differ from those of plain softmax atten"):
        check_model(build("roberta", is_decoder=True, num_hidden_layers=2, **SIZES).to(dtype))


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


def test_a_model_is_probed_once_and_again_when_its_configuration_changes():
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


@BOTH_ENGINES
@pytest.mark.parametrize(
    ("too_long", "n_tokens"),
    [(request_of(1, 30), 34), (request_of(1, 28, gold=6), 33), (request_of(1, 30, compress_at=10), 34)],
    ids=["answer", "gold", "question"],
)
def test_a_window_too_short_ends_a_run_before_its_first_sample(engine, too_long, n_tokens):
    model = loaded(mistral(sliding_window=32))
    fits = [request_of(0, 28, gold=5), request_of(2, 27, gold=6)]
    assert {answer.index for answer in engine.run(model, fits)} == {0, 2}
    message = f"{n_tokens} tokens of prompt and answer exceed MistralForCausalLM's sliding window of 32: lower model"
    with pytest.raises(ModelError, match=message):
        next(engine.run(model, [*fits, too_long]))


@BOTH_ENGINES
def test_two_sets_of_rotary_frequencies_are_never_mixed(engine):
    """As with Phi-3 of 128k tokens: the longest row of a batch decides for all of it."""
    rotary = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    model = build("phi3", original_max_position_embeddings=32, rope_parameters=rotary)
    for requests in ([request_of(0, 28), request_of(1, 10)], [request_of(0, 33), request_of(1, 40, gold=9)]):
        for answer in engine.run(loaded(model), requests):
            if answer.arm.key != "full":
                continue
            ids = torch.tensor([requests[answer.index].input_ids])
            expected = model.generate(ids, do_sample=False, max_new_tokens=5, min_new_tokens=5, eos_token_id=2)
            assert answer.token_ids == expected[0, ids.shape[1] :].tolist()
    for requests in (
        [request_of(0, 20), request_of(1, 40)], [request_of(0, 29)], [request_of(0, 40, compress_at=20)],
        [request_of(0, 28), request_of(1, 9, 24)],
    ):  # fmt: skip
        with pytest.raises(ModelError, match=r"both sets of Phi3ForCausalLM's rotary frequencies.* change at 32"):
            next(engine.run(loaded(model), requests))


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_a_run_is_refused_in_one_line_with_exit_code_2(engine, tmp_path, monkeypatch, capfd):
    build("diffllama", **SIZES).save_pretrained(tmp_path / "model")
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
