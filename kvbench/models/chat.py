"""What stands around a prompt: the chat wrapper, the tokens that end a turn, and protection from injected ones."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvbench.errors import ModelError
from kvbench.models.load import PreparedModel

LLAMA2_FRAME = ("[INST]", "[/INST]")
"""LongBench's frame for Llama-2-chat: no spaces, no system prompt (`build_chat` in its `pred.py`)."""

END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
"""Special tokens that end an assistant's turn in common chat templates; they stop generation where they exist."""

_PLACEHOLDER = "\u27e6prompt\u27e7"


@dataclass(frozen=True)
class Wrapped:
    """A prompt inside its wrapper.

    Attributes:
        text: the whole text.
        prompt_start: character index in `text` at which the prompt begins, or None if the template changed the prompt
            beyond trimming it.
        add_special_tokens: whether the tokenizer adds its special tokens (BOS) to `text`; a template writes its own.
    """

    text: str
    prompt_start: int | None
    add_special_tokens: bool


def wrap(prompt: str, loaded: PreparedModel, *, chat: bool) -> Wrapped:
    """Put the model's chat wrapper around a prompt.

    Args:
        prompt: the user message, already truncated.
        loaded: its `chat_format` decides.
        chat: False leaves the prompt bare.

    Raises:
        ModelError: if the chat template fails.
    """
    head, tail = frame(loaded, chat=chat)
    text = head + prompt + tail
    if not chat or loaded.chat_format != "template":
        return Wrapped(text, len(head), add_special_tokens=True)
    rendered = _render(prompt, loaded)
    if rendered == text:
        return Wrapped(text, len(head), add_special_tokens=False)
    # Some templates trim the message: find what is left of it.
    core = prompt.strip()
    at = rendered.find(core, len(head)) if core else -1
    leading = len(prompt) - len(prompt.lstrip())
    return Wrapped(rendered, at - leading if at >= 0 else None, add_special_tokens=False)


def frame(loaded: PreparedModel, *, chat: bool) -> tuple[str, str]:
    """The texts before and after the prompt.

    Args:
        loaded: its `chat_format` decides.
        chat: False means no wrapper: two empty texts.

    Raises:
        ModelError: if the chat template fails, or leaves the message out.
    """
    if not chat or loaded.chat_format == "none":
        return "", ""
    if loaded.chat_format == "llama2":
        return LLAMA2_FRAME
    head, found, tail = _render(_PLACEHOLDER, loaded).partition(_PLACEHOLDER)
    if not found:
        raise ModelError(
            f"the chat template of model {loaded.name} leaves out the user's message: use model.chat_format=none"
        )
    return head, tail


def stop_token_ids(loaded: PreparedModel, *, stop_newline: bool) -> tuple[int, ...]:
    """The ids that end generation, in ascending order.

    Args:
        loaded: the model; its generation configuration, its tokenizer's EOS and its end-of-turn token count.
        stop_newline: add the last id of an encoded newline (LongBench's samsum).
    """
    tokenizer = loaded.tokenizer
    stops = {*loaded.stop_token_ids, tokenizer.eos_token_id}
    if loaded.chat_format == "template":
        stops.update(tokenizer.added_tokens_encoder.get(token) for token in END_OF_TURN_TOKENS)
    if stop_newline:
        stops.add(tokenizer.encode("\n", add_special_tokens=False)[-1])
    return tuple(sorted(int(stop) for stop in stops if stop is not None))


def protect(text: str, loaded: PreparedModel) -> str:
    """Keep text that spells a special token from becoming one.

    The first character of each spelling is replaced by its full-width form (`<|im_end|>` becomes `＜|im_end|>`), so
    lengths and character positions stay. The same goes for the `[INST]` markers where they are the wrapper.

    Args:
        text: text of a data set.
        loaded: the model whose special tokens are meant.
    """
    for spelling in sorted(_spellings(loaded.tokenizer, loaded.chat_format), key=len, reverse=True):
        text = text.replace(spelling, _full_width(spelling[0]) + spelling[1:])
    return text


def _spellings(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> set[str]:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    return special | set(LLAMA2_FRAME) if chat_format == "llama2" else special


def _full_width(character: str) -> str:
    return chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else "\ufffd"


def _render(prompt: str, loaded: PreparedModel) -> str:
    message = [{"role": "user", "content": prompt}]
    try:
        return str(loaded.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is foreign code: jinja lets any exception through
        raise ModelError(
            f"the chat template of model {loaded.name} fails ({error}): use model.chat_format=none"
        ) from error
