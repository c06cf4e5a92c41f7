"""python -m prlhf.simulate: the command of `prlhf.data.sets.simulate`."""

from prlhf.data.sets.simulate import main
from prlhf.errors import run_command

if __name__ == "__main__":
    run_command(main)
