"""The tasks of the lm-evaluation-harness (EleutherAI, package `lm_eval`) with a compressed cache.

    pip install "kvbench[lm_eval]"
    python -m kvbench.lm_eval --model kvbench --tasks gsm8k \
        --model_args pretrained=smollm2-135m,method=kvmerger,budget=0.5

The command is the harness's own `lm_eval`, with one model more: lm_eval 0.4.13 looks for no entry points, so whoever
starts it has to register others first. A script calls `kvbench.lm_eval.register()`, before
`lm_eval.simple_evaluate(model="kvbench", ...)`. What is compressed says `kvbench.integrations.lm_eval`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from kvbench.catalogue import method
from kvbench.commands import command
from kvbench.errors import ConfigError

MODEL_NAME = "kvbench"


def register() -> None:
    """Make the model `kvbench` known to the harness of this process, again if need be; a ConfigError without it."""
    try:
        from lm_eval.api.registry import register_model
    except ImportError as error:
        problem = f"the package lm_eval cannot be imported ({error})"
        raise ConfigError(f'{problem}: pip install "kvbench[lm_eval]" (0.4.13 or later)') from error
    from kvbench.integrations.lm_eval import CompressedCacheLM  # late: it loads torch

    register_model(MODEL_NAME)(CompressedCacheLM)


def check_method(words: Sequence[str]) -> None:
    """Tell a mistyped `method=` before the seconds that torch and the harness take; in JSON it is told after them."""
    if re.search(rf"(^|\s)(--model|-[mM])[\s=]{MODEL_NAME}(\s|$)", " ".join(words)):
        for name in re.findall(r"(?:^|[\s,=])method=([^\s,]+)", " ".join(words)):
            method(name)


@command
def main() -> int:
    """Register the model and hand over to `lm_eval`; returns 2 after an error that the user can mend."""
    check_method(sys.argv[1:])
    register()
    from lm_eval.__main__ import cli_evaluate  # only here: `register` says so if the package is missing

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
