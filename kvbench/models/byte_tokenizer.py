"""A tokenizer without a download: one token per UTF-8 byte, plus a handful of special tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
MIN_VOCAB_SIZE = 259
"""Three special tokens and 256 bytes."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]\n{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def byte_tokenizer(max_context_tokens: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer: ids 0, 1, 2 are pad, bos, eos; the bytes follow; a BOS opens every encoded text.

    Decoding what was encoded gives the text back, whatever it is.

    Args:
        max_context_tokens: recorded as the tokenizer's `model_max_length`.
    """
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS])}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Without merges the pattern that splits words changes no id, and takes two thirds of the time.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        add_bos_token=True,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_context_tokens,
        clean_up_tokenization_spaces=False,
    )
