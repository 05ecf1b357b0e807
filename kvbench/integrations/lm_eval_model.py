"""The harness's view of a model with a compressed cache. Imports `lm_eval`; see `kvbench.lm_eval.register`."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from rich.console import Console
from rich.progress import track

from kvbench.errors import ConfigError
from kvbench.integrations.lm_eval_answers import CompressedAnswers, Continuation, Prompt
from kvbench.methods.registry import build_policy
from kvbench.models.config import ModelConfig, model_config_folder, named_config
from kvbench.models.load import load_model
from kvbench.paths import user_path

logger = logging.getLogger(__name__)

LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
HARNESS_DEFAULT_DEVICE = "cuda:0"
GREEDY = {"do_sample": (False, None), "temperature": (0, None), "num_beams": (1, None)}
"""Generation arguments that are understood, with the values that mean greedy decoding."""


class CompressedCacheLM(TemplateLM):
    """`--model kvbench`: every context is read through one method's compressed cache.

    Args:
        pretrained: a name in `configs/model` ("smollm2-135m"), a checkpoint folder, or "organisation/model".
        method: a method's name.
        budget: fraction of the cache kept; None for the method's own default.
        question_tokens: see `CompressedAnswers`.
        short_context: likewise.
        seed: likewise.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "cuda:N"; the harness passes its `--device`, which is "cuda:0" unless given.
        max_gen_toks: limit of answers whose task sets none, in tokens.
        batch_size: accepted and unused: the engine fills its batches as memory allows.
        max_batch_size: likewise.
        **options: options of the method.

    Raises:
        ConfigError: if the method, an option or a value is unknown.
        ModelError: if the weights cannot be had.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "full",
        budget: float | None = None,
        question_tokens: int = 1,
        short_context: str = "refuse",
        seed: int = 0,
        dtype: str = "auto",
        device: str | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ):
        super().__init__()
        policy = build_policy(method, options if budget is None else {"budget": budget, **options})
        config = dataclasses.replace(model_config(pretrained), dtype=dtype)
        loaded = load_model(config, device=chosen_device(device))
        self.answers = CompressedAnswers(
            loaded, policy, question_tokens=question_tokens, short_context=short_context, seed=seed
        )
        self.tokenizer: Any = loaded.tokenizer
        self.max_gen_toks = max_gen_toks
        self._device = loaded.device

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
        return self.answers.max_tokens

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
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        asked = [Continuation(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        results = self.answers.likelihoods(asked)
        for index, value, greedy in _tracked(results, len(asked), "continuations", disable_tqdm):
            found[index] = (value, greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers to the requests' contexts; see `LM.generate_until` of the harness.

        Raises:
            ConfigError: if a task asks for sampling, beams or an unknown argument.
        """
        asked = []
        for request in requests:
            context, arguments = request.args
            stop_texts, limit = self._generation(arguments)
            asked.append(Prompt(tuple(self.tok_encode(context)) or (self.prefix_token_id,), stop_texts, limit))
        found = [""] * len(asked)
        for index, text in _tracked(self.answers.texts(asked), len(asked), "answers", disable_tqdm):
            found[index] = text
            self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: a rolling likelihood scores a text from its first token on, so there is no context to compress.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{len(requests)} requests of type loglikelihood_rolling have no context that could be compressed: use "
            "tasks of type generate_until, loglikelihood or multiple_choice"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into the `config` of its results: the method, and what was really kept."""
        policy, tally = self.answers.policy, self.answers.tally
        return {
            "model_source": self.answers.loaded.source,
            "model_device": str(self.device),
            "model_dtype": str(self.answers.loaded.dtype).removeprefix("torch."),
            "method": policy.name,
            "budget": policy.budget,
            "method_options": {name: str(value) for name, value in policy.options().items()},
            "question_tokens": self.answers.question_tokens,
            "budget_measured": tally.budget_measured,
            "requests": tally.requests,
            "contexts_truncated": tally.truncated,
            "contexts_kept_whole": tally.kept_whole,
        }

    def _generation(self, arguments: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Stop texts and the limit in tokens that a task's generation arguments ask for."""
        until = arguments.get("until") or ()
        limit = next((arguments[name] for name in LIMIT_NAMES if arguments.get(name) is not None), self.max_gen_toks)
        for name, value in arguments.items():
            if name not in ("until", *LIMIT_NAMES) and not (name in GREEDY and value in GREEDY[name]):
                if arguments.get("do_sample") is False and name in ("temperature", "top_p", "top_k"):
                    continue  # without sampling they have no effect
                raise ConfigError(
                    f"generation argument {name}={value!r} is not supported, only greedy decoding is: override it with "
                    "--gen_kwargs do_sample=False,temperature=0"
                )
        return ((until,) if isinstance(until, str) else tuple(until)), int(limit)


def model_config(pretrained: str) -> ModelConfig:
    """The configuration of a model by its name in `configs/model`, its folder, or its name on the hub."""
    if (model_config_folder() / f"{pretrained}.yaml").is_file():
        return named_config(pretrained)
    if user_path(pretrained).is_dir():
        folder = user_path(pretrained)
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
