"""Random models, and the tokenizer of bytes that they have."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvbench.errors import ConfigError
from kvbench.models.config import named_config
from kvbench.models.load import BOS, EOS, MIN_VOCAB_SIZE, PAD, byte_tokenizer, load_model

TOKENIZER = byte_tokenizer(8192)


def test_same_seed_same_weights_other_seed_other_weights(tiny_gqa, tiny_model):
    state = torch.random.get_rng_state()
    again, other = tiny_model(), tiny_model(seed=1)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone
    weights, same, different = (m.model.lm_head.weight for m in (tiny_gqa, again, other))
    assert torch.equal(weights, same)
    assert not torch.equal(weights, different)


def test_it_computes_what_an_ordinary_llama_with_these_weights_computes(tiny_gqa):
    # Built on the meta device, so anything that is no parameter (rotary frequencies) could be left undefined.
    twin = LlamaForCausalLM(LlamaConfig.from_dict(tiny_gqa.model.config.to_dict())).eval()
    twin.load_state_dict(tiny_gqa.model.state_dict())
    input_ids = torch.arange(200)[None]
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids).logits, tiny_gqa.model(input_ids).logits)


def test_attention_is_neither_uniform_nor_one_hot(tiny_model):
    loaded = tiny_model(n_layers=2)
    loaded.model.set_attn_implementation("eager")
    input_ids = torch.tensor([loaded.tokenizer("The quick brown fox jumps over the lazy dog. " * 6)["input_ids"]])
    for attention in loaded.model(input_ids, output_attentions=True).attentions:
        last = attention[0, :, -1]
        entropy = -(last * last.log()).sum(-1).mean() / torch.tensor(float(last.shape[-1])).log()
        assert 0.3 < entropy < 0.98


def test_other_shapes_and_dtype(tiny_model):
    loaded = tiny_model(n_layers=2, hidden_size=96, n_query_heads=6, n_kv_heads=3, head_dim=32, dtype="bfloat16")
    assert loaded.model.model.layers[1].self_attn.k_proj.weight.shape == (96, 96)
    assert loaded.model.lm_head.weight.dtype == torch.bfloat16
    assert loaded.model.config.dtype == torch.bfloat16
    assert torch.isfinite(loaded.model(torch.arange(300)[None]).logits).all()
    with pytest.raises(ConfigError, match="vocab_size=258 is below 259"):
        tiny_model(vocab_size=258)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_shapes_are_made_on_the_device():
    loaded = load_model(named_config("random-llama2-7b", n_layers=8), device="cuda")
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cuda"}
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(loaded.model(torch.arange(64, device=loaded.device)[None]).logits).all()


@given(st.text())
def test_decoding_undoes_encoding(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text
    assume(not any(token in text for token in (PAD, BOS, EOS)))
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


def test_one_token_per_byte_after_one_bos():
    text = "né 语\n 12"
    input_ids = TOKENIZER(text)["input_ids"]
    assert input_ids[0] == TOKENIZER.bos_token_id == 1
    assert len(input_ids) == 1 + len(text.encode())
    assert len(TOKENIZER) == MIN_VOCAB_SIZE
    assert isinstance(TOKENIZER.decode(list(range(512))), str)  # models may emit more than the tokenizer knows


def test_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("né <|eos|>")["input_ids"] == TOKENIZER("né <|eos|>")["input_ids"]
    assert again.chat_template == TOKENIZER.chat_template
