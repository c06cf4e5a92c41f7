"""Commands about data.

    python -m prlhf.data fetch NAME [--out FOLDER]
    python -m prlhf.data prepare NAME [--raw FOLDER] [--out FOLDER] [--few-shot K] [--seed N] ...
    python -m prlhf.data split FILE --out FOLDER [--by prompt|response|FIELD] [--few-shot K] [--seed N] ...
    python -m prlhf.data check TRAIN [HELD_OUT ...] [--config NAME] [--set key=value ...]

`fetch` downloads the raw files of a paper's data set (prlhf/data/fetch/fetch.py), `prepare` makes comparisons of them and
`split` divides a file of your own (prlhf/data/sets/prepare.py); `check` reports on files of comparisons before training
(prlhf/data/check/report.py).
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from types import ModuleType
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

BY_HELP = (
    "prompt: each prompt on one side; response: each user's responses on one side; or the field that names the dialogue, which "
    "is one user's (not `prompt` or `response`); default: response where a user judged one in two different pairs, else prompt"
)
GROUPS_HELP = (
    "how much is trained on: of the prompts or of each user's dialogues (0.9), or of each user's responses (0.7: about 0.7^2 "
    "of the pairs are trained on, 0.3^2 held out, the others left out)"
)
OWNERS = {"known_users": ("tldr", "tldr_length"), "rejected": ("prism",)}  # options of some data sets alone


def main() -> None:
    """Parse the command line and run the command."""
    form = RawDescriptionHelpFormatter
    parser = ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(title="commands", required=True)

    def add(run: Callable[[Namespace], None], name: str, about: str, module: ModuleType) -> ArgumentParser:
        command = commands.add_parser(name, help=about, description=module.__doc__, formatter_class=form)
        command.set_defaults(run=run)
        return command

    command = add(lambda args: fetch.run(args.name, args.out), "fetch", "download a data set's raw files", fetch)
    command.add_argument("name", metavar="NAME", help=", ".join(DATA_SETS))
    command.add_argument("--out", metavar="FOLDER", help="where they go; by default ~/.cache/prlhf/data/NAME")

    command = add(run_prepare, "prepare", "make comparisons of raw files", prepare)
    command.add_argument("name", metavar="NAME", help=", ".join(DATA_SETS))
    command.add_argument("--raw", metavar="FOLDER", help="the raw files; by default where `fetch` puts them")
    command.add_argument("--out", metavar="FOLDER", help="by default runs/data/NAME")
    command.add_argument("--known-users", type=int, metavar="N", help="tldr: this many workers are known (10)")
    command.add_argument("--rejected", choices=("each", "best"), help="prism: each unchosen response, or the best one")
    _add_common(command)

    command = add(run_split, "split", "divide comparisons into training, held-out and few-shot ones", splits)
    command.add_argument("file", metavar="FILE", help="comparisons")
    command.add_argument("--out", metavar="FOLDER", required=True)
    command.add_argument("--by", metavar="prompt|response|FIELD", help=BY_HELP)
    command.add_argument("--format", default="auto", choices=choices_of(KEYS["data.format"]))
    command.add_argument("--user-column", default="user", metavar="FIELD", help="names the user")
    command.add_argument("--users", type=float, default=0.9, metavar="SHARE", help="of the users who are known (0.9)")
    command.add_argument("--groups", type=float, metavar="SHARE", help=GROUPS_HELP)
    _add_common(command)

    about = "what is in comparison files, what leaks between them, what trivial rules get right"
    command = add(run_check, "check", about, data_check)
    command.add_argument("files", nargs="+", metavar="FILE", help="the training comparisons, then any held-out ones")
    command.add_argument("--config", help="also what this config drops and cuts; a YAML file, or one in configs/")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    args = parser.parse_args()
    args.run(args)


def _add_common(command: ArgumentParser) -> None:
    command.add_argument("--few-shot", type=int, default=0, metavar="K", help="comparisons of each unknown user")
    command.add_argument("--seed", type=int, default=123, help="of the split and the prompts (123)")
    command.add_argument("--overwrite", action="store_true", help="replace what --out holds")


def run_prepare(args: Namespace) -> None:
    """`prepare`: check the options and run it."""
    source_name(args.name)
    given = {name: getattr(args, name) for name in OWNERS if getattr(args, name) is not None}
    for name in given:
        if args.name not in OWNERS[name]:
            owners = " and ".join(OWNERS[name])
            raise UserError(f"--{name.replace('_', '-')}: an option of {owners}, not of {args.name}")
    check_range("--known-users", given.get("known_users", 1), low=1)
    prepare.prepare(args.name, args.raw, args.out, _options(args, **given), args.overwrite)


def run_split(args: Namespace) -> None:
    """`split`: check the options and run it."""
    check_range("--users", args.users, low=0, high=1)
    check_range("--groups", 1 if args.groups is None else args.groups, low=0, high=1)
    division = prepare.Division(args.by, args.users, args.groups)
    form = DataConfig(format=args.format, user_column=args.user_column)
    prepare.split_file(args.file, args.out, division, form, _options(args), args.overwrite)


def _options(args: Namespace, **given: Any) -> Options:
    check_range("--few-shot", args.few_shot, low=0)
    check_range("--seed", args.seed, low=0, high=2**32 - 1)
    return Options(seed=args.seed, few_shot=args.few_shot, **given)


def run_check(args: Namespace) -> None:
    """`check`: with a config, also what becomes of the files as tokens."""
    if args.config is None:
        if args.set:
            raise UserError(f"--set {args.set[0]}: found no --config, expected one with it")
        return data_check.run(args.files)
    config = load_config(find_config(args.config), args.set)
    encoder = Encoder(load_tokenizer(config.model), config.data, config.method, config.user_model.place)

    def encode(file: ComparisonFile, users: UserIndex) -> data_check.AsTokens:
        data = encode_file(file, encoder, users)
        report = data.report
        lost = report.too_long_dropped, report.prompts_truncated, report.user_texts_truncated
        return data_check.AsTokens([c.length for c in data.comparisons], report.lines(), lost)

    data_check.run(args.files, config.data, encode)


if __name__ == "__main__":
    run_command(main)
