"""How well a model knows new users after N comparisons, beside what else could be done: the tables of docs/results.md.

    python -m examples.new_users polis --data FOLDER --checkpoint RUN [RUN ...] [--out FOLDER] [--in-context N ...]
    python -m examples.new_users pal --raw FOLDER --out FOLDER
    python -m examples.new_users pal --raw FOLDER --out FOLDER --checkpoint RUN [RUN ...]

The protocols are in protocols.py: polis, pal, lore-tldr, lore-prism. Of the last three the first command writes FOLDER/train.jsonl
and says how to train on it. RUN is a reward model with a linear head; several runs are training seeds. Where the backbone was
trained too, only the rows of the checkpoint's own vectors are measured.

Rows: the generic user; adapted (prlhf.adapt); adapted to another user's comparisons, a control; the nearest trained user; a
user-blind reward model; the share of training votes; LoRe with K reward functions, and the best K at each N, chosen on what is
predicted, so an upper bound; the same users trained from the start, a ceiling; with --in-context, the comparisons as text in the
prompt, for the N that it names: this reads everything again for each user and N, which is slow.
Accuracy is the mean over users; intervals (95%, bootstrap over users) are of the paired difference from the generic user, and
in a second table of adapted less the other rows.
Nothing is chosen on the new users' comparisons but LoRe's best K.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from examples.new_users import report
from examples.new_users.baselines import from_the_start, user_blind, vote_share
from examples.new_users.context import InContext
from examples.new_users.lore import KS, lore
from examples.new_users.protocols import PROTOCOLS, Division, polis
from examples.new_users.setting import Adapted, Row, Setting, generic, nearest, set_up
from prlhf.adapt.users import check_adaptable
from prlhf.backbone.loading import choose_device
from prlhf.data.files import write_json_lines
from prlhf.errors import UserError, expanded, run_command
from prlhf.evaluate.stats.metrics import correct, expected_calibration_error
from prlhf.score.agreement import check_agreement
from prlhf.store.final import load_final

TRAIN = "python train.py --config polis_prm.yaml --set run_dir=RUN data.train={} data.valid=null data.max_tokens=1024"


class Measured(NamedTuple):
    """A row, and the N that it is measured at; None: all."""

    margins: Row
    shots: tuple[int, ...] | None = None


def rows(setting: Setting, adapted: Adapted, in_context: tuple[int, ...]) -> dict[str, Measured]:
    """The rows of the table."""
    found = {
        "generic user": Measured(lambda turns: generic(setting, turns)),
        "adapted": Measured(adapted.own),
        "another user's N": Measured(adapted.another),
        "nearest trained user": Measured(nearest(setting)),
    }
    if not setting.loaded.config.model.frozen:  # the others' training would have trained their own backbone
        return found
    found |= {
        "user-blind": Measured(user_blind(setting)),
        "vote share": Measured(vote_share(setting)),
    }
    found |= {f"LoRe, K = {K}": Measured(lore(setting, K)) for K in KS}
    if in_context:
        reader = InContext(setting)
        found["in context, generic head"] = Measured(reader.by_head(), in_context)
        found["in context, likelihood"] = Measured(reader.by_likelihood(), in_context)
    return {**found, "from the start (ceiling)": Measured(from_the_start(setting))}


def accuracies(setting: Setting, row: Measured, shots: tuple[int, ...]) -> np.ndarray:
    """Of each user, mean over draws, (N, users); NaN where the row is not measured."""

    def of(N: int) -> np.ndarray:
        if row.shots is not None and N not in row.shots:
            return np.full(len(setting.draws[0]), np.nan)
        drawn = [row.margins(setting.turns(draw, N)) for draw in range(len(setting.draws))]
        return np.mean([[correct(margins.numpy()).mean() for margins in turns] for turns in drawn], axis=0)

    return np.stack([of(N) for N in shots])


def calibration(setting: Setting, adapted: Adapted, shots: tuple[int, ...]) -> np.ndarray:
    """The expected calibration errors of adapted users, plug-in and integrated, (N, 2); mean over draws."""

    def of(draw: int, N: int) -> list[float]:
        turns = setting.turns(draw, N)
        return [
            expected_calibration_error(torch.cat(margins).numpy()) or 0.0 for margins in adapted.margins(turns, turns)
        ]

    return np.array([np.mean([of(draw, N) for draw in range(len(setting.draws))], axis=0) for N in shots])


def prepare(division: Division, out: Path) -> None:
    """Write what a protocol trains on, and say how."""
    path = out / "train.jsonl"
    if path.exists():
        raise UserError(f"{path}: exists; expected another --out, or --checkpoint with what was trained on it")
    out.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, division.train)
    known, new = len({r["user"] for r in division.train}), len(division.draws[0])
    print(
        f"{path}: {len(division.train):,} comparisons of {known:,} users; {new:,} new users, {len(division.draws)} draws"
    )
    print(f"train, for seed=0, 1, ...: {TRAIN.format(path)}\nthen: the same command with --checkpoint RUN")


def measure(division: Division, checkpoints: list[str], in_context: tuple[int, ...]) -> tuple[report.Result, str]:
    """All rows of all checkpoints, and the table of calibration."""
    found: dict[str, list[np.ndarray]] = {}
    errors, frozen = [], set()
    for checkpoint in checkpoints:
        loaded = load_final(checkpoint)
        check_adaptable(loaded)
        frozen.add(loaded.config.model.frozen)
        if len(frozen) > 1:
            raise UserError(f"{loaded.path}: found model.frozen={loaded.config.model.frozen}; expected the same in all")
        check_agreement(loaded.model.to(choose_device(loaded.config.device)))
        setting = set_up(loaded, division)
        adapted = Adapted(setting)
        print(f"{checkpoint}: {len(setting.draws[0])} new users", flush=True)
        for N in division.shots:
            print(f"  N = {N}: {adapted.prior(setting.turns(0, N)).said}", flush=True)
        for name, row in rows(setting, adapted, in_context).items():
            found.setdefault(name, []).append(accuracies(setting, row, division.shots))
        errors.append(calibration(setting, adapted, division.shots))
    result = report.Result(division.shots, {name: np.stack(each) for name, each in found.items()}).with_best("LoRe, K")
    return result, report.calibration_table(division.shots, np.mean(errors, axis=0).tolist())


def main() -> None:
    """Write the training file of the protocol that the command line names, or measure checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("polis", *PROTOCOLS))
    parser.add_argument("--data", help="polis: the folder of unseen_users_adapt.jsonl and unseen_users_test.jsonl")
    parser.add_argument("--raw", help="other protocols: the data set's raw files")
    parser.add_argument("--checkpoint", nargs="+", default=[], help="runs, one a training seed")
    parser.add_argument("--out", help="where the training file goes, or the table, the figure and the accuracies")
    parser.add_argument("--in-context", nargs="+", type=int, default=[], metavar="N", help="numbers of comparisons")
    args = parser.parse_args()
    source = "data" if args.protocol == "polis" else "raw"
    if getattr(args, source) is None:
        raise UserError(f"{args.protocol}: found no --{source}; expected the folder of its files")
    folder = expanded(getattr(args, source))
    divide = polis if args.protocol == "polis" else PROTOCOLS[args.protocol]
    division = divide(folder)
    if unknown := sorted(set(args.in_context) - set(division.shots)):
        raise UserError(f"--in-context {unknown[0]}: expected some of {', '.join(map(str, division.shots))}")
    if not args.checkpoint:
        if args.out is None or not division.train:
            raise UserError(
                f"{args.protocol}: found no --checkpoint; expected one" + " or --out" * bool(division.train)
            )
        return prepare(division, expanded(args.out))
    result, errors = measure(division, args.checkpoint, tuple(args.in_context))
    text = "\n\n".join((report.table(result), report.less_table(result), errors))
    print(text)
    if args.out is not None:
        said = {"protocol": args.protocol, "folder": str(folder), "checkpoints": args.checkpoint}
        report.write(result, expanded(args.out), said, text, f"New users: {args.protocol}, {folder.name}")


if __name__ == "__main__":
    run_command(main)
