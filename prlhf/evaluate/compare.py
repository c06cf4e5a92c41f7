"""Compare two or more evaluated models on the same comparisons: which differences are more than chance?

    python -m prlhf.compare NAME=EVAL_DIR[,EVAL_DIR...] NAME=EVAL_DIR[,EVAL_DIR...] ... --out DIR

EVAL_DIR is what evaluate.py wrote, or a run whose eval/ it is; several of one name are seeds of one model. The first model
is the baseline. Writes report.md, report.json and comparison.png: accuracies, calibration errors and personalisation gains;
paired differences to the baseline, with intervals over users; for each known user a paired test, adjusted for there being
many users; and whose gain a rule explains that only remembers the users' own votes (own_record).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.errors import UserError, run_command
from prlhf.evaluate.margins import REPORTED, read_models
from prlhf.evaluate.report import cell, interval_text, label, optional_pyplot, percent
from prlhf.evaluate.stats.paired import LEVEL, compare

MEASURES = {"top": "Accuracy-top", "average_mean": "Accuracy-average", "generic": "Accuracy-generic"}
USERS_SHOWN = 10  # users in the table


def markdown(report: dict[str, Any]) -> str:
    """The report as text: accuracies, differences to the baseline, and users."""
    counts, baseline = report["comparisons"], report["baseline"]
    lines = ["# Comparison", ""]
    lines += [f"{counts['known_users']} comparisons of known and {counts['unknown_users']} of unknown users.", ""]
    models = report["models"]
    reported = [k for k in REPORTED if any(model["reported"].get(k) is not None for model in models.values())]
    lines += [_row("%", *MEASURES.values(), *(REPORTED[k][1] for k in reported))]
    lines += ["|---" * (1 + len(MEASURES) + len(reported)) + "|"]
    for name, model in models.items():
        others = (_with_std(model["reported"][k], model["reported_std_over_seeds"][k]) for k in reported)
        lines.append(_row(name, *(_cell(model, m) for m in MEASURES), *others))
    lines += ["", "Accuracy-average: mean ± standard deviation over known users."]
    if any(model["seeds"] > 1 for model in models.values()):
        lines.append("With several seeds, mean ± standard deviation over these; intervals and tests are of the mean.")
    lines += ["", f"Against {baseline}, on the same comparisons; intervals resample users with both models:", ""]
    lines += ["| | | difference, % | 95% interval | win rate |", "|---" * 5 + "|"]
    for name, rows in report["differences"].items():
        for measure, row in rows.items():
            if row["difference"] is None:
                continue
            numbers = _signed(row["difference"]), interval_text(row["interval"]), _rate(row["win_rate"])
            lines.append(_row(name, MEASURES[measure], *numbers))
    lines += ["", "Win rate: the share of comparisons that it alone gets right, half of those where both are equal."]
    per_user = report["per_user"] if counts["known_users"] else {}
    for name, users in per_user.items():
        lines += ["", *_users_table(name, baseline, users)]
    lines += _explained(models)
    return "\n".join(lines) + "\n"


def figure(pyplot: Any, report: dict[str, Any], path: Path) -> None:
    """Each model's accuracies, with their intervals."""
    drawing, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    for i, (name, model) in enumerate(report["models"].items()):
        x = np.arange(len(MEASURES)) + 0.5 * ((i + 0.5) / len(report["models"]) - 0.5)
        y = [math.nan if (value := model["accuracy"][m]) is None else value for m in MEASURES]
        ends = [model["interval"][m] or (value, value) for m, value in zip(MEASURES, y)]
        axes.errorbar(x, y, np.abs(np.array(ends).T - y), fmt="o", capsize=3, label=label(name))
    axes.set_xticks(range(len(MEASURES)), list(MEASURES.values()))
    axes.set_xlim(-0.6, len(MEASURES) - 0.4)
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)


