"""Commands about data.

    python -m prlhf.data fetch NAME [--out FOLDER]
    python -m prlhf.data prepare NAME [--raw FOLDER] [--out FOLDER] [--few-shot K] [--seed N] ...
    python -m prlhf.data split FILE --out FOLDER [--by prompt|response|FIELD] [--few-shot K] [--seed N] ...
    python -m prlhf.data check TRAIN [HELD_OUT ...] [--config NAME] [--set key=value ...]

`fetch` downloads the raw files of a paper's data set (prlhf/data/fetch/fetch.py), `prepare` makes comparisons of them and `split`
divides a file of your own (prlhf/data/sets/prepare.py); `check` reports on files of comparisons before training
(prlhf/data/check/report.py).
"""

import argparse
from typing import Any

from prlhf.backbone.loading import load_tokenizer
from prlhf.batch.datasets import encode_file
from prlhf.batch.tokens import Encoder
from prlhf.config.keys import KEYS, DataConfig, choices_of
from prlhf.config.load import find_config, load_config
from prlhf.data.check import report as data_check
from prlhf.data.comparisons import ComparisonFile
from prlhf.data.fetch import fetch
from prlhf.data.sets import prepare, splits
from prlhf.data.sets.raw import Options
from prlhf.data.sources import DATA_SETS, source_name
from prlhf.data.users import UserIndex
from prlhf.errors import UserError, check_range, run_command


def main() -> None:
    """Parse the command line and run what it asks for."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m prlhf.data", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", required=True)

    command = commands.add_parser(
        "fetch", help="download a data set's raw files", description=fetch.__doc__, formatter_class=raw
    )
    command.add_argument("name", metavar="NAME", help=", ".join(DATA_SETS))
    command.add_argument("--out", metavar="FOLDER", help="where they go; by default ~/.cache/prlhf/data/NAME")
    command.set_defaults(run=lambda args: fetch.run(args.name, args.out))

    command = commands.add_parser(
        "prepare", help="make comparisons of raw files", description=prepare.__doc__, formatter_class=raw
    )
    command.add_argument("name", metavar="NAME", help=", ".join(DATA_SETS))
    command.add_argument("--raw", metavar="FOLDER", help="the raw files; by default where `fetch` puts them")
    command.add_argument("--out", metavar="FOLDER", help="by default runs/data/NAME")
    command.add_argument("--known-users", type=int, metavar="N", help="tldr: so many workers are known (10)")
    command.add_argument("--rejected", choices=("each", "best"), help="prism: each unchosen response, or the best one")
    _common(command)
    command.set_defaults(run=run_prepare)

    _add_split(commands, formatter_class=raw)

    command = commands.add_parser(
        "check", help="what is in comparison files, what leaks between them, what trivial rules get right",
        description=data_check.__doc__, formatter_class=raw,
    )  # fmt: skip
    command.add_argument("files", nargs="+", metavar="FILE", help="the training comparisons, then any held-out ones")
    command.add_argument("--config", help="also tell what this config drops and cuts; a YAML file, or one in configs/")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    command.set_defaults(run=run_check)
    args = parser.parse_args()
    args.run(args)


def _add_split(commands: Any, formatter_class: type) -> None:
    command = commands.add_parser(
        "split", help="divide comparisons into training, held-out and few-shot ones", description=splits.__doc__,
        formatter_class=formatter_class,
    )  # fmt: skip
    command.add_argument("file", metavar="FILE", help="comparisons")
    command.add_argument("--out", metavar="FOLDER", required=True)
    command.add_argument(
        "--by", metavar="prompt|response|FIELD",
        help="prompt: all of a prompt on one side; response: no held-out pair has a response that its user judged in "
        "training; or the field that names the dialogue, one user's own (no field is called prompt or response here); by "
        "default response where a user judged one response in two different pairs, else prompt",
    )  # fmt: skip
    command.add_argument("--format", default="auto", choices=choices_of(KEYS["data.format"]))
    command.add_argument("--user-column", default="user", metavar="FIELD", help="names the user")
    command.add_argument("--users", type=float, default=0.9, metavar="SHARE", help="of the users who are known (0.9)")
    command.add_argument(
        "--groups", type=float, metavar="SHARE",
        help="of what is trained on (0.9): prompts, or each user's dialogues; by response of each user's responses (0.7: of "
        "the pairs about 0.7^2 are trained on, 0.3^2 held out, the others left out)",
    )  # fmt: skip
    _common(command)
    command.set_defaults(run=run_split)


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--few-shot", type=int, default=0, metavar="K", help="comparisons of each unknown user")
    command.add_argument("--seed", type=int, default=123, help="of the split and the prompts (123)")
    command.add_argument("--overwrite", action="store_true", help="replace what --out holds")


def run_prepare(args: argparse.Namespace) -> None:
    """`prepare`: check the options and go."""
    source_name(args.name)
    said = {"known_users": args.known_users, "rejected": args.rejected}
    owners = {"known_users": ("tldr", "tldr_length"), "rejected": ("prism",)}
    for name, value in said.items():
        if value is not None and args.name not in owners[name]:
            raise UserError(
                f"--{name.replace('_', '-')}: an option of {' and '.join(owners[name])}, not of {args.name}"
            )
    _check_ranges(args)
    check_range("--known-users", 1 if args.known_users is None else args.known_users, low=1)
    given = {name: value for name, value in said.items() if value is not None}
    options = Options(seed=args.seed, few_shot=args.few_shot, **given)
    prepare.prepare(args.name, args.raw, args.out, options, args.overwrite)


def run_split(args: argparse.Namespace) -> None:
    """`split`: check the options and go."""
    _check_ranges(args)
    check_range("--users", args.users, low=0, high=1)
    if args.groups is not None:
        check_range("--groups", args.groups, low=0, high=1)
    options = Options(seed=args.seed, few_shot=args.few_shot)
    form = DataConfig(format=args.format, user_column=args.user_column)
    prepare.split_file(args.file, args.out, args.by, form, args.users, args.groups, options, args.overwrite)


def run_check(args: argparse.Namespace) -> None:
    """`check`: with a config, what it makes of the files as tokens too."""
    if args.config is None:
        if args.set:
            raise UserError(f"--set {args.set[0]}: found no --config, expected one with it")
        return data_check.run(args.files)
    config = load_config(find_config(args.config), args.set)
    encoder = Encoder(load_tokenizer(config.model), config.data, config.method)

    def encode(file: ComparisonFile, users: UserIndex) -> data_check.AsTokens:
        data, report = encode_file(file, encoder, users)[::2]
        counts = report.too_long_dropped, report.prompts_truncated, report.user_texts_truncated
        return data_check.AsTokens([c.length for c in data], report.lines(), *counts)

    data_check.run(args.files, config.data, encode)


def _check_ranges(args: argparse.Namespace) -> None:
    check_range("--few-shot", args.few_shot, low=0)
    check_range("--seed", args.seed, low=0, high=2**32 - 1)


if __name__ == "__main__":
    run_command(main)
