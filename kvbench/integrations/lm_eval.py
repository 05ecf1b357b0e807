"""The lm-evaluation-harness (EleutherAI, package `lm_eval`) over a compressed context; see `kvbench.lm_eval`.

A request is a context and what follows it. The context is compressed once, except its last `question_tokens` tokens,
which are read with the compressed cache; a *continuation* is then forced along it, as the engine forces a gold answer,
and an *answer* is generated from it. `docs/lm_eval.md` says what that means and why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from kvbench.errors import BudgetError, ConfigError, ModelError
from kvbench.methods.base import Policy
from kvbench.methods.full import Full, in_effect
from kvbench.methods.registry import build_policy
from kvbench.models.config import ModelConfig, named_config
from kvbench.models.load import LoadedModel, load_model
from kvbench.models.prompt import stop_token_ids
from kvbench.paths import config_folder, user_path
from kvbench.runtime.fused import FusedEngine
from kvbench.runtime.requests import Answer, Arm, Engine, Request, SampleFailure, model_shape

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # `kvbench.lm_eval.register` says so; the rest needs no harness
    TemplateLM = object

logger = logging.getLogger(__name__)

SHORT_CONTEXTS = ("refuse", "full")
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
HARNESS_DEFAULT_DEVICE = "cuda:0"
GREEDY = {"do_sample": (False, None), "temperature": (0, None), "num_beams": (1, None)}
"""Generation arguments that are understood, with the values that mean greedy decoding."""


Ids = tuple[int, ...]


class Continuation(NamedTuple):
    """Tokens of a context, at least one, and tokens to force after it."""

    context_ids: Ids
    continuation_ids: Ids


class Prompt(NamedTuple):
    """Tokens of a context, at least one; texts that end the answer, no part of it; and the answer's limit."""

    context_ids: Ids
    stop_texts: tuple[str, ...]
    max_new_tokens: int


@dataclass
class Tally:
    """What was really done, over all requests so far."""

    requests: int = 0  # answered
    truncated: int = 0  # contexts whose beginning was cut to fit the model
    kept_whole: int = 0  # contexts too short for the method's budget that were left uncompressed
    kept_slots: int = 0  # summed over requests, layers and KV heads
    full_slots: int = 0  # of the full cache, likewise

    @property
    def budget_measured(self) -> float | None:
        """Kept slots over full slots, or None before the first request."""
        return self.kept_slots / self.full_slots if self.full_slots else None


