"""Commands about data.

    python -m prlhf.data check TRAIN [HELD_OUT ...] [--config NAME] [--set key=value ...]

`check` reports on files of comparisons before training (prlhf/data_check.py).
"""

import argparse

from prlhf import data_check
from prlhf.errors import run_command


def main() -> None:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m prlhf.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", required=True)
    check = commands.add_parser(
        "check",
        help="what is in comparison files, what leaks between them, what trivial rules get right",
        description=data_check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="the training comparisons, then any held-out ones")
    check.add_argument("--config", help="also tell what this config drops and cuts; a YAML file, or one in configs/")
    check.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    check.set_defaults(run=lambda args: data_check.run(args.files, args.config, args.set))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
