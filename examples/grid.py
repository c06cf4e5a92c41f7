"""The grid behind a table: arms x seeds, trained by train.py and evaluated by evaluate.py in this process.

Each run has its own folder OUT/ARM_seedN, with its evaluations in eval/. Finished runs and evaluations are kept, so the same
command again continues where it stopped. A finished run's checkpoints are removed, as it no longer needs them.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from prlhf.config import load as config_module
from prlhf.errors import UserError, did_you_mean
from prlhf.evaluate import __main__ as evaluate
from prlhf.train import __main__ as train

OWN: dict[str, str | None] = {"": None}  # held-out file: the config's data.valid, evaluated in eval/ itself


class Arm(NamedTuple):
    """A row of the table: a config, and the keys that this row changes."""

    config: str
    keys: tuple[str, ...]


def call(main: Callable[[], None], *arguments: str) -> None:
    """Run a command of the project in this process."""
    sys.argv = [main.__module__, *arguments]
    main()


def options(description: str | None, out: str) -> argparse.ArgumentParser:
    """The command-line options that all grids share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=out, help="where the runs go (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, in this order (default: all)")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], metavar="N")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every run")
    return parser


def run_grid(
    args: argparse.Namespace,
    arms: Mapping[str, Arm],
    keys: tuple[str, ...] = (),
    held_out: Mapping[str, str | None] = OWN,
) -> dict[str, dict[str, list[Path]]]:
    """Train and evaluate args.arms x args.seeds; returns the evaluations' folders by held-out file and arm, one per seed.

    args: parsed by `options`. keys: of every run; args.set overrides them, and an arm's keys override both. held_out: files, by
    the name of their folder in eval/. UserError for any run's config, before anything is trained.
    """
    chosen = _chosen(args, arms)
    plan = []
    for seed in dict.fromkeys(args.seeds):
        for name, arm in chosen.items():
            run = Path(args.out) / f"{name.replace(' ', '').replace(',', '_').replace('=', '')}_seed{seed}"
            overrides = (*keys, *args.set, *arm.keys, f"run_dir={run}", f"seed={seed}")
            valid = config_module.load_config(config_module.find_config(arm.config), overrides).data.valid
            plan.append((name, arm.config, run, overrides, valid))
    folders: dict[str, dict[str, list[Path]]] = {split: {name: [] for name in chosen} for split in held_out}
    for name, config, run, overrides, valid in plan:
        call(train.main, "--config", config, "--set", *overrides)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        for split, file in held_out.items():
            out = run / "eval" / split
            folders[split][name].append(out)
            if not _is_evaluated(out, file or valid):
                data = ("--data", file, "--set", "data.new_users=true") if file else ()  # unknown voters' votes, say
                call(evaluate.main, "--checkpoint", str(run), *data, "--out", str(out))
    return folders


def _chosen(args: argparse.Namespace, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms of --arms. UserError for an unknown arm, and if --set would change a key in which the arms differ."""
    for name in args.arms or ():
        if name not in arms:
            raise UserError(
                f"--arms {name}: no such arm{did_you_mean(name, arms)}, expected some of: {'; '.join(arms)}"
            )
    chosen = {name: arms[name] for name in args.arms or arms}
    own = {"run_dir", "seed", *(text.partition("=")[0] for arm in chosen.values() for text in arm.keys)}
    for text in args.set:
        if text.partition("=")[0].strip() in own:
            raise UserError(f"--set {text}: the runs of this grid differ in it, expected one of the other keys")
    return chosen


def _is_evaluated(folder: Path, data: str | None) -> bool:
    """Whether the folder holds a complete report on this file; evaluate.py writes the report last."""
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))["data"] == data
    except (OSError, ValueError, KeyError, TypeError):
        return False
