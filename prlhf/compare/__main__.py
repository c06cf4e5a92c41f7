"""python -m prlhf.compare: the command of `prlhf.evaluate.compare`."""

from prlhf.errors import run_command
from prlhf.evaluate.compare import main

if __name__ == "__main__":
    run_command(main)
