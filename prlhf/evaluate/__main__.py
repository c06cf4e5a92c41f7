"""Evaluate a model: python evaluate.py --checkpoint DIR [--data PATH] [--out DIR] [--set key.sub=value ...]

Writes report.json, report.md, users.csv, margins.jsonl and figures to the run's eval/ (or --out), and prints report.md. With
--baseline the run's untouched base model is asked instead which response each user prefers, told the text about the user
(`roleplay`), N of the user's training comparisons (`fewshot:N`), or nothing (`base`).
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from prlhf.batch.datasets import Dataset
from prlhf.config.keys import has_linear_coordinates
from prlhf.data.check.rules import FittedRules, fit
from prlhf.errors import UserError, run_command
from prlhf.evaluate.accuracy import integrated_calibration, reward_margins, score_users, summarize
from prlhf.evaluate.held_out import encoded, held_out_task, read_held_out, training_file
from prlhf.evaluate.report import accuracy_curve, markdown, write_margins, write_report
from prlhf.judge.baselines import BASELINES, Baseline, find_baseline, predicted_margins
from prlhf.method.models import PersonalizedRewardModel
from prlhf.method.posterior import features, integrated
from prlhf.parallel.ranks import check_started_alone
from prlhf.score.slopes import margin_slopes, user_rows
from prlhf.score.states import States, response_states
from prlhf.score.task import Task
from prlhf.store.final import Loaded, load_final


def main() -> None:
    """Evaluate the model that the command line names, and write its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's directory or its final/")
    parser.add_argument("--data", help="comparisons; by default the config's data.valid")
    parser.add_argument(
        "--baseline", help=f"judge the run's base model, as it predicts choices: {', '.join(BASELINES)}"
    )
    parser.add_argument(
        "--out", help="where the report goes; by default RUN_DIR/eval, of a baseline RUN_DIR/eval_BASELINE"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    args = parser.parse_args()

    check_started_alone("evaluate.py")
    loaded = load_final(args.checkpoint, tuple(args.set))
    config = loaded.config
    source = args.data or config.data.valid
    if source is None:
        raise UserError(f"{loaded.path / 'config.yaml'}: data.valid is not set, expected --data PATH")
    run_dir = loaded.path.parent if loaded.path.name == "final" else loaded.path
    baseline = find_baseline(loaded, args.baseline, config.evaluate.seed) if args.baseline else None
    out = Path(args.out) if args.out else run_dir / (f"eval_{args.baseline.replace(':', '')}" if baseline else "eval")
    out.mkdir(parents=True, exist_ok=True)
    limited = args.data is None or any(text.startswith("data.valid_limit=") for text in args.set)
    file = read_held_out(source, loaded).sample(config.data.valid_limit if limited else None, config.seed)
    data = encoded(loaded, file)
    print(f"{source}: {data.report.lines()}")
    rules = fit_rules(loaded).right(data.raw)

    users = [c.user for c in data.comparisons]
    margins, logits_B = scored(loaded, data, baseline)
    report = {
        "checkpoint": str(loaded.path),
        "data": str(source),
        **({"baseline": args.baseline} if baseline else {}),
        "encoding": asdict(data.report),
        **summarize(config.evaluate, margins, users, data.names, rules, others=len(loaded.users) > 1),
    }
    if (adapted_B := ~np.isnan(logits_B)).any():
        report["calibration"]["adapted"] = integrated_calibration(margins[0][adapted_B], logits_B[adapted_B])
    (out / "report.json").unlink(missing_ok=True)  # an earlier evaluation's, whose margins are replaced
    write_margins(out, data.raw, [user > 0 for user in users], margins, logits_B)
    if baseline is None:
        draw_curve(run_dir / "metrics.jsonl", out / "accuracy_curve.png")
    write_report(report, out)  # last: a report says that the evaluation is complete
    print(f"{markdown(report)}\nwritten to {out}")


def scored(loaded: Loaded, data: Dataset, baseline: Baseline | None) -> tuple[np.ndarray, np.ndarray]:
    """The margins of the model, (3, B) as of `reward_margins`, and `adapted_logits`, (B,); or the margins of its baseline."""
    if baseline:
        return predicted_margins(baseline, data.raw), np.full(len(data.raw), np.nan)
    task = held_out_task(loaded, data)
    margins = reward_margins(task, score_users(task))
    return margins, adapted_logits(loaded, task, margins[0])


def adapted_logits(loaded: Loaded, task: Task, margins_B: np.ndarray) -> np.ndarray:
    """The logit of P(chosen is preferred), integrated over the posterior of an adapted user, (B,); NaN for others.

    margins_B: as the true user.
    """
    posterior, logits_B = loaded.posterior, np.full(len(task.users), np.nan)
    rows = [i for i, user in enumerate(task.users) if posterior is not None and posterior.row(user) is not None]
    if posterior is None or not rows:
        return logits_B
    variance_N = margin_variances(loaded, task, rows)
    users, margin_N = [task.users[i] for i in rows], torch.from_numpy(margins_B[rows]).double()
    logits_B[rows] = integrated(margin_N, variance_N, posterior.sharpness_of(users)).numpy()
    return logits_B


def margin_variances(loaded: Loaded, task: Task, rows: list[int]) -> torch.Tensor:
    """The posterior variance of the margins of these comparisons, whose users were adapted, (N,): exact where rewards are linear
    in users' coordinates, else to first order."""
    model, posterior, users = task.model, loaded.posterior, [task.users[i] for i in rows]
    if has_linear_coordinates(loaded.config):
        assert isinstance(model, PersonalizedRewardModel)
        pairs = [task.comparisons[i] for i in rows]
        states = response_states(model, pairs, task.config.evaluate.batch_size, loaded.backbone_weights())
        chosen_NW, rejected_NW = States(*states).of_pairs(pairs)
        return posterior.variances(users, features(model.user_model, chosen_NW - rejected_NW))
    found_N = torch.zeros(len(rows), dtype=torch.float64)
    for part in margin_slopes(task, rows, user_rows(model.user_model, users)):
        found_N[part.indices] = posterior.row_variances([users[n] for n in part.indices], part.slopes_NV)
    return found_N


def draw_curve(metrics: Path, path: Path) -> None:
    """Draw accuracy against step where metrics.jsonl is there; a damaged one costs the figure, not the evaluation."""
    try:
        if metrics.exists():
            accuracy_curve(metrics, path)
    except UserError as error:
        print(f"warning: no curve of accuracy against step: {error}", file=sys.stderr)


def fit_rules(loaded: Loaded) -> FittedRules:
    """The trivial rules, fitted to the training comparisons if that file is still there; the model's users are known to them."""
    if (file := training_file(loaded)) is None:
        print(f"data.train: {loaded.config.data.train} is not there; rules that learn from it are left out")
        return fit([])
    return fit(file.comparisons, loaded.users)


if __name__ == "__main__":
    run_command(main)
