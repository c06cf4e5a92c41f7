"""python -m prlhf.users: the command of `prlhf.adapt.look`."""

from prlhf.adapt.look import main
from prlhf.errors import run_command

if __name__ == "__main__":
    run_command(main)