def parse_models(arguments: list[str]) -> dict[str, list[str]]:
    """NAME=EVAL_DIR[,EVAL_DIR...] as folders by name. UserError for another form, or a name given twice."""
    named: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, folders = argument.partition("=")
        if not (name and equals and all(folders.split(","))):
            raise UserError(f"found {argument!r}, expected NAME=EVAL_DIR or NAME=EVAL_DIR,EVAL_DIR")
        if name in named:
            raise UserError(f"two models are named {name!r}; expected NAME=EVAL_DIR,EVAL_DIR for seeds of one")
        named[name] = folders.split(",")
    return named


def main() -> None:
    """Compare evaluated models; print the report, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=EVAL_DIR[,EVAL_DIR...]", help="the first is the baseline")
    parser.add_argument("--out", required=True, help="a folder")
    args = parser.parse_args()

    named = parse_models(args.models)
    if len(named) < 2:
        raise UserError(f"expected two or more models to compare, found {len(named)}")
    report = compare(*read_models(named))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    pyplot = optional_pyplot()
    if pyplot is not None:
        figure(pyplot, report, out / "comparison.png")
    else:
        print("no figure: matplotlib is not installed (pip install 'prlhf[plots]')")
    print(markdown(report))
    print(f"written to {out}")


def _explained(models: dict[str, Any]) -> list[str]:
    """Whose gain the rule own_record explains, in a sentence; none where no evaluation says."""
    seeds = {k: [s for s in model["own_record_explains_gain"] if s is not None] for k, model in models.items()}
    silent = [name for name, found in seeds.items() if not found]
    if len(silent) == len(models):
        return []
    parts = {name: "" if all(found) else f" ({sum(found)} of {len(found)} seeds)" for name, found in seeds.items()}
    explained = [name + parts[name] for name, found in seeds.items() if any(found)]
    who = f"The gain of {', '.join(explained)}" if explained else "No model's gain"
    unknown = f" Not known of {', '.join(silent)}." if silent else ""
    rule = "the rule own_record, which only remembers each user's own record of the responses in training"
    return ["", f"{who} over the generic user can be explained by {rule}.{unknown}"]


def _row(*cells: str) -> str:
    return "| " + " | ".join(map(cell, cells)) + " |"


def _cell(model: dict[str, Any], measure: str) -> str:
    """A model's accuracy; with seeds, also its standard deviation over seeds; for the average, that over users."""
    text = _with_std(model["accuracy"][measure], model["std_over_seeds"][measure])
    if measure == "average_mean" and model["accuracy"]["average_std"] is not None:
        over_users = f"± {percent(model['accuracy']['average_std'])}"
        text += f" (over users {over_users})" if model["seeds"] > 1 else f" {over_users}"
    return text


def _with_std(value: float | None, std_over_seeds: float | None) -> str:
    return percent(value) + ("" if std_over_seeds is None else f" ± {percent(std_over_seeds)}")


def _signed(difference: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:+.2f}"


def _rate(win_rate: float | None) -> str:
    return "-" if win_rate is None else f"{win_rate:.2f}"


def _users_table(name: str, baseline: str, users: dict[str, Any]) -> list[str]:
    table, level = users["users"], f"{LEVEL:.0%}"
    lines = [f"{name} against {baseline}, user by user (paired permutation test, Holm-adjusted over {len(table)} users): "
             f"significantly better for {users['better']}, worse for {users['worse']} at {level}."]  # fmt: skip
    if len(table) > USERS_SHOWN:
        lines[0] += f" The {USERS_SHOWN} largest differences:"
    lines += ["", "| user | comparisons | difference, % | p | p after Holm |", "|---|---|---|---|---|"]
    for row in table[:USERS_SHOWN]:
        numbers = _signed(row["difference"]), f"{row['p']:.4f}", f"{row['p_holm']:.4f}"
        lines.append(_row(row["user"], str(row["n"]), *numbers))
    return lines


if __name__ == "__main__":
    run_command(main)
