"""From a sample to model input, in the order of the official benchmark runners: cut, wrap in a chat turn, tokenize.

LongBench (`pred.py` at commit 2e00731f): tokenize the prompt with special tokens; if it is too long keep the first and
the last half of the limit and decode both; put the chat wrapper around the result; tokenize again.  ZeroSCROLLS
(`experiments/hf/run_hf_model.py` at commit c9946762): cut the end of the document and keep the query after it.

One thing differs: the official runners make a special token of a row's text that spells one (`</s>`), here it stays
text (see `special_tokens`). Rows that spell none, and all official ones we have seen are such, get the same ids to the
last. `model.parse_special_tokens=true` does as the official runners do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvbench.errors import ModelError
from kvbench.models.load import PreparedModel
from kvbench.models.special_tokens import Span, encode_data_as_text, rewrite_spellings, spellings_in
from kvbench.tasks.base import Sample

LLAMA2_FRAME = ("[INST]", "[/INST]")
"""LongBench's frame for Llama-2-chat: no spaces, no system prompt (`build_chat` in its `pred.py`)."""
DEMANDS = (
    "\n\nRepeat the previous context exactly.",
    "\n\nRepeat the part of the previous context exactly, starting with ",
)
"""KVzip's demands for the first chunk of a context and for a later one (`self_task` in `model/wrapper.py`)."""
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
"""Special tokens that end an assistant's turn in common chat templates; they stop generation where they exist."""
RETOKENIZE_MARGIN_TOKENS = 16
"""Room left when the limit is derived from the context: text cut between tokens may tokenize into a few more."""

_PLACEHOLDER = "\u27e6prompt\u27e7"


@dataclass(frozen=True)
class EncodedPrompt:
    """Model input for one sample."""

    input_ids: tuple[int, ...]  # of the prompt, wrapper and opening of the answer included
    # Tokens before the question; None if the sample marks none, its beginning was cut off, or nothing would follow.
    question_start_token: int | None
    truncated_tokens: int  # tokens of the prompt that were cut
    stop_token_ids: tuple[int, ...]  # they end generation
    min_new_tokens: int  # tokens before which no stop is allowed
    prompt_text: str  # what `input_ids` encode


