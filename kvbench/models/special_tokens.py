"""Keep text of a data set that spells a special token from becoming one.

A tokenizer turns `<|im_end|>` into the token that ends a turn, wherever it stands: a data row could close the user's
message and open another. `encode_data_as_text` encodes such a spelling as the ordinary characters it is made of, while
the chat template's own tokens stay what they are; text that spells no special token is encoded exactly as by the
tokenizer alone. How: the first character of each spelling is replaced by a character of the private use area, which no
spelling has; the text is encoded; the tokens of that character are replaced by those of the character it stands for.

`rewrite_spellings` is for tokenizers with which that cannot be done: it changes the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from kvbench.errors import ModelError

PRIVATE_USE = range(0xE000, 0xF900)
REMEDY = "set model.protect_special_tokens=true to rewrite such text"
Span = tuple[int, int]  # first and last + 1 character index


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The spellings of a tokenizer's special tokens and their ids."""
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=True))
    return {spelling: index for spelling, index in {**named, **added}.items() if spelling}


def spellings_in(text: str, tokenizer: PreTrainedTokenizerBase) -> list[re.Match[str]]:
    """Where `text` spells special tokens; of two that begin alike the longer counts, as in the tokenizer."""
    tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return list(re.finditer("|".join(map(re.escape, tokens)), text)) if tokens else []


def rewrite_spellings(text: str, tokenizer: PreTrainedTokenizerBase, others: Iterable[str] = ()) -> str:
    """Give each spelling, and the `others`, a full-width first character: `＜|im_end|>`; positions stay."""
    for spelling in sorted({*special_tokens(tokenizer), *others}, key=len, reverse=True):
        first = chr(ord(spelling[0]) + 0xFEE0) if "!" <= spelling[0] <= "~" else "\ufffd"
        text = text.replace(spelling, first + spelling[1:])
    return text


def encode_data_as_text(
    tokenizer: PreTrainedTokenizerBase, text: str, data: Span | None, *, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """Token ids of a text, and the character index at which each ends (0 for special tokens that are added).

    `data` is the part of the text that may spell special tokens, None if all of it is ours.

    Raises:
        ModelError: if the tokenizer has no fast version, or makes a special token of the data all the same.
    """
    named = f"tokenizer {type(tokenizer).__name__}"
    if not tokenizer.is_fast:
        raise ModelError(f"{named} cannot tell character positions: use a folder with tokenizer.json")
    marked, places = (text, []) if data is None else _mark(tokenizer, text, data)
    # `verbose=False`: no warning about texts above the context; they are cut or refused by the caller.
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    encoded = tokenizer(marked, add_special_tokens=add_special_tokens, **options)[0]
    ids, spans = encoded.ids, encoded.offsets
    if data is not None and places:
        ids, spans = _put_back(tokenizer, text, sorted(places), ids, spans)
        special = set(special_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
        for index, (start, end) in zip(ids, spans, strict=True):
            if index in special and start < end and end > data[0] and start < data[1]:
                token = tokenizer.convert_ids_to_tokens(index)
                problem = f"makes the special token {token} of a data row's text at character {start}"
                raise ModelError(f"{named} {problem}: {REMEDY}")
    return ids, [end for _, end in spans]


def _mark(tokenizer: PreTrainedTokenizerBase, text: str, data: Span) -> tuple[str, list[int]]:
    """The text with a stand-in for the first character of each spelling in the data, and the places of those."""
    held, places = set(text), list[int]()
    unused = (chr(code) for code in PRIVATE_USE if chr(code) not in held)
    while found := [m.start() for m in spellings_in(text, tokenizer) if m.end() > data[0] and m.start() < data[1]]:
        stand_in = next(unused, None)  # a second round only where one spelling lies within another
        if stand_in is None:
            problem = f"holds all {len(PRIVATE_USE)} characters of the private use area, by one of which they are kept"
            raise ModelError(f"data that spells special tokens {problem} text: {REMEDY}")
        characters = list(text)
        for place in found:
            characters[place] = stand_in
        text = "".join(characters)
        places += found
    return text, places


def _put_back(
    tokenizer: PreTrainedTokenizerBase, text: str, places: list[int], ids: list[int], spans: list[Span]
) -> tuple[list[int], list[Span]]:
    """Replace the tokens that hold the stand-ins at `places` (ascending), in one pass over the tokens."""
    new_ids, new_spans = list[int](), list[Span]()
    encoded: dict[str, list[int]] = {}
    token, n_tokens, covered = 0, len(ids), 0
    for place in places:
        if place < covered:  # within what was put back for an earlier place
            continue
        first = token
        while token < n_tokens and not spans[token][0] <= place < spans[token][1]:
            token += 1
        new_ids += ids[first:token]
        new_spans += spans[first:token]
        if token == n_tokens:
            problem = "drops characters of the private use area, by which special tokens in data are kept text"
            raise ModelError(f"tokenizer {type(tokenizer).__name__} {problem}: {REMEDY}")
        start, covered = spans[token]
        while token < n_tokens and spans[token][0] < covered and spans[token][1] > start:
            covered = max(covered, spans[token][1])
            token += 1
        original = text[start:covered]
        if original not in encoded:
            encoded[original] = list(tokenizer.encode(original, add_special_tokens=False))
            alone = tokenizer.convert_tokens_to_ids(original)
            if len(original) == 1 and isinstance(alone, int) and alone != tokenizer.unk_token_id:
                encoded[original] = [alone]
        new_ids += encoded[original]
        new_spans += [(start, covered)] * len(encoded[original])
    return new_ids + ids[token:], new_spans + spans[token:]
