"""`python -m kvbench`: see `kvbench.cli`."""

import os
import sys


def main() -> int:
    """Set what has to be set before torch is loaded, then run the command line; returns the exit code."""
    # Threads that spin while they wait make everything several times slower on a machine that others use too: two
    # samples of the demo took 104 s spinning and 26 s sleeping, on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from kvbench.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
