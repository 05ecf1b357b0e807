"""Checkpoint folders from anyone: what is whole and safe loads, the rest is refused in one line, and no code runs."""

import json
import pickle
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from kvbench.errors import ModelError
from kvbench.models.checkpoint import quiet
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.models.prompt import frame

WEIGHT = "model.layers.1.mlp.up_proj.weight"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def saved(tiny_gqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_gqa.model.save_pretrained(folder)
    tiny_gqa.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def load(folder, **overrides):
    return load_model(named_config("llama2-7b-chat", path=str(folder), **overrides), device="cpu")


def refused(folder, words, **overrides):
    with pytest.raises(ModelError, match=words) as error:
        load(folder, **overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(folder, name="config.json", **changes):
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_loads_under_any_configuration(tiny_gqa, folder):
    loaded = load(folder)
    input_ids = torch.tensor([tiny_gqa.tokenizer("any text")["input_ids"]])
    torch.testing.assert_close(loaded.model(input_ids).logits, tiny_gqa.model(input_ids).logits)
    assert loaded.tokenizer("any text")["input_ids"] == input_ids[0].tolist()
    assert (loaded.name, loaded.chat_format, loaded.max_prompt_tokens) == ("llama2-7b-chat", "llama2", 3500)
    assert (loaded.source, loaded.max_context_tokens) == (str(folder), tiny_gqa.max_context_tokens)
    assert load(folder, dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_folder_goes_straight_to_the_gpu(folder):
    loaded = load_model(named_config("llama2-7b-chat", path=str(folder)), device="cuda")
    assert loaded.device.type == "cuda"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(loaded.model(torch.arange(9, device=loaded.device)[None]).logits).all()


def test_what_is_rightly_absent_or_left_over_still_loads(folder):
    def edit(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # older Llama files
        del weights["lm_head.weight"]

    edit_weights(folder, edit)
    edit_config(folder, tie_word_embeddings=True)
    model = load(folder).model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_missing_files_are_named(folder, tmp_path):
    refused(tmp_path / "absent", "is no folder")
    (folder / "chat_template.jinja").unlink()
    refused(folder, r"model\.chat_format=none", chat_format="template")
    assert load(folder, chat_format="none").tokenizer.chat_template is None
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    refused(folder, r"has an adapter.*merge it")
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    (folder / "adapter_config.json").unlink()
    refused(folder, "cannot be loaded")
    (folder / "model.safetensors").unlink()
    refused(folder, r"no \*\.safetensors file")
    (folder / "config.json").unlink()
    refused(folder, r"no readable config\.json")


@pytest.mark.parametrize("text", ["{", DEEP, '{"a": ' + DEEP, "[]", "null"])
def test_a_configuration_that_is_none_is_one_line(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json.*download it again")


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "big"}, {"num_hidden_layers": "two"}, {"max_position_embeddings": None}]
)
def test_words_for_numbers_are_one_line(folder, fields):
    edit_config(folder, **fields)
    refused(folder, r"cannot be loaded .*check that it is complete")


@pytest.mark.parametrize(("name", "text"), [("tokenizer", "[]"), ("tokenizer", '"text"'), ("generation", "[]")])
def test_what_is_no_object_beside_the_configuration_is_one_line(folder, name, text):
    (folder / f"{name}_config.json").write_text(text)
    refused(folder, r"cannot be loaded .*check that it is complete")


def test_weights_that_are_missing_or_that_the_model_has_not_are_refused(folder, capfd):
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    refused(folder, r"holds 1 weights .* \(model\.layers\.0\.self_attn\.q_norm\.weight\)")
    edit_weights(folder, lambda weights: weights.pop("model.layers.0.self_attn.q_norm.weight"))
    edit_config(folder, num_hidden_layers=3)  # fewer layers than the file has
    message = refused(folder, r"holds 9 weights that LlamaForCausalLM .* \(model\.layers\.3\.")
    assert str(folder) in message
    assert message.count("model.layers.3.") == 3
    assert "download config.json and *.safetensors of one model" in message
    edit_config(folder, num_hidden_layers=4)
    edit_weights(folder, lambda weights: weights.pop(WEIGHT))  # not replaced by a random one
    refused(folder, rf"lacks 1 weights \({WEIGHT}\)")
    assert capfd.readouterr().err == ""  # transformers' own table would not be one line


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_integer_weights_are_refused(folder, dtype):
    edit_weights(folder, lambda weights: weights.update({WEIGHT: (weights[WEIGHT] * 50).to(dtype)}))
    refused(folder, rf"1 weights in integers or float8 \({WEIGHT}\)")


@pytest.mark.parametrize("method", ["nope", None, 4])
def test_an_unknown_quantisation_is_refused(folder, method):
    edit_config(folder, quantization_config={"quant_method": method})
    refused(folder, rf"quant_method {method!r}, known are .*: use weights that are not quantised")


def test_progress_bar_setting_is_restored():
    assert logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError, match="broken"), quiet():  # noqa: PT012  (the block is on trial)
        assert not logging.is_progress_bar_enabled()
        raise RuntimeError("broken")
    assert logging.is_progress_bar_enabled()


# Code that comes with the weights is never run: each of these would create a file.


def test_code_beside_the_weights_is_never_run(folder):
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own.Own"})
    assert type(load(folder).model).__name__ == "LlamaForCausalLM"
    auto_map = {"AutoTokenizer": ["own.Own", None]}
    edit_config(folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Own")
    with suppress(ModelError):  # loading without it is as good
        load(folder)
    edit_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"})
    refused(folder, r"model_type 'own'.*its own Python code")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unread(folder, name, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / name).write_bytes(pickle.dumps(Payload()))
    assert load(folder).name == "llama2-7b-chat"  # beside safetensors a pickle is left alone
    (folder / "model.safetensors").unlink()
    refused(folder, rf"only pickled weights \({name}\).*can run code when read: convert them to")
    assert not (tmp_path / "ran").exists()


ESCAPES = ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}")


@pytest.mark.parametrize("template", [*ESCAPES, "{% for i in range(10**9) %}{% endfor %}"])
def test_a_chat_template_runs_in_a_sandbox(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    loaded = load(folder, chat_format="template")
    with pytest.raises(ModelError, match="chat template of model llama2-7b-chat fails"):
        frame(loaded, chat=True)
