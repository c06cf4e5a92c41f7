"""python generate.py ... is prlhf generate ...: see prlhf/generate/__main__.py."""

from prlhf.errors import run_command
from prlhf.generate.__main__ import main

if __name__ == "__main__":
    run_command(main)
