"""python train.py ... is prlhf train ...: see prlhf/train/__main__.py."""

from prlhf.errors import run_command
from prlhf.train.__main__ import main

if __name__ == "__main__":
    run_command(main)
