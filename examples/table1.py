"""Table 1 of the paper's first version: P-RM and P-DPO on real annotators' choices between summaries (TL;DR).

    python -m examples.table1 --data FOLDER [--out runs/table1] [--seeds 0 1 2] [--arms ARM ...] [--set key=value ...]

FOLDER holds train.jsonl and valid.jsonl as `python -m prlhf.data prepare tldr` writes them. Trains every arm and seed
(train.py with configs/tldr_prm.yaml and configs/tldr_pdpo.yaml), evaluates them (evaluate.py), and writes OUT/table1.md and
table1.json: accuracies beside the paper's, and each arm's gain over its vanilla arm with intervals over users (prlhf.compare).
The same command again continues where it stopped. Arms: vanilla_rm, prm_USERS, vanilla_dpo and pdpo_USERS, where USERS is
individual_a1, individual_a0.5, cluster5_a1 or cluster5_a0.5. --set applies to every run.
"""

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from examples.grid import Arm, options, run_grid
from prlhf.config import load as config_module
from prlhf.data.check.tables import interval_text, percent
from prlhf.errors import run_command
from prlhf.evaluate.compare import MEASURES
from prlhf.evaluate.margins import read_models
from prlhf.evaluate.stats.paired import compare


class Published(NamedTuple):
    """A row of the paper's table: title and accuracies in %."""

    title: str
    top: float
    average_mean: float
    average_std: float
    generic: float


PAPER = {  # arXiv 2402.05133v1, Table 1
    "vanilla_rm": Published("vanilla RM", 60.27, 61.10, 3.44, 59.20),
    "prm_individual_a1": Published("P-RM, individual, alpha = 1", 58.59, 58.76, 2.91, 57.10),
    "prm_individual_a0.5": Published("P-RM, individual, alpha = 0.5", 61.72, 62.09, 3.51, 60.65),
    "prm_cluster5_a1": Published("P-RM, cluster, K = 5, alpha = 1", 58.79, 59.72, 3.76, 59.94),
    "prm_cluster5_a0.5": Published("P-RM, cluster, K = 5, alpha = 0.5", 59.66, 60.19, 2.95, 59.90),
    "vanilla_dpo": Published("vanilla DPO", 60.48, 60.57, 3.14, 60.99),
    "pdpo_individual_a1": Published("P-DPO, individual, alpha = 1", 60.07, 60.13, 3.75, 60.53),
    "pdpo_individual_a0.5": Published("P-DPO, individual, alpha = 0.5", 61.33, 61.61, 3.49, 61.97),
    "pdpo_cluster5_a1": Published("P-DPO, cluster, K = 5, alpha = 1", 59.24, 60.20, 4.69, 59.58),
    "pdpo_cluster5_a0.5": Published("P-DPO, cluster, K = 5, alpha = 0.5", 60.98, 61.46, 4.77, 61.27),
}
CLUSTER = ("user_model.kind=cluster", "user_model.clusters=5")
USERS = {
    "individual_a1": ("user_model.kind=individual", "loss.alpha=1"),
    "individual_a0.5": ("user_model.kind=individual", "loss.alpha=0.5"),
    "cluster5_a1": (*CLUSTER, "loss.alpha=1"),
    "cluster5_a0.5": (*CLUSTER, "loss.alpha=0.5"),
}
FAMILIES = {  # the vanilla arm comes first; the others are compared with it
    "reward models": {
        "vanilla_rm": Arm("tldr_prm.yaml", ("user_model.kind=uniform", "user_model.tokens=0")),
        **{f"prm_{users}": Arm("tldr_prm.yaml", keys) for users, keys in USERS.items()},
    },
    "language models": {
        "vanilla_dpo": Arm("tldr_pdpo.yaml", ("user_model.kind=uniform", "user_model.tokens=0")),
        **{f"pdpo_{users}": Arm("tldr_pdpo.yaml", keys) for users, keys in USERS.items()},
    },
}
HEAD = " | ".join(f"{measure} | paper" for measure in MEASURES.values()) + " |\n" + "|---" * 7 + "|"
RUN_KEYS = ("run_dir", "seed", "data.train", "data.valid", "train.eval_last")  # allowed to differ between runs


def changed_keys(evaluations: dict[str, list[Path]], arms: dict[str, Arm]) -> list[str]:
    """Keys in which the runs differ from the arms' own configs, as 'optim.lr: 5e-06 -> 0.001'."""
    found: dict[str, None] = {}
    for name, (folder, *_) in evaluations.items():
        expected = config_module.load_config(config_module.find_config(arms[name].config), arms[name].keys)
        differing = config_module.differing_keys(expected, config_module.load_resolved(folder.parent / "config.yaml"))
        found |= dict.fromkeys(text for text in differing if not text.startswith(tuple(f"{k}:" for k in RUN_KEYS)))
    return list(found)


