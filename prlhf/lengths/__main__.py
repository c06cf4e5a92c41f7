"""python -m prlhf.lengths: the command of `prlhf.evaluate.lengths`."""

from prlhf.errors import run_command
from prlhf.evaluate.lengths import main

if __name__ == "__main__":
    run_command(main)
