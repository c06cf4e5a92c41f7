"""prlhf NAME ...: the command NAME; the same as python -m prlhf.NAME ... ."""

import importlib
import sys

from prlhf.errors import UserError, did_you_mean, run_command

COMMANDS = {
    "train": "train a personalised language or reward model",
    "evaluate": "evaluate a model on held-out comparisons",
    "generate": "answer prompts as several users, or score responses",
    "adapt": "make a model know new users from a few comparisons",
    "users": "show who the users are to a model, or forget one",
    "data": "fetch, prepare, split or check comparisons",
    "judge": "win rates of one system's responses against another's, by a judge",
    "compare": "compare evaluated models on the same comparisons",
    "simulate": "relabel comparisons with simulated preferences for length",
    "lengths": "report how many words each user is answered with",
}


def main() -> None:
    """Run the command that the first argument names, with the others."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        lines = [f"  {name:<10}{meaning}" for name, meaning in COMMANDS.items()]
        print("\n".join(["usage: prlhf NAME ...", "", *lines, "", "prlhf NAME --help tells more"]))
        return
    name = sys.argv[1]
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}{did_you_mean(name, COMMANDS)}; expected one of {', '.join(COMMANDS)}")
    sys.argv = [f"prlhf {name}", *sys.argv[2:]]
    importlib.import_module(f"prlhf.{name}.__main__").main()


def command() -> None:
    """The console command `prlhf`."""
    run_command(main)


if __name__ == "__main__":
    command()
