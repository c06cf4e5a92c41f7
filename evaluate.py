"""python evaluate.py ... is prlhf evaluate ...: see prlhf/evaluate/__main__.py."""

from prlhf.errors import run_command
from prlhf.evaluate.__main__ import main

if __name__ == "__main__":
    run_command(main)
