"""Run `dimr-fast` as `python -m dimr_fast`, as launchers start it."""

import sys

from dimr_fast.cli import main_of_process

if __name__ == "__main__":  # not in a worker process, which imports this file
    sys.exit(main_of_process())
