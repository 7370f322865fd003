"""Run `dimr-fast train`, as `accelerate launch -m dimr_fast.training` and torchrun start it."""

import sys

from dimr_fast.cli import main_of_process

if __name__ == "__main__":  # not in a worker process, which imports this file
    sys.exit(main_of_process(["train", *sys.argv[1:]]))
