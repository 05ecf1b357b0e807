"""A tokenizer that behaves like Llama-2's fast tokenizer, built in code: BOS, a prefix space, "▁" for spaces."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

WORDS = ["▁the", "▁of", "▁question", "▁what", "INST", "tion", "in", "er"]


def llama_like_tokenizer():
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary, merges = {piece: index for index, piece in enumerate(pieces)}, []
    for word in WORDS:  # merged from left to right
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.setdefault(word[:end], len(vocabulary))
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **names, add_bos_token=True, clean_up_tokenization_spaces=False
    )
