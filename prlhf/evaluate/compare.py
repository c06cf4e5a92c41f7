"""Compare two or more evaluated models on the same comparisons: which differences are more than chance?

    python -m prlhf.compare NAME=EVAL_DIR[,EVAL_DIR...] NAME=EVAL_DIR[,EVAL_DIR...] ... --out DIR

EVAL_DIR is what evaluate.py wrote, or a run that it evaluated. Several of one name are seeds of one model. The first model
is the baseline. Writes report.md, report.json, users.csv and comparison.png: accuracies, calibration errors and personalisation gains;
paired differences to the baseline, with intervals over users; a paired test for each known user, adjusted for the number of
users; and whose gain the rule own_record explains, which only remembers the users' own votes. docs/evaluation.md has more.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.config.keys import DataConfig
from prlhf.data.check.tables import interval_text, markdown_table, percent
from prlhf.data.files import write_json
from prlhf.data.unknown import check_users
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.evaluate.ends import USERS_CSV, ends, write_users
from prlhf.evaluate.figures import label, save_figure
from prlhf.evaluate.margins import REPORTED, read_models
from prlhf.evaluate.report import MARGINS
from prlhf.evaluate.stats.paired import LEVEL, compare

MEASURES = {"top": "Accuracy-top", "average_mean": "Accuracy-average", "generic": "Accuracy-generic"}


def markdown(report: dict[str, Any]) -> str:
    """The report as text: accuracies, differences to the baseline, users, and what own_record explains."""
    counts, models, baseline = report["comparisons"], report["models"], report["baseline"]
    notes = "Accuracy-average: mean ± standard deviation over known users."
    if any(model["seeds"] > 1 for model in models.values()):
        notes += "\nWith several seeds, mean ± standard deviation over these; intervals and tests are of the mean."
    parts = [
        "# Comparison",
        f"{counts['known_users']:,} comparisons of known and {counts['unknown_users']:,} of unknown users.",
        _models_table(models),
        notes,
        f"Against {baseline}, on the same comparisons; intervals resample users with both models:",
        _differences_table(report["differences"]),
        "Win rate: the share of comparisons that it alone gets right, half of those where both are equal.",
    ]
    if counts["known_users"]:
        parts += [_users_text(name, baseline, users) for name, users in report["per_user"].items()]
    explained = _explained({name: model["own_record_explains_gain"] for name, model in models.items()})
    return "\n\n".join(parts + ([explained] if explained else [])) + "\n"


def _models_table(models: dict[str, Any]) -> str:
    """A row for each model: its accuracies, and those of the REPORTED numbers that any evaluation reported."""
    reported = [k for k in REPORTED if any(model["reported"].get(k) is not None for model in models.values())]
    rows = []
    for name, model in models.items():
        cells = [_accuracy(model, measure) for measure in MEASURES]
        cells += [_with_std(model["reported"][k], model["reported_std_over_seeds"][k]) for k in reported]
        rows.append([name, *cells])
    return markdown_table(["%", *MEASURES.values(), *(REPORTED[k].title for k in reported)], rows)


def _accuracy(model: dict[str, Any], measure: str) -> str:
    """A model's accuracy; with seeds, also its standard deviation over seeds; for the average, that over users."""
    text = _with_std(model["accuracy"][measure], model["std_over_seeds"][measure])
    if measure == "average_mean" and model["accuracy"]["average_std"] is not None:
        over_users = f"± {percent(model['accuracy']['average_std'])}"
        text += f" (over users {over_users})" if model["seeds"] > 1 else f" {over_users}"
    return text


def _with_std(value: float | None, std: float | None) -> str:
    return percent(value) + ("" if std is None else f" ± {percent(std)}")


