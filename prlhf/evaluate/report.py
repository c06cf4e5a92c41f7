"""An evaluation as files: report.json, report.md, margins.jsonl, and figures where matplotlib is installed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.data.check.rules import RULES
from prlhf.data.comparisons import Comparison
from prlhf.data.files import fingerprint_of, read_json_lines, write_json_lines

MARGINS = "margins.jsonl"
BRANCHES = ("true", "generic", "shuffled")  # the users under whom margins are computed
HEADLINES = {
    "top": "Accuracy-top (known users, own vectors)",
    "average_mean": "Accuracy-average, mean over known users",
    "average_std": "Accuracy-average, standard deviation",
    "generic": "Accuracy-generic (unknown users)",
    "worst_user": "Worst known user",
}
CONTROLS = {
    "generic_user": "Known users as the generic user",
    "shuffled_users": "Known users as another, random user",
    "gain_over_generic": "Gain of the true over the generic user",
    "placebo_gain": "Placebo: gain of another, random over the generic user",
    "personalisation_gain": "Personalisation gain: the first less the placebo",
}
CALIBRATION = {"top": "known users, own vectors", "generic": "unknown users"}
CURVES = (  # in metrics.jsonl: is it of an eval record, field; title, and style of line
    (False, "user_accuracy", "training, true user", "C0-"),
    (False, "generic_accuracy", "training, generic user", "C1-"),
    (True, "accuracy_top", "held out, Accuracy-top", "C0o--"),
    (True, "accuracy_generic", "held out, Accuracy-generic", "C1o--"),
)
INTERVALS = ["| | accuracy, % | 95% interval |", "|---|---|---|"]


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.md, per_user.png (only where matplotlib is installed) and, last, report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    pyplot = optional_pyplot()
    if pyplot is not None and report["per_user"]:
        _per_user_figure(pyplot, report, folder / "per_user.png")
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_margins(folder: Path, comparisons: Sequence[Comparison], known: Sequence[bool], margins: np.ndarray) -> None:
    """Write margins.jsonl, which `prlhf.compare` reads: each comparison's id, user, a hash of its prompt and responses,
    whether the model knows the user, and its margins.

    margins: (3, B) reward margins, chosen minus rejected, as the true, generic and shuffled user (BRANCHES).
    """
    write_json_lines(
        folder / MARGINS,
        (
            {
                "id": c.id, "user": c.user, "text": fingerprint_of(c.prompt, c.chosen, c.rejected), "known": bool(k),
                **dict(zip(BRANCHES, map(float, values))),
            }
            for c, k, values in zip(comparisons, known, margins.T)
        ),
    )  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The report as text, in the order of the paper's tables."""
    lines = ["# Evaluation", "", f"Checkpoint `{report['checkpoint']}` on `{report['data']}`.", ""]
    lines += INTERVALS + [interval_row(HEADLINES[k], report["accuracy"][k], report["interval"][k]) for k in HEADLINES]
    ece = (f"{title} {percent(report['calibration'][name])}" for name, title in CALIBRATION.items())
    lines += ["", "Expected calibration error, %: " + ", ".join(ece) + ".", ""]
    lines += [
        "Personalisation helps where the gain over the generic user is above 0, and is personal where its own gain is.",
        "",
    ]
    controls = report["controls"].items()
    lines += INTERVALS + [interval_row(CONTROLS[k], c["accuracy"], c["interval"]) for k, c in controls]
    lines += own_record_lines(report)
    if "rules" in report:
        lines += ["", "What trivial rules reach:", "", "| | known users | unknown users |", "|---|---|---|"]
        model = {"known_users": report["accuracy"]["top"], "unknown_users": report["accuracy"]["generic"]}
        for title, right in {"this model": model, **{RULES[k]: r for k, r in report["rules"].items()}}.items():
            lines.append(f"| {title} | {percent(right['known_users'])} | {percent(right['unknown_users'])} |")
    lines += ["", "| user | comparisons | accuracy | as generic user | as another user |", "|---|---|---|---|---|"]
    for user, row in report["per_user"].items():
        cells = [percent(row[k]) for k in ("accuracy", "generic_user", "shuffled_users")]
        lines.append(f"| {cell(user)} | {row['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def own_record_lines(report: dict[str, Any]) -> list[str]:
    """A paragraph on whether a rule that only remembers each user's own record explains what the model gains."""
    if "own_record" not in report or report["accuracy"]["top"] is None:
        return []
    found = report["own_record"]
    rule = "A rule that only remembers each user's own record of the two responses in training"
    if found is None:
        return ["", f"{rule} may explain the gain: not known, for the training comparisons are not there."]
    if not found["decided"]:
        return ["", f"{rule} decides nothing here: there is nothing to remember."]
    gains, overall = found["gain_over_generic"], report["controls"]["gain_over_generic"]["accuracy"]
    silent = gains["where_it_does_not"]
    if overall <= 0:
        verdict = "There is no gain to explain."
    elif found["explains_gain"]:
        verdict = "So the rule can explain all of the gain: where it is silent, none is shown."
    elif found["accuracy"] <= 0.5:
        verdict = "So the rule does not explain the gain: it is right on no more than half."
    else:
        verdict = "So the rule does not explain the gain: most of it lies, or one is shown, where it is silent."
    return [
        "",
        f"{rule} (own_record) decides {percent(found['decided'])}% of known users' comparisons and reaches "
        f"{percent(found['accuracy'])}%; this model reaches {percent(report['accuracy']['top'])}%. The gain of the true "
        f"over the generic user is {_gain_text(gains['where_it_decides'])} where the rule decides, and "
        f"{_gain_text(silent)} where it does not. {verdict}",
    ]


def _gain_text(gain: dict[str, Any]) -> str:
    """A gain in percent, with its interval and the number of comparisons."""
    count = f"{gain['comparisons']:,} comparison" + ("" if gain["comparisons"] == 1 else "s")
    if not gain["comparisons"]:
        return f"not known ({count})"
    interval = "no interval" if gain["interval"] is None else f"interval {interval_text(gain['interval'])}"
    return f"{percent(gain['accuracy'])} ({interval}, {count})"


def optional_pyplot():
    """matplotlib.pyplot drawing to files, or None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def label(text: str) -> str:
    """A text as matplotlib shows it: a dollar sign would begin a formula."""
    return text.replace("$", "\\$")


def percent(value: float | None) -> str:
    """A share as text, in percent."""
    return "-" if value is None else f"{100 * value:.2f}"


def interval_text(interval: Sequence[float] | None) -> str:
    """An interval of shares as text, in percent."""
    return "-" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def interval_row(title: str, value: float | None, interval: Sequence[float] | None) -> str:
    """A row of a table of values with their intervals."""
    return f"| {title} | {percent(value)} | {interval_text(interval)} |"


def accuracy_curve(metrics: str | Path, path: Path) -> bool:
    """Draw accuracy against step from a run's metrics.jsonl: in training, and of the evaluations on held-out data.

    False where matplotlib is not installed or there is nothing to draw. UserError where the file is missing or damaged.
    """
    records = [record for _, record in read_json_lines(metrics)]
    curves = []
    for held_out, field, title, style in CURVES:
        points = [(r.get("step"), r.get(field)) for r in records if bool(r.get("eval")) == held_out]
        numbers = [point for point in points if all(isinstance(value, (int, float)) for value in point)]
        if numbers:
            curves.append((numbers, title, style))
    pyplot = optional_pyplot()
    if pyplot is None or not curves:
        return False
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for numbers, title, style in curves:
        axes.plot(*zip(*numbers), style, label=title, alpha=1 if "o" in style else 0.5)
    axes.set_xlabel("update")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _per_user_figure(pyplot, report: dict[str, Any], path: Path) -> None:
    rows = sorted(report["per_user"].items(), key=lambda item: item[1]["accuracy"])[:60]
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.22 * len(rows)), layout="constrained")
    y = range(len(rows))
    axes.plot([r["accuracy"] for _, r in rows], y, "o", label="true user")
    axes.plot([r["generic_user"] for _, r in rows], y, "|", markersize=10, label="as generic user")
    if all(r["shuffled_users"] is not None for _, r in rows):
        axes.plot([r["shuffled_users"] for _, r in rows], y, "x", label="as another user")
    axes.set_yticks(list(y), [label(user) for user, _ in rows])
    axes.set_xlabel("accuracy")
    axes.set_xlim(0, 1.02)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
