import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from kvbench.errors import ModelError
from kvbench.models.checkpoint import quiet
from kvbench.models.config import named_config
from kvbench.models.load import load_model
from kvbench.models.prompt import frame


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


def test_a_folder_loads_under_any_configuration(tiny_gqa, folder):
    loaded = load(folder)
    input_ids = torch.tensor([tiny_gqa.tokenizer("any text")["input_ids"]])
    torch.testing.assert_close(loaded.model(input_ids).logits, tiny_gqa.model(input_ids).logits)
    assert loaded.tokenizer("any text")["input_ids"] == input_ids[0].tolist()
    assert (loaded.name, loaded.chat_format, loaded.max_prompt_tokens) == ("llama2-7b-chat", "llama2", 3500)
    assert loaded.source == str(folder)
    assert loaded.max_context_tokens == tiny_gqa.max_context_tokens


def test_dtype_is_applied(folder):
    assert load(folder, dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_folder_goes_straight_to_the_gpu(folder):
    loaded = load_model(named_config("llama2-7b-chat", path=str(folder)), device="cuda")
    assert loaded.device.type == "cuda"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(loaded.model(torch.arange(9, device=loaded.device)[None]).logits).all()


def test_no_folder(tmp_path):
    with pytest.raises(ModelError, match="is no folder"):
        load(tmp_path / "absent")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\).*convert"):
        load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        load(folder)


@pytest.mark.parametrize("text", [None, "{"])
def test_no_readable_config(folder, text):
    (folder / "config.json").unlink()
    if text:
        (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        load(folder)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_code_beside_the_weights_is_never_run(folder):
    edit_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"model_type 'own'.*its own Python code"):
        load(folder)
    assert not (folder / "ran").exists()


def test_known_model_types_ignore_code_beside_the_weights(folder):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own.Own"})
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    assert type(load(folder).model).__name__ == "LlamaForCausalLM"
    assert not (folder / "ran").exists()


def test_broken_weights_are_one_line(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_missing_weights_are_not_replaced_by_random_ones(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(model\.layers\.1\.self_attn\.k_proj\.weight\)"):
        load(folder)


def test_missing_template_names_the_remedy(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"model\.chat_format=none"):
        load(folder, chat_format="template")
    assert load(folder, chat_format="none").tokenizer.chat_template is None


def test_progress_bar_setting_is_restored():
    assert logging.is_progress_bar_enabled()
    shown = []

    def fail():
        with quiet():
            shown.append(logging.is_progress_bar_enabled())
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert shown == [False]
    assert logging.is_progress_bar_enabled()


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_the_model_has_not_are_refused(folder, capfd):
    """As left over where config.json says fewer layers than the file has."""
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"holds 9 weights that LlamaForCausalLM .* \(model\.layers\.3\.") as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert str(error.value).count("model.layers.3.") == 3
    assert "download config.json and *.safetensors of one model" in str(error.value)
    assert capfd.readouterr().err == ""  # transformers' own table would not be one line


def test_a_single_stray_weight_is_refused(folder):
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    with pytest.raises(ModelError, match=r"holds 1 weights .* \(model\.layers\.0\.self_attn\.q_norm\.weight\)"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_integer_weights_are_refused(folder, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: (weights[name] * 50).to(dtype)}))
    with pytest.raises(ModelError, match=r"1 weights in integers or float8 \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load(folder)


@pytest.mark.parametrize("method", ["nope", None, 4])
def test_an_unknown_quantisation_is_refused(folder, method):
    edit_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=rf"quant_method {method!r}, known are .*: use weights that are not quantised"):
        load(folder)


def test_what_is_rightly_absent_or_left_over_still_loads(folder):
    def edit(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # older Llama files
        del weights["lm_head.weight"]

    edit_weights(folder, edit)
    edit_config(folder, tie_word_embeddings=True)
    model = load(folder).model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unread(folder, name, tmp_path):
    """The file is a pickle that would create a file when loaded."""
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelError, match=r"only pickled weights.*can run code when read: convert them to"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_safetensors_is_not_read(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert load(folder).name == "llama2-7b-chat"
    assert not (tmp_path / "ran").exists()


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"has an adapter.*merge it"):
        load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "[" * 100_000, "[]", "null"])
def test_a_configuration_that_is_none_is_one_line(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json.*download it again") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"hidden_size": "big"}),
        ("config.json", {"num_hidden_layers": "two"}),
        ("config.json", {"max_position_embeddings": None}),
        ("tokenizer_config.json", []),
        ("tokenizer_config.json", "text"),
        ("generation_config.json", []),
    ],
)
def test_words_for_numbers_and_lists_for_objects_are_one_line(folder, name, content):
    path = folder / name
    if isinstance(content, dict):
        content = {**json.loads(path.read_text()), **content}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"cannot be loaded .*check that it is complete") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_its_own_code_does_not_run_it(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    try:
        load(folder)
    except ModelError as error:
        assert "cannot be loaded" in str(error)  # noqa: PT017 (loading without it is as good)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    loaded = load(folder, chat_format="template")
    with pytest.raises(ModelError, match="chat template of model llama2-7b-chat fails"):
        frame(loaded, chat=True)
