"""`python -m kvbench.lm_eval`: the harness's own command line, which then knows the model `kvbench`."""

import sys

from kvbench.commands import command
from kvbench.lm_eval import register


@command
def main() -> int:
    """Register the model and hand over to `lm_eval`; returns 2 after an error that the user can mend."""
    register()
    from lm_eval.__main__ import cli_evaluate  # only here: `register` says so if the package is missing

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