@dataclass
class CompressedAnswers:
    """A model that reads every context through one method's compressed cache; wrong options are a ConfigError."""

    loaded: LoadedModel
    policy: Policy  # the method with its budget and options
    engine: Engine = field(default_factory=FusedEngine)
    question_tokens: int = 1  # last tokens of a context that are read with the compressed cache; see above
    short_context: str = "refuse"  # a context too short for the method's budget, or keep it "full" and count it
    seed: int = 0  # of the policies; a request's own also depends on its context, not on its place
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        n_tokens = self.question_tokens
        if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 0:
            raise ConfigError(f"question_tokens={n_tokens!r} is no integer of at least 0: give 0 or more")
        if self.short_context not in SHORT_CONTEXTS:
            raise ConfigError(f"short_context={self.short_context!r} is not one of {', '.join(SHORT_CONTEXTS)}")
        self._openings: dict[tuple[str, ...], Ids] = {}

    def likelihoods(self, requests: Sequence[Continuation]) -> Iterator[tuple[int, float, bool]]:
        """Index, sum of the tokens' log-probabilities (nats) and greediness of each request, in any order.

        A BudgetError tells of a context too short for the budget, a ModelError of one too long for the model.
        """
        jobs = []
        for index, (context, continuation) in enumerate(requests):
            if continuation:
                jobs.append(self._job(index, context, (), len(continuation), continuation))
            else:
                yield index, 0.0, True
        for index, result in self._run(jobs):
            yield index, -sum(result.gold_nll), tuple(result.token_ids) == requests[index].continuation_ids

    def texts(self, requests: Sequence[Prompt]) -> Iterator[tuple[int, str]]:
        """Greedy answers up to their first stop text, with the request's index; order and errors as `likelihoods`."""
        ends = stop_token_ids(self.loaded, stop_newline=False)
        jobs = [
            self._job(index, context, (*ends, *self._opening(stop_texts)), max_new_tokens)
            for index, (context, stop_texts, max_new_tokens) in enumerate(requests)
        ]
        for index, result in self._run(jobs):
            text = str(self.loaded.tokenizer.decode(result.token_ids, skip_special_tokens=True))
            for stop in filter(None, requests[index].stop_texts):
                text = text.partition(stop)[0]
            yield index, text

    def _job(self, index: int, context: Ids, stops: Ids, new_tokens: int, forced: Ids = ()) -> Request:
        context = self._fitting(context, new_tokens)
        compress_at = max(1, len(context) - self.question_tokens)
        arm = self._arm(compress_at)
        digest = hashlib.sha256(f"{self.seed}|{context}".encode()).digest()
        return Request(
            index=index, input_ids=context, compress_at=compress_at, gold_ids=forced, arms=(arm,),
            reference=arm,  # no KL is asked for, so no further row is spent on the full cache
            stop_ids=stops, max_new_tokens=new_tokens, seed=int.from_bytes(digest[:4], "big") >> 1,
        )  # fmt: skip

    def _fitting(self, context: Ids, new_tokens: int) -> Ids:
        """The context's last tokens, as many as fit; the harness cuts on the left, and so do we."""
        room = self.loaded.max_context_tokens - new_tokens
        if self.loaded.max_prompt_tokens is not None:
            room = min(room, self.loaded.max_prompt_tokens)
        if room < 1:
            raise ModelError(
                f"{new_tokens} new tokens leave no room for a context in the {self.loaded.max_context_tokens} tokens "
                f"of model {self.loaded.name}: ask for fewer (max_gen_toks) or use a model with a longer context"
            )
        self.tally.truncated += len(context) > room
        return context[-room:]

    def _arm(self, n_tokens: int) -> Arm:
        try:
            in_effect(self.policy).layer_budgets(n_tokens, model_shape(self.loaded)["n_layers"])
        except BudgetError as error:
            if self.short_context == "refuse":
                raise BudgetError(f"{error}; or keep such contexts whole with short_context=full") from error
            self.tally.kept_whole += 1
            return Arm.of(Full())
        return Arm.of(self.policy)

    def _opening(self, stop_texts: tuple[str, ...]) -> Ids:
        """Tokens whose text begins with a stop text: at these the engine may stop without losing a character."""
        stop_texts = tuple(filter(None, stop_texts))
        if stop_texts not in self._openings:
            self._openings[stop_texts] = tuple(i for i, text in enumerate(self._texts) if text.startswith(stop_texts))
        return self._openings[stop_texts]

    @cached_property
    def _texts(self) -> list[str]:
        """What each token adds to a text (some tokenizers drop the space of a token that stands alone)."""
        tokenizer = self.loaded.tokenizer
        before = tokenizer.encode("a", add_special_tokens=False)
        start = len(str(tokenizer.decode(before)))
        texts = tokenizer.batch_decode([[*before, token] for token in range(len(tokenizer))])
        return [str(text)[start:] for text in texts]

    def _run(self, jobs: list[Request]) -> Iterator[tuple[int, Answer]]:
        for result in self.engine.run(self.loaded, jobs):
            if isinstance(result, SampleFailure):
                raise ModelError(f"request {result.index} cannot be answered: {result.reason}")
            self.tally.requests += 1
            self.tally.kept_slots += sum(result.slots_per_layer)
            self.tally.full_slots += result.full_slots
            yield result.index, result