def encode_sample(sample: Sample, loaded: PreparedModel) -> EncodedPrompt:
    """Cut (as `sample.truncation` says), wrap and tokenize a sample; a ModelError if it cannot be made to fit."""
    if loaded.protect_special_tokens:
        frame_texts = LLAMA2_FRAME if loaded.chat_format == "llama2" else ()
        sample = replace(sample, prompt=rewrite_spellings(sample.prompt, loaded.tokenizer, frame_texts))
    limit = _prompt_limit(sample, loaded)
    prompt_ids: list[int] = []  # without a limit nothing is cut, and only the wrapped prompt is tokenized
    if limit is not None:
        prompt_ids = _encode(loaded, sample.prompt, (0, len(sample.prompt)), add_special_tokens=True)[0]
    truncated = 0
    if limit is None or len(prompt_ids) <= limit:
        ids, question, text = _encode_wrapped(sample, loaded)
    elif sample.truncation == "middle":
        truncated = len(prompt_ids) - 2 * (limit // 2)
        ids, question, text = _encode_wrapped(_cut_middle(sample, loaded, prompt_ids, limit // 2), loaded)
    elif sample.truncation == "document_end":
        ids, question, text, truncated = _encode_document_cut(sample, loaded, limit)
    else:
        raise ModelError(
            f"sample {sample.id}: its prompt of {len(prompt_ids)} tokens exceeds the limit of {limit} tokens of model "
            f"{loaded.name}: ask for a shorter prompt or raise model.max_prompt_tokens"
        )
    if len(ids) + sample.max_new_tokens > loaded.max_context_tokens:
        raise ModelError(
            f"sample {sample.id}: {len(ids)} prompt tokens and {sample.max_new_tokens} new tokens exceed "
            f"the context of {loaded.max_context_tokens} tokens of model {loaded.name}: ask for a shorter prompt or "
            "fewer new tokens, or lower model.max_prompt_tokens"
        )
    stops = stop_token_ids(loaded, stop_newline=sample.stop_newline)
    return EncodedPrompt(tuple(ids), question, truncated, stops, sample.min_new_tokens, text)


def encode_text(text: str, loaded: PreparedModel) -> list[int]:
    """Token ids of a text of the data set by itself (a reference answer), without BOS."""
    return _encode(loaded, text, (0, len(text)), add_special_tokens=False)[0]


def encode_demands(sample: Sample, loaded: PreparedModel) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Tokens that demand a repetition of the first chunk of a context, of a later one, and that open the answer."""
    texts = (*DEMANDS, frame(loaded, chat=sample.chat)[1])
    first, later, opening = (tuple(_encode(loaded, text, None, add_special_tokens=False)[0]) for text in texts)
    return first, later, opening


def stop_token_ids(loaded: PreparedModel, *, stop_newline: bool) -> tuple[int, ...]:
    """The ids that end generation, ascending; with `stop_newline` the last of a newline, too (LongBench's samsum)."""
    tokenizer = loaded.tokenizer
    stops = {*loaded.stop_token_ids, tokenizer.eos_token_id}
    if loaded.chat_format == "template":
        stops.update(tokenizer.added_tokens_encoder.get(token) for token in END_OF_TURN_TOKENS)
    if stop_newline:
        stops.add(tokenizer.encode("\n", add_special_tokens=False)[-1])
    return tuple(sorted(int(stop) for stop in stops if stop is not None))


def wrap(prompt: str, loaded: PreparedModel, *, chat: bool) -> tuple[str, int | None, bool]:
    """Put the model's chat wrapper around a prompt, or nothing without `chat`.

    Returns the text, the character index of the prompt in it (None if the template changed the prompt beyond trimming
    it), and whether the tokenizer adds its special tokens (a template writes its own).
    """
    head, tail = frame(loaded, chat=chat)
    text = head + prompt + tail
    if not chat or loaded.chat_format != "template":
        return text, len(head), True
    rendered = _render(prompt, loaded)
    if rendered == text:
        return text, len(head), False
    core = prompt.strip()  # some templates trim the message: find what is left of it
    at = rendered.find(core, len(head)) if core else -1
    leading = len(prompt) - len(prompt.lstrip())
    return rendered, at - leading if at >= 0 else None, False


def frame(loaded: PreparedModel, *, chat: bool) -> tuple[str, str]:
    """The texts before and after the prompt, two empty ones without `chat`."""
    if not chat or loaded.chat_format == "none":
        return "", ""
    if loaded.chat_format == "llama2":
        return LLAMA2_FRAME
    head, found, tail = _render(_PLACEHOLDER, loaded).partition(_PLACEHOLDER)
    if not found:
        raise _template_error(loaded, "leaves out the user's message")
    return head, tail


def _render(prompt: str, loaded: PreparedModel) -> str:
    message = [{"role": "user", "content": prompt}]
    try:
        return str(
            loaded.tokenizer.apply_chat_template(
                message,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # Qwen3's: answer at once
            )
        )
    except Exception as error:  # a template is foreign code: jinja lets any exception through
        raise _template_error(loaded, f"fails ({error})") from error


def _template_error(loaded: PreparedModel, problem: str) -> ModelError:
    return ModelError(f"the chat template of model {loaded.name} {problem}: use model.chat_format=none")


def _prompt_limit(sample: Sample, loaded: PreparedModel) -> int | None:
    """Tokens a bare prompt may have, or None if only the context limits it."""
    if loaded.max_prompt_tokens is not None:  # counts the bare prompt, as LongBench's `max_length` does
        return loaded.max_prompt_tokens
    if sample.truncation == "refuse":
        return None
    around = "".join(frame(loaded, chat=sample.chat)) + sample.answer_prefix
    around_tokens = len(_encode(loaded, around, None, add_special_tokens=False)[0])
    limit = loaded.max_context_tokens - sample.max_new_tokens - around_tokens - RETOKENIZE_MARGIN_TOKENS
    if limit < 2:
        raise ModelError(
            f"sample {sample.id}: {sample.max_new_tokens} new tokens leave no room for a prompt in the context of "
            f"{loaded.max_context_tokens} tokens of model {loaded.name}: ask for fewer new tokens"
        )
    return limit


def _cut_middle(sample: Sample, loaded: PreparedModel, prompt_ids: list[int], half: int) -> Sample:
    """LongBench's cut: decode the first and last `half` tokens and join the texts."""
    ends = (prompt_ids[:half], prompt_ids[-half:])
    head, tail = (str(loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in ends)
    question_start = None
    if sample.question_start is not None and tail.endswith(question := sample.prompt[sample.question_start :]):
        question_start = len(head + tail) - len(question)
    return replace(sample, prompt=head + tail, question_start=question_start)


def _encode_wrapped(sample: Sample, loaded: PreparedModel) -> tuple[list[int], int | None, str]:
    """Wrap a prompt, open the answer, and tokenize the whole: ids, first token of the question, text."""
    prompt = sample.prompt
    text, start, add_special_tokens = wrap(prompt, loaded, chat=sample.chat)
    text += sample.answer_prefix
    data = None
    if start is not None:  # blanks at the ends of the data may be gone
        data = start + len(prompt) - len(prompt.lstrip()), start + len(prompt.rstrip())
    elif not loaded.parse_special_tokens and spellings_in(prompt, loaded.tokenizer):
        raise ModelError(
            f"sample {sample.id} spells a special token, and the chat template of model {loaded.name} rewrites the "
            "message, so that it cannot be kept apart: use model.chat_format=none or model.protect_special_tokens=true"
        )
    ids, ends = _encode(loaded, text, data, add_special_tokens=add_special_tokens)
    question = None
    if sample.question_start is not None and start is not None:
        question = _first_token_after(start + sample.question_start, ends)
    return ids, question, text


def _encode_document_cut(sample: Sample, loaded: PreparedModel, limit: int) -> tuple[list[int], int | None, str, int]:
    """ZeroSCROLLS' cut, separator and query put after the shortened document: as `_encode_wrapped`, and tokens cut."""
    try:
        query_start, separator = int(sample.meta["query_start"]), str(sample.meta["truncation_separator"])
    except KeyError as error:
        raise ModelError(f"sample {sample.id} has no {error} in its meta: truncation=document_end needs it") from error
    head, tail = frame(loaded, chat=sample.chat)
    special = not (sample.chat and loaded.chat_format == "template")
    prefix, ending = sample.prompt[:query_start], separator + sample.prompt[query_start:]
    suffix_tokens = len(encode_text(ending, loaded))
    prefix_tokens = len(_encode(loaded, prefix, (0, len(prefix)), add_special_tokens=True)[0])
    if suffix_tokens >= limit:
        raise ModelError(
            f"sample {sample.id}: its query of {suffix_tokens} tokens alone fills the limit of {limit} tokens of model "
            f"{loaded.name}: raise model.max_prompt_tokens"
        )
    cut_tokens = max(0, prefix_tokens + suffix_tokens - limit)
    beginning = head + prefix
    prefix_ids, prefix_ends = _encode(loaded, beginning, (len(head), len(beginning)), add_special_tokens=special)
    kept_tokens = len(prefix_ids) - cut_tokens
    prefix_ids, prefix_ends = prefix_ids[:kept_tokens], prefix_ends[:kept_tokens]
    suffix = ending + tail + sample.answer_prefix
    suffix_ids, suffix_ends = _encode(loaded, suffix, (0, len(ending)), add_special_tokens=False)
    question = None
    if sample.question_start is not None and sample.question_start >= query_start:
        at = _first_token_after(len(separator) + sample.question_start - query_start, suffix_ends)
        question = None if at is None else len(prefix_ids) + at
    return prefix_ids + suffix_ids, question, beginning[: max(prefix_ends, default=0)] + suffix, cut_tokens


def _encode(
    loaded: PreparedModel, text: str, data: Span | None, *, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    data = None if loaded.parse_special_tokens else data
    return encode_data_as_text(loaded.tokenizer, text, data, add_special_tokens=add_special_tokens)


def _first_token_after(character: int, ends: list[int]) -> int | None:
    """Index of the first token that reaches past `character`: so many tokens lie wholly before it."""
    return next((index for index, end in enumerate(ends) if end > character), None)