def results(evaluations: dict[str, list[Path]]) -> dict[str, Any]:
    """By family: the report of prlhf.compare (no differences if the vanilla arm is missing), config and `changed_keys`."""
    found = {}
    for family, arms in FAMILIES.items():
        own = {name: evaluations[name] for name in arms if name in evaluations}
        if own:
            report = compare(*read_models({name: list(map(str, folders)) for name, folders in own.items()}))
            if report["baseline"] != next(iter(arms)):
                report |= {"baseline": None, "differences": {}, "per_user": {}}
            config, changed = arms[next(iter(own))].config, changed_keys(own, arms)
            found[family] = {**report, "config": config, "changed_keys": changed}
    return found


def markdown(families: dict[str, Any], command: str, seeds: list[str]) -> str:
    """The paper's table, each arm minus its vanilla arm, and how they were made."""
    lines = ["# Table 1: TL;DR comparisons of real annotators", "", f"| accuracy, % | {HEAD}"]
    for family in families.values():
        for name, model in family["models"].items():
            ours, paper = (_with_spread(model, measure) for measure in MEASURES), PAPER[name]
            average = f"{paper.average_mean:.2f} ± {paper.average_std:.2f}"
            lines.append(_row(paper.title, ours, (f"{paper.top:.2f}", average, f"{paper.generic:.2f}")))
    lines += ["", "Accuracy-average: mean ± standard deviation over known users. paper: arXiv 2402.05133v1, Table 1."]
    if len(seeds) > 1:
        lines.append(f"Means over {len(seeds)} seeds; in parentheses, the standard deviation over them.")
    if any(family["differences"] for family in families.values()):
        lines += ["", f"| less vanilla, % (interval) | {HEAD}"]
        for family in families.values():
            for name, rows in family["differences"].items():
                ours, paper = (_gain(rows[measure]) for measure in MEASURES), PAPER[name]
                vanilla = PAPER[family["baseline"]]
                theirs = (f"{getattr(paper, measure) - getattr(vanilla, measure):+.2f}" for measure in MEASURES)
                lines.append(_row(paper.title, ours, theirs))
        lines += ["", "On the same comparisons; 95% intervals resample users, with both arms (prlhf.compare)."]
    lines += ["", f"- Command: `{command}`", f"- Seeds: {', '.join(seeds)}"]
    for title, family in families.items():
        counts, changed = family["comparisons"], "; ".join(family["changed_keys"]) or "nothing"
        known, unknown = counts["known_users"], counts["unknown_users"]
        lines.append(f"- {title.capitalize()}: {known} held-out comparisons of known users, {unknown} of unknown ones.")
        lines.append(f"  Set otherwise than the paper's ({family['config']}): {changed}")
    return "\n".join(lines) + "\n"


def _row(title: str, ours: Iterable[str], paper: Iterable[str]) -> str:
    return f"| {title} | " + " | ".join(cell for both in zip(ours, paper) for cell in both) + " |"


def _with_spread(model: dict[str, Any], measure: str) -> str:
    """A measure in %, with its standard deviation over seeds; the average also has the one over users."""
    over_seeds = model["std_over_seeds"][measure]
    text = percent(model["accuracy"][measure]) + ("" if over_seeds is None else f" ({percent(over_seeds)})")
    return f"{text} ± {_with_spread(model, 'average_std')}" if measure == "average_mean" else text


def _gain(row: dict[str, Any]) -> str:
    return "-" if row["difference"] is None else f"{100 * row['difference']:+.2f} ({interval_text(row['interval'])})"


def main() -> None:
    """Run every arm and seed, then write the table."""
    command = shlex.join(["python", "-m", "examples.table1", *sys.argv[1:]])
    parser = options(__doc__, "runs/table1")
    parser.add_argument("--data", required=True, help="the folder of train.jsonl and valid.jsonl")
    args = parser.parse_args()
    arms = {name: arm for family in FAMILIES.values() for name, arm in family.items()}
    keys = (f"data.train={args.data}/train.jsonl", f"data.valid={args.data}/valid.jsonl", "train.eval_last=false")
    families, seeds = results(run_grid(args, arms, keys)[""]), list(dict.fromkeys(args.seeds))
    text, paper = markdown(families, command, seeds), {name: row._asdict() for name, row in PAPER.items()}
    report = {"command": command, "seeds": seeds, "paper_percent": paper, "families": families}
    out = Path(args.out)
    (out / "table1.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "table1.md").write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {out}")


if __name__ == "__main__":
    run_command(main)
