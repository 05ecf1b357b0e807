"""The converter on a tiny GGUF file written here, against the model the file was made from."""

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvbench.errors import ModelError
from kvbench.models.gguf import convert_llama_gguf

N_QUERY_HEADS, N_KV_HEADS, HIDDEN = 4, 2, 64
BYTES = [chr(33 + i) for i in range(94)]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file>", "Ġ", *BYTES, "12", "ab"]
NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_cpp_rows(weight, n_heads):
    """Row order of llama.cpp: the two halves of each head interleaved."""
    head_dim = weight.shape[0] // n_heads
    order = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(n_heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write_gguf(file, model, pre="smollm", architecture="llama", tied=True):
    writer = gguf.GGUFWriter(str(file), architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(N_QUERY_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 4 + [1] * (len(TOKENS) - 4))
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "lm_head":
            if not tied:
                writer.add_tensor("output.weight", weight.numpy())
            continue
        if parts[1] == "layers":
            values = weight.numpy()
            if parts[-2] in ("q_proj", "k_proj"):
                values = llama_cpp_rows(values, N_QUERY_HEADS if parts[-2] == "q_proj" else N_KV_HEADS)
            writer.add_tensor(f"blk.{parts[2]}.{NAMES[parts[-2]]}.weight", values)
        elif parts[1] == "norm":
            writer.add_tensor("output_norm.weight", weight.numpy())
        else:
            quantised = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor("token_embd.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            weight.copy_(torch.tensor(gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_llama(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=N_QUERY_HEADS,
        num_key_value_heads=N_KV_HEADS,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def converted(request, tmp_path):
    model = tiny_llama(request.param)
    write_gguf(tmp_path / "tiny.gguf", model, tied=request.param)
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_llama_gguf(tmp_path / "tiny.gguf", folder)
    return model, folder, tmp_path


def test_same_logits_as_the_original(converted):
    model, folder, _ = converted
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    input_ids = torch.arange(40)[None] % len(TOKENS)
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert loaded.config.rope_parameters["rope_theta"] == 50000.0
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.generation_config.eos_token_id == 2


def test_tokenizer_splits_digits_and_knows_its_special_tokens(converted):
    _, folder, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab 12<|im_end|>")["input_ids"]) == [
        "ab", "Ġ", "1", "2", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("ab 12")["input_ids"]) == "ab 12"
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (0, 1, 2, 2)
    assert tokenizer.decode([1, 5, 3], skip_special_tokens=True) == "!"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == (
        "<|im_start|>ab<|im_end|>"
    )


@pytest.mark.parametrize(
    ("changes", "word"), [({"pre": "llama-bpe"}, "llama-bpe"), ({"architecture": "gemma3"}, "gemma3")]
)
def test_unknown_kinds_are_refused(tmp_path, changes, word):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), **changes)
    with pytest.raises(ModelError, match=word):
        convert_llama_gguf(tmp_path / "tiny.gguf", tmp_path)
