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
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prlhf.data.files import read_json_lines
from prlhf.errors import UserError, run_command
from prlhf.metrics import correct
from prlhf.paired import LEVEL, Comparisons, Model, compare
from prlhf.report import BRANCHES, MARGINS, cell, interval_text, label, optional_pyplot, percent

MEASURES = {"top": "Accuracy-top", "average_mean": "Accuracy-average", "generic": "Accuracy-generic"}
REPORTED = {  # of an evaluation's report.json: where, and the column's title
    "calibration_top": (("calibration", "top"), "calibration error, known users"),
    "calibration_generic": (("calibration", "generic"), "calibration error, unknown users"),
    "gain_over_generic": (("controls", "gain_over_generic", "accuracy"), "gain over the generic user"),
    "personalisation_gain": (("controls", "personalisation_gain", "accuracy"), "personalisation gain"),
    "own_record": (("own_record", "accuracy"), "the rule own_record, known users"),
}
SHOWN = 10  # users in the table


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


FIELDS = {  # of margins.jsonl: is this right, and what is
    "id": (lambda value: isinstance(value, str), "a string"),
    "user": (lambda value: value is None or isinstance(value, str), "a string or null"),
    "text": (lambda value: isinstance(value, str), "a string (of older evaluations: evaluate anew)"),
    "known": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(BRANCHES, (_is_finite, "a finite number")),
}


def evaluation_folder(folder: str) -> Path:
    """The folder of an evaluation: itself, or a run's eval/. UserError where neither holds margins.jsonl."""
    for path in (Path(folder), Path(folder) / "eval"):
        if (path / MARGINS).is_file():
            return path
    found = f"neither {MARGINS} nor eval/{MARGINS}" if Path(folder).is_dir() else "no such folder"
    raise UserError(f"{folder}: found {found}, expected what evaluate.py wrote, or a run that it evaluated")


def read_margins(folder: str) -> tuple[Comparisons, np.ndarray]:
    """The comparisons of an EVAL_DIR (or of a run's) and what the model got right of them, (B,).

    UserError, with file, line and field, where margins.jsonl is missing or damaged.
    """
    path = evaluation_folder(folder) / MARGINS
    records = []
    for number, record in read_json_lines(path):
        for field, (kind, expected) in FIELDS.items():
            value = record.get(field)
            if field not in record or not kind(value):
                raise UserError(f"{path}, line {number}, {field}: expected {expected}, found {json.dumps(value)}")
        records.append(record)
    records.sort(key=lambda record: (record["id"], record["user"] or "", record["text"]))
    known_B = np.array([record["known"] for record in records])
    margins_B = np.array([record["true" if record["known"] else "generic"] for record in records], dtype=float)
    ids, users, texts = ([record[field] for record in records] for field in ("id", "user", "text"))
    return Comparisons(ids, users, texts, known_B), correct(margins_B)


class Reported(NamedTuple):
    """Of an evaluation's report.json the REPORTED numbers, by name, and whether own_record explains the model's gain."""

    numbers: dict[str, float | None]
    explained: bool | None


def read_reported(folder: str) -> Reported:
    """What an evaluation reported; None for what its report.json lacks. UserError where that is damaged."""
    path = evaluation_folder(folder) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error

    def read(keys: Sequence[str], kind: Callable[[Any], bool], expected: str) -> Any:
        value = report
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not kind(value):
            raise UserError(f"{path}, {'.'.join(keys)}: expected {expected} or null, found {json.dumps(value)}")
        return value

    numbers = {name: read(keys, _is_finite, "a finite number") for name, (keys, _) in REPORTED.items()}
    return Reported(numbers, read(("own_record", "explains_gain"), lambda v: isinstance(v, bool), "true or false"))


def read_models(named: dict[str, list[str]]) -> tuple[Comparisons, list[Model]]:
    """The models by name, from their folders.

    UserError where two folders do not hold the same comparisons, and where two seeds of a model are one folder.
    """
    first, models = None, []
    for name, folders in named.items():
        resolved = [evaluation_folder(folder).resolve() for folder in folders]
        for i, folder in enumerate(folders):
            if resolved[i] in resolved[:i]:
                other = folders[resolved.index(resolved[i])]
                raise UserError(f"{name}: {folder} and {other} are the same evaluation, which would count as two seeds")
        right = []
        for folder in folders:
            comparisons, right_B = read_margins(folder)
            first = first or (folder, comparisons)
            require_same(*first, folder, comparisons)
            right.append(right_B)
        reported = [read_reported(folder) for folder in folders]
        numbers, explained = map(list, zip(*reported))
        models.append(Model(name, folders, np.stack(right), numbers, explained))
    return first[1], models


def require_same(first: str, expected: Comparisons, other: str, found: Comparisons) -> None:
    """UserError that says what differs, where two folders' ids, users, texts or known users do."""
    rows = [list(zip(c.ids, c.users)) for c in (expected, found)]
    if rows[0] != rows[1]:
        only = [f"{_excess(*these)} only in {folder}" for these, folder in ((rows, first), (rows[::-1], other))]
        raise UserError(f"not the same comparisons (ids and users): {only[0]}, {only[1]}")
    differing = np.flatnonzero(np.array(expected.texts) != np.array(found.texts))
    if len(differing):
        raise UserError(
            f"not the same comparisons: in {len(differing)} of them (the first: {_title(rows[0][differing[0]])}) prompt, chosen "
            f"or rejected response are another text in {first} than in {other}"
        )
    differing = np.flatnonzero(expected.known_B != found.known_B)
    if len(differing):
        i = differing[0]
        status = ["known" if c.known_B[i] else "unknown" for c in (expected, found)]
        raise UserError(
            f"not the same known users: in {len(differing)} comparisons (the first: {_title(rows[0][i])}) the user is "
            f"{status[0]} in {first}, {status[1]} in {other}"
        )


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


def _title(comparison: tuple[str, str | None]) -> str:
    return f"id {comparison[0]!r} of user {comparison[1]!r}"


def _excess(these: list[tuple], those: list[tuple]) -> str:
    """How many comparisons only the first list has, and the first of them."""
    only = list((Counter(these) - Counter(those)).elements())
    return f"{len(only)} ({_title(only[0])}, ...)" if only else "none"


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
    if len(table) > SHOWN:
        lines[0] += f" The {SHOWN} largest differences:"
    lines += ["", "| user | comparisons | difference, % | p | p after Holm |", "|---|---|---|---|---|"]
    for row in table[:SHOWN]:
        numbers = _signed(row["difference"]), f"{row['p']:.4f}", f"{row['p_holm']:.4f}"
        lines.append(_row(row["user"], str(row["n"]), *numbers))
    return lines


if __name__ == "__main__":
    run_command(main)