class CompressedCacheLM(TemplateLM):
    """The harness's view, `--model kvbench`: every context is read through one method's compressed cache.

    The arguments are those of `docs/lm_eval.md`. The harness passes its `--device`, which is "cuda:0" unless given;
    batch sizes are accepted and unused, since the engine fills its batches as memory allows.
    """

    def __init__(
        self, pretrained: str, method: str = "full", budget: float | None = None, question_tokens: int = 1,
        short_context: str = "refuse", seed: int = 0, dtype: str = "auto", device: str | None = None,
        max_gen_toks: int = 256, batch_size: Any = None, max_batch_size: Any = None, **options: Any,
    ):  # fmt: skip
        super().__init__()
        policy = build_policy(method, options if budget is None else {"budget": budget, **options})
        loaded = load_model(dataclasses.replace(model_config(pretrained), dtype=dtype), device=chosen_device(device))
        self.answers = CompressedAnswers(
            loaded, policy, question_tokens=question_tokens, short_context=short_context, seed=seed
        )
        self.tokenizer: Any = loaded.tokenizer
        self.max_gen_toks, self._device = max_gen_toks, loaded.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The context of a continuation that has none: BOS, or the end-of-text token where there is no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Most tokens of a context and what follows it together."""
        return self.answers.loaded.max_context_tokens

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize; a text that begins with BOS (a chat template wrote it) gets no second one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's own chat template writes it."""
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ending))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [Continuation(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        results = self.answers.likelihoods(asked)
        for index, value, greedy in _tracked(results, len(asked), "continuations", disable_tqdm):
            found[index] = (value, greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers; a task that asks for sampling, beams or an unknown argument is refused by a ConfigError."""
        asked = []
        for context, arguments in (request.args for request in requests):
            context_ids = tuple(self.tok_encode(context)) or (self.prefix_token_id,)
            asked.append(Prompt(context_ids, *self._generation(arguments)))
        found = [""] * len(asked)
        for index, text in _tracked(self.answers.texts(asked), len(asked), "answers", disable_tqdm):
            found[index] = text
            self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused by a ConfigError: a text that is scored from its first token on has no context to compress."""
        problem = f"{len(requests)} requests of type loglikelihood_rolling have no context that could be compressed"
        raise ConfigError(f"{problem}: use tasks of type generate_until, loglikelihood or multiple_choice")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into the `config` of its results: the method, and what was really kept."""
        answers, policy, tally = self.answers, self.answers.policy, self.answers.tally
        return {
            "model_source": answers.loaded.source, "model_device": str(self.device),
            "model_dtype": str(answers.loaded.dtype).removeprefix("torch."), "method": policy.name,
            "budget": policy.budget, "method_options": {name: str(value) for name, value in policy.options().items()},
            "question_tokens": answers.question_tokens, "budget_measured": tally.budget_measured,
            "requests": tally.requests, "contexts_truncated": tally.truncated, "contexts_kept_whole": tally.kept_whole,
        }  # fmt: skip

    def _generation(self, arguments: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Stop texts and the limit in tokens that a task's generation arguments ask for."""
        until = arguments.get("until") or ()
        limit = next((arguments[name] for name in LIMIT_NAMES if arguments.get(name) is not None), self.max_gen_toks)
        for name, value in arguments.items():
            if name in ("until", *LIMIT_NAMES) or (name in GREEDY and value in GREEDY[name]):
                continue
            if arguments.get("do_sample") is False and name in ("temperature", "top_p", "top_k"):
                continue  # without sampling they have no effect
            problem = f"generation argument {name}={value!r} is not supported, only greedy decoding is"
            raise ConfigError(f"{problem}: override it with --gen_kwargs do_sample=False,temperature=0")
        return ((until,) if isinstance(until, str) else tuple(until)), int(limit)


def model_config(pretrained: str) -> ModelConfig:
    """The configuration of a model by its name in `configs/model`, its folder, or its name on the hub."""
    if (config_folder() / "model" / f"{pretrained}.yaml").is_file():
        return named_config(pretrained)
    if (folder := user_path(pretrained)).is_dir():
        return ModelConfig(name=folder.name, source="local", path=str(folder), chat_format="none")
    return ModelConfig(name=pretrained, source="hub", hub_id=pretrained, chat_format="none")


def chosen_device(device: str | None) -> str:
    """The device to use: what was asked for, but "auto" for the harness's default where there is no GPU."""
    if device == HARNESS_DEFAULT_DEVICE and not torch.cuda.is_available():
        logger.warning("no CUDA device for --device %s, the harness's default: running on the CPU", device)
        return "auto"
    return device or "auto"


def _tracked(results: Any, total: int, what: str, quiet: bool) -> Any:
    return track(results, what, total, console=Console(stderr=True), disable=quiet)