def _differences_table(differences: dict[str, Any]) -> str:
    rows = []
    for name, measures in differences.items():
        for measure, row in measures.items():
            if row["difference"] is not None:
                rate = None if row["win_rate"] is None else f"{row['win_rate']:.2f}"
                numbers = (_signed(row["difference"]), interval_text(row["interval"]), rate)
                rows.append([name, MEASURES[measure], *numbers])
    return markdown_table(("", "", "difference, %", "95% interval", "win rate"), rows)


def _signed(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def _users_text(name: str, baseline: str, users: dict[str, Any]) -> str:
    """How many users a model is significantly better for, and the table of users, worst to best where they are many."""
    table = ends(users["users"], "difference")
    text = (
        f"{name} against {baseline}, user by user (paired permutation test, Holm-adjusted over {len(users['users']):,} users): "
        f"significantly better for {users['better']}, worse for {users['worse']} at {LEVEL:.0%}."
    )
    if table.said:
        text += f" {table.said}"
    rows = [
        (row["user"], str(row["n"]), _signed(row["difference"]), f"{row['p']:.4f}", f"{row['p_holm']:.4f}")
        for row in table.rows
    ]
    return f"{text}\n\n" + markdown_table(("user", "comparisons", "difference, %", "p", "p after Holm"), rows)


def _explained(of_seeds: dict[str, list[bool | None]]) -> str | None:
    """Whose gain the rule own_record explains, in a sentence; None where no evaluation says."""
    known = {name: [found for found in seeds if found is not None] for name, seeds in of_seeds.items()}
    silent = [name for name, seeds in known.items() if not seeds]
    if len(silent) == len(known):
        return None
    explained = [
        name if all(seeds) else f"{name} ({sum(seeds)} of {len(seeds)} seeds)"
        for name, seeds in known.items()
        if any(seeds)
    ]
    who = f"The gain of {', '.join(explained)}" if explained else "No model's gain"
    unknown = f" Not known of {', '.join(silent)}." if silent else ""
    rule = "the rule own_record, which only remembers each user's own record of the responses in training"
    return f"{who} over the generic user can be explained by {rule}.{unknown}"


def figure(report: dict[str, Any], path: Path) -> bool:
    """Each model's accuracies, with their intervals. False where matplotlib is not installed."""

    def draw(axes: Any) -> None:
        for i, (name, model) in enumerate(report["models"].items()):
            x = np.arange(len(MEASURES)) + 0.5 * ((i + 0.5) / len(report["models"]) - 0.5)
            y = [math.nan if (value := model["accuracy"][m]) is None else value for m in MEASURES]
            ends = [model["interval"][m] or (value, value) for m, value in zip(MEASURES, y)]
            axes.errorbar(x, y, np.abs(np.array(ends).T - y), fmt="o", capsize=3, label=label(name))
        axes.set_xticks(range(len(MEASURES)), list(MEASURES.values()))
        axes.set(xlim=(-0.6, len(MEASURES) - 0.4), ylabel="accuracy")
        axes.grid(axis="y", alpha=0.3)
        axes.legend()

    return save_figure(path, (6.5, 3.6), draw)


def parse_models(arguments: list[str]) -> dict[str, list[str]]:
    """NAME=EVAL_DIR[,EVAL_DIR...] as folders by name. UserError for another form, or a name given twice."""
    named: dict[str, list[str]] = {}
    for argument in arguments:
        name, _, folders = argument.partition("=")
        if not name or not all(folders.split(",")):
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
    comparisons, models = read_models(named)
    report = compare(comparisons, models)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    rows = [{"model": name, **row} for name, found in report["per_user"].items() for row in found["users"]]
    write_users(out / USERS_CSV, rows, ("model", "user", "n", "difference", "p", "p_holm"))
    if not figure(report, out / "comparison.png"):
        print("no figure: matplotlib is not installed (pip install 'prlhf[plots]')")
    print(markdown(report))
    known = UserIndex(sorted({name for name, is_known in zip(comparisons.users, comparisons.known_B) if is_known}))
    if said := check_users(MARGINS, comparisons.users, known, DataConfig(new_users=True)):
        print(said)
    print(f"written to {out}")
