"""`python -m kvbench.check`."""

import sys

from kvbench.check.cli import main

if __name__ == "__main__":
    sys.exit(main())
