"""From a sample to model input, in the order of the official benchmark runners.

LongBench (`pred.py` at commit 2e00731f): tokenize the prompt with special tokens; if it is too long keep the first and
the last half of the limit and decode both; put the chat wrapper around the result; tokenize again.  ZeroSCROLLS
(`experiments/hf/run_hf_model.py` at commit c9946762): cut the end of the document and keep the query after it.

One thing differs: the official runners make a special token of a row's text that spells one (`</s>`), here it stays
text (see `contain`). Rows that spell none, and all official ones we have seen are such, get the same ids to the last.
`model.parse_special_tokens=true` does as the official runners do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from kvbench.errors import ModelError
from kvbench.models.chat import frame, protect, stop_token_ids, wrap
from kvbench.models.contain import encode_contained, spellings_in
from kvbench.models.load import PreparedModel
from kvbench.tasks.base import Sample

RETOKENIZE_MARGIN_TOKENS = 16
"""Room left when the limit is derived from the context: text cut between tokens may tokenize into a few more."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Model input for one sample.

    Attributes:
        input_ids: the prompt's token ids, wrapper and opening of the answer included.
        question_start_token: how many leading tokens lie before the question, or None if the sample has no question
            mark, the cut removed its beginning, or nothing would follow.
        truncated_tokens: tokens of the prompt that were cut.
        stop_token_ids: ids that end generation.
        min_new_tokens: tokens before which no stop is allowed.
        prompt_text: the text that `input_ids` encode.
    """

    input_ids: tuple[int, ...]
    question_start_token: int | None
    truncated_tokens: int
    stop_token_ids: tuple[int, ...]
    min_new_tokens: int
    prompt_text: str


@dataclass(frozen=True)
class _Cut:
    """A prompt after truncation: its text, where the question starts in it, how many tokens went."""

    text: str
    question_start: int | None
    truncated_tokens: int


def encode_sample(sample: Sample, loaded: PreparedModel) -> EncodedPrompt:
    """Truncate, wrap and tokenize one sample.

    Args:
        sample: the question; `truncation` names what is cut from a prompt that is too long.
        loaded: the model, with its limits and its chat format.

    Returns:
        The encoded prompt; it fits the context together with `sample.max_new_tokens`.

    Raises:
        ModelError: if the prompt is too long and must not (or cannot) be cut enough.
    """
    if loaded.protect_special_tokens:
        sample = replace(sample, prompt=protect(sample.prompt, loaded))
    limit = _prompt_limit(sample, loaded)
    prompt_ids: list[int] = []  # without a limit nothing is cut, and only the wrapped prompt is tokenized
    if limit is not None:
        prompt_ids = _encode(loaded, sample.prompt, (0, len(sample.prompt)), add_special_tokens=True)[0]
    if limit is None or len(prompt_ids) <= limit:
        encoded = _encode_wrapped(sample, loaded, _Cut(sample.prompt, sample.question_start, 0))
    elif sample.truncation == "middle":
        encoded = _encode_wrapped(sample, loaded, _cut_middle(sample, prompt_ids, limit // 2, loaded.tokenizer))
    elif sample.truncation == "document_end":
        encoded = _encode_document_cut(sample, loaded, limit)
    else:
        raise ModelError(
            f"sample {sample.id}: its prompt of {len(prompt_ids)} tokens exceeds the limit of {limit} tokens of model "
            f"{loaded.name}: ask for a shorter prompt or raise model.max_prompt_tokens"
        )
    total = len(encoded.input_ids) + sample.max_new_tokens
    if total > loaded.max_context_tokens:
        raise ModelError(
            f"sample {sample.id}: {len(encoded.input_ids)} prompt tokens and {sample.max_new_tokens} new tokens exceed "
            f"the context of {loaded.max_context_tokens} tokens of model {loaded.name}: ask for a shorter prompt or "
            "fewer new tokens, or lower model.max_prompt_tokens"
        )
    return encoded


def _prompt_limit(sample: Sample, loaded: PreparedModel) -> int | None:
    """Tokens a bare prompt may have, or None if only the context limits it.

    A configured limit counts the bare prompt, as LongBench's `max_length` does: the wrapper comes on top. A limit
    derived from the context leaves room for the wrapper, the opening of the answer and the new tokens.
    """
    if loaded.max_prompt_tokens is not None:
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


def _cut_middle(sample: Sample, prompt_ids: list[int], half: int, tokenizer: PreTrainedTokenizerBase) -> _Cut:
    """LongBench's cut: decode the first and last `half` tokens and join the texts."""
    head = tokenizer.decode(prompt_ids[:half], skip_special_tokens=True)
    tail = tokenizer.decode(prompt_ids[-half:], skip_special_tokens=True)
    text = str(head) + str(tail)
    question_start = None
    if sample.question_start is not None:
        question = sample.prompt[sample.question_start :]
        if str(tail).endswith(question):
            question_start = len(text) - len(question)
    return _Cut(text, question_start, len(prompt_ids) - 2 * half)


