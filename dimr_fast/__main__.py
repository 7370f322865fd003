"""`python -m dimr_fast …` is `dimr-fast …`."""

import sys

from dimr_fast.cli import main

if __name__ == "__main__":  # not in a process that this one starts
    sys.exit(main())