def _encode_wrapped(sample: Sample, loaded: PreparedModel, cut: _Cut) -> EncodedPrompt:
    """Wrap the text of a prompt, open the answer, and tokenize the whole."""
    wrapped = wrap(cut.text, loaded, chat=sample.chat)
    text = wrapped.text + sample.answer_prefix
    data = None
    if wrapped.prompt_start is not None:  # blanks at the ends of the data may be gone
        n_leading = len(cut.text) - len(cut.text.lstrip())
        data = wrapped.prompt_start + n_leading, wrapped.prompt_start + len(cut.text.rstrip())
    elif not loaded.parse_special_tokens and spellings_in(cut.text, loaded.tokenizer):
        raise ModelError(
            f"sample {sample.id} spells a special token, and the chat template of model {loaded.name} rewrites the "
            "message, so that it cannot be kept apart: use model.chat_format=none or model.protect_special_tokens=true"
        )
    input_ids, ends = _encode(loaded, text, data, add_special_tokens=wrapped.add_special_tokens)
    question_start_token = None
    if cut.question_start is not None and wrapped.prompt_start is not None:
        question_start_token = _first_token_after(wrapped.prompt_start + cut.question_start, ends)
    return _encoded(sample, loaded, input_ids, question_start_token, cut.truncated_tokens, text)


def _encode_document_cut(sample: Sample, loaded: PreparedModel, limit: int) -> EncodedPrompt:
    """ZeroSCROLLS' cut: token ids of the shortened document, then those of separator and query (without BOS).

    Args:
        sample: with `query_start` (character index) and `truncation_separator` in `meta`.
        loaded: the model.
        limit: tokens that the bare prompt may have.
    """
    try:
        query_start, separator = int(sample.meta["query_start"]), str(sample.meta["truncation_separator"])
    except KeyError as error:
        raise ModelError(f"sample {sample.id} has no {error} in its meta: truncation=document_end needs it") from error
    head, tail = frame(loaded, chat=sample.chat)
    special = not (sample.chat and loaded.chat_format == "template")
    prefix, query = sample.prompt[:query_start], sample.prompt[query_start:]
    ending = separator + query
    suffix_tokens = len(_encode(loaded, ending, (0, len(ending)), add_special_tokens=False)[0])
    prefix_tokens = len(_encode(loaded, prefix, (0, len(prefix)), add_special_tokens=True)[0])
    if suffix_tokens >= limit:
        raise ModelError(
            f"sample {sample.id}: its query of {suffix_tokens} tokens alone fills the limit of {limit} tokens of model "
            f"{loaded.name}: raise model.max_prompt_tokens"
        )
    cut_tokens = max(0, prefix_tokens + suffix_tokens - limit)
    beginning, data = head + prefix, (len(head), len(head + prefix))
    prefix_ids, prefix_ends = _encode(loaded, beginning, data, add_special_tokens=special)
    kept_tokens = len(prefix_ids) - cut_tokens
    prefix_ids, prefix_ends = prefix_ids[:kept_tokens], prefix_ends[:kept_tokens]
    suffix = ending + tail + sample.answer_prefix
    suffix_ids, suffix_ends = _encode(loaded, suffix, (0, len(ending)), add_special_tokens=False)
    question_start_token = None
    if sample.question_start is not None and sample.question_start >= query_start:
        at = _first_token_after(len(separator) + sample.question_start - query_start, suffix_ends)
        question_start_token = None if at is None else len(prefix_ids) + at
    text = beginning[: max(prefix_ends, default=0)] + suffix
    return _encoded(sample, loaded, prefix_ids + suffix_ids, question_start_token, cut_tokens, text)


def _encoded(
    sample: Sample, loaded: PreparedModel, input_ids: list[int], question: int | None, truncated: int, text: str
) -> EncodedPrompt:
    return EncodedPrompt(
        input_ids=tuple(input_ids),
        question_start_token=question,
        truncated_tokens=truncated,
        stop_token_ids=stop_token_ids(loaded, stop_newline=sample.stop_newline),
        min_new_tokens=sample.min_new_tokens,
        prompt_text=text,
    )


def encode_text(text: str, loaded: PreparedModel) -> list[int]:
    """Token ids of a text of the data set by itself (a reference answer), without BOS."""
    return _encode(loaded, text, (0, len(text)), add_special_tokens=False)[0]


def _encode(
    loaded: PreparedModel, text: str, data: tuple[int, int] | None, *, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """See `contain.encode_contained`; nothing is contained where the model's configuration says so."""
    data = None if loaded.parse_special_tokens else data
    return encode_contained(loaded.tokenizer, text, data, add_special_tokens=add_special_tokens)


def _first_token_after(character: int, ends: list[int]) -> int | None:
    """Index of the first token that reaches past `character`: so many tokens lie wholly before it."""
    return next((index for index, end in enumerate(ends) if end > character), None)
